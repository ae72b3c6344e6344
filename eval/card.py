"""Measures the bundled base model and writes its model card: ``python eval/card.py --training "..."``."""

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.disk import check_writable
from data.labels import after_eot, collect, first_eot, labels
from data.prompt import Prompt
from data.prompts import PromptSource, load_prompts
from data.provenance import environment, write_aside
from data.typed import Count, Length, Text, Whole
from decoding.config import DecodeConfig
from decoding.decoder import Decoder
from decoding.strategies import make_strategy
from eval.command import command
from eval.compare import Run, compare, share
from eval.trace import trace
from models.errors import InputError, first_line
from models.predictor import MaskPredictor

HELD_OUT = [
    PromptSource(f"stories:{name}", size=size, seed=40_000_000, options={"max_number": 40, "wording": "held_out"} | most)
    for name, size, most in (
        ("story", 2600, {"max_events": 5}), ("order", 1500, {"max_events": 6}), ("short", 1000, {})
    )
]  # fmt: skip
"""Prompts in sentences that training never saw; their test split is a twentieth."""
BINS = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.99, 1.0)


def main(
    training: Text,
    base: Path = Path("models/bundled/llada-tiny"),
    recipes: list[Path] = [Path("configs/base/order.yaml"), Path("configs/base/default.yaml")],  # noqa: B006  # shown in --help
    limit: Count | None = None,
    samples: Whole = 10,
    batch_size: Length = 64,
) -> None:
    """Decodes held-out prompts and writes ``README.md`` beside the model.

    Args:
        training: Sentences on the run: steps, time, device, and what departed from the recipe.
        base: Folder of the model.
        recipes: The configurations it was trained with, in order, quoted in the card.
        limit: Number of prompts of each set, the tasks in turn; null for all.
        samples: Sample decodes in the card.
        batch_size: Prompts decoded together.
    """
    if not recipes:
        raise InputError("recipes", "none", "at least one YAML file")
    quoted = "\n".join(map(_quoted, recipes))
    check_writable("base", base / "README.md", folder=False)
    predictor = MaskPredictor.from_pretrained(base)
    prompts = load_prompts([PromptSource(split="test")], split="test", limit=limit)
    strange = load_prompts(HELD_OUT, split="test", limit=limit)
    rows = []
    for title, some, gen_length in (("test", prompts, 128), ("test", prompts, 256), ("held-out wording", strange, 128)):
        sys.stderr.write(f"decoding {len(some)} prompts ({title}, gen_length {gen_length})\n")
        (row,) = compare(predictor, some, [Run("full_step")], gen_length=gen_length, batch_size=batch_size)
        rows += [_accuracy(title, gen_length, name, part) for name, part in (*row["by_task"].items(), ("all", row))]
    sys.stderr.write("decoding prompts to calibrate and to show\n")
    parameters = sum(parameter.numel() for parameter in predictor.model.parameters())
    where = environment()
    text = f"""---
license: apache-2.0
---
# llada-tiny

A LLaDA of {parameters:,} parameters in the official checkpoint format, trained from scratch so that every part of this
repository runs on a laptop. It writes worked answers to three kinds of problems (`data/stories.py`) and knows nothing else. The
wording of an answer is drawn, so the model is in doubt about words that it gets right, and sure of numbers that it gets wrong.

## Accuracy

Full-step decoding (one token a forward; block_length 32, EoT rule `commit`, temperature 0) of prompts that no training
stream holds. Exact: the final answer is right. Valid: every sentence is well formed, and every step right too. Held-out
wording: prompts in sentences that training never saw.

| prompts | gen_length | task | prompts | exact | valid | NFE |
|---|---|---|---|---|---|---|
{chr(10).join(rows)}

Measured with torch {where["torch"]} on {where["device"]}.

## What its confidence is worth

How often a masked position's guess is what full_step ends with, by the confidence at that moment; over all states of a
full-step decode, up to the end of the text. A calibrated model would stay within each row's range.

{calibration(predictor, prompts[:256], batch_size)}

## Training

{training}

First any-order prediction of every response token in one forward (`objective: order`), then LLaDA's objective in its
supervised form: prompt visible, response and its EoT padding masked at ratio t, loss weighted 1/t. Samples are generated
as they are needed. No prompt whose hash falls into the validation or test split is ever trained on, whatever its seed.

{quoted}
## Samples

Test prompts, decoded by `threshold` .9; behind each token the forward that committed it.

{chr(10).join(sample(predictor, prompt) for prompt in prompts[:samples])}"""
    write_aside(base / "README.md", text)
    print(text.split("## Training", maxsplit=1)[0])


def _quoted(recipe: Path) -> str:
    try:
        text = recipe.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise InputError(f"recipes: {recipe}", first_line(error), "a YAML file in UTF-8") from error
    return f"`{recipe}`:\n\n```yaml\n{text}\n```\n"


def _accuracy(title: str, gen_length: int, task: str, part: dict[str, Any]) -> str:
    cells = (title, gen_length, task, part["prompts"], share(part["exact_match"]), share(part["valid"]))
    return f"| {' | '.join(map(str, cells))} | {part['nfe_mean']:.1f} |"


def calibration(predictor: MaskPredictor, prompts: Sequence[Prompt], batch_size: int) -> str:
    """Shares of final guesses by confidence, numbers and words apart, as a Markdown table."""
    assert predictor.tokenizer is not None
    out = Decoder(predictor, make_strategy("full_step")).generate(
        [prompt.prompt for prompt in prompts], batch_size=batch_size, trace=True
    )
    assert out.trace is not None
    steps = collect(out.trace)
    final, evidence = labels(steps, out.sequences), steps.evidence
    first = first_eot(out.sequences, predictor.ids.eot)[steps.rows]
    counted = evidence.masked & ~after_eot(first, steps.block, evidence.masked.shape[1])
    digits = [str(predictor.tokenizer.decode([token])).strip().isdigit() for token in range(predictor.vocab_size)]
    number = torch.tensor(digits)[evidence.token]
    lines = ["| confidence | numbers: guesses | final | words: guesses | final |", "|---|---|---|---|---|"]
    for low, high in itertools.pairwise(BINS):
        inside = counted & (evidence.confidence > low) & (evidence.confidence <= high)
        cells = [f"{low:g} to {high:g}"]
        for kind in (number, ~number):
            cells += [str(int((inside & kind).sum())), _mean(final[inside & kind])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(values: Tensor) -> str:
    return f"{100 * values.double().mean().item():.1f} %" if len(values) else "–"


def sample(predictor: MaskPredictor, prompt: Prompt) -> str:
    """A prompt, what it should give, and its decode with the forward of each token."""
    strategies = [make_strategy("full_step"), make_strategy("threshold")]
    data = trace(predictor, prompt.prompt, strategies, DecodeConfig())
    full, panel = data["panels"]
    words = "".join(
        f"{data['pieces'][token]}<sub>{step}</sub>"
        for token, step in zip(panel["final"][: panel["tokens"]], panel["commit"], strict=False)
    )
    same = "the same text as" if panel["same"] else "another text than"
    return (
        f"> {prompt.prompt}\n\n{words}\n\n{panel['nfe']} forwards, {same} full_step in {full['nfe']}; "
        f"the answer is {prompt.answer}.\n"
    )


if __name__ == "__main__":
    command(main)
