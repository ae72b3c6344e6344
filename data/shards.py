"""The rollout set on disk: Parquet shards and a manifest, written so that a run can be killed at any instant.

A folder holds, for every batch of prompts, ``steps-NAME.parquet`` (one row a forward), ``sequences-NAME.parquet`` (one
row a prompt) and ``shard-NAME.json``, which is written last and makes the pair count; ``manifest.json`` sums up the
finished set and names its shards. Every file is written aside and renamed. NAME is the place of the shard's first prompt in
the run's list and a hash of its prompts, so it depends neither on ranks nor on interruptions.
"""

import hashlib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data.disk import locked
from data.manifest import (
    COLUMNS,
    MANIFEST,
    SCHEMA_VERSION,
    RolloutKey,
    Rollouts,
    ShardRecord,
    check_key,
    check_shard,
    describe,
    digest,
    intact,
    read_manifest,
    renamed,
    write_json,
)
from data.provenance import now, versions
from data.tables import RolloutBatch, sequences_table, steps_table
from data.typed import checked
from models.checkpoint import abandoned, read_json, writing
from models.errors import InputError

__all__ = ["RolloutBatch", "RolloutKey", "Rollouts", "ShardWriter"]
_REPEATED = ("prompt_id", "split", "pass", "task")  # the same in many rows
_FLOATS = [f"{name}.list.element" for name in ("confidence", "margin", "entropy")]


class ShardWriter:
    """Writes shards into a folder and knows which prompts it holds.

    Processes share a folder, each with its own writer; the first one made begins the manifest.

    Args:
        folder: Folder of the set; made if it is not there.
        key: Model, tokenizer and settings.
        sources: Where the prompts come from, for the manifest; JSON values only.

    Raises:
        InputError: The folder holds rollouts of another key or schema.
    """

    def __init__(self, folder: str | Path, key: RolloutKey, sources: Sequence[Mapping[str, Any]] = ()) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.verified: dict[
            str, tuple[list[tuple[int, int]], dict[str, Any]]
        ] = {}  # records, and their files when read
        self.key, self.eot_id = key, int(key.settings["eot_id"])
        if (self.folder / MANIFEST).exists():
            self.manifest = read_manifest(self.folder)
            check_key(self.folder / MANIFEST, self.manifest, key.fingerprint, key.tokenizer_hash, key.settings)
        else:
            for file in sorted(self.folder.glob("shard-*.json")):
                if record := _read_record(self.folder, file):
                    self._check(record, required=True)
            self.manifest = {
                "schema_version": SCHEMA_VERSION,
                "complete": False,
                "started": now(),
                **key.described(),
                "sources": [],
                "versions": versions(),
                "shards": [],
            }
        known = self.manifest["sources"]
        new = [dict(source) for source in sources if dict(source) not in known]
        self.manifest["sources"] = known + new
        # A finished set stays readable as it was until its extension is finished.
        if not self.manifest["complete"] and (new or not (self.folder / MANIFEST).exists()):
            write_json(self.folder / MANIFEST, self.manifest)

    @classmethod
    def begun(cls, folder: Path) -> "ShardWriter":
        """The writer of a set that exists, as its manifest describes it."""
        found = read_manifest(folder)
        return cls(folder, RolloutKey(found["model_fingerprint"], found["tokenizer_hash"], found["settings"]))

    def skip(self, skipped: Mapping[str, int]) -> None:
        """Notes prompts that are left out, so that nobody waits for them.

        Args:
            skipped: Number of tokens of each, by the hash of its text.
        """
        known = self.manifest.get("skipped", {})
        if new := {prompt: count for prompt, count in skipped.items() if prompt not in known}:
            self.manifest["skipped"] = {**known, **new}
            if not self.manifest["complete"]:
                write_json(self.folder / MANIFEST, self.manifest)
            first, count = next(iter(new.items()))
            print(
                f"{self.folder}: {len(new)} prompts are too long and left out, the first with hash {first} and {count} "
                f"tokens; {MANIFEST} lists them",
                file=sys.stderr,
            )

    def written(self) -> list[dict[str, Any]]:
        """What is written so far, one record a shard, in order. A damaged shard is forgotten, and decoded again.

        Asked again, it reads only what is new or has changed.

        Raises:
            InputError: A shard says that it is of another model or other settings.
        """
        records = []
        for file in sorted(self.folder.glob("shard-*.json")):
            stamps, record = self.verified.get(file.name, ([], None))
            if record is None or not stamps or stamps != _stamps(self.folder, file, record):
                if (record := _read_record(self.folder, file)) is None:
                    file.unlink(missing_ok=True)
                    continue
                self._check(record)
                self.verified[file.name] = _stamps(self.folder, file, record), record
            records.append(record)
        return records

    def _check(self, record: dict[str, Any], required: bool = False) -> None:
        for kind in COLUMNS:
            check_shard(self.folder / record[kind]["file"], self.key.described(), required)

    def name(self, first: int, hashes: Iterable[str]) -> str:
        """Name of the shard of the prompts with these hashes, the first of which has this place in the run's list."""
        return f"{first:07d}-{hashlib.sha256(' '.join(hashes).encode()).hexdigest()[:8]}"

    def has(self, name: str) -> bool:
        """Whether a shard is written."""
        return (self.folder / f"shard-{name}.json").is_file()

    @contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Keeps other processes from decoding a shard while this one does, until it dies or leaves the context.

        A lock of the file system, so nothing stays behind of a process that is killed. Where there are no locks two
        processes may decode the same shard, to the same bytes.

        Yields:
            True where it is this process's to decode; False where another is at it or it is written.
        """
        path = self.folder / f"claim-{name}"
        with path.open("a") as stream:
            if not locked(stream):
                yield False
                return
            try:
                yield not self.has(name)
            finally:
                path.unlink(missing_ok=True)

    def claimed(self) -> int:
        """How many shards other processes are decoding right now."""
        count = 0
        for path in self.folder.glob("claim-*"):
            with suppress(FileNotFoundError), path.open("a") as stream:
                count += not locked(stream)
        return count

    def write(self, batch: RolloutBatch) -> None:
        """Writes one batch. Killed before this returns, it does not count; written again, it has the same bytes."""
        name = self.name(batch.index[0], batch.hashes)
        record = {
            "name": name,
            "prompts": batch.hashes,
            "splits": dict(sorted(Counter(batch.splits).items())),
            "passes": {name: int(nfe.sum()) for name, nfe in batch.nfe.items()},
            "steps": self._write_table(f"steps-{name}.parquet", steps_table(batch, self.eot_id)),
            "sequences": self._write_table(f"sequences-{name}.parquet", sequences_table(batch, self.eot_id)),
        }
        write_json(self.folder / f"shard-{name}.json", record)

    def _write_table(self, name: str, table: pa.Table) -> dict[str, Any]:
        encodings: dict[str, Any] = {"use_dictionary": [n for n in _REPEATED if n in table.column_names]}
        if "confidence" in table.column_names:
            encodings["use_byte_stream_split"] = _FLOATS
        with writing(self.folder / name) as aside:
            pq.write_table(self.key.stamp(table), aside, compression="zstd", **encodings)
        return describe(self.folder / name, table.num_rows)

    def missing(self, expected: Iterable[str]) -> list[str]:
        """Which of the prompts, given by their hashes, are in no shard yet."""
        there = {prompt for record in self.written() for prompt in record["prompts"]} | {
            *self.manifest.get("skipped", {})
        }
        return [prompt for prompt in expected if prompt not in there]

    def finish(self, expected: Iterable[str]) -> Rollouts:
        """Merges all processes' shards into the final manifest; may be called again.

        Args:
            expected: Hashes of the prompts that were to be decoded; those that are skipped may be among them.

        Raises:
            InputError: A prompt is missing or was written twice.
        """
        records, skipped = _without_repeats(self.written()), self.manifest.get("skipped", {})
        count = Counter(prompt for record in records for prompt in record["prompts"])
        for problem, prompts in (
            ("written twice", [prompt for prompt, times in count.items() if times > 1]),
            ("not decoded", [prompt for prompt in expected if prompt not in count and prompt not in skipped]),
        ):
            if prompts:
                found = f"{len(prompts)} {problem}, the first with hash {prompts[0]}"
                raise InputError(f"{self.folder}: prompts", found, "each prompt once; run the rollout again")
        self._sweep(records)
        splits, passes = Counter(), Counter()
        for record in records:
            splits.update(record["splits"])
            passes.update(record["passes"])
        counts = {"prompts": len(count), "splits": dict(sorted(splits.items())), "steps": dict(sorted(passes.items()))}
        self.manifest |= {
            "schema_version": SCHEMA_VERSION,
            "complete": True,
            "finished": now(),
            "counts": counts,
            "shards": [record["name"] for record in records],
            "digest": digest(self.manifest, records),
        }
        write_json(self.folder / MANIFEST, self.manifest)
        return Rollouts(self.folder, self.manifest)

    def _sweep(self, records: list[dict[str, Any]]) -> None:
        """Removes what killed runs left behind: ``load_dataset("parquet")`` with a wildcard would read it."""
        keep = {record[kind]["file"] for record in records for kind in COLUMNS}
        keep |= {f"shard-{record['name']}.json" for record in records}
        for pattern in ("steps-*", "sequences-*", "shard-*", "claim-*", f"{MANIFEST}*.part", ".*.part"):
            for file in self.folder.glob(pattern):
                if file.name not in keep and (pattern != ".*.part" or abandoned(file)):
                    file.unlink(missing_ok=True)


def _read_record(folder: Path, file: Path) -> dict[str, Any] | None:
    """The record of a shard; ``None`` where it is damaged, or one of its files is."""
    try:
        record = read_json(file)
        record = renamed(record) if isinstance(record, dict) else record
        checked(ShardRecord, record, file)
    except InputError:
        return None
    return record if all(intact(folder / record[kind]["file"], record[kind]) for kind in COLUMNS) else None


def _stamps(folder: Path, file: Path, record: dict[str, Any]) -> list[tuple[int, int]]:
    """When the files of a shard were last written, and how large they are; nothing where one is gone."""
    try:
        found = [path.stat() for path in (file, *(folder / record[kind]["file"] for kind in COLUMNS))]
    except OSError:
        return []
    return [(status.st_mtime_ns, status.st_size) for status in found]


def _without_repeats(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records without those all of whose prompts are in larger ones: a prompt's rollout is the same in any shard."""
    kept, there = [], set[str]()
    for record in sorted(records, key=lambda record: (-len(record["prompts"]), record["name"])):
        if not there.issuperset(record["prompts"]):
            kept.append(record)
            there.update(record["prompts"])
    return sorted(kept, key=lambda record: record["name"])
