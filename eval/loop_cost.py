"""What the decode loop costs beside the forwards of a model of given sizes, on random weights: ``python eval/loop_cost.py``."""

import json
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field

from data.disk import check_writable
from data.provenance import environment, now, write_aside
from data.typed import Count, Length
from decoding.config import CacheRule, DecodeConfig
from decoding.loop import decode
from decoding.strategies import STRATEGIES, Strategy, make_strategy
from eval.command import command
from models.errors import InputError
from models.filter import FilterConfig, build_filter
from models.predictor import MaskPredictor, usable_device
from models.rules import check, list_of, one_of

BESIDE = ("oracle", "apd")
"""Strategies that random weights say nothing about: one needs references, one a helper, whose forwards are no loop."""
COLUMNS = ["decode", "batch", "cache", "forwards", "ms a forward", "ms of the loop", "loop's share of the wall"]


def main(
    config_file: Path = Path("docs/llada_8b.json"),
    strategies: Annotated[list[str], Field(min_length=1)] = ["full_step", "threshold", "klass", "dico", "learn2pd"],  # noqa: B006 - never changed
    caches: Annotated[list[CacheRule], Field(min_length=1)] = ["none", "dual"],  # noqa: B006
    batch_sizes: Annotated[list[Length], Field(min_length=1)] = [1, 16],  # noqa: B006
    prompt_length: Length = 256,
    gen_length: Length = 64,
    block_length: Length = 32,
    repeats: Count = 3,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    device: str | None = None,
    out: Path = Path("runs/loop_cost/loop.json"),
) -> None:
    """Decodes with random weights and writes a table of where the time goes; nothing has to be downloaded.

    Random weights are sure of nothing, so strategies commit one token a forward: the forwards of any decode, with the strategy's
    whole work beside each. The filter is a random one of the default sizes.

    Args:
        config_file: ``config.json`` of the model, or its folder; its weights are not read.
        strategies: What to decode with.
        caches: Cache rules.
        batch_sizes: Prompts decoded together.
        prompt_length: Tokens of each prompt.
        gen_length: Generated positions.
        block_length: Positions of a block.
        repeats: How often each is decoded, after once to warm up; the median is written.
        dtype: Dtype of the weights.
        device: Where; a GPU where there is one.
        out: JSON file to write.

    Raises:
        InputError: No description of a model, a strategy that needs more, or a file that cannot be written.
    """
    check({"strategies": strategies}, {"strategies": list_of(one_of([n for n in STRATEGIES if n not in BESIDE]), "")})
    check_writable("out", out, folder=False)
    torch.manual_seed(0)
    with usable_device(device):
        predictor = MaskPredictor.fresh(config_file, dtype)
    room = predictor.max_length - gen_length
    if prompt_length > room:
        raise InputError(
            "prompt_length", prompt_length, f"at most {room}: the model's {predictor.max_length} less gen_length"
        )
    rows = []
    for batch_size in batch_sizes:
        for cache in caches:
            config = DecodeConfig(gen_length, block_length, eot="off", cache=cache)
            for name in strategies:
                seconds, forwards = timed(predictor, name, config, batch_size, prompt_length, repeats)
                rows.append([name, batch_size, cache, forwards, *seconds])
                print(" | ".join(str(cell) for cell in rows[-1]), flush=True)
    weights = sum(each.numel() for each in predictor.model.parameters())
    where = environment()
    measured = (
        f"{weights / 1e9:.2f} B random weights in the sizes of {config_file.name}, {dtype}, {where['device']}, torch "
        f"{where['torch']}; prompts of {prompt_length} tokens, gen_length {gen_length}, block_length {block_length}; median of "
        f"{repeats}; {now()[:10]}"
    )
    write_aside(out, json.dumps({"loop": {"measured": measured, "columns": COLUMNS, "rows": rows}}, indent=1) + "\n")
    print(f"wrote {out}")


def timed(
    predictor: MaskPredictor, name: str, config: DecodeConfig, rows: int, length: int, repeats: int
) -> tuple[list[str], int]:
    """Cells of one decode: milliseconds of a forward, of the loop beside it, and its share; and the forwards.

    Args:
        predictor: The model.
        name: The strategy.
        config: Decode settings.
        rows: Prompts, decoded together.
        length: Tokens of each.
        repeats: How often.
    """
    prompts = torch.randint(4, predictor.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))
    strategy, found = strategy_of(predictor, name, config), []
    for _ in range(repeats + 1):
        out = decode(predictor, prompts.tolist(), config, strategy)
        found.append((out.seconds, out.predictor_seconds, out.forward_calls))
    seconds, inside, forwards = sorted(found[1:])[repeats // 2]
    beside = seconds - inside
    cells = [f"{1000 * inside / forwards:.2f}", f"{1000 * beside / forwards:.2f}", f"{100 * beside / seconds:.1f} %"]
    return cells, forwards


def strategy_of(predictor: MaskPredictor, name: str, config: DecodeConfig) -> Strategy:
    """A strategy; one that reads a filter has a random one, which calls nothing final."""
    if name != "learn2pd":
        return make_strategy(name)
    described_by = FilterConfig(
        block_length=config.block_length, gen_length=config.gen_length, vocab_size=predictor.vocab_size,
        mask_id=predictor.ids.mask, base_fingerprint=predictor.fingerprint, base_family=predictor.family, threshold=1.0,
    )  # fmt: skip
    return make_strategy(name, network=build_filter(described_by).eval(), config=described_by)


if __name__ == "__main__":
    command(main)
