"""Rolls out a base model into labelled steps: ``python train/rollout.py predict``; settings in ``configs/rollout``."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from lightning.pytorch.loggers import Logger

from data.manifest import Rollouts, read_manifest
from data.prompt import split_of
from data.prompts import PromptSource, read_prompts
from data.provenance import write_run_file
from data.rollout_data import SHARD, RolloutData, RolloutSettings
from data.shards import ShardWriter
from data.store import Folder
from decoding.config import DecodeConfig
from decoding.memory_plan import MOST_ROWS, plan_memory
from decoding.strategies import make_strategy
from models.predictor import checkpoint_folder
from train.cli import Command, log_rollouts, run
from train.rollout_module import RolloutModule, RolloutWriter, summary
from train.rollout_module import run as run_rollout
from train.rollout_ray import RaySettings, rollout_by_ray


def _report(command: Command) -> None:
    if command.model.trainer.is_global_zero:
        _tell(command.model.folder, command.model.summary(), command.model.trainer.loggers)


def _tell(folder: Folder, numbers: Mapping[str, float], loggers: Sequence[Logger]) -> None:
    """Prints what a run has done, and tells the loggers of a set that it has finished."""
    print(f"{folder}:", ", ".join(f"{name.removeprefix('rollout/')} {value:.4g}" for name, value in numbers.items()))
    manifest = read_manifest(folder)
    if manifest["complete"] and (digest := manifest.get("digest")):  # older sets have none
        log_rollouts(loggers, digest)


def _instead(settings: Mapping[str, Any]) -> Callable[[Command], None] | None:
    """What does a subcommand's work where Lightning does not."""
    if settings["dry_run"]:
        return lambda command: estimate(command.setting("rollout"), settings["trainer"]["accelerator"])
    return _by_ray if settings["engine"] == "ray" else None


def _by_ray(command: Command) -> None:
    settings: RolloutSettings = command.setting("rollout")
    write_run_file(command.folder / "run.yaml", command.settings)
    loggers, started = command.loggers(), time.perf_counter()
    decoded = rollout_by_ray(settings, command.setting("ray"))
    numbers = summary(read_manifest(settings.folder), decoded, time.perf_counter() - started)
    _tell(settings.folder, numbers, loggers)
    for logger in loggers:
        logger.log_metrics(numbers)
        logger.finalize("success")


def plan(
    base: Path,
    gen_length: int = 128,
    block_length: int = 32,
    batch_size: int = 32,
    prompt_length: int = 256,
    dtype: str = "bfloat16",
    eot_evidence: bool = False,
    hidden_states: bool = False,
) -> None:
    """Prints what rollouts of a model take in memory, and decodes nothing.

    Args:
        base: Its config.json, or the folder of that; weights are not needed.
        gen_length: Generated positions, in tokens.
        block_length: Positions of one block.
        batch_size: Prompts decoded together.
        prompt_length: Tokens of each prompt.
        dtype: Dtype of the weights.
        eot_evidence: With what every step says of EoT.
        hidden_states: With the hidden states of every step.
    """
    config = DecodeConfig(gen_length, block_length)
    print(
        plan_memory(
            base, config, make_strategy("full_step"), dtype=dtype, batch_size=batch_size, prompt_length=prompt_length,
            record=True, record_eot=eot_evidence, record_hidden=hidden_states,
        )
    )  # fmt: skip


def estimate(rollout: RolloutSettings, accelerator: str = "auto") -> None:
    """Prints how much work rollouts are, and keeps nothing: prompts, shards, memory, and time and disk from the first shard.

    Args:
        rollout: What is to be rolled out.
        accelerator: Lightning's accelerator.
    """
    prompts = rollout.prompts()
    shards = -(-len(prompts) // (SHARD * rollout.batch_size))
    print(f"{len(prompts)} prompts in {shards} shards of {SHARD} batches of {rollout.batch_size}")
    for (task, split), count in sorted(Counter((p.task, split_of(p.prompt)) for p in prompts).items()):
        print(f"  {task}, {split}: {count}")
    with TemporaryDirectory() as folder:
        sample = replace(rollout, folder=Path(folder), limit=min(len(prompts), SHARD * rollout.batch_size))
        module = run_rollout(sample, accelerator=accelerator, devices=1)
        (*_, record) = Rollouts(Path(folder), module.manifest).shards
        numbers, predictor = module.summary(), module.roller.predictor
        longest = int(sample.encode(sample.prompts(), predictor)[1].max())
    rows = min(rollout.batch_size, MOST_ROWS)
    memory = plan_memory(
        checkpoint_folder(rollout.base), rollout.decoding, make_strategy("full_step"), batch_size=rows,
        prompt_length=longest, dtype=str(predictor.dtype).removeprefix("torch."), record=True,
        record_eot=rollout.eot_evidence, record_hidden=rollout.hidden_states,
    )  # fmt: skip
    print(f"  memory of {rows} prompts of {longest} tokens, the first shard's longest: {memory}")
    share = len(prompts) / numbers["rollout/prompts"]
    for kind in ("steps", "sequences"):
        print(f"  {kind}: {record[kind]['bytes'] * share / 2**20:.3g} MiB in all")
    hours = len(prompts) / numbers["rollout/prompts_per_second"] / 3600
    print(f"{numbers['rollout/prompts_per_second']:.2f} prompts a second on one {module.device.type} device, so about")
    for devices in (1, 8, 64):
        print(f"  {hours / min(devices, shards):.3g} hours on {devices}")


def merge(folder: Folder) -> None:
    """Finishes a set whose prompts are all decoded, by however many processes; may run while they still work.

    It reads every byte; a damaged shard is removed, and decoded again by the next ``predict``.

    Args:
        folder: Folder of the shards, or its URL.

    Raises:
        InputError: No set, or prompts that are not decoded yet, with their number.
    """
    shards = ShardWriter.begun(folder)
    expected: dict[str, None] = {}
    for request in shards.manifest["sources"]:
        sources = [PromptSource(**source) for source in request["sources"]]
        prompts = read_prompts(sources, request["split"], request["limit"], request["per_task"])
        expected |= dict.fromkeys(prompts.hashes())
    shards.written()
    counts = shards.finish(expected)["counts"]
    print(f"{folder}: {counts['prompts']} prompts, complete")


if __name__ == "__main__":
    run(
        "rollout",
        RolloutModule,
        RolloutData,
        subcommands=("predict",),
        verbs={"plan": plan, "merge": merge},
        settings={"rollout": RolloutSettings, "ray": RaySettings},
        links=[("rollout", f"{part}.settings", None, "instantiate") for part in ("model", "data")],
        callbacks=lambda folder: [RolloutWriter()],
        after={"predict": _report},
        options={
            "engine": (Literal["lightning", "ray"], "lightning", "What hands the shards out: ray takes the group ray."),
            "dry_run": (bool, False, "Print how much work it is, from the first shard, and keep nothing."),
        },
        instead=_instead,
    )
