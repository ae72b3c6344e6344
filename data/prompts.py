"""Prompts: where they come from, how they are split and encoded."""

import csv
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from data import gym, stories
from data.gym import GymTask
from data.prompt import Prompt, final_answer
from data.stories import StoryTask
from data.typed import Count, Text, Whole, check_fields, checked
from decoding.text import MARK, encode, is_unicode
from models.errors import InputError, first_line

Split = Literal["train", "validation", "test"]
BUNDLED = Path(__file__).resolve().parent / "bundled"


@dataclass
class PromptSource:
    """Where prompts come from: the bundled sets, a generator, a file, or a data set of the Hugging Face hub.

    Args:
        path: ``bundled``; ``stories:<task>``, of our own generator; ``gym:<task>``, of reasoning-gym; a ``.jsonl``, ``.json``,
            ``.csv`` or ``.parquet`` file; or anything that ``datasets.load_dataset`` takes. Code that comes with a data
            set is never run.
        split: Bundled: train, validation or test, by default all of them. Hub: the data set's own split, by default
            train. The split that a prompt belongs to here is decided by its hash all the same.
        size: At most this many prompts, the tasks in turn. A generator needs it.
        task: Task name where there is no ``task_column``; by default the last part of the path.
        prompt_column: Column of the user's message.
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


def prompt_hash(text: str) -> str:
    """First 16 hex digits of the SHA-256 of the prompt text without surrounding white space."""
    return hashlib.sha256(text.strip().encode()).hexdigest()[:16]


def split_of(text: str, validation: float = 0.05, test: float = 0.05) -> Split:
    """Split of a prompt by the hash of its text: stable under reordering, and equal prompts never part.

    Args:
        text: Prompt text, before the chat template.
        validation: Share of prompts in the validation split.
        test: Share of prompts in the test split.
    """
    place = int(prompt_hash(text), 16) / 16**16
    if place < test:
        return "test"
    return "validation" if place < test + validation else "train"


def load_prompts(
    sources: Sequence[PromptSource], split: Split | None = None, limit: int | None = None, per_task: int | None = None
) -> list[Prompt]:
    """Prompts of a mixture; a prompt text that occurs twice is taken once.

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
    if split not in (None, *get_args(Split)):
        raise InputError("split", repr(split), " | ".join(get_args(Split)))
    for name, value in (("limit", limit), ("per_task", per_task)):
        checked(Count | None, value, name)
    if not sources:
        raise InputError("sources", "none", "at least one source of prompts")
    unique: dict[str, Prompt] = {}
    for source in sources:
        for prompt in _take(_read(source), source.size):
            unique.setdefault(prompt_hash(prompt.prompt), prompt)
    chosen = [prompt for prompt in unique.values() if split is None or split_of(prompt.prompt) == split]
    if not chosen:
        raise InputError("prompts", f"none in split {split or 'any'}", "sources with at least one prompt")
    return _with_unique_ids(_in_turn(chosen, per_task)[:limit])


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


def _in_turn(prompts: Iterable[Prompt], per_task: int | None = None) -> list[Prompt]:
    """The tasks in turn, in the order they first occur; within a task the splits in proportion."""
    groups: dict[str, dict[Split, list[Prompt]]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.task, {}).setdefault(split_of(prompt.prompt), []).append(prompt)
    tasks = []
    for splits in groups.values():
        placed = [((n + 0.5) / len(part), prompt) for part in splits.values() for n, prompt in enumerate(part)]
        tasks.append([prompt for _, prompt in sorted(placed, key=lambda pair: pair[0])][:per_task])
    return [prompt for row in itertools.zip_longest(*tasks) for prompt in row if prompt is not None]


def _take(prompts: Iterable[Prompt], size: int | None) -> Iterable[Prompt]:
    return prompts if size is None else _in_turn(prompts)[:size]


def _with_unique_ids(prompts: list[Prompt]) -> list[Prompt]:
    """Ids are unique within a source only; where two sources share one, the later prompt's gets its hash appended."""
    seen: set[str] = set()
    for n, prompt in enumerate(prompts):
        if prompt.id in seen:
            prompts[n] = Prompt(**vars(prompt) | {"id": f"{prompt.id}-{prompt_hash(prompt.prompt)}"})
        seen.add(prompts[n].id)
    return prompts


def _read(source: PromptSource) -> Iterator[Prompt]:
    if source.path == "bundled":
        return _bundled(source)
    if source.path.startswith(("stories:", "gym:")):
        return _generated(source)
    return _columns(source)


def _bundled(source: PromptSource) -> Iterator[Prompt]:
    for name in get_args(Split) if source.split is None else (source.split,):
        if name not in get_args(Split):
            raise InputError("bundled prompts: split", repr(name), " | ".join(get_args(Split)))
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
    yield from unique.values()


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


def _file_rows(path: Path) -> list[dict[str, Any]]:
    try:
        rows = _READERS[path.suffix](path)
    except Exception as error:  # each format has its own
        raise InputError(f"prompt source {path}", first_line(error), f"a readable {path.suffix} file") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"prompt source {path}", "something else", "a list of records with named columns")
    return rows


def _json_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(
        path.read_text(encoding="utf-8-sig").split("\n")
    ):  # splitlines would cut at U+2028 too
        try:
            if line.strip():
                rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"line {number + 1}: {error}") from error
    return rows


def _csv_rows(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8-sig") as stream:
        return list(csv.DictReader(stream, strict=True))


_READERS: dict[str, Callable[[Path], Any]] = {
    ".jsonl": _json_lines,
    ".json": lambda path: json.loads(path.read_text(encoding="utf-8-sig")),
    ".csv": _csv_rows,
    ".parquet": lambda path: pq.read_table(path).to_pylist(),
}
