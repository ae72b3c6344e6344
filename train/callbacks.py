"""Progress with the time left, in a terminal and in a log file, and checkpoints to continue from."""

import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, TQDMProgressBar
from torch import Tensor

from models.errors import InputError


def checkpoints(folder: Path, **settings: Any) -> ModelCheckpoint:
    """Keeps ``folder/last.ckpt`` up to date, and the best one as ``folder/best.ckpt`` where ``monitor`` is set.

    Args:
        folder: Where the checkpoints go.
        **settings: Passed to Lightning's ``ModelCheckpoint``.
    """
    if settings.get("monitor"):
        settings.setdefault("filename", "best")
    # Without the version counter a continued run overwrites last.ckpt instead of starting last-v1.ckpt beside it.
    return Checkpoints(dirpath=folder, save_last=True, enable_version_counter=False, **settings)


class Checkpoints(ModelCheckpoint):
    """Lightning's, which also saves the last step of a run whose length is no multiple of ``every_n_train_steps``."""

    def __init__(self, every_n_train_steps: int | None = None, **settings: Any) -> None:
        super().__init__(every_n_train_steps=every_n_train_steps, **settings)
        self.every = every_n_train_steps

    def on_train_batch_end(self, trainer: Trainer, *given: Any) -> None:
        super().on_train_batch_end(trainer, *given)
        assert self.dirpath is not None
        if self.every and trainer.global_step == trainer.max_steps and trainer.global_step % self.every:
            trainer.save_checkpoint(Path(self.dirpath) / "last.ckpt")


class FiniteLoss(Callback):
    """Stops a run whose training loss is no finite number; looks as often as it is logged, since a GPU is waited for."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        every: int = trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue] - Lightning sets it
        if trainer.global_step % max(every, 1) == 0 and "train/loss" in trainer.callback_metrics:
            check_finite("train/loss", trainer.callback_metrics["train/loss"])


def check_finite(name: str, loss: Tensor) -> None:
    """Raises an InputError for a loss that is no finite number: what is trained is lost, and only settings can help."""
    if not loss.isfinite():
        raise InputError(
            name, loss.item(), "a finite number; a lower learning_rate helps, or trainer.gradient_clip_val"
        )


def progress() -> ProgressBar:
    """A bar in a terminal; in a log file one line every half minute."""
    return TQDMProgressBar(refresh_rate=10) if sys.stdout.isatty() else ProgressLines()


class ProgressLines(ProgressBar):
    """Progress as plain lines on stderr: step, share, rate, time left and the metrics of the progress bar.

    Args:
        every: Seconds between two lines.
    """

    def __init__(self, every: float = 30.0) -> None:
        super().__init__()
        self.every = every
        self.enabled = True

    def disable(self) -> None:
        self.enabled = False

    def enable(self) -> None:
        self.enabled = True

    def _start(self, done: int, total: float) -> None:
        self.begin, self.first, self.printed = time.monotonic(), done, -self.every
        self.total = total

    def _line(self, what: str, done: int, trainer: Trainer) -> None:
        now = time.monotonic()
        if not self.enabled or (done != self.total and now - self.printed < self.every):
            return
        self.printed = now
        rate = (done - self.first) / max(now - self.begin, 1e-9)
        parts = [f"{what} {done}"]
        if 0 < self.total < float("inf"):
            left = timedelta(seconds=round((self.total - done) / rate)) if rate else "?"
            parts = [f"{what} {done}/{int(self.total)} ({done / self.total:.0%})", f"{left} left"]
        parts.append(f"{rate:.2f}/s")
        metrics = {key: value for key, value in trainer.progress_bar_metrics.items() if isinstance(value, float | int)}
        parts += [f"{key} {value:.4g}" for key, value in metrics.items()]
        sys.stderr.write(" | ".join(parts) + "\n")
        sys.stderr.flush()

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        self._start(trainer.global_step, trainer.estimated_stepping_batches)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._line("step", trainer.global_step, trainer)

    def on_test_start(self, trainer: Trainer, *_: Any) -> None:
        self._start(0, sum(trainer.num_test_batches))

    def on_test_batch_end(self, trainer: Trainer, _module: Any, _out: Any, _batch: Any, index: int, *_: Any) -> None:
        self._line("batch", index + 1, trainer)

    def on_predict_start(self, trainer: Trainer, *_: Any) -> None:
        # Batches that are handed out as they are asked for: a rank may take all, and will take its share.
        self._start(0, getattr(trainer.predict_dataloaders, "share", sum(trainer.num_predict_batches)))

    def on_predict_batch_end(self, trainer: Trainer, _module: Any, _out: Any, _batch: Any, index: int, *_: Any) -> None:
        self._line("batch", index + 1, trainer)
