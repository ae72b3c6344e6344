"""Prompts of a set of any size: their texts in a mapped file, in memory a few numbers for each."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, get_args, overload

import numpy as np
import pyarrow as pa

from data.prompt import Prompt, Split, prompt_hash, split_of

SPLITS: tuple[Split, ...] = get_args(Split)
_ROWS = 1024  # prompts of a record batch
_SCHEMA = pa.schema([(name, pa.large_string()) for name in Prompt.__annotations__])


class PromptList(Sequence[Prompt]):
    """Prompts that are read from a file as they are asked for.

    Args:
        batches: Their texts, 1,024 rows in each but the last.
        rows: ``(P,)`` int64, row of each prompt.
        hashes: ``(P,)`` uint64, :func:`data.prompt.prompt_hash` of each.
        ids: Ids other than in the file, by row.
    """

    def __init__(
        self, batches: Sequence[pa.RecordBatch], rows: np.ndarray, hashes: np.ndarray, ids: dict[int, str]
    ) -> None:
        self.batches, self.rows, self._hashes, self.ids = batches, rows, hashes, ids

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> "PromptList": ...
    def __getitem__(self, index: int | slice) -> "Prompt | PromptList":
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        row = int(self.rows[index])
        batch, place = divmod(row, _ROWS)
        (fields,) = self.batches[batch].slice(place, 1).to_pylist()
        return Prompt(**fields | ({"id": self.ids[row]} if row in self.ids else {}))

    def take(self, index: np.ndarray) -> "PromptList":
        """Some of the prompts, in the order of ``index`` ``(p,)`` int64."""
        return PromptList(self.batches, self.rows[index], self._hashes[index], self.ids)

    def hash(self, index: int) -> str:
        """The hash of a prompt's text, without reading it."""
        return f"{self._hashes[index]:016x}"

    def hashes(self) -> Iterator[str]:
        """The hash of each."""
        return (self.hash(index) for index in range(len(self)))


class Spool:
    """Takes prompts one by one and lays them down in a file without a name; a context.

    Attributes:
        tasks: Number of each one's task.
        splits: Its place in ``SPLITS``.
        hashes: Its hash.
    """

    def __enter__(self) -> "Spool":
        self.tasks, self.splits, self.hashes = array("l"), array("b"), array("Q")
        self._names: dict[str, int] = {}
        self._waiting: list[dict[str, Any]] = []
        self._folder = TemporaryDirectory(prefix="prompts-")
        self._file = str(Path(self._folder.name, "prompts.arrow"))
        self._sink = pa.OSFile(self._file, "wb")
        self._writer = pa.ipc.new_file(self._sink, _SCHEMA)
        return self

    def __len__(self) -> int:
        return len(self.hashes)

    def add(self, prompts: Iterable[Prompt]) -> None:
        """Takes prompts."""
        for prompt in prompts:
            self.tasks.append(self._names.setdefault(prompt.task, len(self._names)))
            self.splits.append(SPLITS.index(split_of(prompt.prompt)))
            self.hashes.append(int(prompt_hash(prompt.prompt), 16))
            self._waiting.append(vars(prompt))
            if len(self._waiting) == _ROWS:
                self._write()

    def _write(self) -> None:
        self._writer.write_batch(pa.RecordBatch.from_pylist(self._waiting, schema=_SCHEMA))
        self._waiting = []

    def batches(self) -> list[pa.RecordBatch]:
        """The texts; none can be added from now on. The file goes when nobody holds them."""
        if self._waiting:
            self._write()
        self._writer.close()
        self._sink.close()
        reader = pa.ipc.open_file(pa.memory_map(self._file))
        return [reader.get_batch(number) for number in range(reader.num_record_batches)]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._sink.close()
        self._folder.cleanup()


def in_turn(tasks: np.ndarray, splits: np.ndarray, per_task: int | None = None) -> np.ndarray:
    """The tasks in turn, in the order they first occur; within a task the splits in proportion.

    Args:
        tasks: ``(P,)`` number of each prompt's task.
        splits: ``(P,)`` number of its split.
        per_task: At most this many of each task.

    Returns:
        Indices of the prompts that are taken, int64.
    """
    turns, chosen = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for rows in _groups(tasks):
        parts = [rows[part] for part in _groups(splits[rows])]
        place = np.concatenate([(np.arange(len(part)) + 0.5) / len(part) for part in parts])
        chosen.append(np.concatenate(parts)[np.argsort(place, kind="stable")][:per_task])
        turns.append(np.arange(len(chosen[-1])))
    return np.concatenate(chosen)[np.argsort(np.concatenate(turns), kind="stable")]


def _groups(values: np.ndarray) -> list[np.ndarray]:
    """Where each value is, the values in the order they first occur."""
    _, first, counts = np.unique(values, return_index=True, return_counts=True)
    parts = np.split(np.argsort(values, kind="stable"), np.cumsum(counts)[:-1])
    return [parts[number] for number in np.argsort(first)]


def unique_ids(prompts: PromptList) -> PromptList:
    """Ids are unique within a source only; where two sources share one, the later prompt's gets its hash appended."""
    names = pa.chunked_array([batch.column("id") for batch in prompts.batches]).take(pa.array(prompts.rows))
    if len(names.unique()) == len(names):
        return prompts
    seen: set[str] = set()
    for row, name, text in zip(prompts.rows.tolist(), map(str, names.to_pylist()), prompts.hashes(), strict=True):
        if name in seen:
            prompts.ids[row] = f"{name}-{text}"
        seen.add(prompts.ids.get(row, name))
    return prompts


def first_of_each(hashes: np.ndarray) -> np.ndarray:
    """Where each hash ``(P,)`` occurs first, in order."""
    return np.sort(np.unique(hashes, return_index=True)[1])
