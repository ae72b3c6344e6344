"""The rollout set on disk: Parquet shards and a manifest, written so that a run can be killed at any instant.

A folder holds, for every batch of prompts, ``steps-NAME.parquet`` (one row a forward), ``sequences-NAME.parquet`` (one row
a prompt) and ``shard-NAME.json``, which is written last and makes the pair count; ``manifest.json`` describes the finished
set. Every file is written aside and renamed. NAME is the place of the shard's first prompt in the run's list and a hash of
its prompts, so it depends on neither ranks nor interruptions. ``data/records.py`` reads the set back.
"""

import hashlib
import json
import platform
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from torch import Tensor

from data.labels import STATES, collect, first_eot, labels
from data.prompts import Prompt, prompt_hash, split_of
from decoding.state import StepTrace
from models.errors import InputError

SCHEMA_VERSION = 1
STEP_COLUMNS = (
    "prompt_id", "split", "states", "block", "step",
    "masked", "token", "confidence",  # K values each
    "margin", "entropy",  # one value for each True in ``masked``
    "final", "tail",  # K values each
    "open",  # G values: masked anywhere in the generated region
    "eot_probability", "eot_top",  # one value for each True in ``open``
)  # fmt: skip
SEQUENCE_COLUMNS = (
    "index", "prompt_id", "prompt_hash", "split", "task", "prompt", "response", "answer", "metadata",
    "prompt_tokens", "reference", "first_eot", "nfe_full_step", "nfe_oracle", "nfe_filter",
)  # fmt: skip
_COLUMNS = {"steps": STEP_COLUMNS, "sequences": SEQUENCE_COLUMNS}
_FLOATS = ["confidence.list.element", "margin.list.element", "entropy.list.element"]


@dataclass(frozen=True)
class RolloutKey:
    """What every rollout of one folder has in common; a folder with another key is refused.

    Attributes:
        fingerprint: Fingerprint of the base model's weights.
        tokenizer_hash: Hash of the tokenizer and its chat template.
        settings: Decode settings, the states recorded, and the ids that the labels depend on (``eot_id``).
    """

    fingerprint: str
    tokenizer_hash: str
    settings: dict[str, Any]


@dataclass
class RolloutBatch:
    """One decoded batch of ``b`` prompts, ready to be written.

    Attributes:
        index: Place of each prompt in the run's list, which orders the finished set.
        prompts: The prompts.
        tokens: Prompt token ids of each.
        references: ``(b, G)`` int64, the full-step sequences.
        nfe: For each of the states decoded, ``(b,)`` int64 forwards.
        traces: For each of the states decoded, its trace with EoT evidence.
    """

    index: list[int]
    prompts: list[Prompt]
    tokens: list[list[int]]
    references: Tensor
    nfe: Mapping[str, Tensor]
    traces: Mapping[str, Sequence[StepTrace]]


@dataclass
class Rollouts:
    """A verified rollout set: its folder and its manifest."""

    folder: Path
    manifest: dict[str, Any] = field(repr=False)

    def files(self, kind: str) -> list[Path]:
        """The set's ``"steps"`` or ``"sequences"`` files, in the order of their shards."""
        return [self.folder / shard[kind]["file"] for shard in self.manifest["shards"]]


class ShardWriter:
    """Writes shards into a folder and knows which prompts it already holds. Ranks share a folder, each with a writer.

    Args:
        folder: Folder of the set; made if it is not there.
        key: Model, tokenizer and settings.
        sources: Where the prompts come from, for the manifest.

    Raises:
        InputError: The folder holds rollouts of another key or schema.
    """

    def __init__(self, folder: Path, key: RolloutKey, sources: Sequence[Mapping[str, Any]] = ()) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "manifest.json").exists():
            self.manifest = _read_manifest(folder)
            _check_key(folder, self.manifest, key.fingerprint, key.settings, key.tokenizer_hash)
        else:
            self.manifest = {"schema_version": SCHEMA_VERSION, "complete": False, "started": _now(),
                             "model_fingerprint": key.fingerprint, "tokenizer_hash": key.tokenizer_hash,
                             "settings": key.settings, "sources": [], "versions": versions(), "shards": []}  # fmt: skip
            write_json(folder / "manifest.json", self.manifest)
        known = self.manifest["sources"]
        self.sources = known + [dict(source) for source in sources if dict(source) not in known]
        self.eot_id = int(key.settings["eot_id"])

    def shards(self) -> list[dict[str, Any]]:
        """Records of the shards that are written and intact, in order; a damaged shard does not count as written."""
        records = [json.loads(file.read_text()) for file in sorted(self.folder.glob("shard-*.json"))]
        return [record for record in records if all(_intact(self.folder / record[kind]["file"], record[kind]) for kind in _COLUMNS)]

    def done(self) -> set[str]:
        """Hashes of the prompts already written."""
        return {prompt for record in self.shards() for prompt in record["prompts"]}

    def write(self, batch: RolloutBatch) -> None:
        """Writes one batch; until this returns the batch does not count, and writing it again gives the same bytes."""
        hashes = [prompt_hash(prompt.prompt) for prompt in batch.prompts]
        name = f"{batch.index[0]:06d}-{hashlib.sha256(' '.join(hashes).encode()).hexdigest()[:8]}"
        steps, sequences = _steps_table(batch, self.eot_id), _sequences_table(batch, hashes, self.eot_id)
        record = {
            "name": name,
            "prompts": hashes,
            "splits": dict(sorted(Counter(sequences["split"].to_pylist()).items())),
            "states": {state: int(nfe.sum()) for state, nfe in batch.nfe.items()},
            "steps": self._write_table(f"steps-{name}.parquet", steps),
            "sequences": self._write_table(f"sequences-{name}.parquet", sequences),
        }
        write_json(self.folder / f"shard-{name}.json", record)

    def finish(self, expected: Iterable[str]) -> Rollouts:
        """Writes the final manifest; call once, on one rank, when all ranks are done.

        Args:
            expected: Hashes of the prompts that were to be decoded.

        Raises:
            InputError: A prompt is missing or was written twice.
        """
        records = self.shards()
        seen = Counter(prompt for record in records for prompt in record["prompts"])
        if twice := [prompt for prompt, count in seen.items() if count > 1]:
            raise InputError(f"{self.folder}: prompts", f"{len(twice)} written twice ({twice[0]}, ...)", "each prompt once")
        if missing := [prompt for prompt in expected if prompt not in seen]:
            raise InputError(
                f"{self.folder}: prompts", f"{len(missing)} not decoded ({missing[0]}, ...)", "all; run the command again"
            )
        kept = {record[kind]["file"] for record in records for kind in _COLUMNS}
        for file in [*self.folder.glob("*.part"), *(f for kind in _COLUMNS for f in self.folder.glob(f"{kind}-*.parquet"))]:
            if file.name not in kept:  # left by a killed run with another batch size; the glob in load_dataset sees it
                file.unlink()
        splits, states = Counter(), Counter()
        for record in records:
            splits.update(record["splits"])
            states.update(record["states"])
        counts = {"prompts": len(seen), "splits": dict(sorted(splits.items())), "steps": {s: states[s] for s in STATES if s in states}}
        self.manifest |= {"complete": True, "finished": _now(), "sources": self.sources, "counts": counts, "shards": records}
        write_json(self.folder / "manifest.json", self.manifest)
        return Rollouts(self.folder, self.manifest)

    def _write_table(self, name: str, table: pa.Table) -> dict[str, Any]:
        path = self.folder / name
        aside = path.with_name(name + ".part")
        split = [column for column in _FLOATS if column.split(".")[0] in table.column_names]
        pq.write_table(
            table, aside, compression="zstd", compression_level=3, use_byte_stream_split=split or False,
            use_dictionary=[c for c in ("prompt_id", "split", "states", "task") if c in table.column_names],
        )  # fmt: skip
        described = {"file": name, "rows": table.num_rows, "bytes": aside.stat().st_size, "sha256": sha256(aside)}
        aside.replace(path)
        return described


def open_rollouts(
    folder: str | Path, fingerprint: str | None = None, settings: Mapping[str, Any] | None = None
) -> Rollouts:
    """Verifies a finished rollout set.

    Args:
        folder: The set's folder.
        fingerprint: Fingerprint of the base model it must come from.
        settings: Settings it must have; those not named may have any value.

    Raises:
        InputError: No manifest, an unfinished set, another schema, model or setting, a missing or damaged shard, or a
            shard without one of its columns.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    _check_key(folder, manifest, fingerprint, settings or {})
    if not manifest["complete"]:
        raise InputError(f"{folder / 'manifest.json'}: complete", False, "a finished set; run the rollout again, it continues")
    for shard in manifest["shards"]:
        for kind, columns in _COLUMNS.items():
            _check_file(folder / shard[kind]["file"], shard[kind], columns)
    return Rollouts(folder, manifest)


def _check_file(path: Path, record: Mapping[str, Any], columns: Sequence[str]) -> None:
    if not path.is_file():
        raise InputError(str(path), "no such file", f"the shard of {record['rows']} rows that manifest.json lists")
    try:
        there = pq.read_schema(path).names
    except (pa.ArrowException, OSError) as error:
        raise InputError(str(path), f"a corrupt or truncated file ({error})", "an intact Parquet shard") from error
    if missing := [column for column in columns if column not in there]:
        raise InputError(f"{path}: column {missing[0]}", f"columns {', '.join(there)}", ", ".join(columns))
    if not _intact(path, record):
        raise InputError(f"{path}: sha256", f"{sha256(path)} (the file was changed or cut off)", record["sha256"])


def _intact(path: Path, record: Mapping[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == record["bytes"] and sha256(path) == record["sha256"]


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(str(path), str(error), "the manifest of a rollout set") from error
    found = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if found != SCHEMA_VERSION:
        raise InputError(f"{path}: schema_version", found, str(SCHEMA_VERSION))
    return manifest


def _check_key(
    folder: Path, manifest: Mapping[str, Any], fingerprint: str | None, settings: Mapping[str, Any],
    tokenizer_hash: str | None = None,
) -> None:  # fmt: skip
    path = folder / "manifest.json"
    for name, wanted in (("model_fingerprint", fingerprint), ("tokenizer_hash", tokenizer_hash)):
        if wanted is not None and manifest[name] != wanted:
            raise InputError(f"{path}: {name}", manifest[name], f"{wanted}, this model's; or another folder")
    for name, wanted in settings.items():
        if manifest["settings"].get(name) != wanted:
            raise InputError(f"{path}: settings.{name}", manifest["settings"].get(name), f"{wanted!r}; or another folder")


def _steps_table(batch: RolloutBatch, eot_id: int) -> pa.Table:
    parts = {state: collect(trace) for state, trace in batch.traces.items()}
    block_length = next(iter(parts.values())).evidence.masked.shape[1]
    tables = []
    for state, steps in parts.items():
        if steps.eot_probability is None or steps.eot_top is None:
            raise ValueError("the trace has no EoT evidence: decode with record_eot=True")
        final, tail = labels(steps, batch.references, eot_id)
        evidence, masked = steps.evidence, steps.evidence.masked
        # Positions right of an accepted EoT are filled, so what is still open is known from the evidence alone.
        open_ = (steps.eot_probability > 0) | steps.eot_top
        rows = steps.rows.numpy()
        tables.append(pa.table({
            "prompt_id": np.array([prompt.id for prompt in batch.prompts], dtype=object)[rows],
            "split": np.array([split_of(prompt.prompt) for prompt in batch.prompts], dtype=object)[rows],
            "states": [state] * len(rows),
            "block": steps.block.numpy().astype(np.int16),
            "step": steps.step.numpy().astype(np.int16),
            "masked": _fixed(masked),
            "token": _fixed(evidence.token.int()),
            "confidence": _fixed(evidence.confidence),
            "margin": _where(evidence.margin, masked),
            "entropy": _where(evidence.entropy, masked),
            "final": _fixed(final),
            "tail": _fixed(tail),
            "open": _fixed(open_),
            "eot_probability": _where(steps.eot_probability.half(), open_),
            "eot_top": _where(steps.eot_top, open_),
        }))  # fmt: skip
    del block_length
    return pa.concat_tables(tables)
