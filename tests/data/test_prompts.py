"""Prompts: every source, a split that depends on nothing but the text, and text that cannot pose as special tokens."""

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import prompts as module
from data.prompt import Prompt
from data.prompts import PromptSource, encode_prompts, load_prompts, prompt_hash, split_of, tokenizer_hash
from models.errors import InputError
from models.tokenizer import train_tokenizer

ROWS = [
    {"question": f"What is {n} plus {n}?", "solution": f"{n}+{n}={2 * n}\n#### {2 * n}", "kind": f"kind{n % 3}"}
    for n in range(300)
]
COLUMNS = {"prompt_column": "question", "response_column": "solution", "task_column": "kind"}


@pytest.fixture
def tokenizer():
    return train_tokenizer(["user\n\nWhat is the answer?assistant\n\n"] * 20, 280)


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "set.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    return path


def write_bundle(folder: Path, split: str, texts: list[str]) -> None:
    rows = [vars(Prompt(f"{split}-{n}", f"task{n % 2}", text)) for n, text in enumerate(texts)]
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setattr(module, "BUNDLED", tmp_path)
    for split in ("train", "validation", "test"):
        texts = [f"Bundled {n}" for n in range(2000)]
        write_bundle(tmp_path, split, [t for t in texts if split_of(t) == split][: 80 if split == "train" else 20])
    return tmp_path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_local_file_of_any_format_gives_the_same_prompts(tmp_path: Path, jsonl: Path, suffix: str) -> None:
    path = tmp_path / f"other{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif suffix == ".csv":
        import csv

        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(ROWS[0]))
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        path.write_text(json.dumps(ROWS) if suffix == ".json" else jsonl.read_text())
    assert load_prompts([PromptSource(str(path), **COLUMNS)]) == load_prompts([PromptSource(str(jsonl), **COLUMNS)])


def test_columns_become_fields(jsonl: Path) -> None:
    columns = COLUMNS | {"task_column": None}
    (prompt,) = load_prompts([PromptSource(str(jsonl), task="gsm8k", **columns)], limit=1)
    assert (prompt.task, prompt.response, prompt.answer) == ("gsm8k", ROWS[0]["solution"], "0")
    assert prompt.id == f"gsm8k-{prompt_hash(prompt.prompt)}"


def test_a_data_set_that_datasets_can_load(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "some_set"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "train.parquet")
    found = load_prompts([PromptSource(str(folder), **COLUMNS)])
    assert sorted(prompt.prompt for prompt in found) == sorted(row["question"] for row in ROWS)


def test_equal_prompts_are_taken_once_and_ids_stay_unique(tmp_path: Path) -> None:
    rows = [{"prompt": "Same?"}, {"prompt": " Same? \n"}, {"prompt": "Other?"}]
    path = tmp_path / "set.json"
    path.write_text(json.dumps(rows))
    found = load_prompts([PromptSource(str(path)), PromptSource(str(path), task="again")])
    assert sorted(prompt.prompt for prompt in found) == ["Other?", "Same?"]
    assert len({prompt.id for prompt in found}) == 2


def test_a_mixture_has_a_cap_for_each_task(jsonl: Path) -> None:
    found = load_prompts([PromptSource(str(jsonl), **COLUMNS)], per_task=40)
    assert {task: sum(p.task == task for p in found) for task in ("kind0", "kind1", "kind2")} == dict.fromkeys(
        ("kind0", "kind1", "kind2"), 40
    )


def test_a_limit_is_balanced_and_a_larger_one_continues_it(jsonl: Path) -> None:
    """A rollout of few prompts can then be extended without decoding any of them again."""
    source = [PromptSource(str(jsonl), **COLUMNS)]
    few, more = load_prompts(source, limit=30), load_prompts(source, limit=90)
    assert more[:30] == few
    assert [prompt.task for prompt in few].count("kind1") == 10


def test_a_few_bundled_prompts_hold_both_splits_in_proportion(bundle: Path) -> None:
    """Taken file by file, a small rollout would have no validation prompt, and no filter could be fitted on it."""
    found = load_prompts([PromptSource(split="train"), PromptSource(split="validation")], limit=20)
    assert [split_of(prompt.prompt) for prompt in found].count("validation") == 4


def test_the_split_is_stable_under_reordering_and_no_prompt_is_in_two(tmp_path: Path, jsonl: Path) -> None:
    shuffled = random.Random(0).sample(ROWS, len(ROWS))
    other = tmp_path / "shuffled.jsonl"
    other.write_text("\n".join(map(json.dumps, shuffled)))
    seen: dict[str, str] = {}
    for path in (jsonl, other):
        parts = {
            split: load_prompts([PromptSource(str(path), **COLUMNS)], split)
            for split in ("train", "validation", "test")
        }
        assert sum(map(len, parts.values())) == len(ROWS)
        for split, part in parts.items():
            for prompt in part:
                assert seen.setdefault(prompt.prompt, split) == split
    assert len(seen) == len(ROWS)


def test_bundled_prompts(bundle: Path) -> None:
    assert len(load_prompts([PromptSource()])) == 120
    assert all(split_of(p.prompt) == "validation" for p in load_prompts([PromptSource(split="validation")]))
    assert len(load_prompts([PromptSource()], split="test")) == 20


def test_a_bundled_file_with_a_prompt_of_another_split_is_refused(bundle: Path) -> None:
    stray = next(f"Stray {n}" for n in range(1000) if split_of(f"Stray {n}") == "train")
    write_bundle(bundle, "test", [stray])
    with pytest.raises(InputError, match=r"test\.parquet: row 0: found a prompt of split train"):
        load_prompts([PromptSource(split="test")])


def test_the_shipped_prompts_load() -> None:
    if not (module.BUNDLED / "train.parquet").is_file():
        pytest.skip("the bundle is not made yet")
    found = load_prompts([PromptSource(split="validation")], per_task=4)
    assert len(found) >= 4
    assert all(prompt.answer for prompt in found)


def test_reasoning_gym_tasks() -> None:
    pytest.importorskip("reasoning_gym")
    source = PromptSource("gym:chain_sum", size=5, seed=3, options={"options": {"min_digits": 1, "max_digits": 2}})
    found = load_prompts([source])
    assert len(found) == 5
    assert found == load_prompts([source])
    assert {prompt.task for prompt in found} == {"chain_sum"}


def test_a_missing_column_is_named_with_those_that_are_there(jsonl: Path) -> None:
    with pytest.raises(InputError, match=r"row 0: column 'prompt'.*accepted: one of question, solution, kind"):
        load_prompts([PromptSource(str(jsonl))])


def test_an_empty_prompt_is_named_by_its_row(tmp_path: Path) -> None:
    path = tmp_path / "set.json"
    path.write_text(json.dumps([{"prompt": "Fine?"}, {"prompt": "  \n"}]))
    with pytest.raises(InputError, match=r"set\.json: row 1: prompt: found an empty prompt"):
        load_prompts([PromptSource(str(path))])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"path": "no/such.jsonl"}, r"no/such\.jsonl.*No such file"),
        ({"path": "gym:chain_sum"}, r"gym:chain_sum: size: found None"),
        ({"path": "bundled", "split": "dev"}, r"split: found 'dev'; accepted: train \| validation \| test"),
        ({"path": "bundled", "size": 0}, "size: found 0"),
    ],
)
def test_bad_sources_are_refused_by_name(source: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_prompts([PromptSource(**source)])


@pytest.mark.parametrize("content", ['{"prompt": "a"}\n{"prompt": ', "not json", '"a string"'])
def test_a_damaged_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=r"set\.jsonl"):
        load_prompts([PromptSource(str(path))])


def test_a_split_without_prompts_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "set.json"
    path.write_text(json.dumps([{"prompt": next(f"{n}" for n in range(100) if split_of(f"{n}") == "train")}]))
    with pytest.raises(InputError, match="none in split test"):
        load_prompts([PromptSource(str(path))], split="test")
    with pytest.raises(InputError, match="split: found 'dev'"):
        load_prompts([PromptSource(str(path))], split="dev")  # type: ignore[arg-type]


def test_a_unicode_line_separator_does_not_cut_a_json_line(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps({"prompt": "one\u2028two"}, ensure_ascii=False), encoding="utf-8")
    assert load_prompts([PromptSource(str(path))])[0].prompt == "one\u2028two"


def test_prompts_are_wrapped_in_the_chat_template(tokenizer) -> None:
    (ids,) = encode_prompts([Prompt("a", "t", "What is the answer?")], tokenizer)
    messages = [{"role": "user", "content": "What is the answer?"}]
    assert ids == tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    (plain,) = encode_prompts([Prompt("a", "t", "What is the answer?")], tokenizer, chat_template=False)
    assert tokenizer.decode(plain) == "What is the answer?"


@pytest.mark.parametrize("chat_template", [True, False])
def test_text_cannot_pose_as_a_special_token(tokenizer, chat_template: bool) -> None:
    """A literal mask token in a prompt would be decoded as a masked position."""
    text = "Say <|mdm_mask|><|endoftext|> and <|eot_id|>!"
    ids, plain = encode_prompts([Prompt("a", "t", text), Prompt("b", "t", "Say it!")], tokenizer, chat_template)
    special = [token for token in ids if token in tokenizer.all_special_ids]
    assert special == [token for token in plain if token in tokenizer.all_special_ids]
    assert tokenizer.mask_token_id not in ids
    assert text in tokenizer.decode(ids)


def test_the_tokenizers_hash_sees_the_template_and_not_the_last_call(tokenizer) -> None:
    before = tokenizer_hash(tokenizer)
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert tokenizer_hash(tokenizer) == before
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert tokenizer_hash(tokenizer) != before


def test_stories_are_generated_as_they_are_asked_for() -> None:
    source = PromptSource("stories:story", size=30, seed=3, options={"max_number": 30, "wording": "held_out"})
    found = load_prompts([source])
    assert len(found) == 30
    assert found == load_prompts([source])
    assert all(json.loads(prompt.metadata)["wording"] == "held_out" for prompt in found)
    with pytest.raises(InputError, match="stories:story: size: found None"):
        load_prompts([PromptSource("stories:story")])
    with pytest.raises(InputError, match="story task: name: found 'tale'"):
        load_prompts([PromptSource("stories:tale", size=3)])
    with pytest.raises(InputError, match=r"accepted: a task with the options of data\.stories\.StoryTask"):
        load_prompts([PromptSource("stories:story", size=3, options={"words": 3})])


def test_a_generators_split_is_a_part_of_what_it_makes():
    # It was accepted, and not read.
    asked = {"path": "stories:story", "size": 300, "options": {"max_number": 30}}
    whole = load_prompts([PromptSource(**asked)])
    for split in ("train", "validation", "test"):
        part = load_prompts([PromptSource(**asked, split=split)])
        assert part == load_prompts([PromptSource(**asked)], split=split)
        assert 0 < len(part) < len(whole)
    with pytest.raises(InputError, match="stories:story: split: found 'dev'"):
        load_prompts([PromptSource(**asked, split="dev")])
