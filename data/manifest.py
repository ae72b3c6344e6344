"""``manifest.json`` of a rollout set: what the set must have in common, and whether its files are what they were."""

import hashlib
import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, Field

from data.disk import locked
from data.store import UrlStore, open_store, place
from data.tables import SEQUENCE_COLUMNS, STEP_COLUMNS
from data.typed import Count, Whole, checked
from models.checkpoint import parse_json, read_json, writing
from models.errors import InputError, first_line

SCHEMA_VERSION = 4
MANIFEST = "manifest.json"
COLUMNS = {"steps": STEP_COLUMNS, "sequences": SEQUENCE_COLUMNS}
"""The two kinds of files of a shard and their columns."""
_KEY = b"dlm_accel.key"
"""Where the metadata of a shard's files keeps the key of its set, as JSON: they belong to it with a manifest or without."""
_AT_ONCE = 8  # files that are fetched side by side
_OLDER = {"states": "pass"}  # schema version 1: name of a column to the one it has now
_OPTIONAL = ("end", "text", "hidden", "open", "eot_log_odds", "eot_top")
"""Columns that a set may lack: ``end`` before schema version 3, when labels came from the references; ``text`` before filters
read it; hidden states and EoT evidence anyway."""


@dataclass(frozen=True)
class RolloutKey:
    """What all rollouts of one folder have in common; a folder with another key is refused.

    Attributes:
        fingerprint: Fingerprint of the base model's weights.
        tokenizer_hash: Hash of the tokenizer and its chat template.
        settings: Decode settings, the passes recorded, and ``eot_id``, on which the labels depend; JSON values only.
    """

    fingerprint: str
    tokenizer_hash: str
    settings: dict[str, Any]

    def described(self) -> dict[str, Any]:
        """The key as manifests and shards hold it."""
        return {
            "model_fingerprint": self.fingerprint, "tokenizer_hash": self.tokenizer_hash, "settings": self.settings,
        }  # fmt: skip

    def stamp(self, table: pa.Table) -> pa.Table:
        """The table with the key in its metadata."""
        key = json.dumps(self.described(), sort_keys=True).encode()
        return table.replace_schema_metadata({**(table.schema.metadata or {}), _KEY: key})


_Name = Annotated[str, Field(pattern=r"^[^/\\\\]+$")]  # nothing outside the folder is read or removed


class _File(BaseModel):
    """What is known of one file of a shard."""

    file: _Name
    rows: Whole
    bytes: Whole
    sha256: str


class ShardRecord(BaseModel):
    """What ``shard-NAME.json`` holds; before schema version 4 the manifest repeated it."""

    name: str
    prompts: list[str]
    splits: dict[str, Whole]
    passes: dict[str, Whole]
    steps: _File
    sequences: _File


class _Settings(BaseModel):
    """The settings of a set that reading it depends on; there are others."""

    block_length: Count
    eot_id: Whole
    passes: list[str]


class _Counts(BaseModel):
    prompts: Whole
    steps: dict[str, Whole]


class _First(BaseModel):
    """A manifest of schema version 1, as far as it has to be rewritten."""

    settings: dict[str, Any]
    shards: list[dict[str, Any]]


class _Manifest(BaseModel):
    complete: bool
    model_fingerprint: str
    tokenizer_hash: str
    settings: _Settings
    sources: list[dict[str, Any]]
    shards: list[_Name]
    counts: _Counts | None = None
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")] | None = None
    skipped: dict[str, Whole] = {}  # tokens of the prompts that were too long, by hash


class _Older(_Manifest):
    """A manifest before schema version 4."""

    shards: list[ShardRecord]  # pyright: ignore[reportIncompatibleVariableOverride]


@dataclass
class Rollouts:
    """A finished rollout set: its folder and its manifest."""

    folder: Path
    manifest: dict[str, Any] = field(repr=False)

    @cached_property
    def shards(self) -> list[dict[str, Any]]:
        """The records of the shards, of which a manifest has the names."""
        return [record if isinstance(record, dict) else self._record(record) for record in self.manifest["shards"]]

    def _record(self, name: str) -> dict[str, Any]:
        path = self.folder / f"shard-{name}.json"
        return checked_record(path, read_json(path, _LISTED))

    @property
    def digest(self) -> str:
        """16 hex digits that change with every prompt, label and setting in the set, and with nothing else."""
        return digest(self.manifest, self.shards)

    @property
    def hidden_size(self) -> int:
        """Dimensions of the hidden states that were recorded, 0 where none were."""
        if not self.manifest["settings"].get("hidden_states"):
            return 0
        schema = pq.read_schema(self.folder / self.shards[0]["steps"]["file"])
        return schema.field("hidden").type.value_type.byte_width // 2

    def tables(self, kind: str, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The ``"steps"`` or ``"sequences"`` tables, in the order of the shards."""
        for shard in self.shards:
            file = self.folder / shard[kind]["file"]
            there = _columns(file)
            names = [name for name in columns or COLUMNS[kind] if name in there or name not in _OPTIONAL]
            yield pq.read_table(file, columns=[there[name] for name in names]).rename_columns(names)


_LISTED = f"the shard that {MANIFEST} lists; run the rollout again"


def checked_record(where: str | Path, found: Any) -> dict[str, Any]:
    """The record of a shard as it is called now.

    Args:
        where: The file, for the message.
        found: What it holds.

    Raises:
        InputError: It is none.
    """
    record = renamed(found) if isinstance(found, dict) else found
    try:
        checked(ShardRecord, record, where)
    except InputError as error:
        raise InputError(error.field, error.found, _LISTED) from error
    return record


def digest(key: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """See :attr:`Rollouts.digest`.

    Args:
        key: A manifest, or what :meth:`RolloutKey.described` gives.
        records: Records of the shards.
    """
    files = sorted(record[kind]["sha256"] for record in records for kind in COLUMNS)
    names = ("model_fingerprint", "tokenizer_hash", "settings")
    content = json.dumps([files, {name: key[name] for name in names}], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def open_rollouts(
    folder: str | Path, fingerprint: str | None = None, settings: Mapping[str, Any] | None = None
) -> Rollouts:
    """Verifies a finished rollout set, every byte of it.

    A set in an object store is fetched first, into a folder of the user's cache that is named by the set's digest; what is
    there already is not fetched again. The set that is returned is the local one.

    Args:
        folder: The set's folder, or its URL.
        fingerprint: Fingerprint of the base model it must come from; ``None`` accepts any.
        settings: Settings it must have; those not named may have any value.

    Raises:
        InputError: As :func:`find_rollouts`; or a missing or damaged shard, or one without one of its columns.
    """
    rollouts = find_rollouts(folder, fingerprint, settings)
    for shard in rollouts.shards:
        for kind, columns in COLUMNS.items():
            path = rollouts.folder / shard[kind]["file"]
            check_file(path, shard[kind], columns)
            check_shard(path, rollouts.manifest)
    if (known := rollouts.manifest.get("digest")) not in (None, rollouts.digest):
        accepted = f"{rollouts.digest}, of the shards that are there"
        raise InputError(f"{rollouts.folder / MANIFEST}: digest", known, accepted)
    return rollouts


def find_rollouts(
    folder: str | Path, fingerprint: str | None = None, settings: Mapping[str, Any] | None = None
) -> Rollouts:
    """A finished rollout set by its manifest alone, for whoever checks the files that it reads, or has them checked.

    Args:
        folder: The set's folder.
        fingerprint: Fingerprint of the base model it must come from; ``None`` accepts any.
        settings: Settings it must have; those not named may have any value.

    Raises:
        InputError: No manifest, an unfinished set, or another schema, model or setting.
    """
    folder = place(folder)
    where, manifest = open_store(folder).at(MANIFEST), read_manifest(folder)
    check_key(where, manifest, fingerprint, settings=settings)
    if not manifest["complete"]:
        raise InputError(f"{where}: complete", False, "a finished set; run the rollout again, it continues")
    return Rollouts(folder if isinstance(folder, Path) else _fetched(folder, manifest), manifest)


def _fetched(url: str, manifest: Mapping[str, Any]) -> Path:
    """The local folder of a finished set in an object store; a file that is not what it was is not taken."""
    store = UrlStore(url)
    if manifest.get("digest") is None:
        accepted = "what `train/rollout.py merge` writes"
        raise InputError(f"{store.at(MANIFEST)}: digest", "nothing", accepted)
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = caches / "dlm-accel" / "rollouts" / manifest["digest"]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as stream:
        locked(stream, wait=True)  # one of a machine's processes fetches, the others find it
        records = _fetch_records(store, [f"shard-{name}.json" for name in manifest["shards"]], folder)
        files = [record[kind] for record in records for kind in COLUMNS]
        missing = [described for described in files if not intact(folder / described["file"], described)]
        if missing:
            size = sum(described["bytes"] for described in missing) / 2**20
            print(f"{url}: fetching {len(missing)} files, {size:.3g} MiB, to {folder}", file=sys.stderr)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for _ in pool.map(lambda described: _fetch(store, described, folder), missing):
                pass
        write_json(folder / MANIFEST, manifest)
    return folder


def _fetch_records(store: UrlStore, names: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    found = {}
    for name in names:
        with suppress(InputError):
            found[name] = checked_record(folder / name, read_json(folder / name))
    contents = store.read_many(name for name in names if name not in found)
    for name in names:
        if name not in found:
            if name not in contents:
                raise InputError(store.at(name), "no such file", _LISTED)
            try:
                content = parse_json(contents[name].decode())
            except ValueError as error:
                raise InputError(store.at(name), first_line(error), _LISTED) from error
            found[name] = checked_record(store.at(name), content)
            with writing(folder / name, sweep=False) as aside:
                aside.write_bytes(contents[name])
    return [found[name] for name in names]


def _fetch(store: UrlStore, described: Mapping[str, Any], folder: Path) -> None:
    name = described["file"]
    try:
        content = store.read(name)
    except FileNotFoundError:
        raise InputError(store.at(name), "no such file", _LISTED) from None
    if not fits(content, described):
        found = f"{hashlib.sha256(content).hexdigest()} (corrupt or truncated)"
        raise InputError(f"{store.at(name)}: sha256", found, f"{described['sha256']}; run the rollout again")
    with writing(folder / name, sweep=False) as aside:
        aside.write_bytes(content)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a set, finished or not, in a folder or at a URL.

    Raises:
        InputError: There is none, it cannot be read, it has a schema version that is not known, or a field of another type.
    """
    store = open_store(folder)
    path, manifest = store.at(MANIFEST), store.json(MANIFEST, "the manifest of a rollout set")
    found = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if found not in (1, 2, 3, SCHEMA_VERSION):
        raise InputError(f"{path}: schema_version", found, f"1 | 2 | 3 | {SCHEMA_VERSION}")
    if found == 1:
        checked(_First, manifest, path)
        warnings.warn(
            f"{path}: schema_version 1; its states are read as passes, its EoT rule filter as commit", stacklevel=2
        )
        settings = renamed(manifest["settings"])
        settings |= {"eot": "commit"} if settings.get("eot") == "filter" else {}
        manifest |= {"settings": settings, "shards": list(map(renamed, manifest["shards"]))}
    checked(_Manifest if found == SCHEMA_VERSION else _Older, manifest, path)
    if manifest["complete"] and "counts" not in manifest:
        raise InputError(f"{path}: counts", "nothing", "what a finished set holds; run the rollout again")
    return manifest


def renamed(record: Mapping[str, Any]) -> dict[str, Any]:
    """Settings or the record of a shard, in which schema version 1 called ``states`` what are ``passes`` now."""
    return {"passes" if name == "states" else name: value for name, value in record.items()}


def check_key(
    path: str | Path,
    described: Mapping[str, Any],
    fingerprint: str | None = None,
    tokenizer_hash: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Raises an InputError naming the first field in which a manifest's or a shard's key differs from what is given.

    Args:
        path: The file.
        described: What it says.
        fingerprint: Fingerprint of the base model; ``None`` accepts any.
        tokenizer_hash: Hash of the tokenizer; likewise.
        settings: Settings it must have; those not named may have any value.
    """
    for name, wanted in (("model_fingerprint", fingerprint), ("tokenizer_hash", tokenizer_hash)):
        if wanted is not None and described[name] != wanted:
            raise InputError(f"{path}: {name}", described[name], f"{wanted}, this model's; or another folder")
    for name, wanted in (settings or {}).items():
        found = described["settings"].get(name)
        if found != wanted:
            raise InputError(f"{path}: settings.{name}", repr(found), f"{wanted!r}; or another folder")


def check_shard(path: str | Path, key: Mapping[str, Any], required: bool = False, content: bytes | None = None) -> None:
    """Raises an InputError if a shard's file says that it belongs to a set of another key.

    Args:
        path: The Parquet file.
        key: A manifest, or what :meth:`RolloutKey.described` gives.
        required: Refuse a file that says nothing, too: there is no manifest to say it, as older versions left it to.
        content: What the file holds; it is read where this is not given.
    """
    schema = pq.read_schema(path if content is None else pa.BufferReader(content))
    stamp = (schema.metadata or {}).get(_KEY)
    if stamp is not None:
        check_key(path, json.loads(stamp), key["model_fingerprint"], key["tokenizer_hash"], key["settings"])
    elif required:
        raise InputError(
            str(path),
            f"a shard of unknown origin, without {MANIFEST}",
            "the manifest that it belongs to; or another folder",
        )


def check_file(path: Path, described: Mapping[str, Any], columns: Sequence[str]) -> None:
    """Raises an InputError where a file of a shard is not there, damaged, or lacks a column."""
    if not path.is_file():
        raise InputError(str(path), "no such file", f"the shard of {described['rows']} rows that {MANIFEST} lists")
    try:
        there = _columns(path)
    except (pa.ArrowException, OSError) as error:
        raise InputError(str(path), f"a corrupt or truncated file ({error})", "an intact Parquet shard") from error
    if missing := [column for column in columns if column not in there and column not in _OPTIONAL]:
        raise InputError(f"{path}: column {missing[0]!r}", f"columns {', '.join(there)}", ", ".join(columns))
    if not intact(path, described):
        raise InputError(f"{path}: sha256", f"{sha256(path)} (corrupt or truncated)", described["sha256"])


def _columns(path: Path) -> dict[str, str]:
    """The name that each column of a file has now, and the one it has there."""
    names: list[str] = pq.read_schema(path).names
    return {_OLDER.get(name, name): name for name in names}


def describe(name: str, content: bytes, rows: int) -> dict[str, Any]:
    """What the manifest says about a file: name, rows, bytes and checksum."""
    return {"file": name, "rows": rows, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def fits(content: bytes, described: Mapping[str, Any]) -> bool:
    """Whether the content of a file has the size and checksum it was described with."""
    return len(content) == described["bytes"] and hashlib.sha256(content).hexdigest() == described["sha256"]


def intact(path: Path, described: Mapping[str, Any]) -> bool:
    """Whether a file is there and has the size and checksum it was described with."""
    return path.is_file() and path.stat().st_size == described["bytes"] and sha256(path) == described["sha256"]


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """JSON as it is written."""
    return (json.dumps(content, indent=1) + "\n").encode()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON aside and renames it, so that no reader ever sees half a file."""
    with writing(path) as aside:
        aside.write_bytes(json_bytes(content))
