"""Rollouts: decodes prompts full-step, then with the oracle, and streams every step to shards."""

import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.loggers import Logger

from data.manifest import read_manifest
from data.rollout_data import PromptBatch, RolloutData, RolloutSettings
from data.shards import RolloutBatch, Rollouts, ShardWriter
from models.predictor import MaskPredictor
from train.callbacks import progress
from train.cli import Command
from train.roller import Roller
from train.trainer_settings import patient, refusals


class RolloutModule(LightningModule):
    """Decodes prompts full-step and with the oracle (Learn2PD, arXiv 2509.25188), and records every step in shards.

    A run that was interrupted continues when it is started again; a folder that holds rollouts of the same model with
    the same settings is only extended by the prompts it lacks.

    Args:
        settings: What is rolled out.
    """

    def __init__(self, settings: RolloutSettings) -> None:
        super().__init__()
        self.settings, self.folder = settings, settings.folder

    def setup(self, stage: str) -> None:
        """Loads the predictor and opens the folder, which refuses another model or other settings before any work."""
        # Lightning misses the sampler that it would read indices from (ours travel in the batch), and finds it strange
        # when there is nothing left to decode.
        for message in ("Couldn't infer the batch indices", "Total length of `PromptBatches`"):
            warnings.filterwarnings("ignore", message=message)
        settings = self.settings
        dtype = getattr(torch, settings.dtype) if settings.dtype else None
        predictor = MaskPredictor.from_pretrained(settings.base, device=self.trainer.strategy.root_device, dtype=dtype)
        self.roller = Roller(settings, predictor)
        key, request = self.roller.key, [settings.request()]
        if self.trainer.is_global_zero:
            ShardWriter(self.folder, key, request)  # begins the manifest, which the other ranks then find
        self.trainer.strategy.barrier("rollout-folder")
        self.shards = ShardWriter(self.folder, key, request)
        self.started, self.decoded = time.perf_counter(), 0

    def on_predict_start(self) -> None:
        # The writer has written them; Lightning would keep every trace of the run in memory.
        self.trainer.predict_loop.return_predictions = False

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> RolloutBatch:
        """The references of a batch, and the trace of each of the passes."""
        if batch_idx == 0 and self.trainer.is_global_zero:  # with a small set this is all of it, and takes minutes
            passes = ", ".join(self.roller.strategies)
            print(f"decoding the first {len(batch.index)} prompts: {passes}", file=sys.stderr, flush=True)
        found = self.roller.roll(batch)
        self.decoded += len(batch.index)
        return found

    def teardown(self, stage: str) -> None:
        """Merges what all ranks wrote; Lightning calls this when a run has come to its end, not when it was stopped.

        While other runs on this folder still decode, whichever comes last merges.

        Raises:
            InputError: A prompt was left out, as ``limit_predict_batches`` does; the next run decodes it.
        """
        self.trainer.strategy.barrier("rollout-done")
        if self.trainer.is_global_zero:
            expected = list(self.trainer.datamodule.prompts.hashes())  # type: ignore[attr-defined]
            if (others := self.shards.claimed()) and (missing := self.shards.missing(expected)):
                print(f"{self.folder}: {len(missing)} prompts are left, {others} batches of them with other runs")
            else:
                self.shards.finish(expected)
        self.trainer.strategy.barrier("rollout-merged")
        self.rollouts = Rollouts(self.folder, read_manifest(self.folder))
        decoded = torch.tensor(float(self.decoded), device=self.trainer.strategy.root_device)
        self.decoded = int(self.trainer.strategy.reduce(decoded, reduce_op="sum"))
        for logger in self.trainer.loggers:
            logger.log_metrics(self.summary())

    def summary(self) -> dict[str, float]:
        """What there is to say about a finished run: sizes, mean NFE of each of the passes, and this run's speed."""
        seconds = time.perf_counter() - self.started
        own = {"rollout/decoded": self.decoded, "rollout/prompts_per_second": self.decoded / seconds}
        if not (counts := self.rollouts.manifest.get("counts")):
            return own
        means = {f"rollout/nfe_{name}": steps / counts["prompts"] for name, steps in counts["steps"].items()}
        return {"rollout/prompts": counts["prompts"]} | own | means


class RolloutWriter(BasePredictionWriter):
    """Writes each batch as a shard as soon as it is decoded."""

    def __init__(self) -> None:
        super().__init__(write_interval="batch")

    def write_on_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, prediction: RolloutBatch, *_: Any
    ) -> None:
        assert isinstance(pl_module, RolloutModule)
        pl_module.shards.write(prediction)


def rollout(settings: RolloutSettings, *, accelerator: str = "auto", devices: int = 1, num_nodes: int = 1) -> Rollouts:
    """Rolls out what is missing in a folder, without a command line.

    Args:
        settings: What is rolled out.
        accelerator: Lightning's accelerator.
        devices: Number of devices of a node, each a rank with its own batches.
        num_nodes: Number of nodes.

    Returns:
        The finished set, as :func:`data.rollouts.load_records` takes it.

    Raises:
        InputError: Bad prompts, or a folder with rollouts of another model or other settings.
    """
    return run(settings, accelerator=accelerator, devices=devices, num_nodes=num_nodes).rollouts


def run(settings: RolloutSettings, **devices: Any) -> RolloutModule:
    """As :func:`rollout`, but returns the module, which knows how long it took."""
    module = RolloutModule(settings)
    with refusals():
        trainer = patient(
            Trainer(
                logger=False, enable_checkpointing=False, enable_model_summary=False,
                callbacks=[RolloutWriter(), progress()], **devices,
            )
        )  # fmt: skip
    trainer.predict(module, RolloutData(settings), return_predictions=False)
    return module


def roll_out(
    command: Command, settings: RolloutSettings | None = None, loggers: Sequence[Logger] | None = None
) -> None:
    """Before ``fit``: the rollouts that are missing, on the devices that the command has.

    Args:
        command: The command.
        settings: What is rolled out; the command's own settings by default.
        loggers: Where the figures of it go; the command's own by default.
    """
    trainer = command.trainer
    accelerator = command.settings["trainer"]["accelerator"]
    found = run(
        settings or command.setting("rollout"), accelerator=accelerator, devices=trainer.num_devices,
        num_nodes=trainer.num_nodes,
    ).summary()  # fmt: skip
    for logger in trainer.loggers if loggers is None else loggers:
        logger.log_metrics(found)
        logger.save()
