"""Decodes the same prompts with several decoders side by side: ``python eval/bench.py``."""

import os
import shlex
import sys
import time
from collections import Counter
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import wandb

from data.disk import check_writable
from data.prompt import Prompt
from data.prompts import PromptSource, load_prompts, prompt_hash
from data.provenance import environment, now, write_run_file
from data.typed import Count, Length, Part, Repeats
from eval.command import command, wandb_mode
from eval.compare import Comparison, Run, print_table
from eval.headline import MARGIN, doubts, headline, picked, summary
from eval.report import write
from eval.result_file import SCHEMA_VERSION
from eval.tracking import USUAL, WandbSettings, evaluation_run
from models.errors import InputError
from models.predictor import MaskPredictor


def main(
    base: str,
    runs: list[Run],
    prompts: list[PromptSource],
    split: Literal["train", "validation", "test"] | None = "test",
    limit: Count | None = None,
    gen_length: Length = 128,
    block_length: Length = 32,
    batch_size: Length = 32,
    repeats: Repeats = 1,
    margin: Part = MARGIN,
    pick_on: Count | None = 256,
    report: Literal["all", "picked"] = "all",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    out: Path = Path("runs/bench"),
    wandb: WandbSettings = USUAL,
) -> None:
    """Writes ``bench.json``, ``bench.md``, ``bench.png`` and ``run.yaml``, prints the table, and logs it all to W&B.

    Interrupted, the same command goes on where it stopped: finished decodes are kept in ``decodes/`` until something that
    they depend on changes.

    Args:
        base: Folder or hub id of the base model.
        runs: What to compare; the first of each gen_length is the reference of the others.
        prompts: Where the prompts come from.
        split: Takes only the prompts whose hash falls into this split, so that nothing was trained on them; null takes all.
        limit: Number of prompts, the tasks in turn.
        gen_length: Generated positions, in tokens.
        block_length: Positions of a block, in tokens.
        batch_size: Prompts decoded together.
        repeats: How often every run is decoded, interleaved; the times are those of the median, of two the faster.
        margin: Loss of exact match against full_step, from 0 to 1, up to which a decode counts as equally good.
        pick_on: Validation prompts of the same sources, decoded besides, on which each strategy's setting for the headline is
            picked; null picks on the prompts that are reported, and says so.
        report: ``picked`` decodes on the reported prompts only what the headline needs: the references, the settings picked on
            the others, and runs that are ``always`` reported, which are not picked from.
        dtype: Weights' dtype of runs that do not say; null for the checkpoint's on a GPU and float32 on a CPU.
        out: Folder of the results.
        wandb: Where W&B files the run.

    Raises:
        InputError: Prompts without answers, or picking on prompts that are reported too.
    """
    settings = {
        "base": base, "runs": [asdict(run) for run in runs], "prompts": [asdict(source) for source in prompts],
        "split": split, "limit": limit, "gen_length": gen_length, "block_length": block_length, "batch_size": batch_size,
        "repeats": repeats, "margin": margin, "pick_on": pick_on, "report": report, "dtype": dtype,
    }  # fmt: skip
    for name in ("runs", "prompts"):
        if not settings[name]:
            raise InputError(name, "none", "at least one")
    check_writable("out", out)
    if pick_on is not None and split in (None, "validation"):
        raise InputError("pick_on", pick_on, "null where validation prompts are reported")
    if pick_on is None and report == "picked":
        raise InputError("report", report, "all where no prompts to pick on are decoded (pick_on: null)")
    mode = wandb_mode()
    predictor = MaskPredictor.from_pretrained(base, dtype=dtype)
    chosen = answered(load_prompts(prompts, split=split, limit=limit))

    def rows_of(prompts: list[Prompt], runs: list[Run], repeats: int, what: str) -> list[dict[str, Any]]:
        comparison = Comparison(
            predictor, prompts, runs, gen_length=gen_length, block_length=block_length, batch_size=batch_size,
            repeats=repeats, folder=out / "decodes", warm_up=True,
        )  # fmt: skip
        sys.stderr.write(f"{len(prompts)} {what}\n")
        decode(comparison)
        return comparison.rows()

    picked_on = None
    if pick_on is not None:
        others = answered(load_prompts(prompts, split="validation", limit=pick_on))
        hashes = [prompt_hash(prompt.prompt) for prompt in others]
        candidates = [run for run in runs if report == "all" or not run.always]
        picked_on = {
            "split": "validation",
            "hashes": hashes,
            "rows": rows_of(others, candidates, 1, "validation prompts, to pick settings on"),
        }
        if report == "picked":
            named = picked(headline(picked_on["rows"], margin)) | {row["reference"] for row in picked_on["rows"]}
            runs = [run for run in runs if run.always or run.label in named]
    rows = rows_of(chosen, runs, repeats, "prompts to report")
    result = {
        "schema_version": SCHEMA_VERSION,
        "command": shlex.join(["python", *sys.argv]),
        "time": now(),
        "environment": environment(),
        "base": {"name": base, "fingerprint": predictor.fingerprint},
        "prompts": {
            "sources": settings["prompts"], "split": split, "tasks": dict(Counter(prompt.task for prompt in chosen)),
            "hashes": [prompt_hash(prompt.prompt) for prompt in chosen],
        },
        "scorers": sorted({scorer for row in rows for scorer in row["scorers"]}),
        "picked_on": picked_on,
        "rows": rows,
    }  # fmt: skip
    write(result, out, margin)
    print_table(rows, f"{len(chosen)} prompts")
    print(summary(result["headline"]))
    for warning in doubts(rows[0], margin):
        print(f"warning: {warning}")
    write_run_file(out / "run.yaml", settings)
    if mode != "disabled":
        log(result, out, settings, wandb, mode)
    print(f"wrote bench.json, bench.md and bench.png to {out}")


def answered(prompts: list[Prompt]) -> list[Prompt]:
    """The prompts, if each has an answer; an empty answer would call every empty text right."""
    without = sum(not prompt.answer for prompt in prompts)
    if without:
        raise InputError(
            "prompts", f"{without} of {len(prompts)} without an answer", "an answer_column or response_column"
        )
    return prompts


def decode(comparison: Comparison) -> None:
    """Decodes what is left, saying how far it is."""
    watch = Watch(comparison)
    try:
        for number, repeat in comparison.work():
            watch.begin(number, repeat)
            comparison.decode(number, repeat, watch.tell)
    except KeyboardInterrupt:
        done = len(comparison.results)
        raise KeyboardInterrupt(f"interrupted after {done} decodes; the same command goes on from there") from None
    finally:
        watch.end()


class Watch:
    """Says on stderr how far a comparison is and about how long it will take.

    The rest is estimated run by run: from the run's own earlier repeat, else from the others' mean time a prompt.

    Args:
        comparison: The comparison.
    """

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self.live = sys.stderr.isatty()
        self.pause = 0.2 if self.live else 20.0  # seconds between two lines of one decode
        self.columns = os.get_terminal_size(sys.stderr.fileno()).columns if self.live else 0

    def begin(self, number: int, repeat: int) -> None:
        """A decode begins."""
        self.number, self.repeat, self.started, self.said = number, repeat, time.monotonic(), -self.pause
        self.later = [n for n, r in self.comparison.left() if (n, r) != (number, repeat)]
        self.tell(0)

    def tell(self, finished: int) -> None:
        """Some prompts of it are finished."""
        passed = time.monotonic() - self.started
        total = len(self.comparison.prompts_of(self.number))
        if finished < total and passed - self.said < self.pause:
            return
        self.said = passed
        known = self.seconds_by_run()
        here = passed / finished * total if finished else self._guess(self.number, known)
        left = [self._guess(n, known) for n in self.later]
        rest = "?"
        if here is not None and None not in left:
            rest = str(timedelta(seconds=round(max(here - passed, 0) + sum(filter(None, left)))))
        total_decodes = len(self.comparison.runs) * self.comparison.repeats
        label = self.comparison.runs[self.number].label
        text = f"decode {total_decodes - len(self.later)}/{total_decodes} | about {rest} left | {label}"
        text += f", {finished} of {total} prompts"
        sys.stderr.write(f"\r{text[: self.columns - 1]:<{self.columns - 1}}" if self.live else f"{text}\n")
        sys.stderr.flush()

    def end(self) -> None:
        """All is decoded."""
        if self.live:
            sys.stderr.write("\n")

    def seconds_by_run(self) -> dict[int, float]:
        """Seconds of the runs that have been decoded at least once."""
        return {number: out.seconds for (number, _), out in self.comparison.results.items()}

    def _guess(self, number: int, known: dict[int, float]) -> float | None:
        if number in known:
            return known[number]
        if not known:
            return None
        size = self.comparison.prompts_of
        return sum(known.values()) / sum(len(size(n)) for n in known) * len(size(number))


def log(result: dict[str, Any], out: Path, settings: dict[str, Any], where: WandbSettings, mode: str) -> None:
    """Logs the table, the plots, the picture and the settings to W&B."""
    columns = ["label", "exact_match", "valid", "sequence_agreement", "token_agreement", "nfe_mean", "nfe_p95"]
    columns += ["tokens_per_forward", "tokens_per_second", "loop_share", "empty_answers", "truncated_correct_answers"]
    run = evaluation_run(where, settings, out, mode)
    table = wandb.Table(columns=list[Any](columns), data=[[row[name] for name in columns] for row in result["rows"]])
    content: dict[str, Any] = {"bench": table, "quality against cost": wandb.Image(str(out / "bench.png"))}
    for cost in ("nfe_mean", "tokens_per_second"):
        content[f"exact match against {cost}"] = wandb.plot.scatter(table, cost, "exact_match")
    run.log(content)
    run.summary["headline"] = result["headline"]
    run.finish()


if __name__ == "__main__":
    command(main, "eval/bench")
