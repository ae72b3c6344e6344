"""Decodes held-out prompts with several strategies side by side: ``python eval/compare.py``."""

import sys
from pathlib import Path

from data.compare import Run, compare, draw, print_table, write_json
from data.prompts import PromptSource, load_prompts
from decoding.entry import command
from models.predictor import MaskPredictor


def main(
    base: str,
    runs: list[Run],
    prompts: list[PromptSource],
    limit: int = 96,
    gen_length: int = 128,
    block_length: int = 32,
    batch_size: int = 32,
    out: Path = Path("runs/compare"),
) -> None:
    """Prints a table and writes ``comparison.json`` and ``comparison.png``.

    Args:
        base: Folder or hub id of the base model.
        runs: What to compare; the first is the reference of the others.
        prompts: Where the prompts come from; only their test split is used.
        limit: Number of prompts, the tasks in turn.
        gen_length: Generated positions, in tokens.
        block_length: Positions of a block, in tokens.
        batch_size: Prompts decoded together.
        out: Folder of the results.
    """
    predictor = MaskPredictor.from_pretrained(base)
    chosen = load_prompts(prompts, split="test", limit=limit)

    def progress(label: str) -> None:
        sys.stderr.write(f"decoding {len(chosen)} prompts: {label}\n")

    rows = compare(
        predictor,
        chosen,
        runs,
        gen_length=gen_length,
        block_length=block_length,
        batch_size=batch_size,
        progress=progress,
    )
    print_table(rows, f"{len(chosen)} held-out prompts")
    write_json(rows, predictor, out / "comparison.json")
    draw(rows, out / "comparison.png")
    print(f"wrote {out / 'comparison.json'} and {out / 'comparison.png'}")


if __name__ == "__main__":
    command(main, "compare/default")
