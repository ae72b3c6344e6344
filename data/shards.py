"""The rollout set on disk: Parquet shards and a manifest, written so that a run can be killed at any instant.

A folder holds, for every batch of prompts, ``steps-NAME.parquet`` (one row a forward), ``sequences-NAME.parquet`` (one
row a prompt) and ``shard-NAME.json``, which is written last and makes the pair count; ``manifest.json`` sums up the
finished set and names its shards. Every file is there in full or not at all (:mod:`data.store`). NAME is the place of the shard's
first prompt in the run's list and a hash of its prompts, so it depends neither on ranks nor on interruptions.
"""

import hashlib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
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
    check_key,
    check_shard,
    checked_record,
    describe,
    digest,
    fits,
    json_bytes,
    read_manifest,
)
from data.provenance import now, versions
from data.store import Stamp, open_store
from data.tables import RolloutBatch, sequences_table, steps_table
from models.checkpoint import abandoned, parse_json
from models.errors import InputError

__all__ = ["RolloutBatch", "RolloutKey", "ShardWriter"]
_REPEATED = ("prompt_id", "split", "pass", "task")  # the same in many rows
_FLOATS = [f"{name}.list.element" for name in ("confidence", "margin", "entropy")]
_AT_ONCE = 4  # shards that are read side by side when they are verified


@dataclass
class _Known:
    """A shard that was looked at: its record, the stamps its files had then, and whether every byte was read.

    What this process has written itself has no stamps yet when it is first listed.
    """

    record: dict[str, Any]
    stamps: list[Stamp | None] | None
    verified: bool


class ShardWriter:
    """Writes shards into a folder and knows which prompts it holds.

    Processes share a folder, each with its own writer; the first one made begins the manifest.

    Args:
        folder: Folder of the set, made if it is not there; or its URL.
        key: Model, tokenizer and settings.
        sources: Where the prompts come from, for the manifest; JSON values only.

    Raises:
        InputError: The folder holds rollouts of another key or schema.
    """

    def __init__(self, folder: str | Path, key: RolloutKey, sources: Sequence[Mapping[str, Any]] = ()) -> None:
        self.store = open_store(folder)
        self.folder, self.remote = self.store.folder, self.store.remote
        self.store.make()
        self._known: dict[str, _Known] = {}
        self.key, self.eot_id = key, int(key.settings["eot_id"])
        there = self.store.has(MANIFEST)
        if there:
            self.manifest = read_manifest(self.folder)
            check_key(self.store.at(MANIFEST), self.manifest, key.fingerprint, key.tokenizer_hash, key.settings)
        else:
            self.written(required=True)
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
        if not self.manifest["complete"] and (new or not there):
            self._write_manifest()

    @classmethod
    def begun(cls, folder: str | Path) -> "ShardWriter":
        """The writer of a set that exists, as its manifest describes it."""
        found = read_manifest(folder)
        return cls(folder, RolloutKey(found["model_fingerprint"], found["tokenizer_hash"], found["settings"]))

    def _write_manifest(self) -> None:
        self.store.write(MANIFEST, json_bytes(self.manifest))

    def skip(self, skipped: Mapping[str, int]) -> None:
        """Notes prompts that are left out, so that nobody waits for them.

        Args:
            skipped: Number of tokens of each, by the hash of its text.
        """
        known = self.manifest.get("skipped", {})
        if new := {prompt: count for prompt, count in skipped.items() if prompt not in known}:
            self.manifest["skipped"] = {**known, **new}
            if not self.manifest["complete"]:
                self._write_manifest()
            first, count = next(iter(new.items()))
            print(
                f"{self.folder}: {len(new)} prompts are too long and left out, the first with hash {first} and {count} "
                f"tokens; {MANIFEST} lists them",
                file=sys.stderr,
            )

    def written(self, verify: bool = True, required: bool = False) -> list[dict[str, Any]]:
        """What is written so far, one record a shard, in order. A damaged shard is forgotten, and decoded again.

        Asked again, it reads only what is new or has changed.

        Args:
            verify: Read every byte; else a shard whose files have the sizes they should have is believed.
            required: Refuse a shard that does not say what model and settings it is of.

        Raises:
            InputError: A shard says that it is of another model or other settings.
        """
        there = self.store.stamps()
        files = sorted(name for name in there if name.startswith("shard-") and name.endswith(".json"))
        unsure = [file for file in files if not self._unchanged(file, there, verify)]
        read = {file: _parsed(file, content) for file, content in self.store.read_many(unsure).items()}
        if not all(record and _fits(record, there) for record in read.values()):
            there = self.store.stamps()  # of one that was written meanwhile, the first list may have the record alone
        for file, record in read.items():
            if record and _fits(record, there):
                self._known[file] = _Known(record, _stamps(file, record, there), verify)
        if verify:
            found = [file for file in unsure if file in self._known]
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                sound = pool.map(lambda file: self._sound(self._known[file].record, required), found)
                for file, good in zip(found, sound, strict=True):
                    if not good:
                        del self._known[file]
        for file in files:
            if file not in self._known:
                self.store.remove(file)
        return [self._known[file].record for file in files if file in self._known]

    def _unchanged(self, file: str, there: Mapping[str, Stamp], verify: bool) -> bool:
        """Whether a shard is known, to the byte where that is asked for; if not, it is forgotten."""
        known = self._known.get(file)
        if known and known.stamps is None and _fits(known.record, there):
            known.stamps = _stamps(file, known.record, there)
        if known and known.stamps == _stamps(file, known.record, there) and (known.verified or not verify):
            return True
        self._known.pop(file, None)
        return False

    def _sound(self, record: dict[str, Any], required: bool) -> bool:
        """Whether the files of a shard hold what its record says.

        Raises:
            InputError: They are of another model or other settings.
        """
        for kind in COLUMNS:
            name = record[kind]["file"]
            try:
                content = self.store.read(name)
            except FileNotFoundError:
                return False
            if not fits(content, record[kind]):
                return False
            check_shard(self.store.at(name), self.key.described(), required, content)
        return True

    def name(self, first: int, hashes: Iterable[str]) -> str:
        """Name of the shard of the prompts with these hashes, the first of which has this place in the run's list."""
        return f"{first:07d}-{hashlib.sha256(' '.join(hashes).encode()).hexdigest()[:8]}"

    def has(self, name: str) -> bool:
        """Whether a shard is written."""
        return self.store.has(f"shard-{name}.json")

    @contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Keeps other processes from decoding a shard while this one does, until it dies or leaves the context.

        A lock of the file system, so nothing stays behind of a process that is killed. Where there are no locks, as in an
        object store, two processes may decode the same shard, to the same bytes.

        Yields:
            True where it is this process's to decode; False where another is at it or it is written.
        """
        if self.has(name):
            yield False
            return
        if self.remote:
            yield True
            return
        path = Path(self.folder, f"claim-{name}")
        with path.open("a") as stream:
            if not locked(stream):
                yield False
                return
            try:
                yield not self.has(name)
            finally:
                path.unlink(missing_ok=True)

    def claimed(self) -> int:
        """How many shards other processes are decoding right now; 0 where there are no locks to tell."""
        count = 0
        for path in () if self.remote else Path(self.folder).glob("claim-*"):
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
        file = f"shard-{name}.json"
        self.store.write(file, json_bytes(record))
        self._known[file] = _Known(record, None, verified=True)

    def _write_table(self, name: str, table: pa.Table) -> dict[str, Any]:
        encodings: dict[str, Any] = {"use_dictionary": [n for n in _REPEATED if n in table.column_names]}
        if "confidence" in table.column_names:
            encodings["use_byte_stream_split"] = _FLOATS
        sink = pa.BufferOutputStream()
        pq.write_table(self.key.stamp(table), sink, compression="zstd", **encodings)
        content = sink.getvalue().to_pybytes()
        self.store.write(name, content)
        return describe(name, content, table.num_rows)

    def missing(self, expected: Iterable[str]) -> list[str]:
        """Which of the prompts, given by their hashes, are in no shard yet."""
        there = {prompt for record in self.written(verify=False) for prompt in record["prompts"]}
        there |= {*self.manifest.get("skipped", {})}
        return [prompt for prompt in expected if prompt not in there]

    def finish(self, expected: Iterable[str]) -> dict[str, Any]:
        """Merges all processes' shards into the final manifest; may be called again.

        Shards of other processes are read to the byte first, save those in an object store, of which it would fetch all.

        Args:
            expected: Hashes of the prompts that were to be decoded; those that are skipped may be among them.

        Returns:
            The manifest.

        Raises:
            InputError: A prompt is missing or was written twice.
        """
        records, skipped = _without_repeats(self.written(verify=not self.remote)), self.manifest.get("skipped", {})
        count = Counter(prompt for record in records for prompt in record["prompts"])
        for problem, prompts in (
            ("written twice", [prompt for prompt, times in count.items() if times > 1]),
            ("not decoded", [prompt for prompt in expected if prompt not in count and prompt not in skipped]),
        ):
            if prompts:
                found = f"{len(prompts)} {problem}, the first with hash {prompts[0]}"
                raise InputError(f"{self.folder}: prompts", found, "each prompt once; run the rollout again")
        if not self.remote and not self.claimed():
            self._sweep(Path(self.folder), records)
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
        self._write_manifest()
        return self.manifest

    def _sweep(self, folder: Path, records: list[dict[str, Any]]) -> None:
        """Removes what killed runs left behind: ``load_dataset("parquet")`` with a wildcard would read it."""
        keep = {record[kind]["file"] for record in records for kind in COLUMNS}
        keep |= {f"shard-{record['name']}.json" for record in records}
        for name in self.store.stamps().keys() - keep:
            aside = name.endswith(".part") and (
                name.startswith(MANIFEST) or (name[0] == "." and abandoned(folder / name))
            )
            if aside or name.startswith(("steps-", "sequences-", "shard-", "claim-")):
                self.store.remove(name)


def _parsed(file: str, content: bytes) -> dict[str, Any] | None:
    """The record of a shard; ``None`` where it is damaged."""
    try:
        return checked_record(file, parse_json(content.decode()))
    except ValueError:
        return None


def _stamps(file: str, record: Mapping[str, Any], there: Mapping[str, Stamp]) -> list[Stamp | None]:
    """What changes whenever one of a shard's files is written."""
    return [there.get(name) for name in (file, *(record[kind]["file"] for kind in COLUMNS))]


def _fits(record: Mapping[str, Any], there: Mapping[str, Stamp]) -> bool:
    """Whether the files of a shard have the sizes they should have."""
    sizes = [there.get(record[kind]["file"], (-1, ""))[0] for kind in COLUMNS]
    return sizes == [record[kind]["bytes"] for kind in COLUMNS]


def _without_repeats(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records without those all of whose prompts are in larger ones: a prompt's rollout is the same in any shard."""
    kept, there = [], set[str]()
    for record in sorted(records, key=lambda record: (-len(record["prompts"]), record["name"])):
        if not there.issuperset(record["prompts"]):
            kept.append(record)
            there.update(record["prompts"])
    return sorted(kept, key=lambda record: record["name"])
