"""Records as a filter learns from them: in memory, or in a file from which rows are read as they are asked for."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, get_args

import numpy as np
import torch
from torch import Tensor

from data.labels import PASSES, Records
from data.manifest import Rollouts, write_json
from data.prompts import Split
from models.checkpoint import read_json, writing
from models.errors import InputError
from models.features import Evidence

BYTES = 48
"""What a position takes in memory with every field there is but hidden states."""
_SAMPLE = 65_536  # rows that stand for all where something is looked at once
_INDEX = "index.json"


@dataclass
class FilterBatch:
    """Some records; ``(B, K)`` fields.

    Attributes:
        evidence: What the predictor said.
        final: bool, True where the guess was already the reference's token.
        tail: bool, True after the reference's first EoT.
        example: bool, True where a filter has something to say: masked, and not full_step's own choice in that state.
        weight: float32, share of each position in the loss; 0 where it is no example.
    """

    evidence: Evidence
    final: Tensor
    tail: Tensor
    example: Tensor
    weight: Tensor

    def __len__(self) -> int:
        return len(self.final)

    @property
    def device(self) -> torch.device:
        """Where the records are."""
        return self.final.device

    def take(self, rows: Tensor) -> "FilterBatch":
        """The rows at ``rows`` ``(b,)`` int64."""
        return self._map(lambda tensor: tensor[rows])

    def sample(self) -> "FilterBatch":
        """All records: whoever looks at them once need not ask whether they are in memory."""
        return self

    def to(self, device: torch.device) -> "FilterBatch":
        """The same records on a device."""
        return self._map(lambda tensor: tensor.to(device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "FilterBatch":
        rest = (self.final, self.tail, self.example, self.weight)
        return FilterBatch(self.evidence.each(change), *map(change, rest))


def examples(records: Records, split: str, passes: Sequence[str], tail_weight: float) -> tuple[FilterBatch, Tensor]:
    """The records of one split, and the pass of each, ``(R,)`` int64; their weights do not know of :func:`shares` yet.

    What full_step would commit is committed whatever a filter says, and final by construction where the labels come from
    that state on (all passes but the oracle's): no example.

    Args:
        records: The records.
        split: Their split.
        passes: Decodes whose records are taken.
        tail_weight: Weight of positions after the reference's first EoT.
    """
    wanted = torch.tensor([PASSES.index(name) for name in passes])
    in_split = torch.tensor([name == split for name in records.splits], dtype=torch.bool)
    rows = (in_split[records.prompt] & torch.isin(records.passes, wanted)).nonzero()[:, 0]
    evidence = records.evidence.each(lambda values: values[rows])
    which, tail, example = records.passes[rows], records.tail[rows], evidence.masked.clone()
    taken = taken_next(
        evidence.masked, which, *(field[rows] for field in (records.prompt, records.block, records.step))
    )
    own = (which != PASSES.index("oracle")).nonzero()[:, 0]
    example[own, evidence.confidence[own].masked_fill(~taken[own], -1).argmax(1)] = False
    return FilterBatch(
        evidence, records.final[rows], tail, example, example * torch.where(tail, tail_weight, 1.0)
    ), which


def taken_next(masked: Tensor, which: Tensor, prompt: Tensor, block: Tensor, step: Tensor) -> Tensor:
    """Where full_step's own choice lies, ``(R, K)`` bool: what the next of its states lacks; confidences alone may be equal.

    Args:
        masked: ``(R, K)`` bool.
        which: ``(R,)`` int64, the pass.
        prompt: ``(R,)`` int64.
        block: ``(R,)`` int64.
        step: ``(R,)`` int64.

    Returns:
        Of a state whose next is not there, all of ``masked``: the last of a block, and those of another decode.
    """
    if not len(masked):
        return masked
    decode = torch.stack((which, prompt, block), 1)
    order = torch.from_numpy(np.lexsort((step, block, prompt, which)))
    here, later = order[:-1], order[1:]
    same = (decode[here] == decode[later]).all(1) & (which[here] == PASSES.index("full_step"))
    found = masked.clone()
    found[here[same]] &= ~masked[later[same]]
    return torch.where(found.any(1, keepdim=True), found, masked)


def shares(count: Tensor) -> Tensor:
    """Weight of the records of each pass, ``(P,)`` float32, by how many there are, ``(P,)`` int64.

    The passes count alike in the loss, however many steps each takes: full_step has some ten states for each of the oracle's.
    """
    return count.sum() / (count.clamp(min=1) * (count > 0).sum().clamp(min=1))


class StoredExamples:
    """The records of one split in a file that :func:`store` wrote; a process holds those it has just asked for.

    Args:
        file: The file.
        row: NumPy's type of a row: a field of ``K`` values or vectors for each of a :class:`FilterBatch`, and ``pass``.
        count: Records of each pass.
        device: Where batches go.
    """

    def __init__(self, file: Path, row: np.dtype, count: Sequence[int], device: torch.device) -> None:
        self.rows, self.device = sum(count), device
        self.share = shares(torch.tensor(count))
        self.row, self.stream = row, file.open("rb", buffering=0)

    def __len__(self) -> int:
        return self.rows

    def take(self, rows: Tensor) -> FilterBatch:
        """The rows at ``rows`` ``(b,)`` int64, on the device."""
        part = self._read(rows.cpu().numpy())
        fields = {name: torch.from_numpy(np.ascontiguousarray(part[name])) for name in part.dtype.names or ()}
        fields = {name: value.long() if value.dtype is torch.int32 else value for name, value in fields.items()}
        fields["weight"] *= self.share[fields.pop("pass").long()][:, None]
        rest = [fields.pop(name) for name in ("final", "tail", "example", "weight")]
        return FilterBatch(Evidence(**fields), *rest).to(self.device)

    def sample(self) -> FilterBatch:
        """At most 65,536 records, evenly spread."""
        return self.take(torch.arange(0, self.rows, max(1, -(-self.rows // _SAMPLE))))

    def _read(self, rows: np.ndarray) -> np.ndarray:
        """The rows, by plain reads: pages of a mapped file would count as the process's own, sixteen for each row."""
        part = np.empty(len(rows), self.row)
        view, size = memoryview(part.view(np.uint8)), self.row.itemsize  # pyright: ignore[reportArgumentType]
        starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1).tolist()  # of the runs that stand together in the file
        for start, end in itertools.pairwise([*starts, len(rows)]):
            self.stream.seek(int(rows[start]) * size)
            wanted = view[start * size : end * size]
            if self.stream.readinto(wanted) != len(wanted):
                raise InputError(str(self.stream.name), "a record that breaks off", "the file as it was written")
        return part


def store(folder: Path, parts: Iterable[Records], passes: Sequence[str], tail_weight: float) -> None:
    """Writes records into a folder, a file for each split, a part at a time; complete once its index is there.

    Args:
        folder: The folder, made where it is not there.
        parts: Records, whose fields are the same in all of them.
        passes: Decodes whose records are taken.
        tail_weight: Weight of positions after the reference's first EoT.

    Raises:
        InputError: The parts differ in their fields.
    """
    counts = {split: [0] * len(PASSES) for split in get_args(Split)}
    row: np.dtype | None = None
    with ExitStack() as stack:
        streams: dict[str, IO[bytes]] = {}
        for split in counts:
            streams[split] = stack.enter_context(stack.enter_context(writing(folder / split)).open("wb"))
        for records in parts:
            for split, stream in streams.items():
                batch, which = examples(records, split, passes, tail_weight)
                table = _table(batch, which)
                if table.dtype != (row := row or table.dtype):
                    found = f"{', '.join(table.dtype.names or ())} beside {', '.join(row.names or ())}"
                    raise InputError(
                        str(folder), found, "rollouts with the same columns and block length; roll out again"
                    )
                stream.write(table.tobytes())
                found = which.bincount(minlength=len(PASSES)).tolist()
                counts[split] = [a + b for a, b in zip(counts[split], found, strict=True)]
    write_json(folder / _INDEX, {"row": np.lib.format.dtype_to_descr(row or np.dtype("u1")), "counts": counts})


def _table(batch: FilterBatch, which: Tensor) -> np.ndarray:
    rest = {name: getattr(batch, name) for name in ("final", "tail", "example", "weight")}
    fields = {name: value.numpy() for name, value in (batch.evidence.present() | rest).items()}
    types = [
        (name, np.dtype("<i4") if value.dtype == np.int64 else value.dtype, value.shape[1:])
        for name, value in fields.items()
    ]
    table = np.empty(len(batch), np.dtype([*types, ("pass", np.dtype("u1"))]))
    for name, value in fields.items():
        table[name] = value
    table["pass"] = which.numpy()
    return table


def open_stored(folder: Path, device: torch.device) -> dict[str, StoredExamples] | None:
    """What :func:`store` wrote, by split; ``None`` where it did not finish or is damaged."""
    if not (folder / _INDEX).is_file():
        return None
    try:
        index = read_json(folder / _INDEX)
    except InputError:
        return None
    row = np.lib.format.descr_to_dtype(_tuples(index["row"]))
    for split, count in index["counts"].items():
        if not (folder / split).is_file() or (folder / split).stat().st_size != sum(count) * row.itemsize:
            return None
    return {split: StoredExamples(folder / split, row, count, device) for split, count in index["counts"].items()}


def _tuples(description: Any) -> Any:
    """NumPy's description of a type, whose tuples JSON has made lists."""
    if not isinstance(description, list):
        return description
    return [(name, kind, *(tuple(shape) for shape in rest)) for name, kind, *rest in description]


def by_shard(
    rollouts: Rollouts, passes: Sequence[str] | None, last: str | None = None, hidden: bool = False
) -> Iterator[Records]:
    """The records of a set as :func:`data.rollouts.load_records` reads them, one shard at a time: no decode is in two."""
    from data.rollouts import load_records

    for shard in rollouts.shards:
        one = Rollouts(rollouts.folder, rollouts.manifest | {"shards": [shard]})
        yield load_records(one, passes, last=last, hidden=hidden)
