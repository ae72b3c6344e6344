"""A hundred kills at random instants: continued by the same command, each result is that of a run nobody disturbed.

Commands run in forked children with everything imported, so that a kill costs a second or two. Figures: docs/reliability.md.
"""

import importlib
import json
import os
import random
import resource
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
KILLS = 25
"""Of each command."""
IN_A_ROW = 5
"""Kills of one run before it is let finish."""

ROLLOUT = ["--rollout.base", "base", "--rollout.sources", '[{"path": "sums.jsonl", "answer_column": "answer"}]']
ROLLOUT += ["--rollout.gen_length", "8", "--rollout.block_length", "4", "--rollout.batch_size", "2"]
FIT = [*ROLLOUT, "--trainer.accelerator", "cpu", "--trainer.max_epochs", "3", "--rollout.limit", "24"]
RUNS = [{"strategy": "full_step"}, {"strategy": "threshold", "options": {"threshold": 0.5}}, {"strategy": "oracle"}]
COMMANDS = {
    "rollout": [
        "train/rollout.py", "predict", *ROLLOUT, "--rollout.folder", "set", "--rollout.limit", "48", "--trainer.accelerator",
        "cpu",
    ],
    "filter": [
        "train/filter.py", "fit", *FIT, "--pipeline.pick_from", "[0.5, 0.9]", "--pipeline.baselines", "[0.9]",
        "--model.channels", "4", "--model.layers", "1",
    ],
    "rounds": [
        "train/filter.py", "fit", *FIT, "--rounds", "2", "--rollout.states", "2", "--pipeline.pick_from", "[0.9]",
        "--pipeline.baselines", "[0.9]", "--model.channels", "4", "--model.layers", "1",
    ],
    "helper": [
        "train/helper.py", "fit", *FIT, "--pipeline.measure_prompts", "3", "--pipeline.mixture_weights", "[0.5, 1]",
        "--model.d_model", "32", "--model.n_heads", "4", "--model.n_kv_heads", "4",
        "--model.n_layers", "1", "--model.mlp_hidden_size", "64",
    ],
    "bench": [
        "eval/bench.py", "--base", "base", "--runs", json.dumps(RUNS), "--limit", "4", "--pick_on", "2", "--repeats", "2",
        "--prompts", '[{"path": "sums.jsonl", "answer_column": "answer"}]', "--gen_length", "8", "--block_length", "4",
    ],
}  # fmt: skip
EOT = [
    *ROLLOUT,
    "--rollout.eot",
    "off",
    "--rollout.eot_evidence",
    "true",
    "--rollout.folder",
    "eot",
    "--rollout.limit",
    "24",
]
MADE = {
    "eot rollout": ["train/rollout.py", "predict", *EOT, "--trainer.accelerator", "cpu"],
    "bench of two": [*COMMANDS["bench"], "--pick_on", "null"],
}
"""What is there before the commands below begin."""
WRITERS = {
    "trace": [
        "eval/trace.py", "--base", "base", "--prompt", "What is 1 + 2?", "--strategies", '["full_step", "threshold"]',
        "--gen_length", "8", "--block_length", "4",
    ],
    "risk": [
        "eval/risk.py", "--strategy", "threshold", "--values", "[0.9, 0.5]", "--base", "base", "--limit", "12", "--prompts",
        '[{"path": "sums.jsonl", "answer_column": "answer"}]', "--gen_length", "8", "--block_length", "4",
    ],
    "card": ["eval/card.py", "--training", "None.", "--base", "base", "--recipes", "[recipe.yaml]", "--limit", "2"],
    "harness": [
        "eval/harness.py", "--base", "base", "--tasks", "short", "--limit", "3", "--gen_length", "32", "--log_samples", "true",
    ],
    "eot": ["train/eot.py", "--rollouts", "eot", "--base", "base", "--steps", "5"],
    "report": ["eval/report.py", "render", "--result", "runs/bench/bench.json"],
}  # fmt: skip
"""Commands that write a result once, at their end."""
RESULT = {
    "rollout": "set",
    "filter": "exports/filter",
    "rounds": "exports/filter",
    "helper": "exports/helper",
    "bench": "runs/bench",
}
RESULT |= {"trace": "runs/trace", "risk": "runs/risk", "card": "base", "harness": "runs/harness", "eot": "exports/eot"}
RESULT |= {"report": "runs/bench"}
FINISHED = ("**/shard-*.json", "**/decodes/*.safetensors")
"""Parts of the work, which are not done again."""


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    names = ["train.rollout", "train.filter", "train.helper", "train.eot", "matplotlib.pyplot"]
    for name in [*names, "eval.bench", "eval.report", "eval.trace", "eval.risk", "eval.card"]:
        importlib.import_module(name)


@pytest.fixture
def place(tiny_checkpoint: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Makes a folder to run in; within it all paths are the same, so that results can be compared byte by byte."""

    def make(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "base").symlink_to(tiny_checkpoint)
        lines = [{"prompt": f"What is {a} + {b}?", "answer": "7", "task": "sums"} for a in range(12) for b in range(12)]
        (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return folder

    return make


def start(command: str, folder: Path, told: int | None = None, most: int | None = None) -> int:
    """The process of a command that was started in a folder.

    Args:
        command: Which.
        folder: Where.
        told: What takes its words; the file ``said`` by default.
        most: Bytes that no file may grow beyond, which the system reports as it reports a full disk.
    """
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.chdir(folder)
        told = told or os.open("said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(told, 1)
        os.dup2(told, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        torch.set_num_threads(1)
        script, *words = (COMMANDS | MADE | WRITERS)[command]
        if most is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        sys.argv = [script, *words]
        runpy.run_path(str(ROOT / script), run_name="__main__")
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def killed(process: int, seconds: float) -> bool:
    """Kills a process after a while; False where it had ended by then."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitpid(process, os.WNOHANG) != (0, 0):
            return False
        time.sleep(0.005)
    os.kill(process, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(process, 0)[1])


def finish(command: str, folder: Path) -> None:
    assert os.waitpid(start(command, folder), 0)[1] == 0, (folder / "said").read_text()


def without_times(value: object) -> object:
    """Plain data without what two undisturbed runs differ in, too."""
    if isinstance(value, dict):
        timed = ("second", "time", "started", "finished", "loop_share", "memory", "date", "generation", "filter_fn")
        return {key: without_times(part) for key, part in value.items() if not any(word in key for word in timed)}
    return [without_times(part) for part in value] if isinstance(value, list) else value


def contents(folder: Path) -> dict[str, object]:
    """Every file of a result: JSON without times, all else as it is, less pictures and tables of times."""
    found: dict[str, object] = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix == ".json":
            found[str(file.relative_to(folder))] = without_times(json.loads(file.read_text()))
        elif file.is_file() and file.name not in ("run.yaml", "bench.md", "bench.png") and "decodes" not in file.parts:
            found[str(file.relative_to(folder))] = file.read_bytes()
    return found


@pytest.mark.slow  # two minutes each
@pytest.mark.parametrize("command", COMMANDS)
def test_killed_at_any_instant(command: str, place: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    undisturbed = place("undisturbed")
    before = time.monotonic()
    finish(command, undisturbed)
    seconds = time.monotonic() - before
    expected = contents(undisturbed / RESULT[command])
    chance, kills, runs, kept = random.Random(command), 0, 0, 0
    while kills < KILLS:
        folder, done = place(f"killed-{runs}"), dict[Path, int]()
        runs += 1
        for _ in range(min(IN_A_ROW, KILLS - kills)):
            if not killed(start(command, folder), chance.uniform(0, seconds)):
                break
            kills += 1
            parts = [file for pattern in FINISHED for file in folder.glob(pattern)]
            done |= {file: file.stat().st_mtime_ns for file in parts if file not in done}
        finish(command, folder)
        assert contents(folder / RESULT[command]) == expected
        again = [file for file, when in done.items() if not file.exists() or file.stat().st_mtime_ns != when]
        assert not again, "made twice, or gone"
        kept += len(done)
        left = [file for file in folder.rglob("*") if file.suffix in (".part", ".tmp", ".new", ".old")]
        assert not left
    with capsys.disabled():
        print(f"\n{command}: {kills} kills in {runs} runs of {seconds:.1f} s each, {kept} finished parts kept")


def run(command: str, folder: Path, most: int | None = None) -> Callable[[], tuple[int, str]]:
    """Starts a command; what is returned waits for its exit status and its words, which need no disk."""
    read, write = os.pipe()
    process = start(command, folder, write, most)
    os.close(write)

    def end() -> tuple[int, str]:
        with os.fdopen(read) as words:
            said = words.read()
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), said

    return end


@pytest.mark.slow
@pytest.mark.parametrize("most", [1000, 4000, 16_000, 64_000])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_ends_it_with_one_line(command: str, most: int, place: Callable[[str], Path]) -> None:
    undisturbed, folder = place("undisturbed"), place("full")
    finish(command, undisturbed)
    status, said = run(command, folder, most)()
    smaller = [0] if most > 1000 else []  # no file of it may have been larger
    assert status in (*smaller, 2, os.EX_IOERR), said  # 2: found out before it began
    assert "Traceback" not in said, said
    assert not [file for file in folder.rglob("*") if file.suffix in (".part", ".tmp", ".new", ".old")]
    finish(command, folder)
    assert contents(folder / RESULT[command]) == contents(undisturbed / RESULT[command])


@pytest.mark.slow
@pytest.mark.parametrize("most", [500, 2000, 8000])
@pytest.mark.parametrize("command", WRITERS)
def test_a_full_disk_leaves_what_is_written_last(command: str, most: int, place: Callable[[str], Path]) -> None:
    undisturbed, folder = place("undisturbed"), place("full")
    for where in (undisturbed, folder):
        checkpoint = (
            where / "base"
        ).resolve()  # the card is written into it, and decodes stories in tokens of few letters
        (where / "base").unlink()
        shutil.copytree(checkpoint, where / "base")
        described = json.loads((where / "base/config.json").read_text()) | {"max_sequence_length": 1024}
        (where / "base/config.json").write_text(json.dumps(described))
        (where / "recipe.yaml").write_text("learning_rate: 3.0e-3\n")
        for made in {"eot": ["eot rollout"], "report": ["bench of two"]}.get(command, []):
            finish(made, where)
    before = contents(folder / RESULT[command])
    finish(command, undisturbed)
    status, said = run(command, folder, most)()
    smaller = [0] if most > 500 else []
    assert status in (*smaller, 2, os.EX_IOERR), said
    assert "Traceback" not in said, said
    assert not [file for file in folder.rglob("*") if file.suffix in (".part", ".tmp", ".new", ".old")]
    after = contents(folder / RESULT[command])
    assert all(after[name] == before[name] for name in before if status), "what was there is lost"
    finish(command, folder)
    assert contents(folder / RESULT[command]) == contents(undisturbed / RESULT[command])


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_two_at_once_share_the_work_or_one_is_refused(command: str, place: Callable[[str], Path]) -> None:
    undisturbed, folder = place("undisturbed"), place("shared")
    finish(command, undisturbed)
    both = [run(command, folder) for _ in range(2)]
    ended = [end() for end in both]
    refused = (
        1 if command in ("filter", "rounds", "helper") else 0
    )  # a run folder belongs to one fit; the others divide the work
    assert sorted(status for status, _ in ended) == [0] * (2 - refused) + [2] * refused, ended
    assert all("in use by process" in said for status, said in ended if status)
    assert contents(folder / RESULT[command]) == contents(undisturbed / RESULT[command])
