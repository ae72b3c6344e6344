"""Rollouts by Ray: the set is that of one process, whoever dies."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from data.prompts import PromptSource
from data.rollout_data import RolloutSettings
from models.errors import InputError
from train.rollout_module import rollout
from train.rollout_ray import RaySettings, rollout_by_ray

ROOT = Path(__file__).resolve().parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file; of the manifest, all but its time stamps."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    manifest = json.loads(files.pop("manifest.json"))
    assert manifest.pop("started") <= manifest.pop("finished")
    return files | {"manifest.json": json.dumps(manifest).encode()}


def actors(mark: str) -> list[int]:
    """Ids of the processes of our own Ray, known by their environment, that decode or get ready to."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            ours = mark.encode() in (folder / "environ").read_bytes()
            if ours and b"RolloutActor" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:  # gone, or somebody else's
            continue
    return found


@pytest.mark.slow  # starts Ray
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the actors in /proc")
def test_a_pool_grows_and_one_actor_killed_it_writes_what_one_process_does(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray.data")
    file, out, mark = tmp_path / "sums.jsonl", tmp_path / "set", f"DLM_ACCEL_TEST={tmp_path}"
    rows = [{"prompt": f"What is {n} plus {'1' * (n % 5 + 1)}?"} for n in range(400)] + [{"prompt": "1 " * 2000}]
    file.write_text("\n".join(map(json.dumps, rows)))
    settings = RolloutSettings(
        str(tiny_checkpoint), tmp_path / "one", [PromptSource(str(file))], batch_size=2, gen_length=32, block_length=8,
        too_long="skip",
    )  # fmt: skip
    words = [
        sys.executable, "train/rollout.py", "predict", "--engine", "ray", "--run", str(tmp_path / "run"),
        "--rollout.base", str(tiny_checkpoint), "--rollout.folder", str(out),
        "--rollout.sources", json.dumps([{"path": str(file)}]), "--rollout.batch_size", "2", "--rollout.gen_length", "32",
        "--rollout.block_length", "8", "--rollout.too_long", "skip", "--ray.actors", "[1, 2]",
        "--trainer.devices", "64", "--trainer.num_nodes", "8",  # Lightning's, which has no say here
    ]  # fmt: skip
    name, _, value = mark.partition("=")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", name: value}
    with subprocess.Popen(
        words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        while not ((there := actors(mark)) and list(out.glob("shard-*.json"))) and run.poll() is None:
            time.sleep(0.01)
        assert len(there) == 1  # as many as at least
        while len(there) < 2 and run.poll() is None:
            there = actors(mark)
        assert len(there) == 2, "the pool did not grow"
        os.kill(there[0], signal.SIGKILL)
        left = len(list(out.glob("shard-*.json")))
        said, errors = run.communicate()
    assert run.returncode == 0, errors
    assert left < 50  # it died in the middle
    assert said.splitlines()[-1].startswith(f"{out}: prompts 400, decoded ")
    record = yaml.safe_load((tmp_path / "run/run.yaml").read_text())["config"]
    assert (record["engine"], record["ray"]["actors"], record["rollout"]["states"]) == ("ray", [1, 2], 4)
    assert "rollout/nfe_oracle" in next((tmp_path / "run").glob("csv/*/metrics.csv")).read_text()
    assert "1 prompts are too long and left out" in errors
    rollout(settings, accelerator="cpu")
    assert contents(out) == contents(tmp_path / "one")
    assert len(json.loads((out / "manifest.json").read_text())["skipped"]) == 1
    # Nothing is left to do, and nothing is done.
    before = {path: path.stat().st_mtime_ns for path in out.glob("s*")}
    subprocess.run(words, cwd=ROOT, env=environment, check=True, capture_output=True)
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("s*")}
    assert not actors(mark)


@pytest.mark.slow  # starts Ray
def test_ray_and_lightning_share_a_folder(tiny_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray.data")
    file, out = tmp_path / "sums.jsonl", tmp_path / "set"
    file.write_text("\n".join(json.dumps({"prompt": f"What is {n} plus {n}?"}) for n in range(400)))
    settings = RolloutSettings(
        str(tiny_checkpoint), tmp_path / "one", [PromptSource(str(file))], batch_size=2, gen_length=32, block_length=8
    )
    words = [
        "--rollout.base", str(tiny_checkpoint), "--rollout.folder", str(out), "--rollout.batch_size", "2",
        "--rollout.sources", json.dumps([{"path": str(file)}]), "--rollout.gen_length", "32", "--rollout.block_length", "8",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    both: dict[str, tuple[subprocess.Popen[str], Path]] = {}
    for engine in ("ray", "lightning"):
        while both and not list(out.glob("shard-*.json")):  # Ray is the slower to begin
            assert both["ray"][0].poll() is None
            time.sleep(0.01)
        said = tmp_path / engine
        with said.open("w") as told:
            more = ["--engine", engine, "--trainer.accelerator", "cpu", "--run", str(tmp_path / f"run-{engine}")]
            start = [sys.executable, "train/rollout.py", "predict", *words, *more]
            process = subprocess.Popen(
                start, cwd=ROOT, env=environment, stdout=told, stderr=subprocess.STDOUT, text=True
            )
        both[engine] = process, said
    for process, said in both.values():
        assert process.wait() == 0, said.read_text()
    decoded = [int(re.findall(r"decoded (\d+),", said.read_text())[0]) for _, said in both.values()]
    assert min(decoded) > 0
    assert sum(decoded) == 400  # none of it twice
    rollout(settings, accelerator="cpu")
    assert contents(out) == contents(tmp_path / "one")


def test_without_ray_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"ray: found not installed .*; accepted: the extra `cluster`: pip install"):
        rollout_by_ray(RolloutSettings(folder=tmp_path / "set"))
    assert not (tmp_path / "set").exists()


def test_a_pool_of_fewer_at_most_than_at_least_is_refused() -> None:
    with pytest.raises(InputError, match=r"ray\.actors: found 3 to 2"):
        RaySettings((3, 2))
