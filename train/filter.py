"""Trains the Learn2PD filter from nothing but a base model: ``python train/filter.py fit``.

``fit`` rolls out what is missing, trains, picks the threshold on validation prompts, exports, and prints the comparison.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from data.disk import check_writable
from data.filter_data import FilterDataModule
from data.manifest import MANIFEST, Rollouts, check_key, open_rollouts
from data.prompt import Prompt
from data.prompts import Split, split_of
from data.rollout_data import RolloutSettings
from data.store import Folder, inside
from data.typed import Count, Part, Rounds, Share, check_fields
from decoding.risk import Calibration
from decoding.strategies import Strategy, make_strategy
from eval.compare import Run, compare, print_table, share
from eval.headline import by_answers, doubts, pick
from eval.risk import CHOSEN, calibrate, keep, promises
from models.checkpoint import PICTURE, check_replaceable
from models.errors import InputError
from models.filter import FilterConfig, save_filter, size
from models.predictor import MaskPredictor, fingerprint
from train.callbacks import FiniteLoss, checkpoints, progress
from train.cards import filter_time, made_from, metadata
from train.cli import Command, log_export, run
from train.eot import learn as learn_eot
from train.filter_module import FilterModule
from train.folder import WholeFiles, last_checkpoint, load_checkpoint, made_by
from train.reliability import draw
from train.rollout_module import roll_out

ROUNDS = "How often the filter is trained anew on states of its own decodes, labelled by what full_step makes of them."
FIGURES = ("exact_match", "valid", "sequence_agreement", "token_agreement", "nfe_mean", "tokens_per_forward")
FIRST = (
    "rollout.base", "rollout.sources", "rollout.limit", "rollout.folder", "rollout.gen_length", "rollout.block_length",
    "rollout.batch_size", "rounds", "pipeline.out", "trainer.devices",
)  # fmt: skip


@dataclass
class Pipeline:
    """What happens around the training.

    Args:
        out: Folder of the export.
        pick_prompts: Validation prompts on which the threshold is picked; null for all of the sources.
        test_prompts: Test prompts on which the picked threshold is reported; null for all of the sources.
        pick_from: Candidate thresholds.
        baselines: Confidence thresholds of the training-free decode, of which the best is picked by the same rule.
        loss: Right answers, as a share from 0 to 1, that a decode may lose against full_step to count as equally good; one
            standard error of the loss is added to it.
        eot_out: Folder of an EoT head that is trained on the same rollouts, which need ``rollout.eot_evidence``; null for none.
    """

    out: Path
    pick_prompts: Count | None
    test_prompts: Count | None
    pick_from: list[Share]
    baselines: list[Share]
    loss: Part
    eot_out: Path | None

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("pick_from", "baselines"):
            if not getattr(self, name):
                raise InputError(f"pipeline.{name}", "none", "at least one threshold from 0 to 1")


def prepare(command: Command) -> None:
    """Before ``fit``: the rollouts that are missing, on the trainer's devices, and those of every round's filter."""
    pipeline: Pipeline = command.setting("pipeline")
    rollouts: RolloutSettings = command.setting("rollout")
    rounds: int = command.setting("rounds")
    if rounds and "filter" in rollouts.passes:
        raise InputError("rollout.passes", ", ".join(rollouts.passes), "no filter with rounds, which make their own")
    data: FilterDataModule = command.datamodule
    if rounds and "filter" not in (data.passes or ["filter"]):
        raise InputError("data.passes", ", ".join(data.passes or []), "null, or filter among them, with rounds")
    if command.model.config.hidden and not rollouts.hidden_states:
        raise InputError("rollout.hidden_states", False, "true, with model.hidden")
    check_replaceable(pipeline.out.absolute(), "filter")
    if pipeline.eot_out is not None:
        if not rollouts.eot_evidence:
            raise InputError("rollout.eot_evidence", False, "true, with pipeline.eot_out")
        check_replaceable(pipeline.eot_out.absolute(), "eot")
    roll_out(command)
    for number in range(1, rounds + 1):
        learner, loggers = command.folder / "rounds" / str(number), of_round(command, number)
        learn(command, learner, loggers)
        own = replace(
            rollouts, folder=inside(rollouts.folder, f"filter-{fingerprint(learner)}-{command.model.config.threshold:g}"),
            passes=["filter"], filter=learner, references=rollouts.folder,
        )  # fmt: skip
        roll_out(command, own, loggers)
        data.rollouts.append(own.folder)
    if rounds:  # as if they had been there
        seed_everything(command.settings["seed_everything"], verbose=False)


def of_round(command: Command, number: int) -> list[Logger]:
    """The command's loggers as a round has them: the same run of W&B, and metrics whose names begin with ``round 1-``."""
    found: list[Logger] = []
    for logger in command.trainer.loggers:
        if isinstance(logger, WandbLogger):
            found.append(WandbLogger(experiment=logger.experiment, prefix=f"round {number}"))
        if isinstance(logger, CSVLogger):
            found.append(CSVLogger(command.folder, name="csv", prefix=f"round {number}"))
    return found


def learn(command: Command, out: Path, loggers: list[Logger]) -> None:
    """Trains and exports the filter of a round, from what is rolled out so far; one that is there already is kept.

    A training that was interrupted continues where it was.

    Args:
        command: The command, whose model, data and trainer settings it takes.
        out: Folder of the export.
        loggers: Where its metrics go.
    """
    given: FilterDataModule = command.datamodule
    data = FilterDataModule(
        list(given.rollouts), given.batch_size, given.passes, given.tail_weight, given.seed, given.memory, given.limit,
        int(given.hidden),
    )  # fmt: skip
    data.sets = given.sets
    digest = "+".join(one.digest for one in given.open(command.trainer))
    settings = command.settings
    made_of = {"rollouts": digest, **{name: settings[name] for name in ("model", "data", "seed_everything")}}
    record = out / "README.md"
    text = f"# Learn2PD filter of a round\n\n```json\n{json.dumps(made_of, indent=1)}\n```\n"
    if record.is_file() and record.read_text().startswith(text):  # the export adds a line of its own
        return
    trainer, rollouts = command.trainer, command.setting("rollout")
    seed_everything(settings["seed_everything"], verbose=False)
    module = FilterModule(**settings["model"])
    # What is made of something else has another folder: it is not what this one continues from.
    folder = out.with_name(f"{out.name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}")
    best, begun = checkpoints(folder / "checkpoints", monitor="validation/loss"), last_checkpoint(folder)
    if begun is not None:
        rank_zero_only(print)(f"continuing {begun}", file=sys.stderr)
    learning = Trainer(
        accelerator=settings["trainer"]["accelerator"], devices=trainer.num_devices, num_nodes=trainer.num_nodes,
        max_epochs=trainer.max_epochs, max_steps=trainer.max_steps, logger=loggers, enable_model_summary=False,
        callbacks=[best, FiniteLoss(), progress(), *callbacks(out)], plugins=[WholeFiles()],
    )  # fmt: skip
    learning.fit(module, data, ckpt_path=begun, weights_only=True)
    if trainer.is_global_zero:
        module.load_state_dict(load_checkpoint(Path(best.best_model_path))["state_dict"])
        outline = MaskPredictor.outline(rollouts.base)
        save_filter(out, module.net, describe(module.config, outline, data.open(None)[0], {}), text)
        for unfinished in out.parent.glob(f"{out.name}-*"):
            shutil.rmtree(unfinished)
    learning.strategy.barrier("round")


def finish(command: Command) -> None:
    """After ``fit``: best weights, threshold, export, comparison."""
    pipeline: Pipeline = command.setting("pipeline")
    rollouts: RolloutSettings = command.setting("rollout")
    module: FilterModule = command.model
    trainer = command.trainer
    best = Path(trainer.checkpoint_callback.best_model_path)  # type: ignore[union-attr]
    module.load_state_dict(load_checkpoint(best)["state_dict"])
    metrics = dict(trainer.validate(module, command.datamodule, verbose=False)[0])
    curves = module.reliability
    if not trainer.is_global_zero:  # every rank has to take part up to here
        return
    predictor = MaskPredictor.from_pretrained(rollouts.base, dtype=rollouts.dtype)
    (first, *_) = command.datamodule.open(None)
    config = describe(module.config, predictor, first, metrics)
    if pipeline.eot_out is not None:
        learn_eot(first, predictor, pipeline.eot_out)
        print(f"exported {pipeline.eot_out}")
    module.net.to(predictor.device).eval()
    config, split, rows, calibration = pick_threshold(
        predictor, module, config, pipeline, rollouts, command.folder / "decodes"
    )
    cost = filter_time(rows, config.threshold)
    text = card(config, command.datamodule.digest, split, rows, calibration, command.settings)
    save_filter(pipeline.out, module.net, config, f"{text}\n{cost}\n")
    keep(calibration, "filter", pipeline.out)
    draw(curves, pipeline.out / PICTURE)
    print_table(rows, f"{rows[0]['prompts']} {split} prompts; thresholds picked on validation")
    print("\n".join([*promises(calibration), "", CHOSEN, f"{size(module.net)}. {cost}"]))
    print(f"exported {pipeline.out}")
    # The run is over: started again, fit begins anew. An interrupted one still has its last.ckpt and continues.
    (command.folder / "checkpoints" / "last.ckpt").unlink(missing_ok=True)
    picked = config.metrics | {"threshold": config.threshold}
    log_export(trainer.loggers, "filter", pipeline.out, picked, rows, ["label", *FIGURES], command.datamodule.digest)


def describe(
    config: FilterConfig, predictor: MaskPredictor, rollouts: Rollouts, metrics: dict[str, float]
) -> FilterConfig:
    """The filter's configuration completed by what it was trained on; of the predictor the weights are not needed.

    Raises:
        InputError: The rollouts are not of this base model.
    """
    check_key(rollouts.folder / MANIFEST, rollouts.manifest, predictor.fingerprint)
    settings = rollouts.manifest["settings"]
    return replace(
        config, gen_length=settings["gen_length"], eot_rule=settings["eot"], vocab_size=predictor.vocab_size,
        mask_id=predictor.ids.mask, base_fingerprint=predictor.fingerprint, base_family=predictor.family,
        metrics=metrics,
    )  # fmt: skip


def pick_threshold(
    predictor: MaskPredictor, module: FilterModule, config: FilterConfig, pipeline: Pipeline, rollouts: RolloutSettings,
    decodes: Path,
) -> tuple[FilterConfig, str, list[dict[str, Any]], Calibration]:  # fmt: skip
    """Picks the cheapest threshold that loses no more than is accepted, on validation prompts, and measures it on test.

    Prompts are encoded and decoded as the rollouts were. The training-free threshold that it is compared with is picked by
    the same rule. Where the sources have no test prompt, the figures are those of validation. Finished decodes are kept in
    the folder ``decodes``, for when this is interrupted.

    Returns:
        The configuration with the threshold and its figures, the split that these are of, the rows of the comparison, and what
        the validation prompts vouch for at each threshold.
    """

    def decode(split: Split, prompts: Sequence[Prompt], runs: list[Run]) -> list[dict[str, Any]]:
        ready: dict[str, Strategy] = {
            run.label: make_strategy("learn2pd", network=module.net, config=config, **run.options)
            for run in runs
            if run.strategy == "learn2pd"
        }
        return compare(
            predictor, prompts, runs, gen_length=config.gen_length, block_length=config.block_length,
            batch_size=rollouts.batch_size, chat_template=rollouts.chat_template, strategies=ready, folder=decodes,
            progress=lambda label: print(f"decoding {len(prompts)} {split} prompts: {label}", file=sys.stderr),
        )  # fmt: skip

    decoding: Any = {"eot": rollouts.eot, "steps": rollouts.steps}
    plain = [Run("threshold", {"threshold": value}, **decoding) for value in sorted(pipeline.baselines)]
    learned = [Run("learn2pd", {"threshold": value}, **decoding) for value in sorted(pipeline.pick_from)]
    split: Split = "validation"
    prompts = rollouts.encode(rollouts.prompts(split, pipeline.pick_prompts), predictor)[0]
    rows = decode(split, prompts, [Run("full_step", **decoding), *plain, *learned])
    picked = [pick(part, pipeline.loss) for part in (rows[1 : len(plain) + 1], rows[len(plain) + 1 :])]
    threshold = picked[1]["settings"]["threshold"]
    safest_first = rows[: len(plain) : -1]
    for warning in doubts(rows[0], pipeline.loss):
        print(f"warning: {warning}", file=sys.stderr)
    loss = "answer" if by_answers(rows[0]) else "text"
    calibration = calibrate(rows[0], safest_first, prompts, "learn2pd", {}, "threshold", loss)
    tests = [prompt for prompt in rollouts.prompts() if split_of(prompt.prompt) == "test"]
    if tests:
        split = "test"
        tests = rollouts.encode(rollouts.prompts(split, pipeline.test_prompts), predictor)[0]
        chosen = [run for run in (*plain, *learned) if run.label in (picked[0]["label"], picked[1]["label"])]
        if pipeline.eot_out is not None:
            ended: Any = {"eot": "learned", "eot_head": str(pipeline.eot_out), "label": ""}
            chosen += [replace(run, **ended) for run in (Run("full_step", **decoding), chosen[-1])]
        rows = decode(split, tests, [Run("full_step", **decoding), *chosen, Run("oracle", **decoding)])
        picked = rows[1:3]
    figures = {f"decode/{name}": picked[1][name] for name in FIGURES}
    figures |= {"decode/prompts": picked[1]["prompts"], "decode/threshold_nfe_mean": picked[0]["nfe_mean"]}
    return replace(config, threshold=threshold, metrics=config.metrics | figures), split, rows, calibration


def card(
    config: FilterConfig, rollouts: str | None, split: str, rows: list[dict[str, Any]], calibration: Calibration,
    settings: dict[str, Any],
) -> str:  # fmt: skip
    """The model card of an export, trained on rollouts of this digest; ``rows`` are of the prompts of ``split``."""
    count = rows[0]["prompts"]
    lines = [
        metadata("filter", settings["rollout"]) + f"# Learn2PD filter ({config.architecture})",
        "",
        f"Says which guesses of the mask predictor `{config.base_fingerprint}` are already final (arXiv 2509.25188).",
        f"Trained on rollouts of gen_length {config.gen_length}, block_length {config.block_length}, EoT rule "
        f"`{config.eot_rule}`, passes {', '.join(settings['data']['passes'] or settings['rollout']['passes'])}, "
        f"{settings['rounds']} rounds of states of its own; "
        f"prompts: {', '.join(source['path'] for source in settings['rollout']['sources'])}, "
        f"limit {settings['rollout']['limit']}; training prompts used: {settings['data']['limit'] or 'all'}; "
        f"digest of the rollouts {rollouts}.",
        "",
        f"Threshold {config.threshold:g}: on validation prompts the one of fewest forwards that loses at most "
        f"{100 * settings['pipeline']['loss']:g} point against full_step, one standard error added, or, where none does, the one "
        "that loses least; `threshold` is picked by the same rule.",
        "",
        f"| decode of {count} {split} prompts | exact | valid | same text as full_step | NFE | tokens/forward |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['label']} | {share(row['exact_match'])} | {share(row['valid'])} | {share(row['sequence_agreement'])} "
        f"| {row['nfe_mean']:.1f} | {row['tokens_per_forward']:.2f} |"
        for row in rows
    ]
    lines += ["", *promises(calibration), "", CHOSEN]
    lines += ["", f"![How far the probabilities can be taken at their word, on validation prompts]({PICTURE})"]
    lines += ["", "| validation metric (masked positions) | value |", "|---|---|"]
    lines += [f"| {name} | {value:.4f} |" for name, value in config.metrics.items() if name.startswith("validation/")]
    return "\n".join(lines) + "\n"


def export(checkpoint: Path, rollouts: Folder, base: str, out: Path, threshold: Share) -> None:
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
    check_writable("out", out)
    content = load_checkpoint(checkpoint)
    with made_by("train/filter.py", checkpoint):
        settings = {key: value for key, value in content["hyper_parameters"].items() if not key.startswith("_")}
        module = FilterModule(**settings)
        module.on_load_checkpoint(content)
        module.load_state_dict(content["state_dict"])
    config = describe(module.config, MaskPredictor.outline(base), open_rollouts(rollouts), {})
    config = replace(config, threshold=threshold)
    title = metadata("filter", made_from(base, rollouts)) + f"# Learn2PD filter ({config.architecture})"
    save_filter(out, module.net, config, f"{title}\n\nExported from `{checkpoint.name}`.\n")
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
        settings={
            "rollout": RolloutSettings,
            "pipeline": Pipeline,
            "rounds": {"type": Rounds, "default": 0, "help": ROUNDS},
        },
        links=[
            ("rollout.folder", "data.rollouts"),
            ("rollout.block_length", "model.block_length"),
            ("rollout.base", "model.base"),
            ("model.hidden", "data.hidden"),
        ],
        checkpoint={"monitor": "validation/loss"},
        callbacks=callbacks,
        before={"fit": prepare},
        after={"fit": finish},
        first=FIRST,
    )
