"""Rolls out a base model into labelled steps: ``python train/rollout.py predict``; settings in ``configs/rollout``."""

from train.cli import Command, run
from train.rollout_module import RolloutData, RolloutModule, RolloutWriter


def _report(command: Command) -> None:
    module = command.model
    if not module.trainer.is_global_zero:
        return
    numbers = ", ".join(f"{name.removeprefix('rollout/')} {value:.4g}" for name, value in module.summary().items())
    print(f"{module.out}: {numbers}")


if __name__ == "__main__":
    run(
        "rollout",
        RolloutModule,
        RolloutData,
        subcommands=("predict",),
        callbacks=lambda folder: [RolloutWriter()],
        after={"predict": _report},
    )
