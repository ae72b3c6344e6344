"""Prompts of large sets: in the order they always had, and not in memory."""

import itertools
import json
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data.prompt_list import in_turn
from data.prompts import PromptSource, load_prompts, prompt_hash, read_prompts


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
