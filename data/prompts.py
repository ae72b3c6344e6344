"""Prompts: where they come from, how they are split and encoded."""

import csv
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from data import gym, stories
from data.gym import GymTask
from data.prompt import Prompt, Split, final_answer, prompt_hash, split_of
from data.prompt_list import SPLITS, PromptList, Spool, first_of_each, in_turn, unique_ids
from data.stories import StoryTask
from data.typed import Count, Text, Whole, check_fields, checked
from decoding.text import MARK, encode, is_unicode
from models.checkpoint import parse_json
from models.errors import InputError, first_line
from models.rules import LENGTH, check

BUNDLED = Path(__file__).resolve().parent / "bundled"
_GENERATORS = ("stories:", "gym:")


@dataclass
class PromptSource:
    """Where prompts come from: the bundled sets, a generator, a file, or a data set of the Hugging Face hub.

    A setting that such a source does not read is refused.

    Args:
        path: ``bundled``; ``stories:<task>``, of our own generator; ``gym:<task>``, of reasoning-gym; a ``.jsonl``, ``.json``,
            ``.csv`` or ``.parquet`` file; or anything that ``datasets.load_dataset`` takes. Code that comes with a data
            set is never run.
        split: Bundled and generators: train, validation or test, by default all of them; of a generator's ``size`` prompts those
            that are in it. Hub: the data set's own split, by default
            train. The split that a prompt belongs to here is decided by its hash all the same.
        size: At most this many prompts, the tasks in turn. A generator needs it, and makes no more than 1,048,576.
        task: Files and hub: task name where there is no ``task_column``; by default the last part of the path.
        prompt_column: Column of the user's message, as all columns of files and hub.
        response_column: Column of the reference response, if there is one.
        answer_column: Column of the final answer; by default it is taken from the response.
        task_column: Column of the task name, for sets of many tasks.
        subset: Hub: the data set's configuration.
        revision: Hub: the commit or tag.
        seed: Generators: seed of the stream.
        options: Generators: restrictions of the task, the fields of :class:`data.stories.StoryTask` or
            :class:`data.gym.GymTask`.
    """

    path: Text = "bundled"
    split: str | None = None
    size: Count | None = None
    task: str | None = None
    prompt_column: str = "prompt"
    response_column: str | None = None
    answer_column: str | None = None
    task_column: str | None = None
    subset: str | None = None
    revision: str | None = None
    seed: Whole = 0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)
        kind = _kind(self.path)
        for known in fields(self):
            default = known.default if known.default is not MISSING else {}
            if known.name not in _READS[kind] and (value := getattr(self, known.name)) != default:
                raise InputError(
                    known.name, repr(value)[:80], f"no such setting; {kind} reads {', '.join(_READS[kind])}"
                )
        if kind == "a generator":
            check({"size": self.size}, {"size": LENGTH.or_null()})


def _kind(path: str) -> str:
    if path == "bundled":
        return "the bundled sets"
    if path.startswith(_GENERATORS):
        return "a generator"
    return "a file" if Path(path).suffix in _READERS else "a data set of the hub"


def load_prompts(
    sources: Sequence[PromptSource], split: Split | None = None, limit: int | None = None, per_task: int | None = None
) -> list[Prompt]:
    """The prompts of :func:`read_prompts`, all of them in memory."""
    return list(read_prompts(sources, split, limit, per_task))


def read_prompts(
    sources: Sequence[PromptSource], split: Split | None = None, limit: int | None = None, per_task: int | None = None
) -> PromptList:
    """Prompts of a mixture; a prompt text that occurs twice is taken once.

    Rows become objects one at a time, save those of ``.json`` files and generators; texts stay on disk.

    Args:
        sources: The sources, whose order decides between duplicates.
        split: Keep the prompts of one split; ``None`` keeps all.
        limit: At most this many. A smaller limit gives the beginning of what a larger one gives.
        per_task: At most this many of each task (the paper: 66 FLAN tasks, 40 prompts each).

    Returns:
        Prompts with unique ids, the tasks in turn, the splits of a task mixed in proportion: any beginning of the list
        is a fair sample.

    Raises:
        InputError: A source cannot be read, lacks a column or holds an empty prompt; or nothing is left.
    """
    if split not in (None, *SPLITS):
        raise InputError("split", repr(split), " | ".join(SPLITS))
    for name, value in (("limit", limit), ("per_task", per_task)):
        checked(Count | None, value, name)
    if not sources:
        raise InputError("sources", "none", "at least one source of prompts")
    with Spool() as spool:
        taken = []
        for source in sources:
            first = len(spool)
            spool.add(_read(source))
            tasks, splits = np.array(spool.tasks[first:]), np.array(spool.splits[first:])
            taken.append(
                first + (np.arange(len(tasks)) if source.size is None else in_turn(tasks, splits)[: source.size])
            )
        batches, rows = spool.batches(), np.concatenate(taken)
        tasks, splits, hashes = np.array(spool.tasks), np.array(spool.splits), np.array(spool.hashes)
    rows = rows[first_of_each(hashes[rows])]
    if split is not None:
        rows = rows[splits[rows] == SPLITS.index(split)]
    if not len(rows):
        raise InputError("prompts", f"none in split {split or 'any'}", "sources with at least one prompt")
    rows = rows[in_turn(tasks[rows], splits[rows], per_task)[:limit]]
    return unique_ids(PromptList(batches, rows, hashes[rows], {}))


def encode_prompts(
    prompts: Iterable[Prompt], tokenizer: PreTrainedTokenizerBase, chat_template: bool = True
) -> list[list[int]]:
    """Token ids of each prompt; text that looks like a special token is encoded as ordinary text.

    Args:
        prompts: The prompts.
        tokenizer: The predictor's tokenizer.
        chat_template: Wrap each prompt in the chat template and open the assistant's turn.

    Raises:
        InputError: No chat template where one is asked for.
    """
    return [encode(tokenizer, prompt.prompt, chat_template) for prompt in prompts]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hex digits that change whenever a prompt might be encoded otherwise: tokenizer and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    # Padding and truncation are set by the last call, not by the checkpoint.
    content = {name: rules[name] for name in rules if name not in ("padding", "truncation")}
    text = json.dumps([content, tokenizer.chat_template], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read(source: PromptSource) -> Iterator[Prompt]:
    if source.path == "bundled":
        return _bundled(source)
    if source.path.startswith(_GENERATORS):
        return _generated(source)
    return _columns(source)


def _bundled(source: PromptSource) -> Iterator[Prompt]:
    for name in SPLITS if source.split is None else (source.split,):
        if name not in SPLITS:
            raise InputError("bundled prompts: split", repr(name), " | ".join(SPLITS))
        path = BUNDLED / f"{name}.parquet"
        for row, record in enumerate(_file_rows(path)):
            if record.keys() != Prompt.__annotations__.keys():
                raise InputError(f"{path}: columns", ", ".join(record), ", ".join(Prompt.__annotations__))
            prompt = Prompt(**record)
            if split_of(prompt.prompt) != name:
                raise InputError(
                    f"{path}: row {row}", f"a prompt of split {split_of(prompt.prompt)}", f"split {name} only"
                )
            yield prompt


def _generated(source: PromptSource) -> Iterator[Prompt]:
    if source.size is None:
        raise InputError(f"{source.path}: size", None, "the number of prompts to generate")
    kind, _, name = source.path.partition(":")
    make, stream = (StoryTask, stories.samples) if kind == "stories" else (GymTask, gym.samples)
    unique: dict[str, Prompt] = {}
    try:
        prompts: Iterator[Prompt] = stream(make(name, **source.options), source.seed)  # type: ignore[arg-type]
        for prompt in itertools.islice(prompts, 20 * source.size + 1000):
            unique.setdefault(prompt.prompt, prompt)
            if len(unique) == source.size:
                break
    except (ImportError, TypeError, ValueError) as error:
        raise InputError(source.path, error, f"a task with the options of {make.__module__}.{make.__name__}") from error
    if len(unique) < source.size:
        raise InputError(f"{source.path}: size", source.size, f"at most {len(unique)}: so many different prompts came")
    if source.split not in (None, *SPLITS):
        raise InputError(f"{source.path}: split", repr(source.split), " | ".join(SPLITS))
    yield from (prompt for prompt in unique.values() if source.split in (None, split_of(prompt.prompt)))


def _columns(source: PromptSource) -> Iterator[Prompt]:
    file = Path(source.path)
    rows = _file_rows(file) if file.suffix in _READERS else _hub_rows(source)
    number = -1
    for number, row in enumerate(rows):
        where = f"{source.path}: row {number}"

        def text(column: str | None, row: Mapping[str, Any] = row, where: str = where) -> str:
            if column is None:
                return ""
            if column not in row:
                raise InputError(f"{where}: column {column!r}", "no such column", f"one of {', '.join(map(str, row))}")
            value = row[column]
            if value is None:
                return ""
            if not isinstance(value, str | int | float) or not is_unicode(str(value)):
                raise InputError(f"{where}: column {column!r}", ascii(value)[:80], "text or a number")
            return str(value)

        prompt, response = text(source.prompt_column).strip(), text(source.response_column)
        task = text(source.task_column) or source.task or file.stem
        if not prompt.replace(MARK, "").strip():
            raise InputError(f"{where}: {source.prompt_column}", "an empty prompt", "at least one character")
        answer = text(source.answer_column) if source.answer_column else final_answer(response)
        yield Prompt(f"{task}-{prompt_hash(prompt)}", task, prompt, response, answer)
    if number < 0:  # beside other sources it would go unnoticed
        raise InputError(f"prompt source {source.path}", "no rows", "at least one")


def _hub_rows(source: PromptSource) -> Iterable[Mapping[str, Any]]:
    import datasets

    try:
        return datasets.load_dataset(
            source.path, source.subset, split=source.split or "train", revision=source.revision
        )  # type: ignore[return-value]
    except Exception as error:  # the library raises its own, the file system's and the network's
        formats = ", ".join(_READERS)
        accepted = f"bundled, stories:<task>, gym:<task>, an existing file ({formats}) or a data set that can be loaded"
        raise InputError(f"prompt source {source.path!r}", first_line(error), accepted) from error


def _file_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        if path.exists() and not path.is_file():
            raise ValueError("no regular file")
        for row in _READERS[path.suffix](path):
            if not isinstance(row, dict):
                break
            yield row
        else:
            return
    except Exception as error:  # each format has its own
        raise InputError(f"prompt source {path}", first_line(error), f"a readable {path.suffix} file") from error
    raise InputError(f"prompt source {path}", "something else", "a list of records with named columns")


def _json_lines(path: Path) -> Iterator[Any]:
    # Without newline it would cut at a lone carriage return too.
    with path.open(encoding="utf-8-sig", newline="\n") as stream:
        for number, line in enumerate(stream):
            try:
                if line.strip():
                    yield parse_json(line)
            except ValueError as error:
                raise ValueError(f"line {number + 1}: {error}") from error


def _json_rows(path: Path) -> list[Any]:
    rows = parse_json(path.read_text(encoding="utf-8-sig"))
    return rows if isinstance(rows, list) else [None]


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8-sig") as stream:
        lines = csv.reader(stream, strict=True)
        names = _each_once(next(lines, []))
        for cells in lines:
            if len(cells) not in (0, len(names)):
                raise ValueError(f"line {lines.line_num}: {len(cells)} cells below {len(names)} names")
            if cells:
                yield dict(zip(names, cells, strict=True))


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    with pq.ParquetFile(path) as file:
        _each_once(file.schema_arrow.names)
        for batch in file.iter_batches(1024):
            yield from batch.to_pylist()


def _each_once(names: list[str]) -> list[str]:
    """The names of columns, of which none is there twice: the last would win."""
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"the column {name!r} twice")
    return names


_READERS: dict[str, Callable[[Path], Iterable[Any]]] = {
    ".jsonl": _json_lines,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}
_COLUMNS = ("path", "size", "task", "prompt_column", "response_column", "answer_column", "task_column")
_READS = {
    "the bundled sets": ("path", "split", "size"),
    "a generator": ("path", "split", "size", "seed", "options"),
    "a file": _COLUMNS,
    "a data set of the hub": (*_COLUMNS, "split", "subset", "revision"),
}
"""Settings that each kind of source reads."""
