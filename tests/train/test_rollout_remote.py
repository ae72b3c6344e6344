"""Rollout sets in an object store: the same files as in a folder, whatever happens on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
import torch

from data.filter_data import FilterDataModule
from data.manifest import open_rollouts
from data.prompts import PromptSource
from data.rollout_data import PromptBatches, RolloutSettings
from data.rollouts import load_records
from data.shards import ShardWriter
from data.store import check_folder, inside, open_store, place
from models.errors import InputError
from train.rollout import merge
from train.rollout_module import finish, rollout

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"gen_length": 32, "block_length": 8, "batch_size": 2}
BUCKET = """
import fsspec
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

class Bucket(DirFileSystem):
    protocol = "bucket"

    def __init__(self, **options):
        super().__init__(path={place!r}, fs=LocalFileSystem(auto_mkdir=True), **options)

fsspec.register_implementation("bucket", Bucket, clobber=True)
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """A set's place in the memory of this process."""
    yield f"memory://bucket/{tmp_path.name}"
    fsspec.filesystem("memory").store.clear()


@pytest.fixture(scope="module")
def file(sums: Callable[[int], Path]) -> Path:
    return sums(40)


def roll(base: Path, folder: str | Path, file: Path, **more):
    return rollout(RolloutSettings(str(base), folder, [PromptSource(str(file))], **SETTINGS, **more), accelerator="cpu")


@pytest.fixture(scope="module")
def whole(tiny_checkpoint: Path, file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set in a folder."""
    folder = tmp_path_factory.mktemp("whole")
    roll(tiny_checkpoint, folder, file)
    return folder


def contents(folder: str | Path) -> dict[str, bytes]:
    """Every file; of the manifest, all but its time stamps."""
    store = open_store(folder)
    files = store.read_many(name for name in store.stamps() if not name.startswith("."))
    manifest = json.loads(files.pop("manifest.json"))
    assert manifest.pop("started") <= manifest.pop("finished")
    return files | {"manifest.json": json.dumps(manifest).encode()}


def test_a_set_in_a_store_is_that_of_a_folder_and_read_as_one(
    tiny_checkpoint: Path, file: Path, whole: Path, url: str, cache: Path, capsys
) -> None:
    found = roll(tiny_checkpoint, url, file)
    assert contents(url) == contents(whole) == contents(found.folder)
    assert found.folder.is_relative_to(cache)
    assert capsys.readouterr().err.count(f"{url}: fetching") == 1
    there, here = FilterDataModule(url), FilterDataModule(whole)
    for data in (there, here):
        data.setup("fit")
    assert there.digest == here.digest
    for split in ("train", "validation"):
        assert vars(there.parts[split]).keys() == vars(here.parts[split]).keys()
        for name, value in vars(here.parts[split]).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, getattr(there.parts[split], name)), name
    roll(tiny_checkpoint, url, file)  # nothing is left to do
    assert "fetching" not in capsys.readouterr().err  # a second time
    merge(url)
    assert capsys.readouterr().out.endswith(f"{url}: 40 prompts, complete\n")


def test_a_run_that_stops_in_the_middle_of_a_put_goes_on(
    tiny_checkpoint: Path, file: Path, whole: Path, url: str, monkeypatch
) -> None:
    store, puts = fsspec.filesystem("memory"), []
    put = type(store).pipe_file

    def stop(self, path, content, *more, **options) -> None:
        puts.append(path)
        if len(puts) == 9:
            raise KeyboardInterrupt
        put(self, path, content, *more, **options)

    monkeypatch.setattr(type(store), "pipe_file", stop)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        roll(tiny_checkpoint, url, file)
    before = contents_without_manifest(url)
    assert 0 < sum("shard-" in name for name in before) < 5
    with pytest.raises(InputError, match=rf"{url}/manifest\.json: complete: found False"):
        open_rollouts(url)
    puts.clear()
    monkeypatch.setattr(
        type(store), "pipe_file", lambda *given, **more: (puts.append(given[1]), put(*given, **more))[1]
    )
    roll(tiny_checkpoint, url, file)
    assert contents(url) == contents(whole)
    again = {path.rsplit("/")[-1] for path in puts}
    assert not {name for name in again if name.startswith("shard-")} & before.keys()  # nothing is decoded twice


def contents_without_manifest(url: str) -> dict[str, bytes]:
    store = open_store(url)
    return store.read_many(name for name in store.stamps() if name != "manifest.json")


@pytest.mark.parametrize("kind", ["steps", "sequences", "shard"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "gone"])
def test_a_damaged_shard_is_refused_by_name_and_decoded_again(
    tiny_checkpoint: Path, file: Path, whole: Path, url: str, kind: str, damage: str
) -> None:
    store = open_store(url)
    for name, content in {path.name: path.read_bytes() for path in whole.iterdir()}.items():
        store.write(name, content)
    name = sorted(name for name in store.stamps() if name.startswith(kind))[2]
    content = store.read(name)
    if damage == "gone":
        store.remove(name)
    else:
        store.write(name, content[:-9] if damage == "truncated" else content[:90] + b"\0" + content[91:])
    with pytest.raises(InputError, match=rf"{url}/{name}"):
        open_rollouts(url)
    roll(tiny_checkpoint, url, file)
    assert contents(url) == contents(whole)


def test_a_damaged_copy_is_fetched_again(whole: Path, url: str, capsys) -> None:
    for path in whole.iterdir():
        open_store(url).write(path.name, path.read_bytes())
    copy = open_rollouts(url).folder
    for pattern in ("steps-*", "shard-*"):
        damaged = min(copy.glob(pattern))
        damaged.write_bytes(damaged.read_bytes()[:50])
    assert contents(open_rollouts(url).folder) == contents(whole)
    assert capsys.readouterr().err.count("fetching 1 files") == 1


def test_what_is_left_is_told_where_others_may_be_at_it(whole: Path, url: str, capsys) -> None:
    for path in whole.iterdir():
        open_store(url).write(path.name, path.read_bytes())
    shards = ShardWriter.begun(url)
    assert not finish(shards, ["0" * 16])  # which a process without locks may well be decoding
    assert capsys.readouterr().out == f"{url}: 1 prompts are left; another run may be at them, or run this again\n"
    with pytest.raises(InputError, match="1 not decoded"):
        ShardWriter.begun(whole).finish(["0" * 16])


def test_workers_without_locks_seldom_meet() -> None:
    # In the same order, or from different places on, one that catches up would decode all the rest a second time.
    class Shards:
        remote, there = True, set[str]()

        def has(self, name: str) -> bool:
            return name in self.there

        claim = ShardWriter.claim

    shards, names = Shards(), [str(n) for n in range(300)]
    workers = [
        iter(PromptBatches([[n] for n in range(300)], names, lambda index: index, 0, 1, shards))  # type: ignore[arg-type]
        for _ in range(3)
    ]
    decoded = []
    while taken := [index for worker in workers if (index := next(worker, None))]:
        decoded += [index[0] for index in taken]
        shards.there |= {str(index[0]) for index in taken}
    assert set(decoded) == set(range(300))
    assert len(decoded) < 330  # seven of them twice is usual; in one and the same order it would be 900


def test_a_url_stays_as_it_is_written_and_file_urls_are_folders(tmp_path: Path) -> None:
    assert RolloutSettings(folder="s3://bucket/a/set/").folder == "s3://bucket/a/set"
    assert RolloutSettings(folder=f"file://{tmp_path}/set").folder == tmp_path / "set" == place(tmp_path / "set")
    assert inside("s3://bucket/set", "filter-1") == "s3://bucket/set/filter-1"
    assert inside(tmp_path, "filter-1") == tmp_path / "filter-1"
    with pytest.raises(InputError, match="folder: found 5"):
        RolloutSettings(folder=5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "found"), [("nope://bucket/set", "Protocol not known: nope"), ("s3://bucket/set", "Install s3fs")]
)
def test_a_scheme_that_cannot_be_opened_is_refused_with_the_extra(given: str, found: str, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    message = (
        rf"rollout\.folder: found {given} \({found}.*\); accepted: .* s3:// takes s3fs.*pip install -e '\.\[cluster\]'"
    )
    with pytest.raises(InputError, match=message):
        check_folder("rollout.folder", given)
    with pytest.raises(InputError, match=rf"folder: found {given}"):
        open_rollouts(given)


def test_a_store_that_does_not_answer_is_refused_before_anything_is_decoded(monkeypatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError("Forbidden")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "info", refused)
    with pytest.raises(InputError, match=r"rollout\.folder: found memory://b/set \(Forbidden\)"):
        check_folder("rollout.folder", "memory://b/set")


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What lets processes open ``bucket://``, an object store in a folder: their environment."""
    where = tmp_path / "bucket"
    where.mkdir()
    code = BUCKET.format(place=str(where))
    exec(code, {})
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(code)
    paths = os.pathsep.join((str(tmp_path / "hook"), str(ROOT)))
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def command(base: Path, file: Path, run: Path, *more: str) -> list[str]:
    return [
        sys.executable, "train/rollout.py", "predict", "--run", str(run), "--rollout.base", str(base), "--rollout.folder",
        "bucket://sets/one", "--rollout.gen_length", "32", "--rollout.block_length", "8", "--rollout.batch_size", "2",
        "--rollout.sources", json.dumps([{"path": str(file)}]), "--trainer.accelerator", "cpu", *more,
    ]  # fmt: skip


@pytest.mark.slow  # starts the command
def test_processes_that_share_a_bucket_may_be_killed(
    tiny_checkpoint: Path, file: Path, whole: Path, tmp_path: Path, bucket: dict[str, str]
) -> None:
    there = tmp_path / "bucket/sets/one"
    words = [command(tiny_checkpoint, file, tmp_path / f"run{n}") for n in range(2)]
    first, second = (
        subprocess.Popen(line, cwd=ROOT, env=bucket, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for line in words
    )
    while not list(there.glob("shard-*.json")) and first.poll() is None:
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    _, errors = second.communicate()
    assert second.returncode == 0, errors
    assert contents("bucket://sets/one") == contents(whole)
    found = subprocess.run(
        [sys.executable, "train/rollout.py", "merge", "--folder", "bucket://sets/one"], cwd=ROOT, env=bucket, text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    assert found.stdout == "bucket://sets/one: 40 prompts, complete\n"
    here, remote = load_records(whole), load_records("bucket://sets/one")
    assert torch.equal(here.final, remote.final)
    assert torch.equal(here.evidence.confidence, remote.evidence.confidence)


@pytest.mark.slow  # starts Ray
def test_ray_writes_into_a_bucket(
    tiny_checkpoint: Path, file: Path, whole: Path, tmp_path: Path, bucket: dict[str, str]
) -> None:
    pytest.importorskip("ray.data")
    words = command(tiny_checkpoint, file, tmp_path / "run", "--engine", "ray")
    done = subprocess.run(words, cwd=ROOT, env=bucket, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents("bucket://sets/one") == contents(whole)


@pytest.mark.slow  # starts the command
def test_a_filter_is_fitted_on_a_set_in_a_bucket_as_on_one_in_a_folder(
    tiny_checkpoint: Path, file: Path, whole: Path, tmp_path: Path, bucket: dict[str, str]
) -> None:
    for path in whole.iterdir():
        open_store("bucket://sets/one").write(path.name, path.read_bytes())
    rows = command(tiny_checkpoint, file, tmp_path / "run")[5:]
    weights = []
    for number, folder in enumerate(("bucket://sets/one", str(whole))):
        words = [sys.executable, "train/filter.py", "fit", "--run", str(tmp_path / f"fit{number}"), *rows]
        words[words.index("bucket://sets/one")] = folder
        words += ["--trainer.max_epochs", "1", "--pipeline.out", str(tmp_path / f"out{number}")]
        words += ["--pipeline.pick_prompts", "2", "--pipeline.test_prompts", "2"]
        done = subprocess.run(words, cwd=ROOT, env=bucket, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        weights.append((tmp_path / f"out{number}" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
