"""The command line as its user meets it, on a toy module: messages, exit statuses, resuming, what is left on disk."""

import runpy
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import wandb
import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader

from eval.command import wandb_mode
from eval.tracking import WandbSettings, evaluation_run
from models.errors import InputError
from train.callbacks import FiniteLoss, ProgressLines
from train.cli import Command, log_export, log_rollouts, run
from train.folder import load_checkpoint


class Toy(LightningModule):
    """A straight line.

    Args:
        width: Inputs.
        rate: Learning rate.
    """

    steps: list[int] = []  # noqa: RUF012

    def __init__(self, width: int = 2, rate: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(width, 1)

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        if Path("stop").exists() and self.global_step == 6:
            raise {"ctrl-c": KeyboardInterrupt, "sigterm": SIGTERMException}[Path("stop").read_text()]
        Toy.steps.append(self.global_step)
        return self.layer(batch).square().mean()

    def validation_step(self, batch: torch.Tensor, index: int) -> None:
        self.log("loss", self.layer(batch).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.hparams["rate"])


class ToyData(LightningDataModule):
    """Ones.

    Args:
        width: Inputs.
        rows: Rows.
    """

    def __init__(self, width: int = 2, rows: int = 8) -> None:
        super().__init__()
        self.width, self.rows = width, rows

    def setup(self, stage: str) -> None:
        if self.rows < 1:
            raise InputError("data.rows", self.rows, "1 or more")

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.ones(self.rows, self.width), batch_size=1)  # type: ignore[arg-type]

    val_dataloader = train_dataloader


@dataclass
class Around:
    """What a hook needs.

    Args:
        out: A folder.
    """

    out: Path


def double(number: int) -> None:
    """Prints twice ``number``.

    Args:
        number: At least 0.
    """
    if number < 0:
        raise InputError("number", number, "0 or more")
    print(2 * number)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Runs a toy command in an empty folder; returns exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    Toy.steps.clear()

    def call(words: str, **settings):
        verb, *rest = words.split()
        quick = (
            ["--trainer.accelerator=cpu", "--trainer.enable_model_summary=false", "--trainer.log_every_n_steps=1"]
            if verb != "double"
            else []
        )
        monkeypatch.setattr(sys, "argv", ["toy.py", verb, *quick, *rest])
        settings = {"checkpoint": {"every_n_train_steps": 2}, "verbs": {"double": double}} | settings
        status = 0
        try:
            run("toy", Toy, ToyData, **settings)
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return call


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("fit --model.widht 3", ["model.widht", "model.width"]),
        ("fit --config bad.yaml", ["rates", "toy.py fit"]),
        ("fit --model.width abc", ["model.width", "abc", "int"]),
        ("fit --trainer.accelerator foo", ["foo", "cpu"]),
        ("fit --ckpt_path nowhere.ckpt", ["nowhere.ckpt"]),
        ("fit --ckpt_path bad.yaml", ["bad.yaml"]),
        ("fit --data.rows 0", ["data.rows", "0", "1 or more"]),
        ("validate", ["last.ckpt", "fit"]),
        ("fitt", ["fitt", "fit"]),
        ("double --numbr 3", ["numbr", "number"]),
        ("double --number -3", ["number", "-3", "0 or more"]),
        ("double", ["number"]),
    ],
)
def test_bad_input_is_one_line_and_status_2(toy, words: str, named: list[str]):
    Path("bad.yaml").write_text("model:\n  rates: 3\n")
    status, _, err = toy(words)
    lines = [line for line in err.splitlines() if not line.startswith(("Seed", "GPU"))]
    assert status == 2
    assert len(lines) == 1, err
    assert all(name in lines[0] for name in named)
    assert not list(Path().rglob("run.yaml")), "a run that never started left a record"


def test_help_tells_of_ten_settings_first_and_of_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    script = Path(__file__).parents[2] / "train/filter.py"
    monkeypatch.setattr(sys, "argv", [str(script), "fit", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(script), run_name="__main__")
    told = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  --")]
    first = ["base", "sources", "limit", "folder", "gen_length", "block_length", "batch_size"]
    first = [f"--rollout.{name}" for name in first] + ["--rounds", "--pipeline.out", "--trainer.devices"]
    assert [name.strip(",") for name in told[: len(first)]] == first
    assert len(told) == len(set(told))
    assert {"--run", "--model.channels", "--rollout.passes", "--pipeline.loss", "--wandb.project"} <= set(told)


@pytest.mark.parametrize(("given", "expected"), [("", "bf16-mixed"), ("--trainer.precision 32-true", "32-true")])
def test_precision_is_the_commands_unless_it_is_set(toy, monkeypatch: pytest.MonkeyPatch, given: str, expected: str):
    found = []
    monkeypatch.setattr(Toy, "on_train_start", lambda self: found.append(self.trainer.precision))
    assert toy(f"fit --trainer.max_steps 1 {given}", precision="bf16-mixed")[0] == 0
    assert found == [expected]


def test_a_verb_is_a_typed_function(toy):
    assert toy("double --number 4")[:2] == (0, "8\n")


def test_run_yaml_says_what_was_run(toy):
    assert toy("fit --trainer.max_steps 2 --run out/mine")[0] == 0
    record = yaml.safe_load(Path("out/mine/run.yaml").read_text())
    assert record["argv"][:2] == ["toy.py", "fit"]
    assert record["config"]["model"] == {"width": 2, "rate": 0.1}
    assert record["config"]["trainer"]["max_steps"] == 2
    assert {"python", "torch", "lightning", "transformers", "git"} <= set(record["environment"])
    assert not Path("runs").exists(), "something went to the default folder"


@pytest.mark.parametrize(("how", "expected"), [("ctrl-c", 130), ("sigterm", 143)])
def test_an_interrupted_fit_continues(toy, how: str, expected: int):
    Path("stop").write_text(how)
    status, _, err = toy("fit --trainer.max_steps 10")
    assert status == expected, "make would go on as if the run had been finished"
    if how == "ctrl-c":
        assert "the same command continues" in err.splitlines()[-1]
    Path("stop").unlink()
    status, _, err = toy("fit --trainer.max_steps 10")
    assert status == 0
    assert "at step 6" in err
    assert Toy.steps == list(range(10)), "steps were repeated or lost"
    assert not list(Path("runs/toy/checkpoints").glob("last-v*")), "the next start would continue from an old file"


def test_a_fit_with_other_settings_does_not_continue(toy):
    toy("fit --trainer.max_steps 4")
    before = Path("runs/toy/run.yaml").read_text()
    status, _, err = toy("fit --trainer.max_steps 4 --data.rows 9")
    assert status == 2
    assert "data.rows" in err
    assert "8" in err
    assert Path("runs/toy/run.yaml").read_text() == before
    Toy.steps.clear()
    assert toy("fit --trainer.max_steps 4 --data.rows 9 --resume false")[0] == 0
    assert Toy.steps == [0, 1, 2, 3]


def test_without_run_yaml_the_checkpoint_itself_is_compared(toy):
    toy("fit --trainer.max_steps 4")
    Path("runs/toy/run.yaml").unlink()
    assert toy("fit --trainer.max_steps 6 --model.rate 0.2")[0] == 2
    assert toy("fit --trainer.max_steps 6")[0] == 0
    assert Toy.steps == list(range(6))


def test_validate_takes_the_trained_weights_and_keeps_run_yaml(toy):
    toy("fit --trainer.max_epochs 1 --model.width 3 --data.width 3", checkpoint={"monitor": "loss"})
    assert Path("runs/toy/checkpoints/best.ckpt").is_file()
    before = Path("runs/toy/run.yaml").read_text()
    assert toy("validate --data.width 3")[0] == 0, "the model must take its width from the checkpoint"
    assert Path("runs/toy/run.yaml").read_text() == before
    assert Path("runs/toy/validate.yaml").is_file()


def test_linked_arguments_reach_both_and_survive_resuming(toy):
    links = [("data.width", "model.width")]
    assert toy("fit --trainer.max_steps 4 --data.width 3", links=links)[0] == 0
    assert toy("fit --trainer.max_steps 6 --data.width 3", links=links)[0] == 0
    assert toy("validate --data.width 3", links=links)[0] == 0
    assert Toy.steps == list(range(6))
    assert toy("fit --model.width 3", links=links)[0] == 2


def test_hooks_run_around_their_subcommand(toy):
    seen = []
    hooks = {
        "before": {"fit": lambda command: seen.append(command.trainer.global_step)},
        "after": {"fit": lambda command: seen.append((command.trainer.global_step, command.folder))},
    }
    toy("fit --trainer.max_steps 2", **hooks)
    assert seen == [0, (2, Path("runs/toy"))]


def test_a_command_has_settings_of_its_own(toy):
    seen = []
    more = {"settings": {"around": Around}, "after": {"fit": lambda command: seen.append(command.setting("around"))}}
    assert toy("fit --trainer.max_steps 2 --around.out there", **more)[0] == 0
    assert seen == [Around(Path("there"))]
    assert yaml.safe_load(Path("runs/toy/run.yaml").read_text())["config"]["around"] == {"out": "there"}


def test_progress_in_a_log_file_is_lines_with_the_time_left(toy, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("train.callbacks.progress", lambda: ProgressLines())
    _, _, err = toy("fit --trainer.max_steps 16")
    lines = [line for line in err.splitlines() if line.startswith("step")]
    assert lines[0].startswith("step 1/16")
    assert lines[-1].startswith("step 16/16 (100%) | 0:00:00 left")
    assert "\r" not in err


def test_wandb_is_offline_without_a_key(toy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a login prompt"))
    status, _, err = toy("fit --trainer.max_steps 2")
    assert status == 0
    assert "wandb sync" in err
    assert list(Path("runs/toy/wandb").glob("offline-run-*"))


def test_an_export_is_in_its_runs_summary_and_among_its_artifacts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path))
    wandb.finish()  # an earlier test's run would be taken
    (tmp_path / "exports").mkdir()
    (tmp_path / "exports/config.json").write_text("{}")
    logger = WandbLogger(save_dir=tmp_path, mode="offline", settings=wandb.Settings(silent=True))
    logged = []
    monkeypatch.setattr(logger.experiment, "log_artifact", logged.append)
    row = {"label": "learn2pd 0.9", "nfe_mean": 12.5}
    log_export([logger], "filter", tmp_path / "exports", {"threshold": 0.9}, [row], ["label", "nfe_mean"], "abc")
    assert logger.experiment.summary["threshold"] == 0.9
    (artifact,) = (found for found in logged if found.type == "model")
    assert artifact.metadata == {"rollouts": "abc", "threshold": 0.9}
    assert list(artifact.manifest.entries) == ["config.json"]
    logger.experiment.finish()


def test_an_export_of_any_name_and_several_rollouts_is_told_to_wandb(tmp_path: Path):
    folder = tmp_path / "mein filter (größer)"
    folder.mkdir()
    used, logged = [], []
    logger = WandbLogger(save_dir=tmp_path, mode="offline")
    logger._experiment = SimpleNamespace(  # type: ignore[assignment] - a run that can be reached
        summary={}, settings=SimpleNamespace(_offline=False), use_artifact=used.append, log_artifact=logged.append
    )
    log_export([logger], "filter", folder, {}, [], [], "abc+def")
    assert [found.name for found in used] == ["rollouts-abc", "rollouts-def"]
    assert [found.name for found in logged] == ["filter-mein-filter--gr--er-"]
    # The run that made them says so of the same: W&B knows a version by its content.
    log_rollouts([logger], "abc")
    assert (logged[-1].name, logged[-1].type, logged[-1].digest) == ("rollouts-abc", "rollouts", used[0].digest)


def test_an_evaluation_goes_where_it_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    asked = {}
    monkeypatch.setattr(wandb, "init", lambda **given: asked.update(given))
    evaluation_run(WandbSettings("ours", "the-team", ["a"]), {"limit": 3}, tmp_path, "offline")
    wanted = {"project": "ours", "entity": "the-team", "tags": ["a"], "job_type": "eval", "config": {"limit": 3}}
    assert asked.items() >= (wanted | {"mode": "offline", "dir": tmp_path}).items()


def test_processes_wait_for_each_other_for_longer_than_a_shard_takes(toy):
    waits = []

    def stop(command: Command) -> None:
        waits.append(command.trainer.strategy._timeout)
        raise SystemExit(0)

    assert toy("fit --trainer.devices 2 --trainer.accelerator cpu", before={"fit": stop})[0] == 0
    assert waits[0] > timedelta(days=30)


@pytest.mark.parametrize("words", ["", "--trainer.devices 1"])
def test_torchrun_and_the_trainer_have_as_many_processes(toy, monkeypatch: pytest.MonkeyPatch, words: str):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    status, _, told = toy(f"fit {words}")
    assert status == 2
    assert "accepted: 2, as many as torchrun has started on this node" in told


def test_wandb_mode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_mode() == "offline"
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(InputError, match="WANDB_API_KEY"):
        wandb_mode()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password none\n")
    assert wandb_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode() == "disabled"


@pytest.mark.parametrize("steps", [4, 5])
def test_the_last_step_is_saved_whatever_the_run_s_length(toy, steps):
    assert toy(f"fit --trainer.max_steps {steps}")[0] == 0
    assert load_checkpoint(Path("runs/toy/checkpoints/last.ckpt"))["global_step"] == steps
    again = toy(f"fit --trainer.max_steps {steps + 2}")
    assert again[0] == 0
    assert f"at step {steps}" in again[2]
    assert Toy.steps == list(range(steps + 2))


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_a_training_loss_that_is_no_number_stops_the_run(loss):
    # It went on to its end and exported weights of NaN, or ended in a traceback.
    trainer = SimpleNamespace(
        global_step=50, log_every_n_steps=50, callback_metrics={"train/loss": torch.tensor(1.0)}
    )  # fmt: skip
    FiniteLoss().on_train_batch_end(trainer)
    trainer.callback_metrics["train/loss"] = torch.tensor(loss)
    with pytest.raises(InputError, match="train/loss: found .*; accepted: a finite number"):
        FiniteLoss().on_train_batch_end(trainer)
    trainer.global_step = 51  # a GPU is not waited for at every step
    FiniteLoss().on_train_batch_end(trainer)
