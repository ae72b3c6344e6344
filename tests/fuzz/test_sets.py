"""Rollout sets on disks that fill up, and with shards that are damaged: told, and healed by the next run, to the byte."""

import errno
import json
import os
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from data.disk import hold
from data.manifest import open_rollouts
from data.prompts import PromptSource
from data.rollout_data import RolloutSettings
from data.shards import ShardWriter
from models.errors import InputError
from train.rollout import merge
from train.rollout_module import rollout


def roll(base: Path, folder: Path, file: Path) -> None:
    sources = [PromptSource(str(file))]
    settings = RolloutSettings(str(base), folder, sources, batch_size=2, gen_length=32, block_length=8)
    rollout(settings, accelerator="cpu")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file; of the manifest, all but its time stamps."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    manifest = json.loads(files.pop("manifest.json"))
    assert manifest.pop("started") <= manifest.pop("finished")
    return files | {"manifest.json": json.dumps(manifest).encode()}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "sums.json"
    path.write_text(json.dumps([{"prompt": f"What is {n} plus {'1' * (n % 5 + 1)}?"} for n in range(40)]))
    return path


@pytest.fixture(scope="module")
def whole(tiny_checkpoint: Path, file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    roll(tiny_checkpoint, folder, file)
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with room for about half of the set."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.name != "posix" or os.geteuid() or shutil.which("mount") is None:
        pytest.skip("only root mounts a disk")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow  # needs root
def test_a_disk_that_fills_up_keeps_what_is_finished(
    tiny_checkpoint: Path, file: Path, whole: Path, small_disk: Path
) -> None:
    assert sum(path.stat().st_size for path in whole.iterdir()) > 128 << 10
    with pytest.raises(OSError, match="No space left") as refusal:
        roll(tiny_checkpoint, small_disk, file)
    assert refusal.value.errno == errno.ENOSPC  # so that commands end with one line and status 74
    kept = {path.name: path.stat().st_mtime_ns for path in small_disk.glob("shard-*.json")}
    assert 0 < len(kept) < len(list(whole.glob("shard-*.json")))
    with pytest.raises(InputError, match="complete: found False"):
        open_rollouts(small_disk)
    subprocess.run(["mount", "-o", "remount,size=16m", small_disk], check=True)
    roll(tiny_checkpoint, small_disk, file)
    assert contents(small_disk) == contents(whole)
    assert all((small_disk / name).stat().st_mtime_ns == when for name, when in kept.items())  # none of them anew


@pytest.mark.slow  # a hundred times
def test_a_hundred_damaged_shards_are_found_and_decoded_again(
    tiny_checkpoint: Path, file: Path, whole: Path, tmp_path: Path
) -> None:
    folder, rng = tmp_path / "set", random.Random(0)
    shutil.copytree(whole, folder)
    before = contents(folder)
    files = sorted(path for path in folder.iterdir() if path.name != "manifest.json")
    names = {record["name"] for record in ShardWriter.begun(folder).written()}
    for number in range(100):
        path = rng.choice(files)
        content = bytearray(path.read_bytes())
        match number % 4:
            case 0:
                path.unlink()
            case 1:
                path.write_bytes(content[: rng.randrange(len(content))])
            case 2:
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
                path.write_bytes(content)
            case _:
                path.write_bytes(rng.randbytes(len(content)))
        if path.suffix == ".parquet":
            with pytest.raises(InputError, match=path.name):
                open_rollouts(folder)
        left = {record["name"] for record in ShardWriter.begun(folder).written()}
        # A record, unlike a table, may lose a bit that says nothing; it is then read as it is, or refused.
        if path.suffix == ".parquet" or number % 4 != 2:
            assert names - left == {path.stem.partition("-")[2]}
        if number % 25 == 24:
            roll(tiny_checkpoint, folder, file)
        else:
            for there in files:
                there.write_bytes(before[there.name])
        assert contents(folder) == before


YEAR = 366 * 86_400


@pytest.fixture(params=[YEAR, -YEAR], ids=["a year on", "a year back"])
def clock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """A clock that has jumped since a set was begun, by this many seconds."""
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + request.param)
    moment = (datetime.now(UTC) + timedelta(seconds=request.param)).isoformat(timespec="seconds")
    monkeypatch.setattr("data.shards.now", lambda: moment)
    return request.param


def gone() -> int:
    """The id of a process that has ended."""
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    return child


def without_times(folder: Path) -> dict[str, bytes]:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    manifest = json.loads(files.pop("manifest.json"))
    del manifest["started"], manifest["finished"]
    return files | {"manifest.json": json.dumps(manifest).encode()}


def test_a_clock_that_jumps_loses_nothing(
    tiny_checkpoint: Path, file: Path, whole: Path, tmp_path: Path, clock: int
) -> None:
    folder = tmp_path / "set"
    shutil.copytree(whole, folder)
    lost, *kept = sorted(folder.glob("shard-*.json"))
    lost.unlink()  # what is left to do
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"complete": False}))
    stale = folder / f".steps-x.parquet.{socket.gethostname()}-{gone()}.part"
    running = folder / f".steps-y.parquet.{socket.gethostname()}-{os.getppid()}.part"
    for path in (stale, running, folder / "claim-x"):
        path.touch()
    for path in folder.iterdir():
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - clock))
    before = {path.name: path.stat().st_mtime_ns for path in kept}
    roll(tiny_checkpoint, folder, file)
    assert running.is_file()  # whose process lives, however old it looks
    running.unlink()
    assert without_times(folder) == without_times(whole)
    assert {path.name: path.stat().st_mtime_ns for path in kept} == before  # none of them anew
    merge(folder)
    assert without_times(folder) == without_times(whole)


def test_a_lock_is_no_matter_of_time(whole: Path, tmp_path: Path, clock: int) -> None:
    # Were it told by its age, two processes would decode the same, or all would wait for one that is gone.
    folder = tmp_path / "set"
    shutil.copytree(whole, folder)
    shards = ShardWriter.begun(folder)
    held, free, run = folder / "claim-held", folder / "claim-free", tmp_path / "run"
    free.touch()
    with shards.claim("held") as ours, hold(run):
        assert ours
        for path in (held, free, run / ".lock"):
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - clock))
        assert shards.claimed() == 1
        with shards.claim("held") as theirs:
            assert not theirs
        with pytest.raises(InputError, match="in use by process"):
            hold(run)
        with shards.claim("free") as taken:
            assert taken
    hold(run).close()
