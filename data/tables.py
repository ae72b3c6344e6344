"""Arrow tables of a rollout set: tensors in, tensors out. No files here; see ``data/shards.py``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from data.labels import PASSES, Completions, collect, first_eot, targets
from data.prompt import Prompt
from data.prompts import prompt_hash, split_of
from decoding.output import StepTrace

STEP_COLUMNS = (
    "prompt_id", "split", "pass", "block", "step",
    "masked", "token", "confidence",  # K values each, for every position of the active block
    "margin", "entropy",  # one value for each True in masked
    "text",  # one value for each False in masked: the token that is decoded there
    "final",  # K values each
    "end",  # the first EoT of what the labels come from, the reference or the state's completion; -1 where there are none
    "hidden",  # of sets rolled out with ``hidden_states``: D fp16 values, as bytes, for each True in masked, if labelled
    # Of sets rolled out with ``eot_evidence``:
    "open",  # G values: True where the generated region was not decoded yet
    "eot_log_odds", "eot_top",  # one value for each True in open
)  # fmt: skip
SEQUENCE_COLUMNS = (
    "index", "prompt_id", "prompt_hash", "split", "task", "prompt", "response", "answer", "metadata",
    "prompt_tokens", "reference", "first_eot", *(f"nfe_{name}" for name in PASSES),
)  # fmt: skip


@dataclass
class RolloutBatch:
    """One decoded batch of ``b`` prompts, ready to be written.

    Attributes:
        index: Place of each prompt in the run's list, which orders the finished set.
        prompts: The prompts.
        tokens: Prompt token ids of each.
        references: ``(b, G)`` int64, the full-step sequences.
        nfe: For each of the passes decoded, ``(b,)`` int64 forwards.
        traces: For each of the passes decoded, its trace with EoT evidence; rows count the prompts of the batch.
        completions: For passes that leave the reference's path, those of the states that get labels.
    """

    index: list[int]
    prompts: list[Prompt]
    tokens: list[list[int]]
    references: Tensor
    nfe: Mapping[str, Tensor]
    traces: Mapping[str, Sequence[StepTrace]]
    completions: Mapping[str, Completions] = field(default_factory=dict)

    @property
    def hashes(self) -> list[str]:
        """Hash of each prompt's text, by which the set knows it again."""
        return [prompt_hash(prompt.prompt) for prompt in self.prompts]

    @property
    def splits(self) -> list[str]:
        """Split of each prompt."""
        return [split_of(prompt.prompt) for prompt in self.prompts]


def steps_table(batch: RolloutBatch, eot_id: int) -> pa.Table:
    """One row a forward, with ``STEP_COLUMNS``, the optional ones where the traces have them; by pass, prompt and step."""
    ids = np.array([prompt.id for prompt in batch.prompts], dtype=object)
    splits = np.array(batch.splits, dtype=object)
    tables = []
    for name, trace in batch.traces.items():
        steps = collect(trace)
        evidence, rows = steps.evidence, steps.rows.numpy()
        final, end = targets(steps, batch.references, batch.completions.get(name), eot_id)
        columns = {
            "prompt_id": pa.array(ids[rows], pa.string()),
            "split": pa.array(splits[rows], pa.string()),
            "pass": pa.array([name] * len(rows), pa.string()),
            "block": pa.array(steps.block.numpy().astype(np.int16)),
            "step": pa.array(steps.step.numpy().astype(np.int16)),
            "masked": _fixed(evidence.masked),
            "token": _fixed(evidence.token.int()),
            "confidence": _fixed(evidence.confidence),
            "margin": _ragged(evidence.margin, evidence.masked),
            "entropy": _ragged(evidence.entropy, evidence.masked),
            "text": _ragged(evidence.text.int(), ~evidence.masked),
            "final": _fixed(final),
            "end": pa.array(end.numpy().astype(np.int16)),
        }
        if evidence.hidden is not None:
            columns["hidden"] = _ragged_bytes(evidence.hidden, evidence.masked & (end >= 0)[:, None])
        if steps.eot_log_odds is not None and steps.eot_top is not None:
            still_open = (steps.eot_log_odds != 0) | steps.eot_top  # the trace has zeros where a position is decoded
            columns |= {
                "open": _fixed(still_open),
                "eot_log_odds": _ragged(steps.eot_log_odds.half(), still_open),
                "eot_top": _ragged(steps.eot_top, still_open),
            }
        tables.append(pa.table(columns))
    return pa.concat_tables(tables)


def sequences_table(batch: RolloutBatch, eot_id: int) -> pa.Table:
    """One row a prompt, with ``SEQUENCE_COLUMNS``; ``nfe`` is null for passes that were not decoded."""
    prompts = batch.prompts
    columns = {
        "index": pa.array(batch.index, pa.int64()),
        "prompt_id": pa.array([prompt.id for prompt in prompts], pa.string()),
        "prompt_hash": pa.array(batch.hashes, pa.string()),
        "split": pa.array(batch.splits, pa.string()),
        **{
            name: pa.array([getattr(prompt, name) for prompt in prompts], pa.string())
            for name in ("task", "prompt", "response", "answer", "metadata")
        },
        "prompt_tokens": pa.array(batch.tokens, pa.list_(pa.int32())),
        "reference": _fixed(batch.references.int()),
        "first_eot": pa.array(first_eot(batch.references, eot_id).numpy().astype(np.int32)),
    }
    for name in PASSES:
        nfe = batch.nfe[name].tolist() if name in batch.nfe else [None] * len(prompts)
        columns[f"nfe_{name}"] = pa.array(nfe, pa.int32())
    return pa.table([columns[name] for name in SEQUENCE_COLUMNS], names=list(SEQUENCE_COLUMNS))


def fixed(table: pa.Table, name: str) -> np.ndarray:
    """A column of equally long lists, ``(R, N)``."""
    column = table[name].combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)


def ragged(table: pa.Table, name: str, where: np.ndarray) -> np.ndarray:
    """A column with one value for each True in ``where`` ``(R, N)`` bool, laid out so, with zeros elsewhere."""
    values = table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    laid = np.zeros(where.shape, dtype=values.dtype)
    laid[where] = values
    return laid


def _fixed(values: Tensor) -> pa.Array:
    """``(R, N)`` as a column of lists of length ``N``."""
    return pa.FixedSizeListArray.from_arrays(pa.array(values.contiguous().numpy().ravel()), values.shape[1])


def ragged_bytes(table: pa.Table, name: str, where: np.ndarray) -> np.ndarray:
    """A column with fp16 vectors for each True in ``where`` ``(R, N)`` bool, ``(R, N, D)`` with zeros elsewhere."""
    values = table[name].combine_chunks().flatten()
    size, start = values.type.byte_width // 2, values.offset
    found = np.frombuffer(values.buffers()[1], np.float16).reshape(-1, size)[start : start + len(values)]
    laid = np.zeros((*where.shape, size), np.float16)
    laid[where] = found
    return laid


def _ragged_bytes(values: Tensor, where: Tensor) -> pa.Array:
    """The vectors of ``(R, N, D)`` float16 at ``where`` ``(R, N)`` bool, as a column of lists of ``2 D`` bytes each."""
    found = values[where].contiguous()
    width = pa.binary(2 * values.shape[2])
    vectors = pa.FixedSizeBinaryArray.from_buffers(width, len(found), [None, pa.py_buffer(found.numpy())])
    return pa.ListArray.from_arrays(pa.array(_offsets(where)), vectors)


def _ragged(values: Tensor, where: Tensor) -> pa.Array:
    """The values of ``(R, N)`` at ``where`` ``(R, N)`` bool, as a column of lists of differing length."""
    return pa.ListArray.from_arrays(pa.array(_offsets(where)), pa.array(values[where].numpy()))


def _offsets(where: Tensor) -> np.ndarray:
    return torch.nn.functional.pad(where.sum(1).cumsum(0), (1, 0)).int().numpy()
