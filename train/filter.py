"""Trains the Learn2PD filter from nothing but a base model: ``python train/filter.py fit``.

``fit`` rolls out what is missing, trains, picks the threshold on validation prompts, exports, and prints the comparison.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import WandbLogger

from data.filter_data import FilterDataModule
from data.manifest import open_rollouts
from data.rollout_data import RolloutSettings
from decoding.strategies import Strategy, make_strategy
from eval.compare import Run, compare, print_table
from models.errors import InputError
from models.filter import FilterConfig, save_filter
from models.predictor import MaskPredictor
from train.cli import Command, run
from train.filter_module import FilterModule
from train.folder import load_checkpoint
from train.rollout_module import roll_out


@dataclass
class Pipeline:
    """What happens around the training.

    Args:
        out: Folder of the export.
        pick_prompts: Validation prompts on which the threshold is picked.
        pick_from: Candidate thresholds.
        baseline: Confidence threshold of the training-free decode whose quality the picked threshold has to match.
    """

    out: Path
    pick_prompts: int
    pick_from: list[float]
    baseline: float


def prepare(command: Command) -> None:
    """Before ``fit``: the rollouts that are missing, on the trainer's devices."""
    pipeline: Pipeline = command.setting("pipeline")
    if not pipeline.pick_from:
        raise InputError("pipeline.pick_from", "no thresholds", "at least one from 0 to 1")
    roll_out(command)


def finish(command: Command) -> None:
    """After ``fit``: best weights, threshold, export, comparison."""
    pipeline: Pipeline = command.setting("pipeline")
    rollouts: RolloutSettings = command.setting("rollout")
    module: FilterModule = command.model
    trainer = command.trainer
    best = Path(trainer.checkpoint_callback.best_model_path)  # type: ignore[union-attr]
    module.load_state_dict(load_checkpoint(best)["state_dict"])
    metrics = dict(trainer.validate(module, command.datamodule, verbose=False)[0])
    if not trainer.is_global_zero:  # every rank has to take part up to here
        return
    predictor = MaskPredictor.from_pretrained(rollouts.base)
    config = describe(module.config, predictor, rollouts.folder, metrics)
    module.net.to(predictor.device).eval()
    config, rows = pick_threshold(predictor, module, config, pipeline, rollouts)
    save_filter(pipeline.out, module.net, config, card(config, rows, command.settings))
    print_table(rows, f"{rows[0]['prompts']} validation prompts; picked threshold {config.threshold:g}")
    print(f"exported {pipeline.out}")
    # The run is over: started again, fit begins anew. An interrupted one still has its last.ckpt and continues.
    (command.folder / "checkpoints" / "last.ckpt").unlink(missing_ok=True)
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):  # absent with WANDB_MODE=disabled
            names = ["label", "exact_match", "sequence_agreement", "token_agreement", "nfe_mean", "tokens_per_forward"]
            logger.log_table("comparison", columns=names, data=[[row[name] for name in names] for row in rows])


def describe(config: FilterConfig, predictor: MaskPredictor, rollouts: Path, metrics: dict[str, float]) -> FilterConfig:
    """The filter's configuration completed by what it was trained on.

    Raises:
        InputError: The rollouts are not of this base model.
    """
    settings = open_rollouts(rollouts, fingerprint=predictor.fingerprint).manifest["settings"]
    return replace(
        config, gen_length=settings["gen_length"], eot_rule=settings["eot"], vocab_size=predictor.vocab_size,
        mask_id=predictor.ids.mask, base_fingerprint=predictor.fingerprint, metrics=metrics,
    )  # fmt: skip


def pick_threshold(
    predictor: MaskPredictor, module: FilterModule, config: FilterConfig, pipeline: Pipeline, rollouts: RolloutSettings
) -> tuple[FilterConfig, list[dict[str, Any]]]:
    """The cheapest threshold at the quality of the training-free baseline.

    Quality is how often the text is the same as full_step's. Where no candidate reaches the baseline's, the one that
    comes nearest is taken.

    Returns:
        The configuration with the threshold and its figures, and the rows of the comparison.
    """
    prompts = rollouts.prompts("validation", pipeline.pick_prompts)
    runs = [Run("full_step"), Run("threshold", {"threshold": pipeline.baseline})]
    ready: dict[str, Strategy] = {}
    for threshold in sorted(pipeline.pick_from):
        strategy = make_strategy("learn2pd", network=module.net, config=config, threshold=threshold)
        runs.append(Run("learn2pd", {"threshold": threshold}))
        ready[runs[-1].label] = strategy
    rows = compare(
        predictor, prompts, runs, gen_length=config.gen_length, block_length=config.block_length,
        batch_size=rollouts.batch_size, strategies=ready,
        progress=lambda label: print(f"picking the threshold on {len(prompts)} prompts: {label}", file=sys.stderr),
    )  # fmt: skip
    wanted = rows[1]["sequence_agreement"]
    good = [row for row in rows[2:] if row["sequence_agreement"] >= wanted]
    # Without a candidate as good as the baseline, the one that comes nearest to full_step.
    best = sorted(rows[2:], key=lambda row: (-row["sequence_agreement"], row["nfe_mean"]))
    chosen = min(good or best[:1], key=lambda row: row["nfe_mean"])
    figures = {
        f"decode/{name}": chosen[name]
        for name in ("exact_match", "sequence_agreement", "nfe_mean", "tokens_per_forward")
    } | {"decode/prompts": len(prompts), "decode/baseline_nfe_mean": rows[1]["nfe_mean"]}
    threshold = chosen["settings"]["threshold"]
    return replace(config, threshold=threshold, metrics=config.metrics | figures), rows


def card(config: FilterConfig, rows: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """The model card of an export."""
    lines = [
        f"# Learn2PD filter ({config.architecture})",
        "",
        f"Says which guesses of the mask predictor `{config.base_fingerprint}` are already final (arXiv 2509.25188).",
        f"Trained on rollouts of gen_length {config.gen_length}, block_length {config.block_length}, EoT rule "
        f"`{config.eot_rule}`, passes {', '.join(settings['data']['passes'] or settings['rollout']['passes'])}; "
        f"prompts: {', '.join(source['path'] for source in settings['rollout']['sources'])}, "
        f"limit {settings['rollout']['limit']}.",
        "",
        f"Threshold {config.threshold:g}: the cheapest candidate that gives full_step's text on the validation prompts as "
        f"often as `threshold {settings['pipeline']['baseline']:g}` does.",
        "",
        f"| decode of {rows[0]['prompts']} validation prompts | exact | same text as full_step | NFE | tokens/forward |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['label']} | {row['exact_match']:.3f} | {row['sequence_agreement']:.3f} | {row['nfe_mean']:.1f} "
        f"| {row['tokens_per_forward']:.2f} |"
        for row in rows
    ]
    lines += ["", "| validation metric (masked positions) | value |", "|---|---|"]
    lines += [f"| {name} | {value:.4f} |" for name, value in config.metrics.items() if name.startswith("validation/")]
    return "\n".join(lines) + "\n"


def export(checkpoint: Path, rollouts: Path, base: str, out: Path, threshold: float) -> None:
    """Exports a training checkpoint with a threshold of your own.

    Args:
        checkpoint: Checkpoint written by ``fit``.
        rollouts: Rollout folder it was trained on.
        base: Folder or hub id of the base model.
        out: Folder to write.
        threshold: Probability above which a guess counts as final.

    Raises:
        InputError: The checkpoint, rollouts and base model cannot be read or do not belong together.
    """
    content = load_checkpoint(checkpoint)
    settings = {key: value for key, value in content["hyper_parameters"].items() if not key.startswith("_")}
    module = FilterModule(**settings)
    module.on_load_checkpoint(content)
    module.load_state_dict(content["state_dict"])
    predictor = MaskPredictor.from_pretrained(base)
    config = replace(describe(module.config, predictor, rollouts, {}), threshold=threshold)
    save_filter(
        out, module.net, config, f"# Learn2PD filter ({config.architecture})\n\nExported from `{checkpoint.name}`.\n"
    )
    print(f"exported {out}")


def callbacks(folder: Path) -> list[Callback]:
    """Stops once the validation loss has not improved for a while."""
    return [EarlyStopping("validation/loss", patience=5)]


if __name__ == "__main__":
    run(
        "filter",
        FilterModule,
        FilterDataModule,
        verbs={"export": export},
        settings={"rollout": RolloutSettings, "pipeline": Pipeline},
        links=[("rollout.folder", "data.rollouts"), ("rollout.block_length", "model.block_length")],
        checkpoint={"monitor": "validation/loss"},
        callbacks=callbacks,
        before={"fit": prepare},
        after={"fit": finish},
    )
