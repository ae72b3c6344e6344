"""Makes the prompts that ship in ``data/bundled/`` (needs the ``gym`` extra): ``python data/make_bundle.py``.

The tasks and their restrictions are those the bundled base model is trained on; the seeds are not. Each split keeps only
prompts whose hash belongs to it, so none of validation or test is ever in a training stream.
"""

import itertools
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from data.gym import GymTask, samples
from data.prompts import Prompt, split_of

SEEDS = {"train": 10_000_000, "validation": 20_000_000, "test": 30_000_000}
PER_TASK = {"train": 700, "validation": 128, "test": 512}
ROOT = Path(__file__).resolve().parent


def bundled_tasks() -> list[GymTask]:
    """The tasks of ``configs/base/default.yaml``."""
    config = yaml.safe_load((ROOT.parent / "configs/base/default.yaml").read_text())
    return [GymTask(**task) for task in config["data"]["tasks"]]


def bundle(split: str) -> list[Prompt]:
    """The prompts of one split, the tasks in turn; no prompt text twice."""
    columns: list[list[Prompt]] = []
    for task in bundled_tasks():
        unique: dict[str, Prompt] = {}
        # A task of few different prompts gives what it has: 1-digit sums have some 4,000 in all.
        for prompt in itertools.islice(samples(task, SEEDS[split]), 200_000):
            if split_of(prompt.prompt) == split:
                unique.setdefault(prompt.prompt, prompt)
            if len(unique) == PER_TASK[split]:
                break
        columns.append(list(unique.values()))
    turns = itertools.chain.from_iterable(itertools.zip_longest(*columns))
    return [prompt for prompt in turns if prompt is not None]


def main() -> None:
    """Writes the three files."""
    for split in SEEDS:
        table = pa.Table.from_pylist([vars(prompt) for prompt in bundle(split)])
        target = ROOT / "bundled" / f"{split}.parquet"
        target.parent.mkdir(exist_ok=True)
        pq.write_table(table, target, compression="zstd")
        print(f"{target}: {table.num_rows} prompts")


if __name__ == "__main__":
    main()
