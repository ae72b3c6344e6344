"""The benchmark command, as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data.prompt import Prompt
from eval.bench import Watch, decode, main
from eval.command import command
from eval.compare import Comparison, Run
from models.predictor import MaskPredictor

ROOT = Path(__file__).resolve().parents[2]
RUNS = [
    {"strategy": "full_step", "eot": "off"},
    {"strategy": "threshold", "options": {"threshold": 0.5}},
    {"strategy": "oracle", "eot": "off"},
]


def bench(folder: Path, *words: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "eval/bench.py"), *map(str, words)],
        cwd=folder, env={**os.environ, "WANDB_MODE": "disabled"}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory, tiny_checkpoint):
    """A finished benchmark: its folder, the words it was started with, and what it printed."""
    folder = tmp_path_factory.mktemp("bench")
    lines = [{"prompt": f"What is {n} + 4?", "answer": "7", "task": "sums"} for n in range(120)]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, lines)))
    sources = [{"path": "sums.jsonl", "answer_column": "answer"}]
    words = [
        "--base", tiny_checkpoint, "--runs", json.dumps(RUNS), "--prompts", json.dumps(sources), "--limit", 4,
        "--pick_on", 2, "--gen_length", 16, "--block_length", 8, "--repeats", 2,
    ]  # fmt: skip
    out = bench(folder, *words)
    assert out.returncode == 0, out.stderr
    return folder, words, out


def test_everything_a_reader_needs_is_written(done, tiny_checkpoint):
    folder, _, out = done
    content = json.loads((folder / "runs/bench/bench.json").read_text())
    rows = content["rows"]
    assert content["schema_version"] == 4
    assert [row["settings"]["strategy"] for row in rows] == ["full_step", "threshold", "oracle"]
    assert rows[0]["nfe_mean"] == 16
    assert rows[2]["sequence_agreement"] == 1.0  # the oracle reproduces its reference
    assert rows[2]["nfe_mean"] < 16
    needed = {"gen_length", "block_length", "steps", "temperature", "eot", "seed", "cache", "batch_size", "dtype"}
    for row in rows:
        assert needed <= set(row["settings"])
        assert row["settings"]["fingerprints"] == {"base": MaskPredictor.from_pretrained(tiny_checkpoint).fingerprint}
    assert {"device", "torch", "git"} <= set(content["environment"])
    assert len(content["prompts"]["hashes"]) == 4
    assert len(content["picked_on"]["hashes"]) == 2
    assert not set(content["picked_on"]["hashes"]) & set(content["prompts"]["hashes"])
    assert [row["prompts"] for row in content["picked_on"]["rows"]] == [2, 2, 2]
    assert "Settings are picked on 2 other prompts" in (folder / "runs/bench/bench.md").read_text()
    assert "warning: full_step answers 0.0 % rightly" in out.stdout
    assert "warning: on 4 prompts even equal answers leave a loss of" in out.stdout
    assert content["headline"][0]["strategies"][0]["strategy"] == "full_step"
    assert (folder / "runs/bench/bench.png").stat().st_size > 10_000
    assert "## At equal quality" in (folder / "runs/bench/bench.md").read_text()
    assert yaml.safe_load((folder / "runs/bench/run.yaml").read_text())["config"]["repeats"] == 2
    assert "oracle EoT off" in out.stdout
    assert "decode 6/6 | about 0:00:" in out.stderr
    assert "oracle EoT off, 4 of 4 prompts" in out.stderr


def test_started_again_it_decodes_only_what_is_missing(done):
    folder, words, _ = done
    before = json.loads((folder / "runs/bench/bench.json").read_text())
    for file in (folder / "runs/bench/decodes").glob("threshold-*"):
        file.unlink()
    again = bench(folder, *words)
    assert again.returncode == 0, again.stderr
    told = [line for line in again.stderr.splitlines() if line.startswith("decode")]
    assert told
    assert all("threshold 0.5" in line for line in told)
    after = json.loads((folder / "runs/bench/bench.json").read_text())
    assert after["rows"][0]["seconds_all"] == before["rows"][0]["seconds_all"]
    assert after["rows"][1]["nfe_mean"] == before["rows"][1]["nfe_mean"]


def test_the_reported_prompts_are_decoded_by_what_was_picked_alone(done):
    folder, words, _ = done
    others = [{"strategy": "threshold", "options": {"threshold": value}} for value in (0.0, 0.99)]
    runs = [*RUNS, *others, {"strategy": "klass", "always": True}]
    out = bench(folder, *words, "--report", "picked", "--out", "runs/picked", "--runs", json.dumps(runs))
    assert out.returncode == 0, out.stderr
    content = json.loads((folder / "runs/picked/bench.json").read_text())
    assert len(content["picked_on"]["rows"]) == 5
    labels = [row["label"] for row in content["rows"]]
    found = content["headline"][0]["strategies"]
    named = {entry[way]["label"] for entry in found for way in ("forwards", "speed") if entry[way]}
    assert set(labels) == named | {"full_step EoT off", "klass"}
    assert len(labels) < 6  # a threshold is the cheapest, another may be the fastest, the third is neither
    assert [entry["settings_tried"] for entry in found] == [1, 3, 1]  # of klass nothing is picked


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--report", "picked", "--pick_on", "null"], "report: found picked; accepted: all where"),
        (["--repeats", 0], "repeats: found 0"),
        (["--margin", 2], "margin: found 2"),
        (["--runs", '[{"strategy": "threshold"}]'], "runs: first of gen_length 16: found 'threshold'"),
        (["--runs", '[{"strategy": "full_step"}, {"strategy": "nothing"}]'], "strategy: found 'nothing'; accepted: full_step |"),
        (["--split", "null"], "pick_on: found 2; accepted: null where"),
        (["--prompts", '[{"path": "sums.jsonl", "answer_column": null}]'], "without an answer; accepted: an answer_column"),
        (["--split", "nothing"], "train | validation | test"),
        (["--repeat", 3], "--repeat 3; accepted: repeats"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_status_2(done, words, message, monkeypatch, capsys):
    folder, usual, _ = done
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as stop:
        command(main, "eval/bench", args=[str(word) for word in [*usual, *words]])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_an_interrupted_benchmark_says_how_it_goes_on(tiny_checkpoint, monkeypatch):
    prompts = [Prompt(str(n), "t", f"word {n}") for n in range(2)]
    predictor = MaskPredictor.from_pretrained(tiny_checkpoint)
    comparison = Comparison(predictor, prompts, [Run("full_step"), Run("threshold")], gen_length=8, block_length=8)
    decode_one = comparison.decode

    def interrupted(number, repeat, progress):
        if number:
            raise KeyboardInterrupt
        decode_one(number, repeat, progress)

    monkeypatch.setattr(comparison, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt, match="after 1 decodes; the same command goes on"):
        decode(comparison)


def test_the_time_left_follows_each_run_s_own_speed(tiny_checkpoint, capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("eval.bench.time.monotonic", lambda: clock[0])
    prompts = [Prompt(str(n), "t", f"word {n}") for n in range(4)]
    predictor = MaskPredictor.from_pretrained(tiny_checkpoint)
    comparison = Comparison(
        predictor, prompts, [Run("full_step"), Run("threshold")], gen_length=8, block_length=8, repeats=2
    )
    watch = Watch(comparison)

    def left() -> str:
        return capsys.readouterr().err.splitlines()[-1].split("| ")[1]

    seconds = {0: 100.0, 1: 10.0}
    for step, (number, repeat) in enumerate(comparison.work()):
        watch.begin(number, repeat)
        begun = left()
        comparison.decode(number, repeat)
        comparison.results[number, repeat].seconds = seconds[number]
        if step == 0:
            assert begun == "about ? left "
        if step == 2:  # this run again, and then the other, whose times are known
            assert begun == "about 0:01:50 left "
            clock[0] += 30
            watch.tell(3)
            assert left() == "about 0:00:20 left "  # three of four in 30 s: 10 more, and the other run's 10
