"""What Lightning's Trainer would take and stumble over later, or take and ignore: refused before anything runs, or mended."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from data.typed import Count, NotNegative, Whole, checked
from eval.command import raised_by
from eval.lm.processes import TIMEOUT
from models.errors import InputError

_NUMBERS = {
    "accumulate_grad_batches": Count,
    "check_val_every_n_epoch": Count,
    "gradient_clip_val": NotNegative,
    "log_every_n_steps": Whole,
    "num_nodes": Count,
}


PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "32", "bf16", "16")
"""Those that leave weights and rollouts in fp32."""
_LAUNCHED = ("MASTER_ADDR", "SLURM_NTASKS", "LSB_JOBID")
"""What torchrun, srun and LSF tell the processes that they start; one of them is there."""


def check_trainer(settings: Mapping[str, Any], subcommand: str, exports: bool) -> None:
    """Checks the group ``trainer``.

    Args:
        settings: Its settings, as they are.
        subcommand: The Trainer's method.
        exports: Whether the command exports what it has trained, which takes a step and a checkpoint.

    Raises:
        InputError: The first that is not accepted.
    """
    for name, kind in _NUMBERS.items():
        if settings[name] is not None:
            checked(kind, settings[name], f"trainer.{name}")
    cores, devices = max(2, os.cpu_count() or 1), settings["devices"]
    on_cpu = settings["accelerator"] == "cpu" or not torch.cuda.is_available()
    if on_cpu and str(devices).isdigit() and int(devices) > cores:  # as many copies of the model, and none would get on
        raise InputError("trainer.devices", devices, f"at most {cores}, the processors here")
    here = os.environ.get("LOCAL_WORLD_SIZE") if "TORCHELASTIC_RUN_ID" in os.environ else None
    asked = "1" if on_cpu and devices == "auto" else str(devices)
    if here is not None and asked.isdigit() and asked != here:  # Lightning would look for a device that it has not
        raise InputError("trainer.devices", devices, f"{here}, as many as torchrun has started on this node")
    if (nodes := settings["num_nodes"]) > 1 and not any(name in os.environ for name in _LAUNCHED):
        raise InputError("trainer.num_nodes", nodes, "1, unless torchrun or srun starts it on every node")
    if settings["precision"] is not None and str(settings["precision"]) not in PRECISIONS:
        raise InputError("trainer.precision", settings["precision"], f"null | {' | '.join(PRECISIONS)}")
    if subcommand == "predict":
        part = settings["limit_predict_batches"]
        if part is not None and (isinstance(part, int) or part != 1):
            raise InputError(
                "trainer.limit_predict_batches", part, "null: a set has all its prompts; see rollout.limit"
            )
        if settings["fast_dev_run"]:
            raise InputError("trainer.fast_dev_run", settings["fast_dev_run"], "false: a set has all its prompts")
    if settings["val_check_interval"] in (0, False):
        raise InputError("trainer.val_check_interval", 0, "null, a number of batches, or a share of them above 0")
    if not exports:
        return
    for name in ("max_epochs", "max_steps", "limit_train_batches", "limit_val_batches"):
        if settings[name] is not None and settings[name] == 0:
            raise InputError(f"trainer.{name}", settings[name], "more than that: what is trained is exported")
    if settings["max_time"] is not None and not re.search("[1-9]", str(settings["max_time"])):
        raise InputError("trainer.max_time", settings["max_time"], "more than that: what is trained is exported")
    for name, fine in (("enable_checkpointing", True), ("fast_dev_run", False)):
        if settings[name] not in (None, fine):
            accepted = f"{str(fine).lower()}: what is exported comes from a checkpoint"
            raise InputError(f"trainer.{name}", str(settings[name]).lower(), accepted)
    every, epochs = settings["check_val_every_n_epoch"], settings["max_epochs"]
    if every is not None and epochs is not None and 0 < epochs < every:
        accepted = f"at most max_epochs {epochs}: checkpoints are of epochs that were validated"
        raise InputError("trainer.check_val_every_n_epoch", every, accepted)


def patient(trainer: Trainer) -> Trainer:
    """A trainer whose processes wait for each other for however long a shard or a comparison takes.

    PyTorch ends a run after half an hour of waiting, and one shard of an 8B model may well take longer.
    """
    if isinstance(trainer.strategy, DDPStrategy):
        trainer.strategy._timeout = max(trainer.strategy._timeout or TIMEOUT, TIMEOUT)  # Lightning has it no other way
    return trainer


@contextmanager
def refusals() -> Iterator[None]:
    """Makes what Lightning says against the settings of its Trainer bad input; other errors stay what they are.

    Raises:
        InputError: The block failed so.
    """
    try:
        yield
    except InputError:
        raise
    except (MisconfigurationException, ModuleNotFoundError, TypeError, ValueError) as error:
        if not raised_by(error, "lightning"):
            raise
        accepted = "settings that Lightning's Trainer takes"
        raise InputError("trainer", " ".join(str(error).split()), accepted) from error
