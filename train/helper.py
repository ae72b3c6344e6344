"""Distils a helper for adaptive parallel decoding from nothing but a base model: ``python train/helper.py fit``.

``fit`` rolls out what is missing, trains, exports, decodes validation prompts at several mixture weights, and prints the
comparison.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping

from data.disk import check_writable
from data.helper_data import HelperDataModule
from data.manifest import MANIFEST, Rollouts, check_key, open_rollouts
from data.rollout_data import RolloutSettings
from data.typed import Count, Length, Share, check_fields
from decoding.risk import Calibration
from decoding.strategies import Strategy, make_strategy
from eval.compare import Run, compare, print_table, share
from eval.headline import MARGIN, by_answers, doubts
from eval.risk import CHOSEN, calibrate, keep, promises
from models.errors import InputError
from models.helper import Helper, HelperConfig, check_replaceable, save_helper
from models.predictor import MaskPredictor
from train.cards import made_from, metadata
from train.cli import Command, log_export, run
from train.folder import load_checkpoint, made_by
from train.helper_module import HelperModule
from train.rollout_module import roll_out

FIGURES = ("exact_match", "sequence_agreement", "nfe_mean", "tokens_per_forward")


@dataclass
class Pipeline:
    """What happens around the training.

    Args:
        out: Folder of the export.
        measure_prompts: Validation prompts decoded after training.
        mixture_weights: Values of APD's R they are decoded with; [] decodes none.
        kv_window: APD's W; null recomputes everything.
        max_lookahead: APD's M; null for all MASK positions that are left.
    """

    out: Path
    measure_prompts: Count
    mixture_weights: list[Share]
    kv_window: Length | None
    max_lookahead: Length | None

    def __post_init__(self) -> None:
        check_fields(self)


def prepare(command: Command) -> None:
    """Before ``fit``: the rollouts that are missing, on the trainer's devices."""
    check_replaceable(command.setting("pipeline").out.absolute())
    roll_out(command)


def finish(command: Command) -> None:
    """After ``fit``: best weights, decodes of validation prompts, export, comparison."""
    pipeline: Pipeline = command.setting("pipeline")
    rollouts: RolloutSettings = command.setting("rollout")
    module: HelperModule = command.model
    trainer = command.trainer
    best = Path(trainer.checkpoint_callback.best_model_path)  # type: ignore[union-attr]
    module.load_state_dict(load_checkpoint(best)["state_dict"], strict=module.strict_loading)
    metrics = dict(trainer.validate(module, command.datamodule, verbose=False)[0])
    if not trainer.is_global_zero:  # every rank has to take part up to here
        return
    predictor = MaskPredictor.from_pretrained(rollouts.base, dtype=rollouts.dtype)
    config = describe(module, predictor, Rollouts(rollouts.folder, command.datamodule.manifest), metrics)
    module.to(predictor.device)
    rows, calibration = measure(predictor, Helper(module.net, config), pipeline, rollouts, command.folder / "decodes")
    for row in rows[1:]:
        prefix = f"apd/{row['settings']['mixture_weight']:g}"
        config.metrics.update({f"{prefix}/{name}": row[name] for name in FIGURES})
    config.metrics.update({f"full_step/{name}": row[name] for row in rows[:1] for name in FIGURES})
    text = card(config, command.datamodule.digest, rows, calibration, command.settings)
    save_helper(pipeline.out, module.net, config, text)
    if calibration is not None:
        keep(calibration, "helper", pipeline.out)
        print_table(rows, f"{rows[0]['prompts']} validation prompts")
        print("\n".join([*promises(calibration), "", CHOSEN]))
    print(f"exported {pipeline.out}")
    # The run is over: started again, fit begins anew. An interrupted one still has its last.ckpt and continues.
    (command.folder / "checkpoints" / "last.ckpt").unlink(missing_ok=True)
    columns = ["label", *FIGURES]
    log_export(trainer.loggers, "helper", pipeline.out, config.metrics, rows, columns, command.datamodule.digest)


def describe(
    module: HelperModule, predictor: MaskPredictor, rollouts: Rollouts, metrics: Mapping[str, float]
) -> HelperConfig:
    """The helper's description: what it was trained on, and for what.

    Raises:
        InputError: The rollouts are not of this base model.
    """
    check_key(rollouts.folder / MANIFEST, rollouts.manifest, predictor.fingerprint)
    settings = rollouts.manifest["settings"]
    source = module.pretrained
    if source is not None and Path(source).is_dir():
        source = str(Path(source).resolve())  # wherever the export is loaded from
    return HelperConfig(
        vocab_size=predictor.vocab_size, mask_id=predictor.ids.mask, eot_id=predictor.ids.eot,
        base_fingerprint=predictor.fingerprint, gen_length=settings["gen_length"], eot_rule=settings["eot"],
        source=source, source_fingerprint=module.source_fingerprint, adapter=module.lora_rank is not None,
        metrics=dict(metrics), base_family=predictor.family,
    )  # fmt: skip


def measure(
    predictor: MaskPredictor, helper: Helper, pipeline: Pipeline, rollouts: RolloutSettings, decodes: Path
) -> tuple[list[dict[str, Any]], Calibration | None]:
    """Decodes validation prompts full-step and with APD at every mixture weight, encoded and decoded as the rollouts were.

    What is finished is kept in ``decodes``.

    Returns:
        The rows of the comparison, full_step first, and what they vouch for; nothing where there are no mixture weights.
    """
    if not pipeline.mixture_weights:
        return [], None
    prompts = rollouts.encode(rollouts.prompts("validation", pipeline.measure_prompts), predictor)[0]
    decoding: Any = {"eot": rollouts.eot, "steps": rollouts.steps}
    runs, ready = [Run("full_step", **decoding)], dict[str, Strategy]()
    for weight in sorted(pipeline.mixture_weights):
        runs.append(Run("apd", {"mixture_weight": weight}, **decoding))
        ready[runs[-1].label] = make_strategy(
            "apd", network=helper, mixture_weight=weight, kv_window=pipeline.kv_window,
            max_lookahead=pipeline.max_lookahead,
        )  # fmt: skip
    rows = compare(
        predictor, prompts, runs, gen_length=rollouts.gen_length, block_length=rollouts.block_length,
        batch_size=rollouts.batch_size, chat_template=rollouts.chat_template, strategies=ready, folder=decodes,
        progress=lambda label: print(f"decoding {len(prompts)} validation prompts: {label}", file=sys.stderr),
    )  # fmt: skip
    # The larger the weight, the more drafts are accepted: cheaper, and further from the helper's own text.
    options = {"kv_window": pipeline.kv_window, "max_lookahead": pipeline.max_lookahead}
    given = {name: value for name, value in options.items() if value is not None}
    for warning in doubts(rows[0], MARGIN):
        print(f"warning: {warning}", file=sys.stderr)
    loss = "answer" if by_answers(rows[0]) else "text"
    return rows, calibrate(rows[0], rows[1:], prompts, "apd", given, "mixture_weight", loss)


def card(
    config: HelperConfig, rollouts: str | None, rows: list[dict[str, Any]], calibration: Calibration | None,
    settings: dict[str, Any],
) -> str:  # fmt: skip
    """The model card of an export, trained on rollouts of this digest."""
    what = (
        f"tuned from `{config.source}`"
        if config.source
        else f"trained from scratch (init: {settings['model']['init']})"
    )
    how = f", LoRA of rank {settings['model']['lora_rank']}" if settings["model"]["lora_rank"] else ""
    prompts = [
        " ".join(str(source[key]) for key in ("path", "split", "size") if source.get(key))
        for source in settings["rollout"]["sources"]
    ]
    lines = [
        metadata("helper", settings["rollout"]) + "# APD helper",
        "",
        f"A causal language model over the token ids of the mask predictor `{config.base_fingerprint}`, {what}{how}: the",
        "helper of adaptive parallel decoding (arXiv 2506.00413). Distilled on the predictor's own text: rollouts of",
        f"gen_length {config.gen_length}, EoT rule `{config.eot_rule}`; prompts: {', '.join(prompts)}; "
        f"limit {settings['rollout']['limit']}; digest of the rollouts {rollouts}.",
        "",
        f"It has no tokenizer: the ids are the predictor's (vocab_size {config.vocab_size}, EoT {config.eot_id}). "
        "`helper.json` describes it; "
        + ("peft reads the adapter." if config.adapter else "`AutoModelForCausalLM` reads the weights."),
    ]
    if rows:
        first = rows[1]["settings"]
        lines += [
            "",
            f"Accepted length is text committed in a forward of the predictor, in tokens: what follows the first EoT does not "
            f"count. W {first['kv_window']}, M {first['max_lookahead']}.",
            "",
            f"| decode of {rows[0]['prompts']} validation prompts | exact | same text as full_step | NFE | accepted length |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {row['label']} | {share(row['exact_match'])} | {share(row['sequence_agreement'])} | {row['nfe_mean']:.1f} "
            f"| {row['tokens_per_forward']:.2f} |"
            for row in rows
        ]
    if calibration is not None:
        lines += ["", *promises(calibration), "", CHOSEN]
    lines += ["", "| validation metric (response tokens) | value |", "|---|---|"]
    lines += [f"| {name} | {value:.4f} |" for name, value in config.metrics.items() if name.startswith("validation/")]
    return "\n".join(lines) + "\n"


def export(checkpoint: Path, rollouts: Path, out: Path, base: str | None = None, merge: bool = False) -> None:
    """Exports a training checkpoint.

    Args:
        checkpoint: Checkpoint written by ``fit``.
        rollouts: Rollout folder it was trained on.
        out: Folder to write.
        base: Folder or hub id of the base model; by default the one it was trained with.
        merge: Write a LoRA merged into its pretrained model, as one whole model, rather than as an adapter.

    Raises:
        InputError: The checkpoint, rollouts and base model cannot be read or do not belong together.
    """
    check_writable("out", out)
    content = load_checkpoint(checkpoint)
    with made_by("train/helper.py", checkpoint):
        settings = {key: value for key, value in content["hyper_parameters"].items() if not key.startswith("_")}
        module = HelperModule(**settings)
    if merge and module.lora_rank is None:
        raise InputError("merge", "true", "false: the checkpoint is of a whole model, there is nothing to merge")
    predictor = MaskPredictor.from_pretrained(base or settings["base"])
    with made_by("train/helper.py", checkpoint):
        module.build(predictor)
        module.on_load_checkpoint(content)
        module.load_state_dict(content["state_dict"], strict=module.strict_loading)
    config = describe(module, predictor, open_rollouts(rollouts), {})
    net = module.net
    if merge:
        net, config = net.merge_and_unload(), replace(config, adapter=False)
    title = metadata("helper", made_from(base or settings["base"], rollouts)) + "# APD helper"
    save_helper(out, net, config, f"{title}\n\nExported from `{checkpoint.name}` for `{config.base_fingerprint}`.\n")
    print(f"exported {out}")


def callbacks(folder: Path) -> list[Callback]:
    """Stops once the validation loss has not improved for a while."""
    return [EarlyStopping("validation/loss", patience=5)]


if __name__ == "__main__":
    run(
        "helper",
        HelperModule,
        HelperDataModule,
        verbs={"export": export},
        settings={"rollout": RolloutSettings, "pipeline": Pipeline},
        links=[("rollout.folder", "data.rollouts"), ("rollout.base", "model.base")],
        checkpoint={"monitor": "validation/loss"},
        callbacks=callbacks,
        before={"fit": prepare},
        after={"fit": finish},
    )
