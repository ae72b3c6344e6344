"""The one place for the command-line behaviour of everything that trains: configs, run folder, logging, resuming."""

import inspect
import logging
import re
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import wandb
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from data.disk import check_writable, hold
from data.store import check_folder, place
from data.typed import Seed, checked
from decoding.command_line import entry
from eval.command import CONFIGS, CommandParser, command, wandb_mode
from eval.tracking import WandbSettings
from models.errors import InputError
from train.callbacks import FiniteLoss, checkpoints, progress
from train.folder import (
    CHECKPOINTS,
    RunFile,
    WholeFiles,
    check_apart,
    check_same_run,
    flatten,
    last_checkpoint,
    load_checkpoint,
    named_checkpoint,
)  # fmt: skip
from train.trainer_settings import check_trainer, patient, refusals

JOB_TYPES = {"fit": "fit", "validate": "eval", "test": "eval", "predict": "rollout"}
"""W&B job type of each subcommand."""

_INTERRUPTED = "interrupted; the same command continues from what is saved"


@dataclass(frozen=True)
class Spec:
    """What one command is made of; the arguments of :func:`run`."""

    name: str
    module: type[LightningModule]
    data: type[LightningDataModule]
    subcommands: Sequence[str] = ("fit", "validate", "test")
    settings: Mapping[str, type | Mapping[str, Any]] = field(default_factory=dict)
    links: Sequence[tuple[Any, ...]] = ()
    checkpoint: Mapping[str, Any] | None = None
    callbacks: Callable[[Path], list[Callback]] | None = None
    before: Mapping[str, Callable[["Command"], None]] = field(default_factory=dict)
    after: Mapping[str, Callable[["Command"], None]] = field(default_factory=dict)
    verbs: Sequence[str] = ()
    precision: str | None = None
    first: Sequence[str] = ()
    options: Mapping[str, tuple[Any, Any, str]] = field(default_factory=dict)
    instead: Callable[[Mapping[str, Any]], Callable[["Command"], None] | None] = lambda settings: None


class TrainParser(CommandParser, LightningArgumentParser):
    """Lightning's parser with one-line errors."""


class Command(LightningCLI):
    """LightningCLI with a run folder, our loggers, and a ``fit`` that continues where it was interrupted.

    Attributes:
        folder: The run folder, ``runs/<name>`` unless ``--run`` says otherwise.
        settings: The resolved config of the subcommand as plain data.
        instead: What is done in Lightning's place; its trainer is not made then, nor are the trainer's settings looked at.
        held: What is let go when the command ends: the run folder.
    """

    def __init__(self, spec: Spec, held: ExitStack) -> None:
        self.spec, self.held = spec, held
        # LightningCLI calls before_<subcommand> and after_<subcommand> where they exist.
        for when in ("before", "after"):
            for subcommand, hook in getattr(spec, when).items():
                setattr(self, f"{when}_{subcommand}", partial(hook, self))
        # What is rolled out by default is written down once, for every command that has these settings.
        shared = [name for name in spec.settings if name != spec.name and (CONFIGS / name).is_dir()]
        defaults = {"default_config_files": [CONFIGS / name / "default.yaml" for name in (*shared, spec.name)]}
        super().__init__(
            spec.module,
            spec.data,
            save_config_callback=None,  # it refuses to start where a config exists; RunFile writes ours
            parser_kwargs={name: dict(defaults) for name in spec.subcommands}
            | {"description": spec.module.__doc__.splitlines()[0] if spec.module.__doc__ else spec.name}
            | ({"epilog": f"Further first words: {', '.join(spec.verbs)}."} if spec.verbs else {}),
            parser_class=TrainParser,
            auto_configure_optimizers=False,
        )

    def subcommands(self) -> dict[str, set[str]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return {name: skip for name, skip in LightningCLI.subcommands().items() if name in self.spec.subcommands}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.first = self.spec.first  # type: ignore[attr-defined] - made by _lightning as a TrainParser
        parser.add_argument(
            "--run", type=Path, default=Path("runs", self.spec.name), help="Folder of run.yaml, checkpoints and logs."
        )
        parser.add_argument(
            "--resume", type=bool, default=True, help="Let fit continue from the last checkpoint in the run folder."
        )
        parser.add_class_arguments(WandbSettings, "wandb")
        for name, (kind, default, told) in self.spec.options.items():
            parser.add_argument(f"--{name}", type=kind, default=default, help=told)
        for key, group in self.spec.settings.items():
            if isinstance(group, type):
                parser.add_class_arguments(group, key)
            else:
                parser.add_argument(f"--{key}", **group)
        for link in self.spec.links:
            parser.link_arguments(*link)

    def setting(self, key: str) -> Any:
        """One of the command's own settings, an instance of the class given to :func:`run` under this key."""
        return self.config_init[str(self.subcommand)][key]

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        subcommand = self.config["subcommand"]
        config = self.config[subcommand]
        if not isinstance(config.seed_everything, bool):
            checked(Seed | None, config.seed_everything, "seed_everything")
        self.folder: Path = config.run
        if config.ckpt_path is None and self.spec.checkpoint is not None and subcommand != "fit":
            config.ckpt_path = "trained"  # evaluating a module that is trained here is not about random weights
        if config.ckpt_path in CHECKPOINTS:
            config.ckpt_path = str(named_checkpoint(self.folder, config.ckpt_path))
        if config.ckpt_path is not None:
            self._check_module(Path(config.ckpt_path))
        if config.weights_only is None:
            config.weights_only = True  # our checkpoints are tensors and plain values, so no pickle is ever trusted

    def _check_module(self, checkpoint: Path) -> None:
        """A checkpoint of another command is named; Lightning would say which of its hyperparameters it does not know."""
        made_with = {key for key in load_checkpoint(checkpoint).get("hyper_parameters", {}) if not key.startswith("_")}
        if others := sorted(made_with - inspect.signature(self.spec.module).parameters.keys()):
            accepted = f"one that `train/{self.spec.name}.py fit` wrote"
            raise InputError(f"checkpoint {checkpoint}", f"one with {', '.join(others[:3])}", accepted)

    def before_instantiate_classes(self) -> None:
        subcommand = str(self.subcommand)
        dump = self.parser.dump(self.config, skip_link_targets=False, skip_none=False, format="yaml")
        self.settings: dict[str, Any] = yaml.safe_load(dump)[subcommand]
        config = self.config[subcommand]
        self.instead = self.spec.instead(self.settings)
        if self.instead is None:
            check_trainer(
                self.settings["trainer"], subcommand, exports=subcommand == "fit" and "fit" in self.spec.after
            )
        self._check_outputs(subcommand)
        last = last_checkpoint(self.folder) if subcommand == "fit" and config.resume else None
        if config.ckpt_path is None and last is not None:
            step = check_same_run(self.folder, last, self.settings)
            rank_zero_only(print)(f"continuing {last} at step {step}; --resume false starts over", file=sys.stderr)
            config.ckpt_path = str(last)

    def _check_outputs(self, subcommand: str) -> None:
        """Whatever will be written can be: it would be found out after hours otherwise."""
        flat = flatten(self.settings)
        check_writable("run", self.folder)
        rollouts, names = (
            flat.get("rollout.folder"),
            ("pipeline.out", "pipeline.eot_out") if subcommand == "fit" else (),
        )
        exports = {name: flat[name] for name in names if flat.get(name) is not None}
        if rollouts is not None:
            check_folder("rollout.folder", rollouts)
            rollouts = found if isinstance(found := place(rollouts), Path) else None
        for name, out in exports.items():
            check_writable(name, Path(out))
        check_apart(self.folder, rollouts, exports)

    def loggers(self) -> list[Logger]:
        """Those of :func:`loggers`, unless the settings name others, or none."""
        asked = self._get(self.config_init, "trainer")["logger"] in (None, True)
        return loggers(self.folder, JOB_TYPES[str(self.subcommand)], self.settings) if asked else []

    def _run_subcommand(self, subcommand: str) -> None:
        if self.instead is not None:
            return self.instead(self)
        return super()._run_subcommand(subcommand)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        if self.instead is not None:
            return None
        subcommand = str(self.subcommand)
        if subcommand == "fit" and getattr(rank_zero_only, "rank", 0) == 0:
            self.held.enter_context(hold(self.folder))  # now that the input is accepted
        # run.yaml is what fit or predict made this folder with; evaluating must not overwrite it.
        record = "run.yaml" if subcommand in ("fit", "predict") else f"{subcommand}.yaml"
        callbacks: list[Callback] = [RunFile(self.folder / record, self.settings), FiniteLoss()]
        configured = self._get(self.config_init, "trainer")
        if configured["enable_progress_bar"] is not False:
            callbacks.append(progress())
        if self.spec.checkpoint is not None and configured["enable_checkpointing"] is not False:
            callbacks.append(checkpoints(self.folder / "checkpoints", **self.spec.checkpoint))
        elif configured["enable_checkpointing"] is None:
            kwargs["enable_checkpointing"] = False
        if self.spec.callbacks is not None:
            callbacks += self.spec.callbacks(self.folder)
        self.trainer_defaults["callbacks"] = callbacks
        if configured["precision"] is None and self.spec.precision is not None:
            kwargs["precision"] = self.spec.precision
        if configured["logger"] in (None, True):
            kwargs["logger"] = self.loggers()
        given = configured["plugins"] or []
        kwargs["plugins"] = [*(given if isinstance(given, list) else [given]), WholeFiles()]
        return patient(super().instantiate_trainer(**kwargs))


def run(
    name: str,
    module: type[LightningModule],
    data: type[LightningDataModule],
    *,
    subcommands: Sequence[str] = ("fit", "validate", "test"),
    verbs: Mapping[str, Callable[..., object]] | None = None,
    settings: Mapping[str, type | Mapping[str, Any]] | None = None,
    links: Sequence[tuple[Any, ...]] = (),
    checkpoint: Mapping[str, Any] | None = None,
    callbacks: Callable[[Path], list[Callback]] | None = None,
    before: Mapping[str, Callable[[Command], None]] | None = None,
    after: Mapping[str, Callable[[Command], None]] | None = None,
    precision: str | None = None,
    first: Sequence[str] = (),
    options: Mapping[str, tuple[Any, Any, str]] | None = None,
    instead: Callable[[Mapping[str, Any]], Callable[[Command], None] | None] = lambda settings: None,
) -> None:
    """Runs a command of this package from the words it was started with.

    Args:
        name: Name of the command: settings come from ``configs/<name>/``, results go to ``runs/<name>/``.
        module: What is trained or run; its constructor's signature becomes ``--model.*``.
        data: Its data; likewise ``--data.*``.
        subcommands: The Trainer's methods offered: fit, validate, test, predict.
        verbs: Further first words, each a typed function run by its signature.
        settings: Further settings, key to a dataclass, or to what ``add_argument`` takes; hooks read them by
            :meth:`Command.setting`.
        links: Arguments of ``link_arguments``: source key, target key and, where needed, a function.
        checkpoint: Settings of Lightning's ``ModelCheckpoint``; ``None`` saves no checkpoints.
        callbacks: Makes the command's own callbacks for a run folder.
        before: Subcommand to a function called right before it, with trainer, model and data set up.
        after: Subcommand to a function called when it is done.
        precision: The Trainer's precision where the settings leave it to the command.
        first: Settings that the help of its subcommands tells of first.
        options: Further settings of one value each, key to type, default and help.
        instead: From the resolved settings, what does the subcommand's work in Lightning's place; ``None`` leaves it there.

    Raises:
        SystemExit: See :func:`decoding.command_line.entry`.
    """
    quiet()
    verbs = verbs or {}
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if word in verbs:
        return command({word: verbs[word]}, f"{name}/{word}")
    spec = Spec(
        name, module, data, subcommands, settings or {}, links, checkpoint, callbacks, before or {}, after or {},
        tuple(verbs), precision, first, options or {}, instead,
    )  # fmt: skip
    return entry(lambda: _lightning(spec))


def _lightning(spec: Spec) -> None:
    try:
        with ExitStack() as held, refusals():
            Command(spec, held)
    except SIGTERMException:
        raise SystemExit(128 + signal.SIGTERM) from None  # its own status is 0, as if the run had been finished
    except SystemExit as stop:
        # Lightning turns Ctrl-C into its own exit with status 1 once the loggers are closed.
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt(_INTERRUPTED) from None
        raise
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_INTERRUPTED) from None


def quiet() -> None:
    """Drops what Lightning says about its other products and about its own internals; our warnings stay."""
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"lightning\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"lightning\.")
    for expected in (
        ".*does not have many workers",  # our batches are made or held in the main process: faster than handing over
        "Checkpoint directory .* exists and is not empty",  # it does when a run continues
        "Using ModelCheckpoint with manual optimization",  # says the checkpoint is taken after the step, as it should
        "No seed found",  # a command that draws something has a seed among its settings
    ):
        warnings.filterwarnings("ignore", message=expected)
    said = ("💡", "GPU available", "TPU available", "HPU available", "Seed set to")
    for part in ("pytorch.utilities.rank_zero", "fabric.utilities.rank_zero", "fabric.utilities.seed"):
        logging.getLogger(f"lightning.{part}").addFilter(lambda record: not record.getMessage().startswith(said))


def loggers(folder: Path, job_type: str, settings: Mapping[str, Any]) -> list[Logger]:
    """``csv/version_<n>/metrics.csv`` in the run folder, and W&B unless it is disabled.

    Args:
        folder: Run folder.
        job_type: W&B job type: rollout, fit or eval.
        settings: Resolved config, logged whole.
    """
    found: list[Logger] = [CSVLogger(folder, name="csv")]
    mode = wandb_mode()
    if mode != "disabled":
        folder.mkdir(parents=True, exist_ok=True)
        if mode == "offline":
            rank_zero_only(print)(
                f"W&B is offline; `wandb sync {folder}/wandb/offline-*` uploads the run", file=sys.stderr
            )
        logger = WandbLogger(
            save_dir=folder,
            mode=mode,
            job_type=job_type,
            group=folder.name,  # the parts of an interrupted run stay together
            config=dict(settings),
            log_model=False,  # stages hand over by local path
            settings=wandb.Settings(silent=mode == "offline"),
            **settings["wandb"],
        )
        logger._wandb_init.pop("anonymous", None)  # Lightning sets this retired argument, and W&B warns about it
        found.insert(0, logger)
    return found


def log_export(
    loggers: Sequence[Logger], kind: str, folder: Path, metrics: Mapping[str, Any], rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str], rollouts: str | None,
) -> None:  # fmt: skip
    """Tells W&B what a run ended with: figures in its summary, the comparison as a table, the export as its artifact.

    Args:
        loggers: The trainer's; those that are not W&B's keep nothing.
        kind: ``filter`` or ``helper``.
        folder: Folder of the export.
        metrics: Figures of the export, its threshold among them.
        rows: Rows of the comparison.
        columns: Which of their fields the table has.
        rollouts: Digest of the rollouts it was trained on, those of several sets with + between them, which W&B knows as the
            run's input where it can be reached.
    """
    for logger in loggers:
        if not isinstance(logger, WandbLogger):  # absent with WANDB_MODE=disabled
            continue
        run = logger.experiment
        run.summary.update(dict(metrics))
        if rows:
            logger.log_table(
                "comparison", columns=list(columns), data=[[row[name] for name in columns] for row in rows]
            )
        name = re.sub(r"[^\w.-]", "-", f"{kind}-{folder.name}", flags=re.ASCII)[:128]  # what W&B takes for a name
        export = wandb.Artifact(name, type="model", metadata={"rollouts": rollouts, **metrics})
        export.add_dir(str(folder))
        for digest in [] if rollouts is None or run.settings._offline else rollouts.split("+"):
            run.use_artifact(_rollouts(digest))
        run.log_artifact(export)


def log_rollouts(loggers: Sequence[Logger], digest: str) -> None:
    """Tells W&B which rollouts a run has made: the artifact that :func:`log_export` names as the input of what learns from them.

    Args:
        loggers: The trainer's.
        digest: Digest of the set, of which W&B is told nothing else: shards stay where they are.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.log_artifact(_rollouts(digest))


def _rollouts(digest: str) -> wandb.Artifact:
    return wandb.Artifact(f"rollouts-{digest}", type="rollouts", metadata={"digest": digest})
