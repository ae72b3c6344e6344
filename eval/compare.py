"""Decodes the same prompts in several ways and says what each costs and how good it is, side by side."""

import hashlib
import itertools
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

import data
import decoding
import models
from data.prompt import Prompt
from data.prompts import prompt_hash, tokenizer_hash
from data.provenance import code_digest, environment, now
from data.typed import Count, Length, Share, Temperature, Text, check_fields
from decoding.config import CacheRule, EotRule
from decoding.decoder import Decoder, Generation
from decoding.strategies import Strategy, make_strategy
from eval.measure import measure, timed
from eval.memory import PeakMemory
from models.checkpoint import writing
from models.errors import InputError
from models.predictor import MaskPredictor, fingerprint

_DECODING = (
    "gen_length", "block_length", "eot", "cache", "refresh", "steps", "temperature", "eot_head", "eot_risk",
)  # fmt: skip


@dataclass
class Run:
    """One way to decode; what is ``None`` is taken from the comparison.

    Args:
        strategy: Name of the strategy.
        options: Its settings.
        eot: End-of-text rule.
        eot_head: Folder of the EoT head, for the rule learned.
        eot_risk: Probability of losing text below which that rule ends a text.
        cache: Which keys and values are reused.
        refresh: Forwards of a block from one on the whole sequence to the next.
        steps: Denoising steps.
        temperature: 0 takes the most probable token.
        gen_length: Generated positions.
        block_length: Positions of a block.
        batch_size: Prompts decoded together.
        limit: Takes only so many of the prompts, the first ones.
        dtype: Weights' dtype where it is not to be the predictor's, such as ``bfloat16``.
        label: Name in the table; made from the other fields by default.
        always: Where only what was picked is reported, the benchmark reports it besides, and picks nothing from it.
    """

    strategy: Text
    options: dict[str, Any] = field(default_factory=dict)
    eot: EotRule = "commit"
    cache: CacheRule = "none"
    refresh: Count | None = None
    steps: Length | None = None
    temperature: Temperature = 0.0
    gen_length: Length | None = None
    block_length: Length | None = None
    batch_size: Length | None = None
    limit: Count | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    label: str = ""
    eot_head: Text | None = None
    eot_risk: Share = 0.001
    always: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.label:
            return
        numbers = {name: value for name, value in self.options.items() if isinstance(value, int | float)}
        words = [
            self.strategy,
            *(f"{name} {value:g}" if len(numbers) > 1 else f"{value:g}" for name, value in numbers.items()),
        ]
        words += ["+ filter"] * (self.strategy != "learn2pd" and "filter" in self.options)
        words += [f"{self.cache} cache"] * (self.cache != "none")
        words += [f"EoT {self.eot}"] * (self.eot != "commit") + [f"{self.eot_risk:g}"] * (self.eot == "learned")
        for name in ("refresh", "steps", "gen_length", "block_length", "batch_size", "limit"):
            if (value := getattr(self, name)) is not None:
                words.append(f"{name.removesuffix('_length').removesuffix('_size')} {value}")
        self.label = " ".join([*words, self.dtype or ""]).strip()


class Comparison:
    """The same prompts decoded by several runs, each several times, and what came of it.

    Repeats are interleaved: every run once, then all of them again, so that a machine whose speed drifts favours none.

    Args:
        predictor: The mask predictor.
        prompts: The prompts; without answers there are no figures of exact match.
        runs: What to compare. The first run of each ``gen_length`` is the reference of the others of that length, the
            oracle's included: a full_step decode, uncached, of at least as many prompts.
        gen_length: Generated positions of runs that do not say.
        block_length: Positions of a block, likewise.
        batch_size: Prompts decoded together, likewise.
        chat_template: Wrap prompts in the chat template.
        repeats: How often every run is decoded.
        strategies: Ready-made strategies by label, for components that are not exported yet.
        folder: Keeps every finished decode there, so that an interrupted comparison goes on where it stopped.
        warm_up: Decodes one batch of the longest prompts before a run's first decode, untimed, and measures its memory.

    Raises:
        InputError: A run that cannot be a reference, settings that no strategy takes, or two runs of one name.
    """

    def __init__(
        self, predictor: MaskPredictor, prompts: Sequence[Prompt], runs: Sequence[Run], *, gen_length: int = 128,
        block_length: int = 32, batch_size: int = 32, chat_template: bool = True, repeats: int = 1,
        strategies: dict[str, Strategy] | None = None, folder: Path | None = None, warm_up: bool = False,
    ) -> None:  # fmt: skip
        if repeats < 1:
            raise InputError("repeats", repeats, "a whole number of at least 1")
        usual = {"gen_length": gen_length, "block_length": block_length, "batch_size": batch_size}
        self.runs = [_filled(run, usual) for run in runs]
        self.predictor, self.prompts, self.chat_template, self.repeats = predictor, prompts, chat_template, repeats
        self.reference = self._references()
        labels = [run.label for run in self.runs]
        for label in labels:
            if labels.count(label) > 1:
                raise InputError("runs", f"{labels.count(label)} named {label!r}", "a label of its own for each")
        self.predictors: dict[str | None, MaskPredictor] = {None: predictor}
        for run in self.runs:
            if run.dtype is not None and run.dtype not in self.predictors:
                self.predictors[run.dtype] = predictor.to_dtype(run.dtype)
        ready = strategies or {}
        self.strategies = [ready.get(run.label) or make_strategy(run.strategy, run.options) for run in self.runs]
        self._check()
        self.folder, self.warm_up, self.warm = folder, warm_up, set[int]()
        self.surroundings = [*_surroundings(), _tokenizer(predictor)] if folder else []
        self.files: dict[tuple[int, int], Path] = {}
        self.results: dict[tuple[int, int], Generation] = {}
        self.extras: dict[tuple[int, int], dict[str, Any]] = {}

    def _references(self) -> list[int]:
        """Number of each run's reference."""
        first: dict[int | None, int] = {}
        for number, run in enumerate(self.runs):
            reference = self.runs[first.setdefault(run.gen_length, number)]
            if (reference.strategy, reference.cache, reference.dtype) != ("full_step", "none", None):
                accepted = "full_step, uncached and in the predictor's dtype: the reference of the others"
                raise InputError(f"runs: first of gen_length {run.gen_length}", repr(reference.label), accepted)
            if len(self.prompts[: run.limit]) > len(self.prompts[: reference.limit]):
                accepted = f"at most the reference's {reference.limit}"
                raise InputError(f"runs: limit of {run.label!r}", run.limit, accepted)
        return [first[run.gen_length] for run in self.runs]

    def _check(self) -> None:
        """Whatever stops a decode stops the comparison before its first one; a reference has the prompts of its others."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the decode says it
            for number, run in enumerate(self.runs):
                prompts = self.prompts_of(number) if self.reference[number] == number else self.prompts[:1]
                texts = [prompt.prompt for prompt in prompts]
                self._decoder(number).check(texts, chat_template=self.chat_template, **_settings(run))

    def _decoder(self, number: int) -> Decoder:
        return Decoder(self.predictors[self.runs[number].dtype], self.strategies[number])

    def work(self) -> Iterator[tuple[int, int]]:
        """What is left to decode, in order: number of the run, number of the repeat; stored decodes are read on the way."""
        for repeat in range(self.repeats):
            for number in range(len(self.runs)):
                if not self._stored(number, repeat):
                    yield number, repeat

    def left(self) -> list[tuple[int, int]]:
        """What :meth:`work` will still give, as far as can be told; an oracle's text may depend on what is not decoded yet."""
        every = ((number, repeat) for repeat in range(self.repeats) for number in range(len(self.runs)))
        return [item for item in every if item not in self.results and not self._kept(*item)]

    def decode(self, number: int, repeat: int, progress: Callable[[int], None] = lambda finished: None) -> None:
        """Decodes a run once, and keeps it.

        Args:
            number: The run.
            repeat: The repeat.
            progress: Told the number of finished prompts as it grows.
        """
        extra: dict[str, Any] = {"time": now()}
        if self.warm_up and number not in self.warm:
            longest = sorted(range(len(self.prompts_of(number))), key=lambda n: -len(self.prompts_of(number)[n].prompt))
            with PeakMemory(self.predictor.device) as memory:
                self._generate(number, longest[: self.runs[number].batch_size])
            self.warm.add(number)
            extra["memory"] = memory.result
        strategy = self.strategies[number]
        with timed(getattr(strategy, "network", None), self.predictor.device) as timer:
            out = self._generate(number, range(len(self.prompts_of(number))), progress)
        extra |= {"parameters": strategy.parameters, "component_seconds": timer.read()}
        self.results[number, repeat], self.extras[number, repeat] = out, extra
        if self.folder is not None:
            _save(self._file(number, repeat), out, extra)

    def rows(self) -> list[dict[str, Any]]:
        """The figures of every run, once all is decoded; times are those of the median repeat, the rest is equal in all."""
        rows, rights = [], list[Tensor | None]()
        eot = self.predictor.ids.eot
        for number, run in enumerate(self.runs):
            order = sorted(range(self.repeats), key=lambda n: self.results[number, n].seconds)
            median = order[(len(order) - 1) // 2]
            out, prompts, place = self.results[number, median], self.prompts_of(number), self.reference[number]
            reference = self.results[place, 0].sequences[: len(prompts)]
            known = rights[place] if place < number else None
            right = None if known is None else known[: len(prompts)]
            row = {"label": run.label, "reference": self.runs[place].label, "settings": out.settings}
            row |= measure(
                out, prompts, reference, right, eot, component=self.strategies[number].component,
                component_seconds=self.extras[number, median]["component_seconds"],
            )  # fmt: skip
            rights.append(torch.tensor([mark == "1" for mark in row["right"]]) if row["right"] is not None else None)
            row["seconds_all"] = [self.results[number, n].seconds for n in range(self.repeats)]
            row["times"] = [self.extras[number, n]["time"] for n in range(self.repeats)]
            row["memory"] = self.extras[number, 0].get("memory")
            for learned in ("helper", "component"):
                if learned in row and (parameters := self.extras[number, 0]["parameters"]):
                    row[learned]["parameters"] = parameters
            rows.append(row)
        for row in rows:
            without = _forwards_without_eot(row, rows)
            row["forwards_saved_by_eot"] = None if without is None else without - row["nfe_mean"]
        return rows

    def prompts_of(self, number: int) -> Sequence[Prompt]:
        """The prompts that a run decodes."""
        return self.prompts[: self.runs[number].limit]

    def _generate(
        self, number: int, chosen: Sequence[int], progress: Callable[[int], None] = lambda finished: None
    ) -> Generation:
        run, references, done = self.runs[number], self._oracle_text(number), itertools.count(1)
        assert run.batch_size is not None
        return self._decoder(number).generate(
            [self.prompts[n].prompt for n in chosen],
            batch_size=run.batch_size,
            chat_template=self.chat_template,
            references=None if references is None else references[list(chosen)],
            finished=lambda index, tokens, nfe: progress(next(done)),
            **_settings(run),
        )

    def _oracle_text(self, number: int) -> Tensor | None:
        if self.runs[number].strategy != "oracle":
            return None
        return self.results[self.reference[number], 0].sequences[: len(self.prompts_of(number))]

    def _stored(self, number: int, repeat: int) -> bool:
        """Reads a decode that an earlier call has finished; False if there is none."""
        if not self._kept(number, repeat):
            return False
        decoder = Decoder(self.predictor, self.strategies[number])
        self.results[number, repeat], self.extras[number, repeat] = _load(self._file(number, repeat), decoder)
        return True

    def _kept(self, number: int, repeat: int) -> bool:
        known = self.runs[number].strategy != "oracle" or (self.reference[number], 0) in self.results
        return self.folder is not None and known and self._file(number, repeat).is_file()

    def _file(self, number: int, repeat: int) -> Path:
        """Where a decode is kept: its name changes with everything that its content depends on."""
        assert self.folder is not None
        if (number, repeat) in self.files:
            return self.files[number, repeat]
        references = self._oracle_text(number)
        strategy, head = self.strategies[number], self.runs[number].eot_head
        key = [
            asdict(self.runs[number]) | {"label": "", "always": False}, strategy.settings(), strategy.fingerprints(), repeat,
            self.predictor.fingerprint, str(self.predictor.dtype), str(self.predictor.device),
            [prompt_hash(prompt.prompt) for prompt in self.prompts_of(number)], self.chat_template, self.surroundings,
            None if head is None else fingerprint(Path(head)),
            None if references is None else hashlib.sha256(references.numpy().tobytes()).hexdigest(),
        ]  # fmt: skip
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]
        self.files[number, repeat] = self.folder / f"{self.runs[number].strategy}-{digest}.safetensors"
        return self.files[number, repeat]


def compare(
    predictor: MaskPredictor, prompts: Sequence[Prompt], runs: Sequence[Run], *,
    progress: Callable[[str], None] = lambda label: None, **settings: Any,
) -> list[dict[str, Any]]:  # fmt: skip
    """Decodes ``prompts`` by several runs, from beginning to end.

    Args:
        predictor: The mask predictor.
        prompts: The prompts.
        runs: What to compare.
        progress: Called with each label before its decode starts.
        **settings: See :class:`Comparison`.

    Returns:
        One row for each run, see :func:`eval.measure.measure`.
    """
    comparison = Comparison(predictor, prompts, runs, **settings)
    for number, repeat in comparison.work():
        progress(comparison.runs[number].label)
        comparison.decode(number, repeat)
    return comparison.rows()


def share(value: float | None) -> str:
    """A share as a table's cell; a dash where there is none."""
    return "–" if value is None else f"{100 * value:.1f} %"


def print_table(rows: Sequence[dict[str, Any]], title: str) -> None:
    """Prints the rows on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    names = ("decode", "exact", "vs full_step", "same text", "NFE", "tok/forward", "tok/s", "loop", "× fewer")
    for name in names:
        table.add_column(name, justify="left" if name == "decode" else "right", no_wrap=True)
    for row in rows:
        exact = difference = "–"
        if row["exact_match"] is not None:
            low, high = (100 * end for end in row["paired_difference"]["interval"])
            exact = f"{100 * row['exact_match']:.1f}%"
            difference = f"{100 * row['paired_difference']['mean']:+.1f} ({low:+.1f} to {high:+.1f})"
        table.add_row(
            row["label"], exact, difference, f"{100 * row['sequence_agreement']:.1f}%", f"{row['nfe_mean']:.1f}",
            f"{row['tokens_per_forward']:.2f}",
            f"{row['tokens_per_second']:.0f}", f"{100 * row['loop_share']:.0f}%",
            f"{rows[0]['nfe_mean'] / row['nfe_mean']:.1f}",
        )  # fmt: skip
    longest = max(len(row["label"]) for row in rows)
    Console(width=max(Console().width, 110 + longest)).print(table)


def _filled(run: Run, usual: dict[str, int]) -> Run:
    """The run with every length of its own."""
    missing: dict[str, Any] = {name: value for name, value in usual.items() if getattr(run, name) is None}
    return replace(run, **missing)


def _settings(run: Run) -> dict[str, Any]:
    """Its decode settings, of :class:`DecodeConfig`."""
    return {name: getattr(run, name) for name in _DECODING}


def _forwards_without_eot(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> float | None:
    """Mean NFE of the same decode with the EoT rule off: full_step's is known, others' where they are in the list."""
    settings = row["settings"]
    if settings["strategy"] == "full_step":
        return settings["steps"]
    wanted = {name: value for name, value in settings.items() if not name.startswith("eot_")} | {"eot": "off"}
    wanted["fingerprints"] = {name: value for name, value in settings["fingerprints"].items() if name != "eot"}
    same = (other for other in rows if other["settings"] == wanted and other["prompts"] == row["prompts"])
    return next((other["nfe_mean"] for other in same), None)


def _surroundings() -> list[Any]:
    """What a decode depends on besides its settings: the code it runs through, committed or not, and the machine."""
    known = environment()
    own = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return [
        code_digest(models, decoding, data),
        own,
        *(known[name] for name in ("device", "threads", "torch", "transformers")),
    ]


def _tokenizer(predictor: MaskPredictor) -> str:
    return "" if predictor.tokenizer is None else tokenizer_hash(predictor.tokenizer)


def _save(file: Path, out: Generation, extra: dict[str, Any]) -> None:
    """Writes a decode: its tensors, and what is left of it as text in the file's metadata."""
    tensors = {"sequences": out.sequences, "nfe": out.nfe} | {f"count.{k}": v for k, v in out.counts.items()}
    kept = ("forward_calls", "seconds", "predictor_seconds", "helper_seconds", "settings")
    metadata = {
        name: json.dumps(value)
        for name, value in {"generation": {name: getattr(out, name) for name in kept}, "extra": extra}.items()
    }
    with writing(file) as aside:
        aside.write_bytes(save(tensors, metadata | {"sha256": _digest(tensors, metadata)}))


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Checksum of a stored decode: safetensors have none, and a flipped bit would be another text."""
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def _load(file: Path, decoder: Decoder) -> tuple[Generation, dict[str, Any]]:
    try:
        with safe_open(file, "pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a mapping
            texts = dict(stored.metadata() or {})
            if texts.pop("sha256", None) != _digest(tensors, texts):
                raise ValueError("another checksum than it was written with")
            metadata = {name: json.loads(value) for name, value in texts.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(str(file), error, "a decode as this command wrote it; delete the file") from error
    counts = {name.removeprefix("count."): value for name, value in tensors.items() if name.startswith("count.")}
    text, tokens = decoder.read(tensors["sequences"])
    out = Generation(
        text=text, tokens=tokens, sequences=tensors["sequences"], nfe=tensors["nfe"], counts=counts, trace=None,
        **metadata["generation"],
    )  # fmt: skip
    return out, metadata["extra"]
