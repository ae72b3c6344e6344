"""Rollouts: decodes prompts full-step, then with the oracle, and streams every step to shards."""

import random
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from data.labels import Completions, collect, regions
from data.manifest import open_rollouts, read_manifest
from data.prompt import Prompt
from data.prompts import encode_prompts, prompt_hash, tokenizer_hash
from data.rollout_data import PromptBatch, RolloutData, RolloutSettings
from data.shards import RolloutBatch, RolloutKey, Rollouts, ShardWriter, load_sequences
from decoding.loop import decode
from decoding.output import DecodeOutput
from decoding.strategies import Strategy, make_strategy
from models.errors import InputError
from models.predictor import MaskPredictor, fingerprint
from train.callbacks import progress
from train.cli import Command


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
        self.predictor: MaskPredictor | None = None

    def setup(self, stage: str) -> None:
        """Loads the predictor and opens the folder, which refuses another model or other settings before any work."""
        # Lightning misses the sampler that it would read indices from (ours travel in the batch), and finds it strange
        # when there is nothing left to decode.
        for message in ("Couldn't infer the batch indices", "Total length of `PromptBatches`"):
            warnings.filterwarnings("ignore", message=message)
        settings = self.settings
        dtype = getattr(torch, settings.dtype) if settings.dtype else None
        self.predictor = MaskPredictor.from_pretrained(
            settings.base, device=self.trainer.strategy.root_device, dtype=dtype
        )
        self.strategies: dict[str, Strategy] = {
            name: make_strategy("learn2pd", filter=settings.filter) if name == "filter" else make_strategy(name)
            for name in settings.passes
        }
        key, request = self.key(), [settings.request()]
        self.known: dict[str, Tensor] = {}
        if settings.references is not None:
            same = {
                name: key.settings[name] for name in (*settings.decoding.settings(), "chat_template", "dtype", "eot_id")
            }
            earlier = load_sequences(open_rollouts(settings.references, key.fingerprint, same))
            hashes = [prompt_hash(prompt.prompt) for prompt in earlier.prompts]
            self.known = dict(zip(hashes, earlier.references, strict=True))
        if self.trainer.is_global_zero:
            ShardWriter(self.folder, key, request)  # begins the manifest, which the other ranks then find
        self.trainer.strategy.barrier("rollout-folder")
        self.shards = ShardWriter(self.folder, key, request)
        self.started, self.decoded = time.perf_counter(), 0

    def key(self) -> RolloutKey:
        """What makes rollouts reusable; ``setup`` must have run."""
        assert self.predictor is not None
        assert self.predictor.tokenizer is not None
        given = self.settings
        settings = given.decoding.settings() | {
            "passes": given.passes,
            "filter": fingerprint(given.filter) if given.filter else None,
            "filter_threshold": self.strategies["filter"].settings()["threshold"] if given.filter else None,
            "states": given.states if given.filter else None,
            "eot_evidence": given.eot_evidence or None,
            "chat_template": given.chat_template,
            "dtype": str(next(self.predictor.model.parameters()).dtype).removeprefix("torch."),
            "eot_id": self.predictor.ids.eot,
        }
        return RolloutKey(self.predictor.fingerprint, tokenizer_hash(self.predictor.tokenizer), settings)

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of the prompts.

        Raises:
            InputError: A prompt leaves no room for ``gen_length``, found before any of them is decoded.
        """
        assert self.predictor is not None
        assert self.predictor.tokenizer is not None
        tokens = encode_prompts(prompts, self.predictor.tokenizer, self.settings.chat_template)
        room = self.predictor.max_length - self.settings.gen_length
        for prompt, ids in zip(prompts, tokens, strict=True):
            if len(ids) > room:
                accepted = f"at most {room}: the model's {self.predictor.max_length} less gen_length"
                raise InputError(f"prompt {prompt.id}", f"{len(ids)} tokens", accepted)
        return tokens

    def on_predict_start(self) -> None:
        # The writer has written them; Lightning would keep every trace of the run in memory.
        self.trainer.predict_loop.return_predictions = False

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> RolloutBatch:
        """The references of a batch, and the trace of each of the passes."""
        full, references = None, self._known(batch)
        if references is None or "full_step" in self.strategies:
            full = self._decode(batch, make_strategy("full_step"), None)
            references = full.sequences
        runs = {
            name: full if name == "full_step" and full else self._decode(batch, strategy, references)
            for name, strategy in self.strategies.items()
        }
        if "oracle" in runs and not torch.equal(runs["oracle"].sequences, references):
            raise RuntimeError("the oracle did not reproduce its reference")
        self.decoded += len(batch.index)
        nfe, traces = {name: run.nfe for name, run in runs.items()}, {name: run.trace for name, run in runs.items()}
        completions = {name: self._complete(batch, run) for name, run in runs.items() if name == "filter"}
        return RolloutBatch(batch.index, batch.prompts, batch.tokens, references, nfe, traces, completions)

    def _known(self, batch: PromptBatch) -> Tensor | None:
        """References ``(b, G)`` that were decoded before; ``None`` unless all of the batch were."""
        known = [self.known.get(prompt_hash(prompt.prompt)) for prompt in batch.prompts]
        found = [reference for reference in known if reference is not None]
        return torch.stack(found) if len(found) == len(known) else None

    def _complete(self, batch: PromptBatch, run: DecodeOutput) -> Completions:
        """Decodes the active block of some states of a recorded decode to its end, full-step: labels speak of no other.

        Which states depends on the prompt alone.
        """
        assert self.predictor is not None
        decoding, steps = self.settings.decoding, collect(run.trace)
        starts = (run.nfe.cumsum(0) - run.nfe).tolist()
        chosen = []
        for prompt, start, nfe in zip(batch.prompts, starts, run.nfe.tolist(), strict=True):
            rng = random.Random(prompt_hash(prompt.prompt))
            chosen += sorted(start + step for step in rng.sample(range(nfe), min(self.settings.states, nfe)))
        rows = steps.rows[chosen]
        begun = regions(steps, decoding.gen_length, self.predictor.ids.mask)[chosen]
        before = (steps.block[chosen] * decoding.block_length).tolist()
        found = decode(
            self.predictor, [batch.tokens[row] for row in rows.tolist()], decoding, make_strategy("full_step"),
            regions=begun, batch_size=batch.batch_size, stop=lambda state, text: len(text) > before[state],
        )  # fmt: skip
        return Completions(rows, steps.step[chosen], found.sequences)

    def _decode(self, batch: PromptBatch, strategy: Strategy, references: Tensor | None) -> DecodeOutput:
        assert self.predictor is not None
        return decode(
            self.predictor, batch.tokens, self.settings.decoding, strategy, references, record=True,
            record_eot=self.settings.eot_evidence, batch_size=batch.batch_size,
        )  # fmt: skip

    def teardown(self, stage: str) -> None:
        """Merges what all ranks wrote; Lightning calls this when a run has come to its end, not when it was stopped.

        While other runs on this folder still decode, whichever comes last merges.

        Raises:
            InputError: A prompt was left out, as ``limit_predict_batches`` does; the next run decodes it.
        """
        self.trainer.strategy.barrier("rollout-done")
        if self.trainer.is_global_zero:
            prompts = self.trainer.datamodule.prompts  # type: ignore[attr-defined]
            expected = [prompt_hash(prompt.prompt) for prompt in prompts]
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
        The finished set, as :func:`data.shards.load_records` takes it.

    Raises:
        InputError: Bad prompts, or a folder with rollouts of another model or other settings.
    """
    return run(settings, accelerator=accelerator, devices=devices, num_nodes=num_nodes).rollouts


def run(settings: RolloutSettings, **devices: Any) -> RolloutModule:
    """As :func:`rollout`, but returns the module, which knows how long it took."""
    module = RolloutModule(settings)
    trainer = Trainer(
        logger=False, enable_checkpointing=False, enable_model_summary=False, callbacks=[RolloutWriter(), progress()],
        **devices,
    )  # fmt: skip
    trainer.predict(module, RolloutData(settings), return_predictions=False)
    return module


def roll_out(command: Command, settings: RolloutSettings | None = None) -> None:
    """Before ``fit``: the rollouts that are missing, on the devices that the command has.

    Args:
        command: The command.
        settings: What is rolled out; the command's own settings by default.
    """
    trainer = command.trainer
    accelerator = command.settings["trainer"]["accelerator"]
    rollout(
        settings or command.setting("rollout"), accelerator=accelerator, devices=trainer.num_devices,
        num_nodes=trainer.num_nodes,
    )  # fmt: skip
