"""Disks that are full or cannot be written, kills, and two runs at once: whatever was there stays, and nothing lies beside it."""

import os
import resource
import runpy
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data.disk import check_writable, hold
from data.manifest import RolloutKey
from data.provenance import write_aside
from data.shards import ShardWriter
from decoding.command_line import entry
from models.checkpoint import abandoned, writing
from models.errors import InputError
from train.folder import WholeFiles, last_checkpoint, made_by

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def full() -> Iterator[None]:
    """Lets no file grow beyond 4 KiB, which the system reports as it reports a full disk; pytest's own output may be one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    write_aside(file, "old")
    with full(), pytest.raises(OSError, match="too large"):
        write_aside(file, "new" * 10_000)
    assert file.read_text() == "old"
    assert names(tmp_path) == ["result.json"]


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    # Lightning's own come from the temporary folder: on another file system a kill left half of one.
    file = tmp_path / "last.ckpt"
    WholeFiles().save_checkpoint({"step": 1}, file)
    with full(), pytest.raises(OSError, match="too large"):
        WholeFiles().save_checkpoint({"step": 2, "weights": torch.zeros(10_000)}, file)
    assert torch.load(file, weights_only=True) == {"step": 1}
    assert names(tmp_path) == ["last.ckpt"]


def test_two_writers_of_a_file_do_not_meet(tmp_path: Path) -> None:
    with writing(tmp_path / "a") as one:
        child = os.fork()
        if not child:
            with writing(tmp_path / "a") as other:
                other.write_text("child")
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        one.write_text("parent")
    assert (tmp_path / "a").read_text() == "parent"
    assert names(tmp_path) == ["a"]


def test_what_a_kill_leaves_is_known(tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        with writing(tmp_path / "a") as aside:
            aside.write_text("half")
            os._exit(9)
    os.waitpid(child, 0)
    (left,) = tmp_path.iterdir()
    assert abandoned(left)
    mine = tmp_path / f".a.{socket.gethostname()}-{os.getpid()}.part"
    other = tmp_path / ".a.elsewhere-1.part"
    for file in (mine, other):
        file.touch()
        assert not abandoned(file)
    os.utime(other, (0, 0))
    assert abandoned(other)


@pytest.mark.parametrize(
    ("path", "folder", "found"),
    [
        ("file/under/it", True, "no folder"),
        ("file", True, "no folder"),
        ("folder", False, "a folder"),
        ("a" * 300, True, "name"),
        ("loop", True, "a link that leads nowhere"),
        ("loop/under/it", True, "a link that leads nowhere"),
        ("astray", False, "a link that leads nowhere"),
        ("a\0b", True, "x00"),
    ],
)
def test_outputs_are_checked_before_anything_runs(tmp_path: Path, path: str, folder: bool, found: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "astray").symlink_to(tmp_path / "nowhere" / "at all")
    with pytest.raises(InputError, match=f"out: found .*{found}.*; accepted: a path that can be written"):
        check_writable("out", tmp_path / path, folder)


def test_room_is_checked_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_writable("out", tmp_path / "new" / "result")
    check_writable("out", tmp_path / "page.html", folder=False)
    assert not names(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 << 20))
    with pytest.raises(InputError, match="out: found .* with 3 MiB free"):
        check_writable("out", tmp_path)


def test_a_folder_belongs_to_one_run(tmp_path: Path) -> None:
    with hold(tmp_path / "run"):
        owner = f"in use by process {os.getpid()} on {socket.gethostname()}"
        with pytest.raises(InputError, match=owner):
            hold(tmp_path / "run")
    hold(tmp_path / "run").close()


def test_a_run_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        hold(tmp_path)
        os._exit(9)
    os.waitpid(child, 0)
    hold(tmp_path).close()


@pytest.mark.parametrize(
    ("path", "message"),
    [("/dev/null/x", "Not a directory"), ("/nowhere/x", "No such file or directory"), ("/", "Is a directory")],
)
def test_a_refusal_of_the_system_is_one_line(
    path: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.py"])
    with pytest.raises(SystemExit) as stop:
        entry(lambda: Path(path).write_text("a"))
    assert stop.value.code == os.EX_IOERR
    assert capsys.readouterr().err == f"bench.py: {path}: {message}\n"


def checkpoint(file: Path, **content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {}, "global_step": 1, **content}, file)


@pytest.mark.parametrize("damage", [b"", b"PK", b"nonsense"])
def test_a_damaged_last_checkpoint_falls_back(
    tmp_path: Path, damage: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    # The same command stopped for ever.
    assert last_checkpoint(tmp_path) is None
    last, best = (tmp_path / "checkpoints" / name for name in ("last.ckpt", "best.ckpt"))
    checkpoint(last)
    assert last_checkpoint(tmp_path) == last
    last.write_bytes(damage)
    with pytest.raises(InputError, match=r"last\.ckpt"):
        last_checkpoint(tmp_path)
    checkpoint(best)
    assert last_checkpoint(tmp_path) == best
    assert "last.ckpt: found" in capsys.readouterr().err


def test_a_checkpoint_of_another_command_is_named(tmp_path: Path) -> None:
    from train.base import export as export_base
    from train.filter import export
    from train.helper import export as export_helper

    file = tmp_path / "other.ckpt"
    for content in ({"hyper_parameters": {"colour": 1}}, {}):
        checkpoint(file, **content)
        with pytest.raises(InputError, match=r"other\.ckpt: found .*; accepted: one that `train/filter.py fit` wrote"):
            export(file, tmp_path, "nowhere", tmp_path / "out", 0.5)
        with pytest.raises(InputError, match=r"other\.ckpt: found .*; accepted: one that `train/helper.py fit` wrote"):
            export_helper(file, tmp_path, tmp_path / "out")
    checkpoint(file, hyper_parameters={"channels": 4})
    with pytest.raises(InputError, match=r"other\.ckpt: found .*; accepted: one that"):
        export(file, tmp_path, "nowhere", tmp_path / "out", 0.5)
    with pytest.raises(InputError, match=r"tokenizer|other\.ckpt"):
        export_base(file, tmp_path, tmp_path / "out")
    with pytest.raises(InputError, match="accepted: one that"), made_by("train/filter.py", file):
        raise RuntimeError("size mismatch")


@pytest.fixture
def read_only(tiny_checkpoint: Path, tmp_path: Path) -> Iterator[Path]:
    """A disk that holds a base, a rollout set that is begun, a result and a page, and takes no writing."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.name != "posix" or os.geteuid() or shutil.which("mount") is None:
        pytest.skip("only root mounts a disk")
    done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", disk], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    try:
        shutil.copytree(tiny_checkpoint, disk / "base")
        shutil.copy(ROOT / "eval/results/dream/bench.json", disk)
        ShardWriter(disk / "set", RolloutKey("f", "t", {"eot_id": 1, "block_length": 4, "passes": ["oracle"]}))
        (disk / "run").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


READ_ONLY = [
    "eval/bench.py --out {disk}/out",
    "eval/trace.py --prompt a --strategies [threshold] --out {disk}/trace.html",
    "eval/risk.py --strategy threshold --values [0.9] --run {disk}/run",
    "eval/harness.py --tasks short --out {disk}/out",
    "eval/card.py --training a --recipes [{recipe}] --base {disk}/base",
    "eval/report.py render --result {disk}/bench.json",
    "eval/report.py compare --before {disk}/bench.json --after {disk}/bench.json --out {disk}/changes.md",
    "train/rollout.py predict --run {disk}/run",
    "train/rollout.py predict --rollout.folder {disk}/set",
    "train/rollout.py merge --folder {disk}/set",
    "train/filter.py fit --run {disk}/run",
    "train/filter.py fit --rollout.folder {disk}/set",
    "train/filter.py fit --pipeline.out {disk}/out",
    "train/helper.py fit --pipeline.out {disk}/out",
    "train/base.py fit --run {disk}/run",
    "train/base.py export --checkpoint x --tokenizer x --out {disk}/out",
    "train/eot.py --rollouts {disk}/set --out {disk}/out",
]


def test_a_read_only_disk_is_refused(
    read_only: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for line in READ_ONLY:
        script, *words = line.format(disk=read_only, recipe=ROOT / "configs/base/default.yaml").split()
        monkeypatch.setattr(sys, "argv", [str(ROOT / script), *words])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        out, err = capsys.readouterr()
        assert stop.value.code in (2, os.EX_IOERR), line
        assert (out, err.count("\n")) == ("", 1), (line, out, err)
        assert "Read-only file system" in err, (line, err)
        assert names(tmp_path) == ["disk"]
