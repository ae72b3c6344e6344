"""Makes the prompts that ship in ``data/bundled/``: ``python data/make_bundle.py``.

The first test prompts of each task are also written to ``eval/tasks/``, as lm-eval reads them; ``python data/make_bundle.py
tasks`` does only that, from the file that is there.

The tasks and their restrictions are those the bundled base model is trained on; the seeds are not. Each split keeps only
prompts whose hash belongs to it, so none of validation or test is ever in a training stream.
"""

import itertools
import json
import random
import shlex
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from data.prompt import Prompt
from data.prompts import PromptSource, load_prompts, prompt_hash, split_of
from data.provenance import write_aside
from data.stories import StoryTask, samples
from models.checkpoint import writing

SEEDS = {"train": 10_000_000, "validation": 20_000_000, "test": 30_000_000}
SHARES = {"story": 5, "order": 3, "short": 2}
SIZES = {"train": 4000, "validation": 512, "test": 1536}
ROOT = Path(__file__).resolve().parent
TASKS = ROOT.parent / "eval" / "tasks"
TASK_ROWS = 64


def bundled_tasks() -> list[StoryTask]:
    """The tasks of ``configs/base/default.yaml``, whose weights there are the training's, in their shares of the prompts."""
    config = yaml.safe_load((ROOT.parent / "configs/base/default.yaml").read_text())
    return [StoryTask(**task | {"weight": SHARES[task["name"]]}) for task in config["data"]["tasks"]]


def bundle(split: str) -> list[Prompt]:
    """The prompts of one split, the tasks in turn and in their shares; no prompt text twice."""
    tasks = bundled_tasks()
    columns: list[list[Prompt]] = []
    for task in tasks:
        wanted = round(SIZES[split] * task.weight / sum(task.weight for task in tasks))
        unique: dict[str, Prompt] = {}
        for prompt in itertools.islice(samples(task, SEEDS[split]), 200_000):
            if split_of(prompt.prompt) == split:
                unique.setdefault(prompt.prompt, prompt)
            if len(unique) == wanted:
                break
        columns.append(list(unique.values()))
    turns = itertools.chain.from_iterable(itertools.zip_longest(*columns))
    return [prompt for prompt in turns if prompt is not None]


def choices(prompt: Prompt) -> dict[str, Any]:
    """A calculation with four results to choose from, the right one among them; which, depends on the prompt alone."""
    right = int(prompt.answer)
    rng = random.Random(prompt_hash(prompt.prompt))
    numbers = [right, *rng.sample([right + d for d in range(-5, 6) if d and right + d > 0], 3)]
    rng.shuffle(numbers)
    ends = [f"#### {number}" for number in numbers]
    return {"prompt": prompt.prompt, "choices": ends, "label": numbers.index(right)}


def write_tasks() -> None:
    """Writes the data of lm-eval's local tasks."""
    prompts = load_prompts([PromptSource(split="test")], split="test", per_task=TASK_ROWS)
    rows: dict[str, list[dict[str, Any]]] = {}
    for prompt in prompts:
        row = {"task": prompt.task, "prompt": prompt.prompt, "answer": prompt.answer}
        rows.setdefault(prompt.task, []).append(row)
        if prompt.task == "short":
            rows.setdefault("short_choice", []).append(choices(prompt))
    for name, lines in rows.items():
        target = TASKS / f"{name}.jsonl"
        write_aside(target, "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines))
        print(f"{target}: {len(lines)} prompts")


def _usage() -> int:
    """Says which words there are; returns the exit status, 0 where that was asked for."""
    asked = sys.argv[1:] in (["-h"], ["--help"])
    found = "" if asked else f"make_bundle.py: found {shlex.join(sys.argv[1:])}; accepted: "
    (sys.stdout if asked else sys.stderr).write(f"{found}no words, for everything, or `tasks`\n")
    return 0 if asked else 2


def main() -> None:
    """Writes the three files, and the tasks' data."""
    for split in SEEDS:
        table = pa.Table.from_pylist([vars(prompt) for prompt in bundle(split)])
        target = ROOT / "bundled" / f"{split}.parquet"
        with writing(target) as aside:
            pq.write_table(table, aside, compression="zstd")
        print(f"{target}: {table.num_rows} prompts")
    write_tasks()


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["tasks"]):
        sys.exit(_usage())
    write_tasks() if sys.argv[1:] else main()
