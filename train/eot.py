"""Trains the EoT head of the rule ``eot: learned``: ``python train/eot.py --rollouts runs/rollout/eot --out exports/eot``.

The rollouts must be made with ``--rollout.eot off --rollout.eot_evidence true``.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from data.disk import check_writable
from data.eot_data import EotStates, load_eot_states
from data.manifest import open_rollouts
from data.store import Folder
from data.typed import Length, Positive, Whole, Width
from eval.command import command
from models.checkpoint import check_replaceable
from models.eot import COLUMNS, KIND, EotConfig, EotHead, first_end, save_eot
from models.errors import InputError
from models.predictor import MaskPredictor

RISKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
_MOST = 200_000  # examples, evenly spread over all


def main(
    rollouts: Folder,
    base: str = "models/bundled/llada-tiny",
    out: Path = Path("exports/eot"),
    hidden: Width = 16,
    steps: Length = 500,
    learning_rate: Positive = 0.02,
    seed: Whole = 1,
) -> None:
    """Fits a head on training prompts, calibrates it on validation prompts, and exports it.

    Args:
        rollouts: Folder of a finished set, or its URL, rolled out with eot off and eot_evidence true.
        base: Folder or hub id of the base model that was rolled out.
        out: Folder of the export.
        hidden: Width of the head's hidden layer.
        steps: Optimizer steps, each over all examples.
        learning_rate: Of Adam.
        seed: Of the first weights.

    Raises:
        InputError: Rollouts that hold no EoT evidence, are cut at an EoT, or are of another base model.
    """
    check_writable("out", out)
    check_replaceable(out.absolute(), KIND)
    predictor = MaskPredictor.from_pretrained(base)
    opened = open_rollouts(rollouts, fingerprint=predictor.fingerprint)
    states = load_eot_states(opened)
    learned, held = states.of("train"), states.of("validation")
    for name, part in (("train", learned), ("validation", held)):
        if not len(part.decode):
            raise InputError(f"{rollouts}: split", f"no {name} prompt", "prompts of train and of validation")
    torch.manual_seed(seed)
    head = fit(EotHead(hidden), *examples(learned), steps, learning_rate)
    calibrate(head, *examples(held))
    metrics = measure(head, held)
    settings = opened.manifest["settings"]
    config = EotConfig(
        hidden=hidden, gen_length=settings["gen_length"], block_length=settings["block_length"],
        vocab_size=predictor.vocab_size, mask_id=predictor.ids.mask, base_fingerprint=predictor.fingerprint,
        base_family=predictor.family, metrics=metrics,
    )  # fmt: skip
    card = _card(config, opened.digest, len(held.decode.unique()))
    save_eot(out, head, config, card)
    print(card)
    print(f"exported {out}")


def examples(states: EotStates) -> tuple[Tensor, Tensor]:
    """Columns ``(N, F)`` of positions that a text may end at, and whether text would be lost, ``(N,)`` float32."""
    able = states.able()
    columns, lost = states.columns()[able], states.lost()[able]
    every = -(-len(lost) // _MOST)
    return columns[::every], lost[::every].float()


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
    """What cutting at each risk would have done to recorded decodes: the share that loses text, and where it cuts.

    A decode is cut at its first step with a position below the risk; ``loss`` and ``brier`` are of single positions.
    """
    probability, able, lost = head(states.columns()).sigmoid(), states.able(), states.lost()
    said, truth = probability[able], lost[able].float()
    found: dict[str, float | None] = {
        "validation/loss": float(F.binary_cross_entropy(said, truth)),
        "validation/brier": float((said - truth).square().mean()),
    }
    region, decodes = able.shape[1], states.decode.unique()
    for risk in RISKS:
        place = first_end(probability, able, risk)
        broken, beyond = 0, 0.0
        for decode in decodes:
            rows = (states.decode == decode).nonzero()[:, 0]
            cut = rows[place[rows] < region]
            last = int(place[cut[0]]) if len(cut) else region - 1
            end = int(states.first_eot[rows[0]])
            broken += end > last + 1
            beyond += max(last - end, 0)
        found[f"cut_text/{risk:g}"] = broken / len(decodes)
        found[f"beyond_end/{risk:g}"] = beyond / len(decodes)
    return found


def _card(config: EotConfig, digest: str, decodes: int) -> str:
    """The model card of an export; its figures are of ``decodes`` validation decodes."""
    lines = [
        "# EoT head", "",
        f"Says how likely the mask predictor `{config.base_fingerprint}` loses text if its region is ended at a position, from "
        f"{len(COLUMNS)} columns through {config.hidden} units. For `eot: learned`.",
        f"Trained on rollouts without an EoT rule, gen_length {config.gen_length}, block_length {config.block_length}, digest "
        f"{digest}; calibrated, and measured, on validation prompts.", "",
        f"| `eot_risk` | of {decodes} recorded decodes, text lost | tokens left beyond the end, mean |", "|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {risk:g} | {100 * (config.metrics[f'cut_text/{risk:g}'] or 0):.2f} % "
        f"| {config.metrics[f'beyond_end/{risk:g}'] or 0:.1f} |"
        for risk in RISKS
    ]
    lines += ["", f"Log loss of single positions {config.metrics['validation/loss']:.4f}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    command(main)
