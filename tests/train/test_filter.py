"""The rounds of a filter: continued where they were interrupted, and told of in the run that they belong to."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from data.filter_data import FilterDataModule
from data.manifest import Rollouts
from data.prompts import PromptSource
from data.rollout_data import RolloutSettings
from models.predictor import fingerprint
from train.filter import learn, of_round
from train.rollout_module import rollout


@pytest.fixture(scope="module")
def rollouts(tiny_checkpoint: Path, sums: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory) -> Rollouts:
    folder, sources = tmp_path_factory.mktemp("rollouts"), [PromptSource(str(sums(60)))]
    settings = RolloutSettings(
        str(tiny_checkpoint), folder / "set", sources, batch_size=16, gen_length=16, block_length=8
    )
    return rollout(settings, accelerator="cpu")


class Watch(Callback):
    """Notes the steps that are trained, and stops a run before the sixth of them."""

    def __init__(self, stop: bool) -> None:
        self.stop, self.steps = stop, list[int]()

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if self.stop and trainer.global_step == 5:
            raise RuntimeError("pulled the plug")
        self.steps.append(trainer.global_step)


def test_a_round_continues_where_it_was_interrupted(
    rollouts: Rollouts, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(folder: Path, stop: bool = False, rate: float = 3e-3) -> list[int]:
        watch = Watch(stop)
        monkeypatch.setattr("train.filter.callbacks", lambda _: [watch])
        data = FilterDataModule(rollouts.folder, batch_size=512)
        trainer = Trainer(max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False)
        settings = {
            "model": {"block_length": 8, "channels": 4, "learning_rate": rate}, "data": {"batch_size": 512},
            "seed_everything": 1, "trainer": {"accelerator": "cpu"},
        }  # fmt: skip
        command: Any = SimpleNamespace(
            datamodule=data, trainer=trainer, settings=settings,
            setting=lambda name: RolloutSettings(str(tiny_checkpoint), rollouts.folder),
        )  # fmt: skip
        learn(command, folder / "1", [])
        return watch.steps

    whole = start(tmp_path / "whole")
    each = len(whole) // 3
    assert whole == list(range(3 * each))
    assert each < 5 < 2 * each  # the plug is pulled in the second epoch
    with pytest.raises(RuntimeError, match="plug"):
        start(tmp_path / "cut", stop=True)
    assert start(tmp_path / "cut") == list(range(each, 3 * each))
    assert [folder.name for folder in (tmp_path / "cut").iterdir()] == ["1"]
    assert fingerprint(tmp_path / "cut/1") == fingerprint(tmp_path / "whole/1")
    assert start(tmp_path / "cut") == []
    # Other settings do not go on from there.
    with pytest.raises(RuntimeError, match="plug"):
        start(tmp_path / "other", stop=True)
    assert start(tmp_path / "other", rate=1e-3) == whole


def test_rounds_are_logged_in_the_run_under_names_of_their_own(tmp_path: Path) -> None:
    logged = []
    wandb, csv = WandbLogger(save_dir=tmp_path, mode="offline"), CSVLogger(tmp_path, name="csv")
    wandb._experiment = SimpleNamespace(log=logged.append)  # type: ignore[assignment]
    command: Any = SimpleNamespace(folder=tmp_path, trainer=SimpleNamespace(loggers=[wandb, csv]))
    for logger in of_round(command, 2):
        logger.log_metrics({"validation/loss": 0.5}, step=3)
        logger.save()
    assert logged == [{"round 2-validation/loss": 0.5, "trainer/global_step": 3}]
    (file,) = tmp_path.glob("csv/*/metrics.csv")
    assert file.read_text().splitlines()[0].split(",") == ["round 2-validation/loss", "step"]
