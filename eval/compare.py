"""Decodes held-out prompts with several strategies side by side: ``python eval/compare.py``."""

import itertools
import sys
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import wandb

from data.compare import Run, compare, draw, print_table, write_json
from data.prompts import PromptSource, load_prompts
from decoding.entry import command, wandb_mode
from decoding.record import write_run_file
from models.predictor import MaskPredictor


def main(
    base: str,
    runs: list[Run],
    prompts: list[PromptSource],
    limit: int = 64,
    gen_length: int = 128,
    block_length: int = 32,
    batch_size: int = 32,
    repeats: int = 1,
    picture: bool = True,
    out: Path = Path("runs/compare"),
) -> None:
    """Prints a table and writes ``comparison.json``, ``comparison.png`` and ``run.yaml``; logs them to W&B too.

    Args:
        base: Folder or hub id of the base model.
        runs: What to compare; the first is the reference of the others.
        prompts: Where the prompts come from; only their test split is used.
        limit: Number of prompts, the tasks in turn.
        gen_length: Generated positions, in tokens.
        block_length: Positions of a block, in tokens.
        batch_size: Prompts decoded together.
        repeats: How often every run is decoded, interleaved; the times are those of the median.
        picture: Also draw quality against forwards, which wants runs that differ in their strategy only.
        out: Folder of the results.
    """
    settings = {
        "base": base, "runs": [asdict(run) for run in runs], "prompts": [asdict(source) for source in prompts],
        "limit": limit, "gen_length": gen_length, "block_length": block_length, "batch_size": batch_size, "repeats": repeats,
        "picture": picture,
    }  # fmt: skip
    mode = wandb_mode()
    predictor = MaskPredictor.from_pretrained(base)
    chosen = load_prompts(prompts, split="test", limit=limit)

    total, started = len(runs) * repeats, time.monotonic()
    done = itertools.count()

    def progress(label: str) -> None:
        number = next(done)
        left = timedelta(seconds=round((time.monotonic() - started) / number * (total - number))) if number else "?"
        sys.stderr.write(f"run {number + 1}/{total} | about {left} left | {label}\n")

    rows = compare(
        predictor,
        chosen,
        runs,
        gen_length=gen_length,
        block_length=block_length,
        batch_size=batch_size,
        repeats=repeats,
        progress=progress,
    )
    print_table(rows, f"{len(chosen)} held-out prompts")
    write_json(rows, predictor, out / "comparison.json")
    if picture:
        draw(rows, out / "comparison.png")
    write_run_file(out / "run.yaml", settings)
    if mode != "disabled":
        log(rows, out, settings, mode)
    print(f"wrote comparison.json{' and comparison.png' if picture else ''} to {out}")


def log(rows: list[dict[str, Any]], out: Path, settings: dict[str, Any], mode: Any) -> None:
    """Logs the table, the picture and the settings to W&B."""
    columns: list[Any] = ["label", "exact_match", "sequence_agreement", "token_agreement", "nfe_mean", "nfe_p95"]
    columns += ["tokens_per_forward", "tokens_per_second"]
    run = wandb.init(
        project="dlm-accel",
        job_type="eval",
        config=settings,
        mode=mode,
        dir=out,
        settings=wandb.Settings(silent=True),
    )
    table = wandb.Table(columns=columns, data=[[row[name] for name in columns] for row in rows])
    content: dict[str, Any] = {"comparison": table}
    if settings["picture"]:
        content["quality against NFE"] = wandb.Image(str(out / "comparison.png"))
    run.log(content)
    run.finish()


if __name__ == "__main__":
    command(main, "compare/default")
