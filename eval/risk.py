"""Calibrates a strategy for a risk: ``python eval/risk.py --strategy threshold --values "[0.95, 0.9, 0.7]"``.

Then ``Decoder.from_pretrained(base, "threshold", risk=0.02, calibration="runs/risk/risk.json")``.
"""

import functools
import math
import random
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from scipy.optimize import root_scalar
from scipy.special import rel_entr
from scipy.stats import beta

from data.disk import check_writable
from data.prompt import Prompt
from data.prompts import PromptSource, Split, load_prompts, prompt_hash
from data.provenance import environment, now
from data.typed import Count, Length
from decoding.config import CacheRule, EotRule
from decoding.risk import DECODING, Calibration, plain, save_calibration
from decoding.strategies import make_strategy
from eval.bench import answered, decode
from eval.command import command
from eval.compare import Comparison, Run
from eval.headline import doubts
from models.checkpoint import CALIBRATION
from models.errors import InputError
from models.predictor import MaskPredictor, fingerprint

VARIED = {
    "threshold": "threshold", "factor": "factor", "entropy_bound": "gamma", "klass": "threshold", "learn2pd": "threshold",
    "apd": "mixture_weight",
}  # fmt: skip
"""The setting of each strategy that trades quality for forwards."""
Loss = Literal["answer", "text", "tokens"]
LOST = {
    "answer": "Risk of losing a right answer of full_step",
    "text": "Risk of losing the text of full_step",
    "tokens": "Mean share of a text's positions that differ from full_step's",
}
"""What is promised, of each loss."""
VALIDATION = [PromptSource(split="validation")]
RISKS = (0.001, 0.005, 0.01, 0.02, 0.05)
CONFIDENCE = 0.95
CHOSEN = (
    "These prompts also chose the epoch, which makes the promise a little too good; `eval/risk.py` on prompts that training "
    "has not seen makes a strict one."
)
"""What has to be said of a calibration that comes with a fit."""


@functools.lru_cache(4096)  # drawn prompts lose the same few numbers again and again
def upper_bound(lost: int, prompts: int, confidence: float) -> float:
    """Upper end of the exact one-sided interval of a share (Clopper and Pearson 1934).

    A share as large as this or larger gives so few losses with probability ``1 - confidence`` at most.

    Args:
        lost: Prompts that lost something.
        prompts: All prompts.
        confidence: From 0 to 1.
    """
    return 1.0 if lost == prompts else float(beta.ppf(confidence, lost + 1, prompts - lost))


def mean_bound(lost: float, prompts: int, confidence: float) -> float:
    """Upper end of a one-sided interval of the mean of a loss from 0 to 1, however it is distributed.

    The least mean that the p-value of Hoeffding and Bentkus rules out (learn then test, arXiv 2110.01052; Bates et al., arXiv
    2101.02703): with a mean as large as this or larger, the losses of so many prompts add up to so little with probability
    ``1 - confidence`` at most.

    Args:
        lost: Sum of the prompts' losses.
        prompts: All prompts.
        confidence: From 0 to 1.
    """
    mean, doubt = lost / prompts, 1 - confidence
    if mean >= 1:
        return 1.0

    def hoeffding(share: float) -> float:
        return math.exp(-prompts * float(rel_entr(mean, share) + rel_entr(1 - mean, 1 - share)))

    bentkus = upper_bound(math.ceil(lost), prompts, 1 - doubt / math.e)
    return min(bentkus, root_scalar(lambda share: hoeffding(share) - doubt, bracket=(mean, 1.0)).root)


def main(
    strategy: str,
    values: list[float],
    base: str = "models/bundled/llada-tiny",
    options: dict[str, Any] | None = None,
    option: str | None = None,
    loss: Loss = "answer",
    confidence: float = CONFIDENCE,
    prompts: list[PromptSource] = VALIDATION,
    split: Split | None = "validation",
    limit: Count | None = None,
    gen_length: Length = 128,
    block_length: Length = 32,
    eot: EotRule = "commit",
    cache: CacheRule = "none",
    refresh: Count | None = None,
    batch_size: Length = 32,
    run: Path = Path("runs/risk"),
    out: Path | None = None,
) -> None:
    """Decodes calibration prompts with every setting and writes, to ``risk.json``, the risk that each is vouched for.

    Interrupted, the same command goes on where it stopped.

    Args:
        strategy: Name of the strategy.
        values: Values of the setting that varies, from the safest to the cheapest. The order is part of the test.
        base: Folder or hub id of the base model.
        options: Settings of the strategy that stay, such as {"filter": "exports/filter"}.
        option: The setting that varies; each strategy has a usual one.
        loss: What counts as lost: an answer that full_step gives rightly, its text, or of that text the share of tokens that
            differ.
        confidence: Confidence of what is promised, from 0 to 1.
        prompts: Where the calibration prompts come from.
        split: Takes only the prompts of this split; null takes all.
        limit: Number of prompts, the tasks in turn.
        gen_length: Generated positions, in tokens.
        block_length: Positions of a block, in tokens.
        eot: End-of-text rule, of full_step too.
        cache: Which keys and values are reused; full_step reuses none.
        refresh: Forwards of a block from one on the whole sequence to the next.
        batch_size: Prompts decoded together.
        run: Folder of the decodes.
        out: Folder of ``risk.json``: that of the filter or helper, which then knows it, or else ``run``.

    Raises:
        InputError: A strategy without such a setting, or prompts without answers.
    """
    options = options or {}
    varied = option or VARIED.get(strategy)
    if varied is None or varied in options or not values:
        accepted = "a strategy with a setting that trades quality for forwards, and values of it"
        raise InputError("strategy, option, values", f"{strategy}, {varied}, {values}", accepted)
    check_writable("run", run)
    if not 0 < confidence < 1:
        raise InputError("confidence", confidence, "a number between 0 and 1, such as 0.95")
    for value in values:  # refuses what the strategy does not take before anything is decoded
        make_strategy(strategy, options | {varied: value})
    predictor = MaskPredictor.from_pretrained(base)
    chosen = load_prompts(prompts, split=split, limit=limit)
    if loss == "answer":
        answered(chosen)
    runs = [Run("full_step", eot=eot)]
    runs += [Run(strategy, options | {varied: value}, eot, cache, refresh, label=f"{value:g}") for value in values]
    comparison = Comparison(
        predictor, chosen, runs, gen_length=gen_length, block_length=block_length, batch_size=batch_size,
        folder=run / "decodes",
    )  # fmt: skip
    decode(comparison)
    full, *rows = comparison.rows()
    for warning in doubts(full, 1.0) if loss == "answer" else []:
        print(f"warning: {warning}", file=sys.stderr)
    calibration = calibrate(full, rows, chosen, strategy, options, varied, loss, confidence)
    calibration.made.update(prompts=[asdict(source) for source in prompts], split=split)
    component = options.get("filter") or options.get("helper")
    target = (out or (Path(component) if component else run)) / CALIBRATION
    save_calibration(target, calibration)
    print(table(calibration, full["nfe_mean"]))
    print(f"wrote {target}")


def calibrate(
    full: dict[str, Any], rows: list[dict[str, Any]], prompts: Sequence[Prompt], strategy: str, options: dict[str, Any],
    option: str, loss: Loss, confidence: float = CONFIDENCE,
) -> Calibration:  # fmt: skip
    """What the rows of a comparison vouch for.

    Args:
        full: The row of full_step.
        rows: Those of the strategy, from the safest setting to the cheapest.
        prompts: What was decoded.
        strategy: Its name.
        options: Its settings that stay.
        option: The setting that varies.
        loss: What counts as lost.
        confidence: From 0 to 1.
    """
    settings, lost = rows[0]["settings"], [_lost(full, row, loss) for row in rows]
    bound = mean_bound if loss == "tokens" else upper_bound
    return Calibration(
        strategy=strategy, options=plain(options), option=option, values=[row["settings"][option] for row in rows],
        lost=lost, bounds=[bound(count, len(prompts), confidence) for count in lost],
        nfe=[row["nfe_mean"] for row in rows], prompts=len(prompts), loss=loss, confidence=confidence,
        decoding={name: settings[name] for name in DECODING}, fingerprints=settings["fingerprints"],
        made={
            "command": shlex.join(["python", *sys.argv]), "time": now(), "environment": environment(),
            "hashes": [prompt_hash(prompt.prompt) for prompt in prompts],
        },
    )  # fmt: skip


def _lost(full: dict[str, Any], row: dict[str, Any], loss: Loss) -> float:
    """How many prompts lost something, a whole number; of ``tokens`` the sum of the shares, as a float."""
    if loss == "tokens":
        return (1 - row["token_agreement"]) * row["prompts"]
    if loss == "text":
        return round((1 - row["sequence_agreement"]) * row["prompts"])
    return sum(ours < theirs for ours, theirs in zip(row["right"], full["right"], strict=True))


def promises(calibration: Calibration) -> list[str]:
    """What a calibration promises, a line a risk: ``Decoder.from_pretrained(..., risk=...)`` takes that setting."""
    counted = f"{calibration.prompts} calibration prompts"
    lines = [f"{LOST[calibration.loss]}, at {100 * calibration.confidence:g} % confidence ({counted}):", ""]
    least = calibration.bounds[0]
    lines += [
        f"- {100 * risk:g} %: {calibration.option} {calibration.value(risk):g}" for risk in RISKS if risk >= least
    ]
    if least > RISKS[0]:
        lines.append(f"- below {100 * least:.3g} %: no setting")
    return lines


def broken_promises(
    full: dict[str, Any], rows: Sequence[dict[str, Any]], fresh_full: dict[str, Any], fresh: Sequence[dict[str, Any]],
    risk: float, times: int = 200, seed: int = 0,
) -> tuple[int, int, list[dict[str, Any]]]:  # fmt: skip
    """How often a promise is broken on fresh prompts, of many that were made on calibration prompts drawn anew.

    As many prompts as were calibrated on are drawn from them, with repeats; what is promised on these is compared with what the
    fresh ones lose.

    Args:
        full: The row of full_step on the calibration prompts.
        rows: Those of a strategy, from the safest setting to the cheapest.
        fresh_full: The row of full_step on the fresh prompts.
        fresh: Those of the strategy there, in the same order.
        risk: What is promised, from 0 to 1.
        times: How many draws.
        seed: Of the draws.

    Returns:
        How often more than ``risk`` of the fresh prompts lose their answer, how often no setting was vouched for, and of each
        of the other draws the row of ``fresh`` of the setting that was taken.
    """
    lost = [[ours < theirs for ours, theirs in zip(row["right"], full["right"], strict=True)] for row in rows]
    count, chance = len(full["right"]), random.Random(seed)
    broken, none, taken = 0, 0, list[dict[str, Any]]()
    for _ in range(times):
        drawn = chance.choices(range(count), k=count)
        passed = 0
        while passed < len(rows) and upper_bound(sum(lost[passed][n] for n in drawn), count, CONFIDENCE) <= risk:
            passed += 1
        if not passed:
            none += 1
            continue
        taken.append(fresh[passed - 1])
        broken += _lost(fresh_full, taken[-1], "answer") > risk * len(fresh_full["right"])
    return broken, none, taken


def keep(calibration: Calibration, kind: str, folder: Path) -> None:
    """Lays a calibration beside the component, a ``filter`` or ``helper``, that it was measured with before its export."""
    known = calibration.fingerprints | {kind: fingerprint(folder)}
    save_calibration(folder / CALIBRATION, replace(calibration, fingerprints=known))


def table(calibration: Calibration, full_step_nfe: float) -> str:
    """What a calibration says, for the terminal."""
    lines = [
        f"{calibration.prompts} prompts, full_step {full_step_nfe:.1f} forwards; lost: full_step's {calibration.loss}"
    ]
    for value, lost, bound, nfe in zip(
        calibration.values, calibration.lost, calibration.bounds, calibration.nfe, strict=True
    ):
        lines.append(
            f"  {calibration.option} {value:g}: {nfe:.1f} forwards, {lost:g} lost, at most {100 * bound:.2f} %"
        )
    lines += promises(calibration)
    return "\n".join(lines)


if __name__ == "__main__":
    command(main)
