"""What a run has: answers, kept in a file so that an interrupted run continues, and sums of what they cost."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from data.typed import Text, Whole, checked
from models.errors import InputError

Sums = dict[str, dict[str, float]]
"""Decode settings, as JSON, to name to sum."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")
    key: Text


class _Answer(_Record):
    text: str
    tokens: Whole
    nfe: Whole


class _LogLikelihood(_Record):
    log_likelihood: Annotated[float, Field(le=0)]
    greedy: bool


def answer_key(**parts: Any) -> str:
    """32 hex digits of everything an answer depends on: two requests share them only if their answers are the same."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


class Answers:
    """Records by key: in memory, and in ``answers-rank<n>.jsonl`` where there is a folder.

    Every process writes a file of its own and reads all, so a run may continue on another number of devices. JSON lines,
    appended: a run that is killed loses at most the line it was writing.

    Args:
        folder: Folder of the files; ``None`` keeps nothing.
        rank: Number of this process.

    Raises:
        InputError: A file holds something else.
    """

    def __init__(self, folder: Path | None = None, rank: int = 0) -> None:
        self._records: dict[str, dict[str, Any]] = {}
        self.file = None if folder is None else folder / f"answers-rank{rank}.jsonl"
        if folder is None or self.file is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        _mend(self.file)
        for file in sorted(folder.glob("answers-rank*.jsonl")):
            self._records |= _read(file)

    def __contains__(self, key: str) -> bool:
        return key in self._records

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._records[key]

    def add(self, records: Mapping[str, dict[str, Any]]) -> None:
        """Adds finished answers, key to record; they are in the file when this returns."""
        self._records |= records
        if self.file is not None:
            lines = [json.dumps({"key": key} | record, ensure_ascii=False) for key, record in records.items()]
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write("".join(f"{line}\n" for line in lines))


def _mend(file: Path) -> None:
    """Cuts a line off that was being written when the run was killed."""
    if file.is_file():
        whole = file.read_bytes()
        kept = whole[: whole.rfind(b"\n") + 1]
        if len(kept) < len(whole):
            with file.open("r+b") as stream:
                stream.truncate(len(kept))


def _read(file: Path) -> dict[str, dict[str, Any]]:
    # Another process may be writing its last line.
    lines = file.read_bytes().split(b"\n")[:-1]
    records = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(
                f"{file}: line {number}", error, "an answer as this command writes it; or remove the file"
            ) from None
        scored = isinstance(record, dict) and "log_likelihood" in record
        checked(_LogLikelihood if scored else _Answer, record, f"{file}: line {number}")
        records[record.pop("key")] = record
    return records


class Tally:
    """Sums of one process.

    Attributes:
        sums: See :data:`Sums`.
    """

    def __init__(self) -> None:
        self.sums: Sums = {}

    def add(self, settings: Mapping[str, Any], **amounts: float) -> None:
        """Adds amounts to the sums of these settings."""
        sums = self.sums.setdefault(json.dumps(settings, sort_keys=True), {})
        for name, amount in amounts.items():
            sums[name] = sums.get(name, 0) + amount


def summary(processes: Iterable[Sums]) -> list[dict[str, Any]]:
    """One row for each decode settings, over all processes.

    ``answers``, ``reused`` (of them, finished in an earlier run), ``nfe_mean``, ``tokens`` (before the first EoT),
    ``tokens_per_forward`` and ``empty_answers`` are of all answers; ``forward_calls`` and the seconds, summed over
    processes, of this run alone.
    """
    total = Tally()
    for sums in processes:
        for settings, amounts in sums.items():
            total.add(json.loads(settings), **amounts)
    return [{"settings": json.loads(settings)} | _means(amounts) for settings, amounts in total.sums.items()]


def _means(amounts: dict[str, float]) -> dict[str, float]:
    row = {name: amount for name, amount in amounts.items() if name != "nfe"}
    if nfe := amounts.get("nfe"):
        row |= {"nfe_mean": nfe / amounts["answers"], "tokens_per_forward": amounts["tokens"] / nfe}
    return row
