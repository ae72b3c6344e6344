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
from decoding.config import EotRule
from decoding.decoder import Decoder, Generation
from decoding.eot import first_true
from decoding.record import environment, write_aside
from decoding.strategies import Strategy, make_strategy
from models.predictor import MaskPredictor

SCHEMA_VERSION = 1


@dataclass
class Run:
    """One way to decode.

    Args:
        strategy: Name of the strategy.
        options: Its settings.
        eot: End-of-text rule.
        label: Name in the table; made from the other fields by default.
    """

    strategy: str
    options: dict[str, Any] = field(default_factory=dict)
    eot: EotRule = "filter"
    label: str = ""

    def __post_init__(self) -> None:
        shown = " ".join(f"{value:g}" for value in self.options.values() if isinstance(value, int | float))
        ending = "" if self.eot == "filter" else f" (EoT {self.eot})"
        self.label = self.label or f"{self.strategy} {shown}".strip() + ending


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
    strategies: dict[str, Strategy] | None = None,
    progress: Callable[[str], None] = lambda label: None,
) -> list[dict[str, Any]]:
    """Decodes ``prompts`` once for each run and measures agreement with the first run, a full_step decode.

    Args:
        predictor: The mask predictor.
        prompts: Prompts with answers.
        runs: What to compare; the first is the reference of all, the oracle's included.
        gen_length: Generated positions.
        block_length: Positions of a block.
        batch_size: Prompts decoded together.
        strategies: Ready-made strategies by label, for components that are not exported yet.
        progress: Called with each label before its decode starts.

    Returns:
        One row for each run; ``paired_difference`` is its exact-match difference to the reference with a standard error.
    """
    rows: list[dict[str, Any]] = []
    reference: Tensor | None = None
    for run in runs:
        progress(run.label)
        strategy = (strategies or {}).get(run.label) or make_strategy(run.strategy, **run.options)
        out = Decoder(predictor, strategy).generate(
            [prompt.prompt for prompt in prompts], gen_length=gen_length, block_length=block_length, eot=run.eot,
            batch_size=batch_size, references=reference if run.strategy == "oracle" else None,
        )  # fmt: skip
        if reference is None:
            reference = out.sequences
        row = row_of(run, out, prompts, reference, predictor.ids.eot) | {"batch_size": batch_size}
        first = rows[0] if rows else row
        difference = torch.tensor(row["exact"], dtype=torch.double) - torch.tensor(first["exact"], dtype=torch.double)
        spread = difference.std(unbiased=False).item() / math.sqrt(len(prompts))
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
        "p95",
        "tok/forward",
        "tok/s",
        "× fewer",
    ):
        table.add_column(name, justify="left" if name == "decode" else "right")
    for row in rows:
        pair = row["paired_difference"]
        table.add_row(
            row["label"], f"{100 * row['exact_match']:.1f}%", f"{100 * pair['mean']:+.1f}±{100 * pair['standard_error']:.1f}",
            f"{100 * row['sequence_agreement']:.1f}%", f"{100 * row['token_agreement']:.1f}%", f"{row['nfe_mean']:.1f}",
            f"{row['nfe_p95']:.0f}", f"{row['tokens_per_forward']:.2f}", f"{row['tokens_per_second']:.0f}",
            f"{rows[0]['nfe_mean'] / row['nfe_mean']:.1f}",
        )  # fmt: skip
    Console(width=max(Console().width, 110)).print(table)


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
    """Draws quality against NFE: one line for each strategy, the reference's quality as a dashed line."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    for axis, key, title in zip(
        axes, ("exact_match", "sequence_agreement"), ("exact match", "same text as full_step"), strict=True
    ):
        names = list(dict.fromkeys(row["settings"]["strategy"] for row in rows))
        for name in names:
            points = sorted((row["nfe_mean"], 100 * row[key]) for row in rows if row["settings"]["strategy"] == name)
            axis.plot(*zip(*points, strict=True), marker="o" if name != "oracle" else "*", label=name,
                      markersize=13 if name == "oracle" else 6)  # fmt: skip
        axis.axhline(100 * rows[0][key], color="grey", linestyle="--", linewidth=1)
        axis.set(xlabel="forwards per answer (NFE)", ylabel=f"{title}, %", xscale="log")
        axis.grid(visible=True, which="both", alpha=0.3)
        axis.legend()
    figure.suptitle(f"{rows[0]['prompts']} held-out prompts, gen_length {rows[0]['settings']['gen_length']}")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130)
    plt.close(figure)
