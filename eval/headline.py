"""At equal quality: the cheapest setting of each strategy that is as good as full_step."""

from collections.abc import Sequence
from typing import Any

from eval.intervals import paired, paired_error
from models.errors import InputError

MARGIN = 0.01
"""Loss of exact match against full_step, from 0 to 1, up to which a decode counts as equally good."""

BLIND = 0.05
"""Share of full_step's answers that has to be right for lost answers to say anything; below it the text is compared."""

Row = dict[str, Any]
COSTS = {"nfe_mean": "forwards", "tokens_per_second": "speed"}


def by_answers(row: Row) -> bool:
    """Whether right answers tell how good a decode is: full_step has some, which could be lost."""
    return row["paired_difference"] is not None and row["exact_match"] - row["paired_difference"]["mean"] >= BLIND


def loss(row: Row) -> float:
    """What a decode loses against full_step, from 0 to 1: right answers, or text where hardly any could be lost."""
    return -row["paired_difference"]["mean"] if by_answers(row) else 1 - row["token_agreement"]


def as_good(row: Row, accepted: float) -> bool:
    """Whether a decode loses at most ``accepted``, one standard error of its loss added.

    Of many settings the cheapest that seems to lose no more than that owes it to luck, and loses more on other prompts; the
    error makes up for it (the one-standard-error rule of Breiman et al. 1984, section 3.4.3).
    """
    found = row["paired_difference"]
    error = paired_error(found["won"], found["lost"], row["prompts"]) if by_answers(row) else 0.0
    return loss(row) + error <= accepted


def pick(rows: Sequence[Row], accepted: float) -> Row:
    """The row of fewest forwards among those as good (:func:`as_good`); if there is none, the one that loses least."""
    good = [row for row in rows if as_good(row, accepted)]
    return (
        min(good, key=lambda row: row["nfe_mean"]) if good else min(rows, key=lambda row: (loss(row), row["nfe_mean"]))
    )


def doubts(reference: Row, margin: float) -> list[str]:
    """Why a comparison with this row, full_step's, says less than it seems to."""
    if reference["exact_match"] is None:
        return []
    found = []
    if reference["exact_match"] < BLIND:
        share = f"{100 * reference['exact_match']:.1f} %"
        found.append(
            f"full_step answers {share} rightly: hardly any can be lost, so agreement with its text is what counts"
        )
    blind = -paired(0, 0, reference["prompts"])[0]
    if blind > margin:
        found.append(
            f"on {reference['prompts']} prompts even equal answers leave a loss of {100 * blind:.1f} points possible, and "
            f"{100 * margin:g} are asked about"
        )
    return found


def headline(
    rows: Sequence[Row], margin: float = MARGIN, picked_on: Sequence[Row] | None = None
) -> list[dict[str, Any]]:
    """For each strategy its cheapest settings among those as good as full_step.

    As good is what :func:`as_good` says of the exact match, paired prompt by prompt with full_step's; confirmed, that the
    whole 95 % interval of the difference is above ``-margin``, so that a larger loss is no matter of chance. Settings compete
    within a group only: the same prompts, gen_length, batch size, dtype and temperature.

    Args:
        rows: Rows of a comparison, which are reported; where settings are picked elsewhere, those that were picked suffice.
        margin: The loss that is accepted, from 0 to 1.
        picked_on: Rows of the same runs on other prompts, on which the settings are picked. Without them they are picked on
            the very prompts that are reported, which flatters whoever has many settings.

    Returns:
        A mapping for each group with more than one strategy: what its rows have in common, and ``strategies``, where
        ``forwards`` is the setting of fewest forwards and ``speed`` the one of most tokens a second, or ``None`` where
        none is as good; ``forwards_confirmed`` and ``speed_confirmed`` are those among the confirmed. ``times`` says how
        many times fewer forwards, or more tokens a second, that is than full_step (the reference decode itself), the best
        ``threshold`` and ``oracle`` have; ``None`` where the group has none of these.
    """
    judged = {row["label"]: row for row in picked_on or rows}
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in (row for row in rows if row["label"] in judged):
        groups.setdefault(_group(row), []).append(row)
    found = []
    for key, members in groups.items():
        elsewhere = {row["label"] for row in rows} - {row["label"] for row in members}
        where = _group(judged[members[0]["label"]])
        candidates = [row for row in judged.values() if _group(row) == where and row["label"] not in elsewhere]
        names = list(dict.fromkeys(row["settings"]["strategy"] for row in candidates))
        if len(names) < 2:
            continue
        good = [row for row in members if as_good(judged[row["label"]], margin)]
        sure = [row for row in good if confirmed(judged[row["label"]], margin)]
        reference = next((row for row in members if row["label"] == row["reference"]), None)
        entries: list[dict[str, Any]] = []
        for name in names:
            tried = [row for row in candidates if row["settings"]["strategy"] == name]
            entries.append({"strategy": name, "settings_tried": len(tried)})
            entries[-1]["settings_as_good"] = sum(as_good(row, margin) for row in tried)
        for cost, title in COSTS.items():
            for rows_as_good, ending in ((good, ""), (sure, "_confirmed")):
                best = {name: _best(rows_as_good, name, cost, judged) for name in names}
                for entry in entries:
                    baselines = best | {"full_step": reference}
                    entry[title + ending] = _pick(best[entry["strategy"]], baselines, cost, margin)
        common = dict(zip(("gen_length", "batch_size", "dtype", "temperature", "prompts"), key, strict=True))
        pick_prompts = None if picked_on is None else judged[members[0]["label"]]["prompts"]
        found.append(common | {"margin": margin, "picked_on": pick_prompts, "strategies": entries})
    return found


def picked(groups: Sequence[dict[str, Any]]) -> set[str]:
    """Labels of all settings that a headline names."""
    ways = [f"{title}{ending}" for title in COSTS.values() for ending in ("", "_confirmed")]
    picks = (entry[way] for group in groups for entry in group["strategies"] for way in ways)
    return {pick["label"] for pick in picks if pick is not None}


def check_margin(margin: float) -> None:
    """Raises an InputError for a margin out of range."""
    if not 0 <= margin < 1:
        raise InputError("margin", margin, "a share from 0 to 1, 0.01 for one point")


def confirmed(row: Row, margin: float) -> bool:
    """Whether chance is ruled out as the reason why a decode looks as good as full_step."""
    return row["label"] == row["reference"] or row["paired_difference"]["interval"][0] >= -margin


def _group(row: Row) -> tuple[Any, ...]:
    names = ("gen_length", "batch_size", "dtype", "temperature")
    return (*(row["settings"][name] for name in names), row["prompts"])


def _better(cost: str, row: Row) -> float:
    """The higher the better."""
    return -row[cost] if cost == "nfe_mean" else row[cost]


def _best(good: Sequence[Row], strategy: str, cost: str, judged: dict[str, Row]) -> Row | None:
    rows = [row for row in good if row["settings"]["strategy"] == strategy]
    return max(rows, key=lambda row: _better(cost, judged[row["label"]]), default=None)


def _pick(row: Row | None, baselines: dict[str, Row | None], cost: str, margin: float) -> dict[str, Any] | None:
    if row is None:
        return None
    times = {}
    for name in ("full_step", "threshold", "oracle"):
        other = baselines.get(name)
        ours, theirs = (0, 0) if other is None else (row[cost], other[cost])
        more, less = (theirs, ours) if cost == "nfe_mean" else (ours, theirs)
        times[name] = more / less if less else None  # texts without a token have no speed
    kept = (
        "label",
        "reference",
        "exact_match",
        "exact_match_interval",
        "paired_difference",
        "nfe_mean",
        "tokens_per_second",
    )
    return {name: row[name] for name in kept} | {"confirmed": confirmed(row, margin), "times": times}


def summary(groups: Sequence[dict[str, Any]]) -> str:
    """The headline in a line a strategy, for the terminal."""
    lines = []
    for group in groups:
        where = "the same prompts" if group["picked_on"] is None else f"{group['picked_on']} others"
        lines.append(
            f"at most {100 * group['margin']:g} point below full_step, a standard error added, on {group['prompts']} prompts, "
            f"gen_length {group['gen_length']}, batch {group['batch_size']}, {group['dtype']}, settings picked on {where}:"
        )
        for entry in group["strategies"]:
            fewest, fastest = entry["forwards"], entry["speed"]
            if fewest is None:
                lines.append(f"  {entry['strategy']}: none of {entry['settings_tried']} settings")
                continue
            lines.append(
                f"  {entry['strategy']}: {fewest['nfe_mean']:.2f} forwards ({fewest['label']}), "
                f"{fastest['tokens_per_second']:.0f} tokens/s ({fastest['label']})"
            )
    return "\n".join(lines)
