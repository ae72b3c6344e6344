"""Writes the table of what a decode takes in memory: ``python eval/memory_table.py --config_file config.json --out FILE``."""

import itertools
from pathlib import Path

from data.provenance import versions, write_aside
from decoding.config import CacheRule, DecodeConfig
from decoding.memory_plan import MemoryPlan, plan_memory
from decoding.strategies import make_strategy
from eval.command import command

BATCHES, LENGTHS = (1, 16, 64), (256, 1024)
CACHES: tuple[CacheRule, ...] = ("none", "prefix", "dual")
KEEPING = "klass"
"""The strategy that keeps most beside keys: the table ends with its longest decodes."""


def table(
    config_file: Path, out: Path, dtype: str = "bfloat16", prompt_length: int = 256, strategy: str = "threshold"
) -> None:
    """Counts decodes of a model over batch sizes, lengths and caches; nothing is decoded and no weights are needed.

    Args:
        config_file: ``config.json`` of the model.
        out: Markdown file to write.
        dtype: Dtype of the weights.
        prompt_length: Tokens of each prompt.
        strategy: Strategy of the decodes, but for the last rows.
    """
    cases = [(strategy, *case) for case in itertools.product(BATCHES, LENGTHS, CACHES)]
    cases += [(KEEPING, *case) for case in itertools.product(BATCHES, LENGTHS[-1:], CACHES)]
    rows = []
    for name, batch, length, cache in cases:
        config = DecodeConfig(length, eot="published", cache=cache)
        plan = plan_memory(
            config_file, config, make_strategy(name), dtype=dtype, batch_size=batch, prompt_length=prompt_length
        )
        rows.append(f"| {name} | {batch} | {length} | {cache} | {_cells(plan)} |")
    title = (
        f"# What a decode takes in memory\n\nGiB for `{config_file.name}` in {dtype}: prompts of {prompt_length} tokens, "
        f"blocks of 32, EoT rule `published`, which reads the whole region. Counted on shapes by the loop "
        f"itself (torch {versions()['torch']}), attention fused; what allocator, kernels and device need comes on top.\n"
    )
    head = [
        "| strategy | batch | gen_length | cache | weights | keys | state | activations | evidence | peak |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    write_aside(out, "\n".join([title, *head, *rows]) + "\n")
    print(f"wrote {out}")


def _cells(plan: MemoryPlan) -> str:
    sizes = (plan.weights, plan.keys, plan.state, plan.activations, plan.evidence, plan.peak)
    return " | ".join(f"{size / 2**30:.2f}" for size in sizes)


if __name__ == "__main__":
    command(table)
