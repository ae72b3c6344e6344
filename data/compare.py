"""Decodes the same prompts in several ways and says what each costs and how good it is, side by side."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.prompts import Prompt, final_answer
from decoding.config import CacheRule, EotRule
from decoding.decoder import Decoder, Generation
from decoding.eot import first_true
from decoding.record import environment, write_aside
from decoding.strategies import Strategy, make_strategy
from models.errors import InputError
from models.predictor import MaskPredictor

SCHEMA_VERSION = 2


@dataclass
class Run:
    """One way to decode; what is ``None`` is taken from the comparison.

    Args:
        strategy: Name of the strategy.
        options: Its settings.
        eot: End-of-text rule.
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
    """

    strategy: str
    options: dict[str, Any] = field(default_factory=dict)
    eot: EotRule = "filter"
    cache: CacheRule = "none"
    refresh: int | None = None
    steps: int | None = None
    temperature: float = 0.0
    gen_length: int | None = None
    block_length: int | None = None
    batch_size: int | None = None
    limit: int | None = None
    dtype: str | None = None
    label: str = ""

    def __post_init__(self) -> None:
        if self.label:
            return
        numbers = {name: value for name, value in self.options.items() if isinstance(value, int | float)}
        words = [
            self.strategy,
            *(f"{name} {value:g}" if len(numbers) > 1 else f"{value:g}" for name, value in numbers.items()),
        ]
        words += ["+ filter"] * (self.strategy != "learn2pd" and "filter" in self.options)
        words += [f"{self.cache} cache"] * (self.cache != "none")
        words += [f"EoT {self.eot}"] * (self.eot != "filter")
        for name in ("refresh", "steps", "gen_length", "block_length", "batch_size", "limit"):
            if (value := getattr(self, name)) is not None:
                words.append(f"{name.removesuffix('_length').removesuffix('_size')} {value}")
        self.label = " ".join([*words, self.dtype or ""]).strip()


def agreement(ours: Tensor, reference: Tensor, eot: int) -> tuple[Tensor, Tensor]:
    """How far decodes equal their references, counting only text: what follows the first EoT never counts.

    Args:
        ours: ``(B, G)`` int64.
        reference: ``(B, G)`` int64.
        eot: Id of the EoT token.

    Returns:
        Per row, whether the texts are equal (``(B,)`` bool), and the share of equal positions up to the end of the longer
        text, its EoT included (``(B,)`` float32).
    """
    ends = torch.maximum(first_true(ours == eot), first_true(reference == eot))
    counted = torch.arange(ours.shape[1]) <= ends[:, None]
    both = counted & (ours == reference)
    share = both.sum(1) / counted.sum(1)
    return (both == counted).all(1), share


def row_of(run: Run, out: Generation, prompts: Sequence[Prompt], reference: Tensor, eot: int) -> dict[str, Any]:
    """One row of the comparison: settings, quality and cost of one decode of all prompts."""
    exact = torch.tensor([final_answer(p.task, text) == p.answer for p, text in zip(prompts, out.text, strict=True)])
    same, share = agreement(out.sequences, reference, eot)
    nfe = out.nfe.double()
    tokens = sum(map(len, out.tokens))
    tasks = sorted({prompt.task for prompt in prompts})
    of_task = {task: torch.tensor([prompt.task == task for prompt in prompts]) for task in tasks}
    return {
        "label": run.label,
        "settings": out.settings,
        "prompts": len(prompts),
        "exact_match": exact.double().mean().item(),
        "exact_match_by_task": {task: exact[rows].double().mean().item() for task, rows in of_task.items()},
        "sequence_agreement": same.double().mean().item(),
        "token_agreement": share.double().mean().item(),
        "nfe_mean": nfe.mean().item(),
        "nfe_median": nfe.median().item(),
        "nfe_p95": nfe.quantile(0.95).item(),
        "nfe_by_task": {task: nfe[rows].mean().item() for task, rows in of_task.items()},
        "tokens": tokens,
        "tokens_per_forward": tokens / nfe.sum().item(),
        "tokens_per_second": tokens / out.seconds,
        "seconds": out.seconds,
        "predictor_seconds": out.predictor_seconds,
        "helper_seconds": out.helper_seconds,
        "tokens_per_second_without_helper": tokens / (out.seconds - out.helper_seconds),
        "loop_share": 1 - (out.predictor_seconds + out.helper_seconds) / out.seconds,
        "forward_calls": out.forward_calls,
        "empty_answers": sum(not row for row in out.tokens) / len(prompts),
        "counts": {name: int(count.sum()) for name, count in out.counts.items()},
        "exact": exact.tolist(),
    }


def compare(
    predictor: MaskPredictor,
    prompts: Sequence[Prompt],
    runs: Sequence[Run],
    *,
    gen_length: int = 128,
    block_length: int = 32,
    batch_size: int = 32,
    repeats: int = 1,
    strategies: dict[str, Strategy] | None = None,
    progress: Callable[[str], None] = lambda label: None,
) -> list[dict[str, Any]]:
    """Decodes ``prompts`` in several ways and measures what each costs and how it agrees with its reference.

    Repeats are interleaved: every run once, then all of them again, so that a machine whose speed drifts favours none.
    Times are those of the median repeat; everything else is the same in all of them.

    Args:
        predictor: The mask predictor.
        prompts: Prompts with answers.
        runs: What to compare. The first run of each ``gen_length`` is the reference of the others of that length, the
            oracle's included: a full_step decode, uncached, of at least as many prompts.
        gen_length: Generated positions.
        block_length: Positions of a block.
        batch_size: Prompts decoded together.
        repeats: How often every run is decoded.
        strategies: Ready-made strategies by label, for components that are not exported yet.
        progress: Called with each label before its decode starts.

    Returns:
        One row for each run; ``paired_difference`` is its exact-match difference to the reference with a standard error.

    Raises:
        InputError: A run that cannot be a reference, or settings that cannot be decoded.
    """
    if repeats < 1:
        raise InputError("repeats", repeats, "a whole number of at least 1")
    predictors: dict[str | None, MaskPredictor] = {None: predictor}
    results: list[list[Generation]] = [[] for _ in runs]
    first: dict[int, int] = {}
    for number, run in enumerate(runs):
        place = first.setdefault(run.gen_length or gen_length, number)
        reference = runs[place]
        if (reference.strategy, reference.cache, reference.dtype) != ("full_step", "none", None):
            accepted = "full_step, uncached and in the predictor's dtype: the reference of the others"
            raise InputError(
                f"runs: first of gen_length {run.gen_length or gen_length}", repr(reference.label), accepted
            )
        if (run.limit or len(prompts)) > (reference.limit or len(prompts)):
            raise InputError(f"runs: limit of {run.label!r}", run.limit, f"at most the reference's {reference.limit}")
        if run.dtype is not None and run.dtype not in predictors:
            predictors[run.dtype] = predictor.to_dtype(run.dtype)
    ready = [(strategies or {}).get(run.label) or make_strategy(run.strategy, **run.options) for run in runs]
    for repeat in range(repeats):
        for number, run in enumerate(runs):
            progress(run.label if repeats == 1 else f"{run.label} ({repeat + 1} of {repeats})")
            chosen = prompts[: run.limit]
            length = run.gen_length or gen_length
            references = results[first[length]][0].sequences[: len(chosen)] if run.strategy == "oracle" else None
            out = Decoder(predictors[run.dtype], ready[number]).generate(
                [prompt.prompt for prompt in chosen], gen_length=length, block_length=run.block_length or block_length,
                eot=run.eot, cache=run.cache, refresh=run.refresh, steps=run.steps, temperature=run.temperature,
                batch_size=run.batch_size or batch_size, references=references,
            )  # fmt: skip
            results[number].append(out)
    rows: list[dict[str, Any]] = []
    for run, outs in zip(runs, results, strict=True):
        out = sorted(outs, key=lambda out: out.seconds)[(len(outs) - 1) // 2]
        place = first[run.gen_length or gen_length]
        chosen = prompts[: run.limit]
        row = row_of(run, out, chosen, results[place][0].sequences[: len(chosen)], predictor.ids.eot)
        row |= {"batch_size": run.batch_size or batch_size, "dtype": run.dtype or str(predictor.dtype).split(".")[-1]}
        row |= {"repeats": repeats, "seconds_all": [out.seconds for out in outs]}
        base = (rows[place] if place < len(rows) else row)["exact"][: len(chosen)]
        difference = torch.tensor(row["exact"], dtype=torch.double) - torch.tensor(base, dtype=torch.double)
        spread = difference.std(unbiased=False).item() / math.sqrt(len(chosen))
        row["paired_difference"] = {"mean": difference.mean().item(), "standard_error": spread}
        rows.append(row)
    return rows


def print_table(rows: Sequence[dict[str, Any]], title: str) -> None:
    """Prints the rows on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for name in (
        "decode",
        "exact",
        "± vs first",
        "same text",
        "same tokens",
        "NFE",
        "tok/forward",
        "tok/s",
        "loop",
        "× fewer",
    ):
        table.add_column(name, justify="left" if name == "decode" else "right", no_wrap=True)
    for row in rows:
        pair = row["paired_difference"]
        table.add_row(
            row["label"], f"{100 * row['exact_match']:.1f}%", f"{100 * pair['mean']:+.1f}±{100 * pair['standard_error']:.1f}",
            f"{100 * row['sequence_agreement']:.1f}%", f"{100 * row['token_agreement']:.1f}%", f"{row['nfe_mean']:.1f}",
            f"{row['tokens_per_forward']:.2f}", f"{row['tokens_per_second']:.0f}",
            f"{100 * row['loop_share']:.0f}%", f"{rows[0]['nfe_mean'] / row['nfe_mean']:.1f}",
        )  # fmt: skip
    longest = max(len(row["label"]) for row in rows)
    Console(width=max(Console().width, 110 + longest)).print(table)


def write_json(rows: Sequence[dict[str, Any]], predictor: MaskPredictor, target: Path) -> None:
    """Writes the rows with their environment, aside first and then renamed."""
    content = {
        "schema_version": SCHEMA_VERSION,
        "base_fingerprint": predictor.fingerprint,
        "environment": environment(),
        "rows": list(rows),
    }
    write_aside(target, json.dumps(content, indent=1) + "\n")


def draw(rows: Sequence[dict[str, Any]], target: Path) -> None:
    """Draws quality against NFE and against tokens/s; a line joins runs that differ in the value of a setting only.

    The reference's quality is a dashed line.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault(_series(row["settings"]), []).append(row)
    panels = [("nfe_mean", "exact_match"), ("nfe_mean", "sequence_agreement"), ("tokens_per_second", "exact_match")]
    words = {
        "nfe_mean": "forwards per answer (NFE)", "tokens_per_second": "generated tokens per second",
        "exact_match": "exact match, %", "sequence_agreement": "same text as full_step, %",
    }  # fmt: skip
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), constrained_layout=True)
    for axis, (cost, quality) in zip(axes, panels, strict=True):
        for name, points in lines.items():
            marker, size = ("*", 13) if name == "oracle" else ("o", 6)
            places = sorted((row[cost], 100 * row[quality]) for row in points)
            axis.plot(*zip(*places, strict=True), marker=marker, markersize=size, label=name)
        axis.axhline(100 * rows[0][quality], color="grey", linestyle="--", linewidth=1)
        axis.set(xlabel=words[cost], ylabel=words[quality], xscale="log")
        axis.grid(visible=True, which="both", alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(len(lines), 6))
    figure.suptitle(f"{rows[0]['prompts']} held-out prompts, gen_length {rows[0]['settings']['gen_length']}")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130)
    plt.close(figure)


def _series(settings: dict[str, Any]) -> str:
    """Name of the line that a run belongs to: its strategy and which settings it has beside the usual ones."""
    extra = [name for name in ("filter", "kv_window", "max_lookahead") if settings.get(name) is not None]
    words = [
        settings["strategy"],
        *(f"+ {name}" for name in extra if (settings["strategy"], name) != ("learn2pd", "filter")),
    ]
    words += [f"{settings['cache']} cache"] * (settings["cache"] != "none")
    words += [f"EoT {settings['eot']}"] * (settings["eot"] != "filter")
    return " ".join(words)
