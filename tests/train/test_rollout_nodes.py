"""Rollouts by several machines: under torchrun and under SLURM, as far as processes on one machine show it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.prompts import PromptSource
from data.rollout_data import RolloutSettings
from train.rollout_module import rollout

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "sums.jsonl"
    rows = [{"prompt": f"What is {n} plus {'1' * (n % 5 + 1)}?"} for n in range(160)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def whole(tiny_checkpoint: Path, file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process writes."""
    folder = tmp_path_factory.mktemp("whole")
    settings = RolloutSettings(
        str(tiny_checkpoint), folder, [PromptSource(str(file))], batch_size=2, gen_length=32, block_length=8
    )
    rollout(settings, accelerator="cpu")
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file; of the manifest, all but its time stamps."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    manifest = json.loads(files.pop("manifest.json"))
    assert manifest.pop("started") <= manifest.pop("finished")
    return files | {"manifest.json": json.dumps(manifest).encode()}


def words(base: Path, file: Path, out: Path, devices: int, nodes: int, run: str = "run") -> list[str]:
    return [
        "train/rollout.py", "predict", "--run", str(out.parent / run), "--rollout.base", str(base), "--rollout.folder",
        str(out), "--rollout.gen_length", "32", "--rollout.block_length", "8", "--rollout.batch_size", "2",
        "--rollout.sources", json.dumps([{"path": str(file)}]), "--trainer.accelerator", "cpu", "--trainer.devices",
        str(devices), "--trainer.num_nodes", str(nodes),
    ]  # fmt: skip


def start(command: list[str], **more: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}
    return subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def free_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def rank(number: int, mark: str) -> int:
    """Id of the process that torchrun started as this rank, known by a mark in its environment."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if {mark.encode(), f"RANK={number}".encode()} <= set((folder / "environ").read_bytes().split(b"\0")):
                return int(folder.name)
        except OSError:  # gone, or somebody else's
            continue
    raise AssertionError("no such rank")


@pytest.mark.slow  # starts seven processes
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks in /proc")
def test_two_nodes_of_torchrun_one_killed_and_continued_by_three(
    tiny_checkpoint: Path, file: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out, port = tmp_path / "set", free_port()
    torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--master_port", port]
    nodes = [
        start(
            [*torchrun, "--node_rank", str(node), *words(tiny_checkpoint, file, out, 1, 2)],
            DLM_ACCEL_TEST=str(tmp_path), TORCH_NCCL_ASYNC_ERROR_HANDLING="1",
        )
        for node in range(2)
    ]  # fmt: skip
    while len(list(out.glob("shard-*.json"))) < 2 and all(node.poll() is None for node in nodes):
        time.sleep(0.01)
    os.kill(rank(1, f"DLM_ACCEL_TEST={tmp_path}"), signal.SIGKILL)
    left = len(list(out.glob("shard-*.json")))
    said = [node.communicate(timeout=900)[1] for node in nodes]
    assert nodes[1].returncode != 0, said[1]
    assert 2 <= left < 20, said  # it died in the middle
    written = {path: path.stat().st_mtime_ns for path in out.glob("shard-*.json")}
    three = start(words(tiny_checkpoint, file, out, 3, 1))
    assert three.communicate(timeout=900)[0].count("complete") <= 1
    assert three.returncode == 0
    assert contents(out) == whole
    assert all(path.stat().st_mtime_ns == when for path, when in written.items())  # nothing is decoded twice


@pytest.mark.slow  # starts two processes
def test_two_nodes_of_slurm_write_what_one_process_does(
    tiny_checkpoint: Path, file: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    # What srun tells each of its tasks, on a machine without SLURM.
    job = {
        "SLURM_JOB_ID": "1234", "SLURM_JOB_NAME": "rollout", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NODELIST": "localhost", "SLURM_NNODES": "2", "SLURM_LOCALID": "0", "MASTER_PORT": free_port(),
    }  # fmt: skip
    out = tmp_path / "set"
    command = words(tiny_checkpoint, file, out, 1, 2)
    tasks = [start(command, **job, SLURM_PROCID=str(n), SLURM_NODEID=str(n)) for n in range(2)]
    said = [task.communicate(timeout=900) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    assert sum(told.count("decoded 160,") for told, _ in said) == 1  # one of them reports, for both
    assert contents(out) == whole
