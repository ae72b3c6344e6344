"""Records in files: the same as in memory, and never all of them in memory."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer

from data.examples import StoredExamples, by_shard
from data.filter_data import FilterBatch, FilterDataModule
from data.manifest import Rollouts, open_rollouts
from data.prompts import PromptSource
from data.rollout_data import RolloutSettings
from models.errors import InputError
from train.filter_module import FilterModule
from train.rollout_module import rollout

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def rollouts(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Rollouts:
    """A set of several shards, with prompts of every split."""
    folder = tmp_path_factory.mktemp("rollouts")
    rows = [{"prompt": f"What is {n} plus {'1' * (n % 5 + 1)}?"} for n in range(60)]
    (folder / "sums.json").write_text(json.dumps(rows))
    sources = [PromptSource(str(folder / "sums.json"))]
    settings = RolloutSettings(
        str(tiny_checkpoint), folder / "set", sources, batch_size=4, gen_length=16, block_length=8
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
        torch.cat([t.double() for t in (*part.evidence.present().values(), *rest)], 1).numpy().view("V8").tolist()
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
    assert large - small < (many - few) * 64 / 2**20 + 30  # what grows are the indices of the order
    assert open_rollouts(tmp_path / "set").manifest["counts"]["steps"]
