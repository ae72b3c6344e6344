"""The folder of a run: what it was started with, and the checkpoints that it or a later command continues from."""

import io
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer

from data.provenance import write_run_file
from models.checkpoint import writing
from models.errors import InputError, first_line

CHECKPOINTS = {"best": ["best"], "last": ["last"], "trained": ["best", "last"]}
"""Names a user may give instead of a checkpoint's path: the files that are looked for, in order."""


_OTHERS = {"config.json": "an exported model", "manifest.json": "a rollout set"}
"""Files that tell a folder of something else from a run's, and what it is."""


def check_apart(run: Path, rollouts: str | Path | None, exports: Mapping[str, str]) -> None:
    """Raises an InputError where one of a command's folders would lie in another one's way.

    An export replaces its folder, whatever is in it; and a set is what its manifest says.

    Args:
        run: The run folder.
        rollouts: Folder of the rollouts, where the command has them.
        exports: Folders of what it exports, by the settings that name them.
    """
    for name, kind in _OTHERS.items():
        if (run / name).is_file():
            raise InputError("run", f"{run}, {kind}, with {name} in it", "a folder of its own")
    own = run.absolute().resolve()
    shards = None if rollouts is None else Path(rollouts).absolute().resolve()
    if shards is not None and own == shards:
        raise InputError("run", f"{run}, the folder of the rollouts", "a folder of its own")
    others: dict[str, Path | None] = {"run": own, "rollout.folder": shards}
    for setting, out in exports.items():
        export = Path(out).absolute().resolve()
        if shards is not None and (export == shards or shards in export.parents):
            raise InputError(setting, f"{out}, in rollout.folder {rollouts}", "a folder beside it")
        for name, folder in others.items():
            if folder is not None and (folder == export or export in folder.parents):
                raise InputError(name, f"{folder}, in {setting} {out}, which is replaced", "a folder beside it")
            if folder is not None and name in exports and folder in export.parents:
                raise InputError(setting, f"{out}, in {name} {folder}, which is replaced", "a folder beside it")
        others[setting] = export
    for place in own.parents:
        if (place / "config.json").is_file() and any(place.glob("model*.safetensors*")):
            raise InputError("run", f"{run}, in {place}, an exported model", "a folder beside it")


def named_checkpoint(folder: Path, wanted: str) -> Path:
    """The checkpoint ``best`` or ``last`` of a run folder; ``trained`` is the best, or else the last.

    Raises:
        InputError: There is none.
    """
    files = [folder / "checkpoints" / f"{name}.ckpt" for name in CHECKPOINTS[wanted]]
    for file in files:
        if file.is_file():
            return file
    missing = " or ".join(file.name for file in files)
    raise InputError("ckpt_path", f"no {missing} in {files[0].parent}", "a checkpoint that `fit` wrote")


def load_checkpoint(file: Path) -> dict[str, Any]:
    """A Lightning checkpoint as a dict, tensors left on disk until used; executes nothing stored in the file.

    Raises:
        InputError: The file is missing or not such a checkpoint.
    """
    try:
        checkpoint = torch.load(file, weights_only=True, map_location="cpu", mmap=True)
        if not {"state_dict", "global_step"} <= checkpoint.keys():
            raise ValueError("no Lightning checkpoint")
    except Exception as error:  # torch raises anything from OSError to UnpicklingError
        found = "no such file" if not file.is_file() else first_line(error).split(". ")[0]
        raise InputError(f"checkpoint {file}", found, "a checkpoint that `fit` wrote") from error
    return checkpoint


def last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that a run goes on from, if there is one: the last, or the best where the last is damaged.

    Raises:
        InputError: The last is damaged, and there is no best one.
    """
    last, best = (folder / "checkpoints" / f"{name}.ckpt" for name in ("last", "best"))
    if not last.is_file():
        return None
    try:
        load_checkpoint(last)
    except InputError as error:
        if not best.is_file():
            raise
        print(f"{error}; going back to {best}", file=sys.stderr)
        return best
    return last


@contextmanager
def made_by(command: str, checkpoint: Path) -> Iterator[None]:
    """Names the file where a module cannot be made of a checkpoint: most likely it is another command's.

    Raises:
        InputError: The block failed as it does then.
    """
    try:
        yield
    except (KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"checkpoint {checkpoint}", first_line(error), f"one that `{command} fit` wrote") from error


class WholeFiles(TorchCheckpointIO):
    """Writes checkpoints beside their place and renames them; Lightning's come from the temporary folder, in parts."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        stream = io.BytesIO()  # so that a full disk is the system's error, not the archive writer's
        torch.save(checkpoint, stream)
        with writing(Path(path)) as aside:
            aside.write_bytes(stream.getbuffer())


def check_same_run(folder: Path, checkpoint: Path, settings: Mapping[str, Any]) -> int:
    """Checks that a checkpoint was made with the settings of this run, save for the trainer's.

    Args:
        folder: Run folder; its ``run.yaml`` is compared, or without one the hyperparameters in the checkpoint.
        checkpoint: The checkpoint to continue from.
        settings: Resolved config of this run.

    Returns:
        The optimizer step the checkpoint was saved at.

    Raises:
        InputError: A setting differs, or the checkpoint cannot be read.
    """
    content = load_checkpoint(checkpoint)
    record = folder / "run.yaml"
    if record.is_file():
        made_with = yaml.safe_load(record.read_text())["config"]
    else:
        model = {key: value for key, value in content.get("hyper_parameters", {}).items() if key[0] != "_"}
        made_with = {"model": model}
    before, now = flatten(made_with), flatten(settings)
    for key, value in before.items():
        if key.split(".")[0] in ("model", "data", "seed_everything") and now.get(key) != value:
            accepted = f"{value!r} as in {folder}; or --run with another folder; or --resume false"
            raise InputError(key, repr(now.get(key)), accepted)
    return content["global_step"]


def flatten(nested: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested dicts and lists by dotted key."""
    if isinstance(nested, Mapping) and nested:
        items = nested.items()
    elif isinstance(nested, list) and nested:
        items = enumerate(nested)
    else:
        return {prefix: nested}
    return {k: v for key, value in items for k, v in flatten(value, f"{prefix}.{key}" if prefix else str(key)).items()}


class RunFile(Callback):
    """Writes what a run was started with, once it has got past checking its input, and tells if its rollouts have changed.

    Rollouts may be extended between two parts of a run. Their digest is in ``run.yaml``, in the logs and in the checkpoint.

    Args:
        file: The file to write.
        settings: Resolved config.
    """

    def __init__(self, file: Path, settings: Mapping[str, Any]) -> None:
        self.file, self.settings = file, settings
        self.rollouts: str | None = None
        self.trained_on: str | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.rollouts = getattr(trainer.datamodule, "digest", None)  # type: ignore[attr-defined]
        if not trainer.is_global_zero:
            return
        known = {} if self.rollouts is None else {"rollouts": self.rollouts}
        write_run_file(self.file, self.settings, **known)
        for logger in trainer.loggers if known else ():
            logger.log_hyperparams(known)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self.trained_on not in (None, self.rollouts):
            print(
                f"the rollouts were {self.trained_on} when the checkpoint was written and are {self.rollouts} now; "
                "training goes on with what is there now", file=sys.stderr,
            )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        return {"rollouts": self.rollouts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.trained_on = state_dict["rollouts"]
