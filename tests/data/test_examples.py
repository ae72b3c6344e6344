"""Records in files: the same as in memory, and never all of them in memory."""

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Trainer

from data.examples import BYTES, StoredExamples, by_shard
from data.filter_data import FilterBatch, FilterDataModule
from data.manifest import Rollouts, find_rollouts, open_rollouts, sha256
from data.prompt import prompt_hash, split_of
from data.prompts import PromptSource
from data.rollout_data import RolloutSettings
from data.rollouts import References, load_records, load_sequences, open_on_ranks
from models.errors import InputError
from train.filter_module import FilterModule
from train.rollout_module import rollout

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def rollouts(tiny_checkpoint: Path, sums: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory) -> Rollouts:
    """A set of several shards, with prompts of every split."""
    folder, sources = tmp_path_factory.mktemp("rollouts"), [PromptSource(str(sums(60)))]
    settings = RolloutSettings(
        str(tiny_checkpoint), folder / "set", sources, batch_size=4, gen_length=16, block_length=8
    )
    return rollout(settings, accelerator="cpu")


@pytest.fixture(scope="module")
def with_hidden(
    tiny_checkpoint: Path, sums: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory
) -> Rollouts:
    """The same with hidden states."""
    folder, sources = tmp_path_factory.mktemp("rollouts"), [PromptSource(str(sums(60)))]
    settings = RolloutSettings(
        str(tiny_checkpoint), folder / "set", sources, batch_size=4, gen_length=16, block_length=8, hidden_states=True
    )
    return rollout(settings, accelerator="cpu")


def parts(folder: Path, **settings: Any) -> dict[str, Any]:
    module = FilterDataModule(folder, **settings)
    module.setup("fit")
    return module.parts


def rows(part: FilterBatch) -> list[bytes]:
    """Every record as bytes, in an order of their own."""
    rest = (part.final, part.tail, part.example, part.weight)
    return sorted(
        torch.cat([t.double().flatten(1) for t in (*part.evidence.present().values(), *rest)], 1)
        .numpy()
        .view("V8")
        .tolist()
    )


def test_records_in_files_are_those_in_memory(rollouts: Rollouts) -> None:
    held, stored = parts(rollouts.folder), parts(rollouts.folder, memory=0)
    for split, part in held.items():
        assert isinstance(stored[split], StoredExamples)
        found = stored[split].take(torch.arange(len(part)))
        assert found.evidence.present().keys() == part.evidence.present().keys()
        assert all(found.evidence.present()[n].dtype == t.dtype for n, t in part.evidence.present().items())
        assert rows(found) == rows(part)
        assert rows(stored[split].sample()) == rows(part)
    # In the order of the shards.
    first = next(by_shard(rollouts, None))
    number = [n for n, p in enumerate(first.prompt.tolist()) if first.splits[p] == "train"]
    assert torch.equal(stored["train"].take(torch.arange(len(number))).evidence.token, first.evidence.token[number])


def test_hidden_states_in_files_are_those_in_memory(with_hidden: Rollouts) -> None:
    held, stored = (parts(with_hidden.folder, hidden=4, memory=size)["train"] for size in (64, 0))
    found = stored.take(torch.arange(len(held))).evidence.hidden
    assert found.shape == held.evidence.hidden.shape == (len(held), 8, with_hidden.hidden_size)
    assert found.dtype == held.evidence.hidden.dtype == torch.float16
    assert rows(stored.sample()) == rows(held)
    # They count: what would fit without them is laid down in files.
    assert parts(with_hidden.folder)["train"].evidence.hidden is None
    count = sum(with_hidden.manifest["counts"]["steps"].values())
    assert count * 8 * BYTES < 1 << 20 < count * 8 * (BYTES + 2 * with_hidden.hidden_size)
    kinds = [type(parts(with_hidden.folder, memory=1, hidden=width)["train"]) for width in (0, 4)]
    assert kinds == [FilterBatch, StoredExamples]


def test_a_limit_takes_the_first_training_prompts_by_hash_of_one_set(rollouts: Rollouts, tmp_path: Path) -> None:
    # A learning curve: few prompts are among many, and what they are validated on stays.
    texts = {prompt.prompt for prompt in load_sequences(rollouts).prompts}
    first = sorted((text for text in texts if split_of(text) == "train"), key=prompt_hash)
    whole, few, many = (parts(rollouts.folder, limit=limit) for limit in (None, 8, 16))
    counts = [len(part["train"]) for part in (few, many, whole)]
    assert counts == sorted(set(counts))
    seen = [{row.tobytes() for row in part["train"].evidence.confidence.numpy()} for part in (few, many, whole)]
    assert seen[0] < seen[1] < seen[2]
    assert rows(few["validation"]) == rows(whole["validation"])
    ids = {prompt.prompt: prompt.id for prompt in load_sequences(rollouts).prompts}
    records = load_records(rollouts, last=prompt_hash(first[7]))
    kept = {name for name, split in zip(records.prompt_ids, records.splits, strict=True) if split == "train"}
    assert kept == {ids[text] for text in first[:8]}
    shutil.copytree(rollouts.folder, tmp_path / "set")
    assert len(parts(tmp_path / "set", limit=8, memory=0)["train"]) == counts[0]
    parts(rollouts.folder, limit=len(first))
    with pytest.raises(InputError, match=f"limit: found 1000; accepted: at most {len(first)}, the training prompts"):
        parts(rollouts.folder, limit=1000)


def test_references_are_read_as_they_are_asked_for(rollouts: Rollouts, tmp_path: Path) -> None:
    sequences, references = load_sequences(rollouts), References(rollouts)
    hashes = [prompt_hash(prompt.prompt) for prompt in sequences.prompts]
    chosen = [50, 3, 17, 4]  # of several shards
    found = references.get([hashes[n] for n in chosen])
    assert found is not None
    assert torch.equal(found, sequences.references[chosen])
    assert references.get([*hashes[:2], prompt_hash("Who?")]) is None
    assert references.get(["f" * 16]) is None
    shutil.copytree(rollouts.folder, tmp_path / "set", ignore=shutil.ignore_patterns("records"))
    damaged = References(find_rollouts(tmp_path / "set"))
    for file in (tmp_path / "set").glob("sequences-*"):
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(InputError, match=r"sequences-.*parquet"):
        damaged.get(hashes[:1])


def test_references_of_a_large_set_are_not_in_memory(rollouts: Rollouts) -> None:
    used = []
    for times in (10, 110):
        shards = [
            shard | {"prompts": [f"{n * 1000 + number * 10**6:016x}" for n in range(len(shard["prompts"]))]}
            for number, shard in enumerate(rollouts.shards * times)
        ]
        many = Rollouts(rollouts.folder, rollouts.manifest | {"shards": shards})
        tracemalloc.start()
        kept = References(many)
        used.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        assert len(kept.hashes) == 60 * times
    assert used[1] - used[0] < 14 * 60 * 100 + 8 * 100 * len(rollouts.shards)


class Rank:
    """A rank of two, as a trainer tells of it; what the first one broadcasts arrives at the other."""

    said: Any = None

    def __init__(self, number: int) -> None:
        self.world_size, self.is_global_zero = 2, number == 0
        self.strategy = SimpleNamespace(broadcast=self.broadcast)

    def broadcast(self, value: Any) -> Any:
        if self.is_global_zero:
            Rank.said = value
        return Rank.said


def test_one_rank_verifies_a_set_for_all_and_all_refuse_it(rollouts: Rollouts, tmp_path: Path, monkeypatch) -> None:
    hashed = []
    monkeypatch.setattr("data.manifest.sha256", lambda path: hashed.append(path) or sha256(path))
    files = 2 * len(rollouts.shards)
    assert open_on_ranks(rollouts.folder, Rank(0)).digest == rollouts.digest  # type: ignore[arg-type]
    assert len(hashed) == files
    assert open_on_ranks(rollouts.folder, Rank(1)).digest == rollouts.digest  # type: ignore[arg-type]
    assert len(hashed) == files
    module = FilterDataModule(rollouts.folder)
    for _ in range(2):
        module.open(None)
    module.setup("fit")
    assert len(hashed) == 2 * files  # once, however often it is asked for
    shutil.copytree(rollouts.folder, tmp_path / "set", ignore=shutil.ignore_patterns("records"))
    next((tmp_path / "set").glob("steps-*")).write_bytes(b"?")
    for rank in (0, 1):  # one that went on would wait for the first for ever
        with pytest.raises(InputError, match=r"steps-.*corrupt or truncated"):
            open_on_ranks(tmp_path / "set", Rank(rank))  # type: ignore[arg-type]


def test_files_are_written_once_and_again_where_one_is_damaged(rollouts: Rollouts) -> None:
    parts(rollouts.folder, memory=0)
    files = {path: path.stat().st_mtime_ns for path in (rollouts.folder / "records").glob("*/*")}
    assert {path.name for path in files} == {"train", "validation", "test", "index.json"}
    parts(rollouts.folder, memory=0)
    assert files == {path: path.stat().st_mtime_ns for path in files}
    train = next(path for path in files if path.name == "train")
    whole = train.read_bytes()
    train.write_bytes(whole[:-1])
    parts(rollouts.folder, memory=0)
    assert train.read_bytes() == whole
    (train.parent / "index.json").write_text("{")
    opened = parts(rollouts.folder, memory=0)
    assert train.read_bytes() == whole
    with train.open("r+b") as file:  # while it is read
        file.truncate(1)
    with pytest.raises(InputError, match="train: found a record that breaks off"):
        opened["train"].take(torch.arange(4))
    train.write_bytes(whole)
    parts(rollouts.folder, memory=0, passes=["oracle"])  # other records are other files
    assert train.read_bytes() == whole
    assert len(list((rollouts.folder / "records").iterdir())) == 2


def test_a_filter_is_trained_from_files_and_the_same_each_time(rollouts: Rollouts) -> None:
    nets = []
    for _ in range(2):
        torch.manual_seed(0)
        module = FilterModule(block_length=8, channels=4)
        run = Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        run.fit(module, datamodule=FilterDataModule(rollouts.folder, batch_size=64, memory=0))
        assert run.callback_metrics["validation/loss"] < 0.7
        nets.append(module.net.state_dict())
    assert all(torch.equal(one, nets[1][name]) for name, one in nets[0].items())


def test_all_records_in_one_batch_have_to_be_held(rollouts: Rollouts) -> None:
    with pytest.raises(InputError, match="batch_size: found None; accepted: a number, for records of more than 0 MiB"):
        parts(rollouts.folder, memory=0, batch_size=None)


MEASURE = """
import sys
from pathlib import Path
import torch
import data.rollouts  # what it imports is not what is measured
from data.filter_data import FilterDataModule

def status(name):
    text = Path("/proc/self/status").read_text()
    return int(text.split(name + ":")[1].split()[0]) / 1024

before = status("VmRSS")
module = FilterDataModule(Path(sys.argv[1]), batch_size=2048, memory=int(sys.argv[2]))
module.setup("fit")
rows = 0
for batch in module.train_dataloader():
    rows += len(batch)
print(rows, status("VmHWM") - before)
"""


@pytest.mark.slow  # reads a gigabyte
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_a_set_larger_than_its_memory_is_read_in_bounded_memory(tiny_checkpoint: Path, tmp_path: Path) -> None:
    # The shards of a small set listed many times over: as many records as of thousands of prompts.
    rows = [{"prompt": f"What is {n} plus {'1' * (n % 5 + 1)}?"} for n in range(64)]
    (tmp_path / "sums.json").write_text(json.dumps(rows))
    settings = RolloutSettings(
        str(tiny_checkpoint),
        tmp_path / "set",
        [PromptSource(str(tmp_path / "sums.json"))],
        batch_size=8,
        gen_length=128,
    )
    rollout(settings, accelerator="cpu")
    file = tmp_path / "set" / "manifest.json"
    manifest = {name: value for name, value in json.loads(file.read_text()).items() if name != "digest"}
    peaks = []
    for times in (20, 80):
        counts = manifest["counts"] | {"steps": {n: times * rows for n, rows in manifest["counts"]["steps"].items()}}
        file.write_text(json.dumps(manifest | {"shards": manifest["shards"] * times, "counts": counts}))
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        words = [sys.executable, "-c", MEASURE, str(tmp_path / "set"), "100"]
        done = subprocess.run(words, env=environment, check=True, capture_output=True, text=True)
        count, peak = map(float, done.stdout.split())
        print(f"{times} times: {count:.0f} records, {count * 32 * 48 / 2**20:.0f} MiB in memory, peak {peak:.0f} MiB")
        peaks.append((count, peak))
    (few, small), (many, large) = peaks
    assert many * 32 * 48 > 800 << 20
    assert large < 350
    assert large - small < 30 < (many - few) * 64 / 2**20  # 64 bytes a record would be more
    assert open_rollouts(tmp_path / "set").manifest["counts"]["steps"]
