"""Where W&B files a run; ``WANDB_MODE`` says whether it does (:func:`eval.command.wandb_mode`)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import wandb


@dataclass
class WandbSettings:
    """Where W&B files a run; ``WANDB_MODE`` says whether it does.

    Args:
        project: Project.
        entity: User or team; null is the key's own.
        tags: Tags of the run.
    """

    project: str = "dlm-accel"
    entity: str | None = None
    tags: list[str] = field(default_factory=list)


USUAL = WandbSettings()


def evaluation_run(settings: WandbSettings, config: Mapping[str, Any], folder: Path, mode: Any) -> Any:
    """Starts a W&B run of an evaluation, without a word on the terminal.

    Args:
        settings: Where it goes.
        config: Resolved settings of the command, logged whole.
        folder: W&B's files go into it.
        mode: ``online`` or ``offline``.
    """
    return wandb.init(
        **vars(settings), job_type="eval", config=dict(config), mode=mode, dir=folder,
        settings=wandb.Settings(silent=True),
    )  # fmt: skip
