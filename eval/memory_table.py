"""Counts what decodes take in memory, for docs/memory.md: ``python eval/memory_table.py``, then ``python eval/pages.py``."""

import itertools
import json
from pathlib import Path
from typing import Any

from data.disk import check_writable
from data.provenance import versions, write_aside
from decoding.config import CacheRule, DecodeConfig
from decoding.memory_plan import plan_memory
from decoding.strategies import make_strategy
from eval.command import command

BATCHES, LENGTHS = (1, 16, 64), (256, 1024)
CACHES: tuple[CacheRule, ...] = ("none", "prefix", "dual")
USUAL, KEEPING = "threshold", "klass"
"""Strategies: the usual one, and the one that keeps most beside keys, with whose longest decodes the table ends."""


def main(
    config_file: Path = Path("docs/llada_8b.json"),
    out: Path = Path("eval/results/memory.json"),
    dtype: str = "bfloat16",
    prompt_length: int = 256,
) -> None:
    """Counts decodes of a model over batch sizes, lengths and caches; nothing is decoded and no weights are needed.

    Args:
        config_file: ``config.json`` of the model.
        out: JSON file to write.
        dtype: Dtype of the weights.
        prompt_length: Tokens of each prompt.

    Raises:
        InputError: What :func:`decoding.memory_plan.plan_memory` refuses, or a file that cannot be written.
    """
    check_writable("out", out, folder=False)
    cases = [*itertools.product([USUAL], BATCHES, LENGTHS, CACHES)]
    cases += itertools.product([KEEPING], BATCHES, LENGTHS[-1:], CACHES)
    rows = [counted(str(config_file), dtype, prompt_length, *case) for case in cases]
    usual = _config(LENGTHS[0], "none")
    known = {"config_file": str(config_file), "dtype": dtype, "prompt_length": prompt_length}
    known |= {"block_length": usual.block_length, "eot": usual.eot, "torch": str(versions()["torch"])}
    write_aside(out, json.dumps({"memory": known | {"rows": rows}}, indent=1) + "\n")
    print(f"wrote {out}")


def counted(
    config_file: str, dtype: str, prompt_length: int, strategy: str, batch_size: int, gen_length: int, cache: CacheRule
) -> dict[str, Any]:
    """A row of the table: the decode, and the bytes of its :class:`decoding.memory_plan.MemoryPlan`.

    Raises:
        InputError: What :func:`decoding.memory_plan.plan_memory` refuses.
    """
    config, rule = _config(gen_length, cache), make_strategy(strategy)
    plan = plan_memory(
        config_file, config, rule, dtype=dtype, batch_size=batch_size, prompt_length=prompt_length
    )  # fmt: skip
    return {"strategy": strategy, "batch_size": batch_size, "gen_length": gen_length, "cache": cache} | vars(plan)


def _config(gen_length: int, cache: CacheRule) -> DecodeConfig:
    return DecodeConfig(gen_length, eot="published", cache=cache)  # the rule that reads the whole region


if __name__ == "__main__":
    command(main)
