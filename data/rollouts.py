"""Reads rollout sets: the prompts and reference decodes, and the steps as dense tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from data.labels import PASSES, Records, after_eot, history
from data.manifest import Rollouts, check_file, find_rollouts, open_rollouts
from data.prompt import Prompt
from data.tables import fixed, ragged, ragged_bytes
from models.errors import InputError
from models.features import Evidence

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


@dataclass
class Sequences:
    """The prompts of a rollout set and their full-step decodes, in memory; ``P`` prompts, ``G`` generated positions.

    Attributes:
        prompts: The prompts, in the order of :attr:`data.labels.Records.prompt_ids`.
        splits: Split of each.
        tokens: Prompt token ids of each, chat template included.
        references: ``(P, G)`` int64.
        first_eot: ``(P,)`` int64, ``G`` where there is none.
        nfe: For each of the passes recorded, ``(P,)`` int64 forwards.
    """

    prompts: list[Prompt]
    splits: list[str]
    tokens: list[list[int]]
    references: Tensor
    first_eot: Tensor
    nfe: dict[str, Tensor]


def open_on_ranks(folder: str | Path, trainer: "Trainer | None") -> Rollouts:
    """Opens a set for every rank of a trainer: the first one verifies all of it for the others.

    Args:
        folder: The set's folder.
        trainer: Whose ranks they are; ``None``: this process is alone.

    Raises:
        InputError: On every rank, as :func:`data.manifest.open_rollouts`.
    """
    if trainer is None or trainer.world_size == 1:
        return open_rollouts(folder)
    found, problem = None, None
    if trainer.is_global_zero:
        try:
            found = open_rollouts(folder)
        except InputError as error:
            problem = (error.field, str(error.found), error.accepted)
    if (problem := trainer.strategy.broadcast(problem)) is not None:
        raise InputError(*problem)
    return found or find_rollouts(folder)


class References:
    """The reference decodes of a set by the hash of the prompt, read from the shards as they are asked for.

    In memory are 12 bytes a prompt, and what is known of each shard's file.

    Args:
        rollouts: The set; a shard's file is verified when it is read.
    """

    def __init__(self, rollouts: Rollouts) -> None:
        self.folder = rollouts.folder
        self.files = [shard["sequences"] for shard in rollouts.shards]
        counts = [len(shard["prompts"]) for shard in rollouts.shards]
        each = (int(prompt, 16) for shard in rollouts.shards for prompt in shard["prompts"])
        hashes = np.fromiter(each, np.uint64, sum(counts))
        order = hashes.argsort()
        self.hashes, self.shards = hashes[order], np.repeat(np.arange(len(counts), dtype=np.int32), counts)[order]

    def get(self, hashes: Sequence[str]) -> Tensor | None:
        """The references of the prompts with these hashes, ``(b, G)`` int64; ``None`` unless all of them are there.

        Raises:
            InputError: A shard's file is damaged or gone.
        """
        wanted = np.array([int(prompt, 16) for prompt in hashes], np.uint64)
        place = self.hashes.searchsorted(wanted)
        if not np.isin(wanted, self.hashes[place[place < len(self.hashes)]]).all():
            return None
        found: dict[str, np.ndarray] = {}
        for shard in np.unique(self.shards[place]).tolist():
            path, columns = self.folder / self.files[shard]["file"], ["prompt_hash", "reference"]
            check_file(path, self.files[shard], columns)
            table = pq.read_table(path, columns=columns)
            found |= zip(table["prompt_hash"].to_pylist(), fixed(table, "reference"), strict=True)
        return torch.from_numpy(np.stack([found[prompt] for prompt in hashes]).astype(np.int64))


def load_sequences(rollouts: Rollouts | str | Path) -> Sequences:
    """Reads the prompts and reference sequences of a rollout set.

    Args:
        rollouts: An opened set, or the folder of one, which is then verified.

    Raises:
        InputError: The set does not verify.
    """
    rollouts = _opened(rollouts)
    table = _in_order(pa.concat_tables(rollouts.tables("sequences")))
    texts = {name: table[name].to_pylist() for name in ("task", "prompt", "response", "answer", "metadata")}
    return Sequences(
        prompts=[Prompt(*row) for row in zip(table["prompt_id"].to_pylist(), *texts.values(), strict=True)],
        splits=table["split"].to_pylist(),
        tokens=table["prompt_tokens"].to_pylist(),
        references=torch.from_numpy(fixed(table, "reference").astype(np.int64)),
        first_eot=torch.from_numpy(table["first_eot"].to_numpy().astype(np.int64)),
        nfe={name: torch.from_numpy(table[f"nfe_{name}"].to_numpy().astype(np.int64)) for name in _recorded(rollouts)},
    )


def last_of_first(rollouts: Rollouts, limit: int) -> str:
    """The hash of the last of the first ``limit`` training prompts, in the order of their hashes.

    Raises:
        InputError: There are fewer.
    """
    hashes = []
    for table in rollouts.tables("sequences", ["prompt_hash", "split"]):
        train = table.filter(pc.call_function("equal", [table["split"], "train"]))
        hashes.append(train["prompt_hash"].to_numpy().astype("S16"))
    found = np.sort(np.concatenate(hashes))
    if limit > len(found):
        raise InputError("limit", limit, f"at most {len(found)}, the training prompts of {rollouts.folder}; or null")
    return found[limit - 1].decode()


def load_records(
    rollouts: Rollouts | str | Path, passes: Sequence[str] | None = None, limit: int | None = None,
    last: str | None = None, hidden: bool = False,
) -> Records:  # fmt: skip
    """Reads the steps of a rollout set into dense tensors.

    Args:
        rollouts: An opened set, or the folder of one, which is then verified.
        passes: Which of ``PASSES`` to read; all that were recorded by default.
        limit: Read the first prompts only, this many.
        last: Of the training prompts read only those whose hash is not beyond this one.
        hidden: Read the hidden states, too, where there are some.

    Returns:
        Records ordered by prompt, pass and step.

    Raises:
        InputError: The set does not verify, or does not hold the passes asked for.
    """
    rollouts = _opened(rollouts)
    recorded = _recorded(rollouts)
    for name in passes or ():
        if name not in recorded:
            raise InputError("passes", repr(name), f"{' | '.join(recorded)}, recorded in {rollouts.folder}")
    names = ["index", "prompt_id", "prompt_hash", "split", "first_eot"]
    prompts = _in_order(pa.concat_tables(rollouts.tables("sequences", names))).slice(0, limit)
    if last is not None:
        others = pc.call_function("not_equal", [prompts["split"], "train"])
        first = pc.call_function("less_equal", [prompts["prompt_hash"], last])
        prompts = prompts.filter(pc.call_function("or", [others, first]))
    # The narrow columns first: they say where each row of the files goes, so the wide ones are laid down only once.
    keep, keys = _keys(rollouts, prompts, passes or recorded)
    order = np.lexsort((keys["step"], keys["pass"], keys["prompt"]))
    prompt, which, block, step = (torch.from_numpy(keys[name][order]) for name in ("prompt", "pass", "block", "step"))
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    wide = _wide(rollouts, keep, place, hidden)
    stable, previous = history(wide["masked"], wide["token"], wide["confidence"], prompt * len(PASSES) + which, block)
    end = torch.from_numpy(keys["end"][order])
    final, tail = wide.pop("final"), after_eot(end, block, wide["masked"].shape[1])
    ids, splits = prompts["prompt_id"].to_pylist(), prompts["split"].to_pylist()
    evidence = Evidence(**wide, stable=stable, previous=previous)
    records = Records(evidence, final, tail, prompt, which, block, step, ids, splits)
    # Only now: the rows without labels are part of the others' history.
    return records if (end >= 0).all() else records.take((end >= 0).nonzero()[:, 0])


def _opened(rollouts: Rollouts | str | Path) -> Rollouts:
    return rollouts if isinstance(rollouts, Rollouts) else open_rollouts(rollouts)


def _recorded(rollouts: Rollouts) -> list[str]:
    return [name for name in PASSES if name in rollouts.manifest["counts"]["steps"]]


def _in_order(sequences: pa.Table) -> pa.Table:
    return sequences.sort_by([("index", "ascending"), ("prompt_id", "ascending")])


def _keys(
    rollouts: Rollouts, prompts: pa.Table, passes: Sequence[str]
) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """Which rows of each shard to keep, and prompt, pass, block, step and end of those, in the order of the files."""
    prompt_ids, first = prompts["prompt_id"].combine_chunks(), prompts["first_eot"].to_numpy()
    keep, columns = [], []
    wanted = np.array([PASSES.index(name) for name in passes])
    for table in rollouts.tables("steps", ["prompt_id", "pass", "block", "step", "end"]):
        prompt = _index_in(table["prompt_id"], prompt_ids)
        which = _index_in(table["pass"], pa.array(PASSES))
        keep.append((prompt >= 0) & np.isin(which, wanted))
        end = table["end"].to_numpy() if "end" in table.column_names else first[prompt]  # before schema version 3
        rows = (prompt, which, table["block"].to_numpy(), table["step"].to_numpy(), end)
        columns.append(np.stack([column.astype(np.int64)[keep[-1]] for column in rows]))
    return keep, dict(zip(("prompt", "pass", "block", "step", "end"), np.concatenate(columns, axis=1), strict=True))


def _index_in(column: pa.ChunkedArray, values: pa.Array) -> np.ndarray:
    """Place of each entry in ``values``, -1 where it is not there; ``(R,)`` int64."""
    found = pc.call_function("index_in", [column], pc.SetLookupOptions(values))
    return found.fill_null(-1).to_numpy().astype(np.int64)


def _wide(rollouts: Rollouts, keep: Sequence[np.ndarray], place: np.ndarray, hidden: bool) -> dict[str, Tensor]:
    """The per-position columns, ``(R, K)`` each, and ``hidden``; kept row ``n`` of the files goes to row ``place[n]``."""
    names = ("masked", "token", "confidence", "margin", "entropy", "final", "text")
    length = int(rollouts.manifest["settings"]["block_length"])
    types = {"confidence": torch.float32, "margin": torch.float32, "entropy": torch.float32}
    types |= {"token": torch.int64, "text": torch.int64}
    wide = {name: torch.empty(len(place), length, dtype=types.get(name, torch.bool)) for name in names}
    start, asked = 0, ["end", "hidden"] if hidden else []
    for table, kept in zip(rollouts.tables("steps", [*names, *asked]), keep, strict=True):
        rows = torch.from_numpy(place[start : start + int(kept.sum())])
        start += len(rows)
        masked = fixed(table, "masked")
        if "text" not in table.column_names:
            wide.pop("text", None)
        for name in wide.keys() - {"hidden"} if len(rows) else ():
            if name in ("margin", "entropy", "text"):
                values = ragged(table, name, ~masked if name == "text" else masked)
            else:
                values = fixed(table, name)
            wide[name][rows] = torch.from_numpy(values[kept]).to(wide[name].dtype)
        if "hidden" in table.column_names and len(rows):
            vectors = ragged_bytes(table, "hidden", masked & (table["end"].to_numpy() >= 0)[:, None])
            if "hidden" not in wide:
                wide["hidden"] = torch.empty(len(place), length, vectors.shape[-1], dtype=torch.float16)
            wide["hidden"][rows] = torch.from_numpy(vectors[kept])
    if "text" in wide:
        wide["text"] = torch.where(wide["masked"], wide["token"], wide["text"])
    return wide
