"""Hostile files: prompts, filters and results that are no such thing, each named with the row or the field."""

import json
import math
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from data.manifest import Rollouts, read_manifest
from data.prompts import PromptSource, load_prompts
from decoding.risk import load_calibration
from eval.headline import headline
from eval.lm.answers import Answers
from eval.pages import TABLES
from eval.report import changes, markdown
from eval.result_file import read
from models.checkpoint import check_files
from models.errors import InputError
from models.families import described
from models.filter import FilterConfig, build_filter, load_filter, save_filter
from models.helper import read_description
from models.predictor import MaskPredictor
from models.stock import helper_folder

ROOT = Path(__file__).resolve().parents[2]

BAD_PROMPTS = ["{}", "[]", '["a"]', '{"a": 1}', "true", '""', '" "', "null", '"\\ue000"', '"\\ud800"', "NaN"]


@pytest.mark.parametrize("value", [value for value in BAD_PROMPTS if value not in ("true", "NaN")])
def test_prompt_columns(tmp_path: Path, value: str) -> None:
    # A list or a mapping would become a prompt that reads like Python.
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"prompt": "fine"}}\n{{"prompt": {value}}}\n')
    with pytest.raises(InputError, match=r"prompts\.jsonl: row 1: .*found .*; accepted: ."):
        load_prompts([PromptSource(str(file))])


@pytest.mark.parametrize("column", ["response_column", "answer_column", "task_column"])
@pytest.mark.parametrize("value", [{"a": 1}, ["a"], b"bytes"], ids=str)
def test_other_columns(tmp_path: Path, column: str, value: object) -> None:
    file = tmp_path / "prompts.parquet"
    pq.write_table(pa.table({"prompt": ["fine"], "other": [value]}), file)
    with pytest.raises(InputError, match=r"row 0: column 'other': found .*; accepted: text or a number"):
        load_prompts([PromptSource(str(file), **{column: "other"})])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.csv", "prompt\nfine\n"), ("a.jsonl", '{"prompt": "fine"}\n'), ("a.json", '[{"prompt": "fine"}]')],
)
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str, text: str) -> None:
    # Excel writes one.
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert [prompt.prompt for prompt in load_prompts([PromptSource(str(tmp_path / name))])] == ["fine"]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json", "a.parquet"])
@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"{", b"5", b"\x00" * 10, b'[{"prompt": "a"}, 5]'])
def test_prompt_files(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}.*: found .*; accepted: ."):
        load_prompts([PromptSource(str(tmp_path / name))])


@pytest.mark.parametrize(
    "change",
    [{"size": 0}, {"size": "5"}, {"size": True}, {"path": ""}, {"path": 5}, {"seed": -1}, {"options": []}, {"task": 5}],
)
def test_prompt_sources(change: dict) -> None:
    with pytest.raises(InputError, match=f"^{next(iter(change))}: found .*; accepted: ."):
        PromptSource(**change)


@pytest.mark.parametrize(
    ("path", "change"),
    [
        *(("bundled", change) for change in (
            {"options": {"a": 1}}, {"answer_column": "nope"}, {"prompt_column": "text"}, {"subset": "a"}, {"seed": 1},
            {"task": "a"}, {"revision": "a"})),
        *(("prompts.jsonl", change) for change in (
            {"subset": "a"}, {"seed": 1}, {"options": {"a": 1}}, {"revision": "a"}, {"split": "test"})),
        *(("stories:story", change) for change in ({"task": "a"}, {"task_column": "a"}, {"subset": "a"})),
        *(("some/set", change) for change in ({"seed": 1}, {"options": {"a": 1}})),
        *((path, {"size": size}) for path in ("stories:story", "gym:chain_sum") for size in (99_999_999_999, 2**20 + 1)),
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_a_source_does_not_read(path: str, change: dict) -> None:
    # It would be as if it had not been given; a hundred thousand million stories would be written to the end.
    with pytest.raises(InputError, match=f"^{next(iter(change))}: found .*; accepted: ."):
        PromptSource(path, **change)


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("a.csv", "prompt,answer\nfine,1\nfine,2,3\n", "line 3: 3 cells below 2 names"),
        ("a.csv", "prompt,answer\nfine,1\nfine\n", "line 3: 1 cells below 2 names"),
        ("a.csv", "prompt,answer,prompt\nfine,1,other\n", "the column 'prompt' twice"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b", "prompt": "c"}\n', "line 2: the key 'prompt' twice"),
        ("a.json", '[{"prompt": "a", "prompt": "b"}]', "the key 'prompt' twice"),
        ("a.jsonl", "[" * 100_000, "line 1: .*nested too deeply"), ("a.json", '{"a":' * 100_000, "nested too deeply"),
        *((f"a.{kind}", None, "no regular file") for kind in ("csv", "jsonl", "json", "parquet")),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_prompt_files_that_say_something_twice_or_never_end(
    tmp_path: Path, alarm: None, name: str, text: str | None, found: str
) -> None:
    os.mkfifo(tmp_path / name) if text is None else (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=rf"{name}: found .*{found}"):
        load_prompts([PromptSource(str(tmp_path / name))])


def test_a_parquet_file_with_a_column_twice(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet: found the column 'prompt' twice"):
        load_prompts([PromptSource(str(tmp_path / "a.parquet"))])


def test_empty_lines_and_line_breaks_of_a_csv_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt,answer\n\n"one\ntwo",1\n\nthree,\n')
    found = load_prompts([PromptSource(str(tmp_path / "a.csv"), answer_column="answer")])
    assert sorted((prompt.prompt, prompt.answer) for prompt in found) == [("one\ntwo", "1"), ("three", "")]


def test_no_sources() -> None:
    with pytest.raises(InputError, match="sources: found none"):
        load_prompts([])


@pytest.fixture
def filter_folder(tmp_path: Path) -> Path:
    config = FilterConfig(gen_length=32, vocab_size=64, mask_id=63, base_fingerprint="f", base_family="llada")
    save_filter(tmp_path / "filter", build_filter(config), config, "card")
    return tmp_path / "filter"


@pytest.mark.parametrize("std", [0.0, -1.0, 1e-45, 1e-30, 9e-7])
def test_a_filter_that_divides_by_nothing(filter_folder: Path, std: float) -> None:
    file = filter_folder / "model.safetensors"
    tensors = load_file(file)
    tensors["std"][2] = std
    save_file(tensors, file)
    with pytest.raises(InputError, match=r"model\.safetensors: std: found"):
        load_filter(filter_folder)


def test_a_filter_that_reads_a_column_twice(filter_folder: Path) -> None:
    file = filter_folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"features": ["confidence"] * len(config["features"])}))
    with pytest.raises(InputError, match=r"config\.json: features: found .*each once"):
        load_filter(filter_folder)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "5", "{}", '{"schema_version": 4}', '{"schema_version": 4, "rows": []}', '{"schema_version": 4, "rows": [{}]}',
     '{"schema_version": 4, "rows": [5]}', '{"schema_version": "4"}', '{"schema_version": [4]}', "[" * 200_000, "9" * 5000,
     '{"schema_version": 4, "schema_version": 4}'],
    ids=lambda value: f"{value:.60}",
)  # fmt: skip
def test_results(tmp_path: Path, content: str) -> None:
    file = tmp_path / "bench.json"
    file.write_text(content)
    with pytest.raises(InputError, match=r"bench\.json.*: found .*; accepted: ."):
        read(file)


def test_a_pipe_is_no_result(tmp_path: Path) -> None:
    # It would be waited for.
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(InputError, match=r"pipe\.json: found no regular file"):
        read(tmp_path / "pipe.json")


@pytest.fixture(scope="module")
def whole_result() -> str:
    """One with everything that a result may hold: settings picked elsewhere, a component, a helper."""
    found = json.loads((ROOT / "eval/results/bench.json").read_text())
    helped = next(row["label"] for row in found["rows"] if "helper" in row)
    for part in (found, found["picked_on"]):
        kept = [row for row in part["rows"] if row["label"] in ("full_step", "threshold 0.9", helped)]
        part["rows"] = [row | {"prompts": 3, "right": "111", "reference": "full_step"} for row in kept]
        for row in part["rows"]:
            row["paired_difference"] |= {"won": 0, "lost": 0}
            for groups in (row["by_task"], row["by_length"]):
                for name in list(groups)[1:]:
                    del groups[name]
        (part.get("prompts") or part)["hashes"] = ["a", "b", "c"]
    found["headline"] = headline(found["rows"], picked_on=found["picked_on"]["rows"])
    return json.dumps(found)


UNREAD = ("counts", "fingerprints", "sources", "speed", "speed_confirmed", "forwards_confirmed", "picked_on")
"""What is in them is not read, or of the type of the reported rows."""


def places(value: object, path: tuple = ()) -> Iterator[tuple]:
    """Where everything in a result stands; of a list only its last."""
    if path:
        yield path
    if isinstance(value, dict) and path[-1:] not in {(name,) for name in UNREAD}:
        for name in value:
            yield from places(value[name], (*path, name))
    elif isinstance(value, list) and value:
        yield from places(value[-1], (*path, len(value) - 1))


def tell(result: dict) -> None:
    """Everything that is made of a result but the picture."""
    for file, _, made in TABLES.values() if result.get("headline") else ():  # else refused by pages
        if file.endswith("bench.json"):
            made(result)
    markdown(result | {"headline": headline(result["rows"], 0.01, (result["picked_on"] or result)["rows"])})
    changes(result, result)


MISSING = object()
BAD = [MISSING, None, -1, math.nan, 10**400, {"a": 5}]


@pytest.mark.parametrize("value", BAD, ids=lambda value: "missing" if value is MISSING else f"{value!r:.10}")
def test_whatever_is_wrong_in_a_result_is_refused_or_does_no_harm(
    whole_result: str, tmp_path: Path, value: object
) -> None:
    # 16 of 22 changes ended in a traceback of compare, render or pages.
    file, result, refused = tmp_path / "bench.json", json.loads(whole_result), []
    file.write_text(whole_result)
    tell(read(file))
    for path in places(result):
        *outer, last = path
        inner = result
        for name in outer:
            inner = inner[name]
        before = dict(inner) if isinstance(inner, dict) else list(inner)
        if value is MISSING:
            del inner[last]
        else:
            inner[last] = value
        file.write_text(json.dumps(result))
        try:
            found = read(file)
        except InputError as error:
            refused.append(str(error))
        else:
            tell(found)
        inner.clear()
        inner.extend(before) if isinstance(before, list) else inner.update(before)
    assert len(refused) > 50
    assert all(re.match(r".*bench\.json.*: found .*; accepted: .", line) for line in refused)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"prompts": -5}, "prompts"), ({"exact_match": 2.0}, "exact_match"), ({"exact_match": None}, "exact_match"),
        ({"seconds": 0}, "seconds"), ({"nfe_mean": math.nan}, "nfe_mean"), ({"right": "11"}, "right"),
        ({"right": "112"}, "right"), ({"label": "full_step"}, "label"), ({"reference": "nobody"}, "reference"),
        ({"by_task": {"a": 5}}, "by_task.a"), ({"by_length": {"many": {}}}, r"by_length\S*"), ({"settings": {}}, "strategy"),
        ({"helper": None}, "helper"), ({"memory": {}}, "memory.peak"), ({"prompts": 10**6}, "prompts"),
        ({"sequence_agreement": None}, "sequence_agreement"), ({"paired_difference": None}, "paired_difference"),
    ],
)  # fmt: skip
def test_rows_of_results(whole_result: str, tmp_path: Path, change: dict, field: str) -> None:
    file, result = tmp_path / "bench.json", json.loads(whole_result)
    result["rows"][1] |= change
    file.write_text(json.dumps(result))
    with pytest.raises(InputError, match=rf"bench\.json: rows\.1\.(settings\.)?{field}: found .*; accepted: ."):
        read(file)


@pytest.mark.parametrize("file", sorted((ROOT / "eval/results").rglob("bench.json")), ids=lambda file: str(file)[-30:])
def test_results_that_are_committed(file: Path) -> None:
    assert read(file)["rows"]


CALIBRATION = ROOT / "models/bundled/filter-llada-tiny/risk.json"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((field, value) for field in ("strategy", "option") for value in (5, "", None, ["a"])),
        *((field, value) for field in ("values", "lost", "bounds", "nfe") for value in (None, 5, "abcd", {}, ["a"] * 4)),
        ("values", [float("nan")] * 4), ("lost", [1.5] * 4), ("lost", [-1] * 4), ("bounds", [2] * 4), ("nfe", [True] * 4),
        ("values", [0.9]), *(("prompts", value) for value in (0, "192", 1.5, None)), ("loss", "life"), ("loss", None),
        *(("confidence", value) for value in (0, 1, "0.9", float("nan"))), ("options", []), ("made", "by hand"),
        ("decoding", {}), ("decoding", None), ("fingerprints", {"base": 5}), ("fingerprints", [1]), ("schema_version", "1"),
    ],
    ids=lambda value: f"{value!r:.20}",
)  # fmt: skip
def test_calibrations(tmp_path: Path, field: str, value: object) -> None:
    # A bound that is no number was a traceback in the middle of choosing a setting.
    file = tmp_path / "risk.json"
    content = json.loads(CALIBRATION.read_text()) | {field: value}
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=rf"risk\.json: (values, lost, bounds, nfe|{field}): found .*; accepted: ."):
        load_calibration(file)


ANSWER = {"key": "a", "text": "7", "tokens": 1, "nfe": 2}
SCORE = {"key": "a", "log_likelihood": -1.5, "greedy": True}


@pytest.mark.parametrize(
    "line",
    ["", "5", "[]", "null", "{", "{}", b"\xff", *(json.dumps(record | change) for record, change in [
        (ANSWER, {"key": 5}), (ANSWER, {"key": ""}), (ANSWER, {"text": None}), (ANSWER, {"tokens": "1"}),
        (ANSWER, {"tokens": -1}), (ANSWER, {"nfe": 1.5}), (ANSWER, {"nfe": None}), (ANSWER, {"colour": 1}),
        (SCORE, {"log_likelihood": "a"}), (SCORE, {"log_likelihood": float("nan")}), (SCORE, {"log_likelihood": 1}),
        (SCORE, {"greedy": 1}), (SCORE, {"greedy": None}),
    ])],
)  # fmt: skip
def test_stored_answers(tmp_path: Path, line: str | bytes) -> None:
    file = tmp_path / "answers-rank0.jsonl"
    text = line if isinstance(line, bytes) else line.encode()
    file.write_bytes(json.dumps(ANSWER).encode() + b"\n" + json.dumps(SCORE).encode() + b"\n" + text + b"\n")
    with pytest.raises(InputError, match=r"answers-rank0\.jsonl: line 3.*: found .*; accepted: ."):
        Answers(tmp_path)


JSON_FILES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "base": ("config.json", lambda folder: described(folder / "config.json")),
    "component": ("config.json", load_filter),
    "helper": ("helper.json", read_description),
    "published helper": ("config.json", helper_folder),
    "index": ("model.safetensors.index.json", check_files),
    "calibration": ("risk.json", lambda folder: load_calibration(folder / "risk.json")),
    "manifest": ("manifest.json", read_manifest),
    "shard": ("shard-a.json", lambda folder: Rollouts(folder, {"shards": ["a"]}).shards),
}
"""Every place that reads JSON: the file it reads, and what reads it."""


@pytest.fixture
def alarm() -> Iterator[None]:
    """A pipe that nobody writes to would be waited for until the end of the suite."""
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("[" * 100_000, "nested too deeply"), ('{"a": ' * 100_000, "nested too deeply"),
        ('{"kind": "a", "kind": "b"}', "the key 'kind' twice"), ('{"a": [{"b": 1, "c": 2, "b": 1}]}', "the key 'b' twice"),
        (None, "no regular file"),
    ],
    ids=["deep list", "deep object", "key twice", "key twice inside", "pipe"],
)  # fmt: skip
@pytest.mark.parametrize("place", JSON_FILES)
def test_json_that_is_none(tmp_path: Path, alarm: None, place: str, content: str | None, found: str) -> None:
    name, read = JSON_FILES[place]
    os.mkfifo(tmp_path / name) if content is None else (tmp_path / name).write_text(content)
    if place == "helper" and content is None:
        found = f"without {name}"
    if place == "published helper" and content is not None:  # one of many kinds of folders, of which none fits
        found = "without model_type"
    with pytest.raises(InputError, match=rf"{name}.*{found}|{found}.*; accepted: ."):
        read(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"])
def test_a_base_with_a_pipe_in_it(tmp_path: Path, alarm: None, tiny_checkpoint: Path, name: str) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "base"))
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(InputError, match=f"{name}: found no regular file"):
        MaskPredictor.from_pretrained(folder, device="cpu")


def test_a_filter_whose_weights_are_a_pipe(filter_folder: Path, alarm: None) -> None:
    (filter_folder / "model.safetensors").unlink()
    os.mkfifo(filter_folder / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.safetensors: found no regular file"):
        load_filter(filter_folder)
