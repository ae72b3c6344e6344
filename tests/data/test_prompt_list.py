"""Prompts of large sets: in the order they always had, and not in memory."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.prompt_list import in_turn
from data.prompts import PromptSource, load_prompts, prompt_hash, read_prompts

ROOT = Path(__file__).resolve().parents[2]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=40), st.none() | st.integers(0, 5))
def test_the_order_is_that_of_the_sets_there_are(kinds: list[tuple[int, int]], per_task: int | None) -> None:
    # Another order would give shards other names: no set could be continued.
    groups: dict[int, dict[int, list[int]]] = {}
    for number, (task, split) in enumerate(kinds):
        groups.setdefault(task, {}).setdefault(split, []).append(number)
    tasks = []
    for splits in groups.values():
        placed = [((n + 0.5) / len(part), number) for part in splits.values() for n, number in enumerate(part)]
        tasks.append([number for _, number in sorted(placed, key=lambda pair: pair[0])][:per_task])
    expected = [number for row in itertools.zip_longest(*tasks) for number in row if number is not None]
    both = np.array(kinds, dtype=np.int64).reshape(-1, 2)
    assert in_turn(both[:, 0], both[:, 1], per_task).tolist() == expected


def test_prompts_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    files = []
    for name in ("one", "two"):  # the second source's ids are the first's
        files.append(tmp_path / name / "sums.jsonl")
        files[-1].parent.mkdir()
        texts = (f"{name}: what is {n} + {n}? \u2028 \u00e4" for n in range(1500))
        files[-1].write_text(
            "".join(json.dumps({"prompt": text, "answer": str(n)}) + "\n" for n, text in enumerate(texts))
        )
    sources = [PromptSource(str(file), answer_column="answer") for file in files]
    found, listed = read_prompts(sources), load_prompts(sources)
    assert len(found) == len({prompt.id for prompt in listed}) == 3000  # of several record batches
    assert [found[n] for n in (0, 1023, 1024, 2999, -1)] == [listed[n] for n in (0, 1023, 1024, 2999, -1)]
    assert list(found[5:9]) == listed[5:9]
    assert list(found.hashes()) == [prompt_hash(prompt.prompt) for prompt in listed]
    assert {(prompt.prompt[:3], prompt.answer) for prompt in listed} == {
        (n, str(i)) for n in ("one", "two") for i in range(1500)
    }


_GROWTH = """
import sys, time
from pathlib import Path
from data.prompts import PromptSource, read_prompts

def resident(kind):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) / 1024

before, began = resident("RssAnon"), time.process_time()
found = read_prompts([PromptSource(sys.argv[1], response_column="response")])
for index in range(0, len(found), 97):
    found[index]
print(len(found), resident("RssAnon") - before, time.process_time() - began)
"""


@pytest.mark.slow  # a million prompts
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the process's memory in /proc")
def test_a_million_prompts_are_not_held_in_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, filler = tmp_path / "many.jsonl", "x" * 500
    with file.open("w") as stream:
        for n in range(1_000_000):
            stream.write(json.dumps({"prompt": f"{n} {filler}", "response": filler}) + "\n")
    done = subprocess.run(
        [sys.executable, "-c", _GROWTH, str(file)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    count, grown, seconds = done.stdout.split()
    with capsys.disabled():
        print(f"\n{count} prompts of 1 KB: {float(grown):.0f} MiB of memory, {float(seconds):.0f} s of CPU")
    assert int(count) == 1_000_000
    assert float(grown) < 200
