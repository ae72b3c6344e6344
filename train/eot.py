"""Trains the EoT head of the rule ``eot: learned``: ``python train/eot.py --rollouts runs/rollout/eot --out exports/eot``.

The rollouts must be made with ``--rollout.eot_evidence true``.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from data.disk import check_writable
from data.eot_data import EotStates, load_eot_states
from data.manifest import Rollouts, open_rollouts
from data.typed import Length, Positive, Whole, Width
from eval.command import command
from models.checkpoint import check_replaceable
from models.eot import COLUMNS, KIND, EotConfig, EotHead, first_end, save_eot
from models.errors import InputError
from models.predictor import MaskPredictor

RISKS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
HIDDEN, STEPS, LEARNING_RATE, SEED = 64, 300, 0.02, 1
_MOST = 100_000  # examples, evenly spread over all
_ROWS = 2048  # states whose columns are made at a time


def main(
    rollouts: Path,
    base: str = "models/bundled/llada-tiny",
    out: Path = Path("exports/eot"),
    hidden: Width = HIDDEN,
    steps: Length = STEPS,
    learning_rate: Positive = LEARNING_RATE,
    seed: Whole = SEED,
) -> None:
    """Fits a head on training prompts, calibrates it on validation prompts, and exports it.

    Args:
        rollouts: Folder of a finished set, rolled out with eot_evidence true.
        base: Folder or hub id of the base model that was rolled out.
        out: Folder of the export.
        hidden: Width of the head's hidden layer.
        steps: Optimizer steps, each over all examples.
        learning_rate: Of Adam.
        seed: Of the first weights.

    Raises:
        InputError: Rollouts that hold no EoT evidence, or are of another base model.
    """
    check_writable("out", out)
    check_replaceable(out.absolute(), KIND)
    predictor = MaskPredictor.from_pretrained(base)
    _, card = learn(
        open_rollouts(rollouts, fingerprint=predictor.fingerprint), predictor, out, hidden, steps, learning_rate, seed
    )
    print(card)
    print(f"exported {out}")


def learn(
    rollouts: Rollouts, predictor: MaskPredictor, out: Path, hidden: int = HIDDEN, steps: int = STEPS,
    learning_rate: float = LEARNING_RATE, seed: int = SEED,
) -> tuple[EotConfig, str]:  # fmt: skip
    """What the command does with an opened set, whose base model is ``predictor``; returns what is exported, and its card."""
    states = load_eot_states(rollouts)
    learned, held = states.of("train"), states.of("validation")
    for name, part in (("train", learned), ("validation", held)):
        if not len(part.decode):
            raise InputError(f"{rollouts.folder}: split", f"no {name} prompt", "prompts of train and of validation")
    torch.manual_seed(seed)
    head = fit(EotHead(hidden), *examples(learned), steps, learning_rate)
    calibrate(head, *examples(held))
    settings = rollouts.manifest["settings"]
    config = EotConfig(
        hidden=hidden, gen_length=settings["gen_length"], block_length=settings["block_length"],
        vocab_size=predictor.vocab_size, mask_id=predictor.ids.mask, base_fingerprint=predictor.fingerprint,
        base_family=predictor.family, metrics=measure(head, held),
    )  # fmt: skip
    card = _card(config, rollouts.digest, settings["eot"], len(held.decode.unique()))
    save_eot(out, head, config, card)
    return config, card


def examples(states: EotStates) -> tuple[Tensor, Tensor]:
    """Columns ``(N, F)`` of positions that a text may end at, and whether text would be lost, ``(N,)`` float32."""
    able, lost = states.able(), states.lost()
    every = -(-int(able.sum()) // _MOST) or 1
    taken = torch.zeros_like(able)
    taken.view(-1)[able.view(-1).nonzero()[::every, 0]] = True
    columns = [part.columns()[taken[rows]] for rows, part in _parts(states)]
    return torch.cat(columns), lost[taken].float()


def _parts(states: EotStates) -> Iterator[tuple[slice, EotStates]]:
    for start in range(0, len(states.decode), _ROWS):
        rows = slice(start, start + _ROWS)
        yield rows, states.at(rows)


def fit(head: EotHead, columns: Tensor, lost: Tensor, steps: int, learning_rate: float) -> EotHead:
    """Trains a head on columns ``(N, F)`` and whether text would be lost ``(N,)`` float32.

    Raises:
        InputError: The loss is no finite number any more.
    """
    std = columns.std(0)
    head.mean.copy_(columns.mean(0))
    head.std.copy_(std.where(std > 1e-6, 1.0))
    optimizer = torch.optim.Adam(head.parameters(), learning_rate)
    for step in range(steps + 1):
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(head(columns), lost)
        if not loss.isfinite():
            raise InputError(
                "loss", f"{loss.item()} after {step} steps", "a finite number; a lower learning_rate helps"
            )
        if step < steps:
            loss.backward()
            optimizer.step()
    return head.eval()


def calibrate(head: EotHead, columns: Tensor, lost: Tensor) -> None:
    """Sets slope and offset of the head's logits to those of most likelihood on prompts it was not trained on (Platt 1999)."""
    with torch.no_grad():
        logits = head(columns)
    scale = torch.tensor([1.0, 0.0], requires_grad=True)
    optimizer = torch.optim.LBFGS([scale], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(logits * scale[0] + scale[1], lost)
        value.backward()
        return value

    optimizer.step(loss)
    # A slope of 0 or less would turn the head's word around: then nothing was learned, and it stays as it is.
    if scale.isfinite().all() and scale[0] > 0:
        head.scale.copy_(scale.detach())


@torch.inference_mode()
def measure(head: EotHead, states: EotStates) -> dict[str, float | None]:
    """What closing at each risk would have done to recorded decodes: the share that loses text, and forwards saved, mean.

    As if no other commit changed by it; ``loss`` and ``brier`` are of single positions.
    """
    probability = torch.cat([head(part.columns()).sigmoid() for _, part in _parts(states)])
    able, lost = states.able(), states.lost()
    said, truth = probability[able], lost[able].float()
    found: dict[str, float | None] = {
        "validation/loss": float(F.binary_cross_entropy(said, truth)),
        "validation/brier": float((said - truth).square().mean()),
    }
    decodes = states.decode.unique_consecutive(return_counts=True)[1].tolist()
    for risk in RISKS:
        broken, saved = 0, 0
        for place, masked, first in zip(
            first_end(probability, able, risk).split(decodes), states.masked.split(decodes),
            states.first_eot.split(decodes), strict=True,
        ):  # fmt: skip
            cut = place.cummin(0).values
            before = torch.cat((torch.ones_like(masked[:1]), masked[:-1]))
            committed = (before & ~masked).int().argmax(1)
            broken += bool(first[-1] > cut[-1] + 1)
            saved += int((committed[1:] > cut[:-1]).sum())
        found[f"cut_text/{risk:g}"] = broken / len(decodes)
        found[f"saved/{risk:g}"] = saved / len(decodes)
    return found


def _card(config: EotConfig, digest: str, eot: str, decodes: int) -> str:
    """The model card of an export; its figures are of ``decodes`` validation decodes, rolled out with the rule ``eot``."""
    lines = [
        "# EoT head", "",
        f"Says how likely the mask predictor `{config.base_fingerprint}` loses text if its region is ended at a position, from "
        f"{len(COLUMNS)} columns through {config.hidden} units. For `eot: learned`.",
        f"Trained on rollouts with the EoT rule `{eot}`, gen_length {config.gen_length}, block_length {config.block_length}, "
        f"digest {digest}; calibrated, and measured, on validation prompts.", "",
        f"| `eot_risk` | of {decodes} recorded decodes, text lost | forwards saved, mean |", "|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {risk:g} | {100 * (config.metrics[f'cut_text/{risk:g}'] or 0):.2f} % "
        f"| {config.metrics[f'saved/{risk:g}'] or 0:.1f} |"
        for risk in RISKS
    ]
    lines += ["", f"Log loss of single positions {config.metrics['validation/loss']:.4f}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    command(main)
