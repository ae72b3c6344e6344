"""Tells what ``eval/bench.py`` found: tables, pictures, and what changed from one result to another.

``python eval/report.py compare --before old.json --after new.json``
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.disk import check_writable
from data.provenance import write_aside
from eval import helper_sizes
from eval.command import command
from eval.headline import MARGIN, check_margin, headline
from eval.intervals import paired
from eval.result_file import read
from models.checkpoint import writing

Row = dict[str, Any]


def markdown(result: dict[str, Any]) -> str:
    """A result as Markdown: headline, all rows, by task, by answer length, and what they were made with."""
    rows = result["rows"]
    lines = ["# Decoders side by side", ""]
    lines += [f"{len(result['prompts']['hashes'])} prompts, {_listed(result['prompts']['tasks'])}; judged by "]
    lines[-1] += (
        f"{' and '.join(result['scorers'])}. Base model {result['base']['fingerprint']}, `{result['base']['name']}`."
    )
    lines += ["", *_headline_lines(result["headline"])]
    lines += ["## All runs", "", *table(rows, ALL), "", *_NOTES]
    for title, key in (("task", "by_task"), ("length of full_step's answer, in tokens", "by_length")):
        lines += ["", f"## By {title}", "", *_parts(rows, key)]
    if any("helper" in row for row in rows):
        lines += ["", "## Helpers", "", *table([row for row in rows if "helper" in row], helper_sizes.COLUMNS)]
        lines += ["", helper_sizes.NOTE]
    where = result["environment"]
    lines += [
        "",
        "## Made with",
        "",
        f"`{result['command']}`, {result['time']}, on {where['device']}, {where['threads']} ",
    ]
    lines[-1] += f"threads, torch {where['torch']}, transformers {where['transformers']}, commit {where['git']}."
    lines += ["", "Every row's complete decode settings are in the JSON file beside this one.", ""]
    return "\n".join(lines)


def _headline_lines(groups: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for group in groups:
        lines += [
            f"## At equal quality: gen_length {group['gen_length']}, batch {group['batch_size']}, {group['dtype']}",
            "",
            f"The cheapest setting of each strategy that loses at most {100 * group['margin']:g} point of exact match against "
            f"full_step, one standard error added, on {group['prompts']} prompts; confirmed where the 95 % interval rules out "
            "a larger one. "
            + (
                f"Settings are picked on {group['picked_on']} other prompts, the validation split's."
                if group["picked_on"]
                else "Settings are picked on the prompts that are reported."
            ),
        ]
        for title, head, unit in (("forwards", "NFE", "fewer forwards"), ("speed", "tokens/s", "as many tokens/s")):
            columns = ["strategy", "setting", "exact match", "difference to full_step", head]
            columns += [f"× {unit}: {name}" for name in ("full_step", "best threshold", "oracle")]
            columns += ["confirmed setting", head, f"× {unit}: full_step"]
            lines += ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
            lines += [_headline_row(entry, title) for entry in group["strategies"]]
        lines.append("")
    return lines


def _headline_row(entry: dict[str, Any], title: str) -> str:
    pick, sure = entry[title], entry[f"{title}_confirmed"]
    cost, digits = ("nfe_mean", 2) if title == "forwards" else ("tokens_per_second", 0)
    cells = [entry["strategy"]]
    if pick is None:
        cells += [f"none of {entry['settings_tried']} is as good", *["–"] * 6]
    else:
        cells += [pick["label"], percent(pick["exact_match"]), difference(pick), f"{pick[cost]:.{digits}f}"]
        cells += [times(pick, name) for name in ("full_step", "threshold", "oracle")]
    cells += ["–"] * 3 if sure is None else [sure["label"], f"{sure[cost]:.{digits}f}", times(sure, "full_step")]
    return f"| {' | '.join(cells)} |"


def times(pick: dict[str, Any], name: str) -> str:
    """How many times better than another's a headline's pick is, as a cell."""
    value = pick["times"][name]
    return "–" if value is None else f"{value:.2f}×"


def percent(value: float) -> str:
    """A share as a cell."""
    return f"{100 * value:.1f} %"


def difference(row: Row) -> str:
    """A row's paired difference to its reference in points, with its interval, as a cell."""
    if row.get("label") == row.get("reference", ""):
        return "the reference"
    low, high = row["paired_difference"]["interval"]
    return f"{100 * row['paired_difference']['mean']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def _component(row: Row) -> str:
    return f"{row['component']['per_forward']:.1f}" if "component" in row else "–"


def filter_share(row: Row) -> str:
    """A filter's time as a share of a forward's, as a cell."""
    found = row.get("component", {}).get("share_of_forward")
    return "–" if found is None else percent(found)


def _memory(row: Row) -> str:
    return f"{row['memory']['peak'] / 2**20:.0f}" if row["memory"] else "–"


ALL = {
    "decode": lambda row: row["label"],
    "prompts": lambda row: str(row["prompts"]),
    "exact match (95 %)": lambda row: (
        f"{percent(row['exact_match'])} "
        f"({100 * row['exact_match_interval'][0]:.1f} to {100 * row['exact_match_interval'][1]:.1f})"
    ),
    "difference (95 %)": difference,
    "valid": lambda row: "–" if row.get("valid") is None else percent(row["valid"]),
    "same text": lambda row: percent(row["sequence_agreement"]),
    "same tokens": lambda row: percent(row["token_agreement"]),
    "NFE mean / median / p95": lambda row: f"{row['nfe_mean']:.2f} / {row['nfe_median']:.0f} / {row['nfe_p95']:.0f}",
    "tokens/forward": lambda row: f"{row['tokens_per_forward']:.2f}",
    "tokens/s": lambda row: f"{row['tokens_per_second']:.0f}",
    "predictor / helper / loop": lambda row: " / ".join(
        f"{100 * row[name] / row['seconds']:.0f} %" for name in ("predictor_seconds", "helper_seconds", "loop_seconds")
    ),
    "component commits/forward": _component,
    "empty": lambda row: percent(row["empty_answers"]),
    "cut": lambda row: percent(row["truncated_correct_answers"]),
    "saved by EoT": lambda row: "–" if (saved := row["forwards_saved_by_eot"]) is None else f"{saved:.1f}",
    "peak MiB": _memory,
}
_NOTES = [
    "Valid: every sentence well formed and every step right. Same text, same tokens: agreement with full_step up to the "
    "end of the text. Tokens are counted before the first EoT. Predictor / helper / loop: shares of the wall time. Empty: "
    "answers without a token. Cut: prompts that full_step answers rightly and this decode wrongly, in a text that ends "
    "earlier. Saved by EoT: mean forwards fewer than with the rule off.",
]


def table(rows: Sequence[Row], columns: dict[str, Any]) -> list[str]:
    """The lines of a Markdown table; ``columns`` says how each cell is made of a row."""
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return lines + [f"| {' | '.join(value(row) for value in columns.values())} |" for row in rows]


def _parts(rows: Sequence[Row], key: str) -> list[str]:
    """Exact match, agreement and forwards of each run in each group of prompts."""
    names = list(dict.fromkeys(name for row in rows for name in row[key]))
    if key == "by_length":
        names.sort(key=lambda name: int(name.split()[0]))
    counts = {name: max(row[key][name]["prompts"] for row in rows if name in row[key]) for name in names}
    columns = {"exact match / same text / NFE": lambda row: row["label"]}
    for name in names:
        columns[f"{name} ({counts[name]})"] = lambda row, name=name: (
            f"{100 * part['exact_match']:.1f} / {100 * part['sequence_agreement']:.1f} / {part['nfe_mean']:.2f}"
            if (part := row[key].get(name))
            else "–"
        )
    return table(rows, columns)


def _listed(tasks: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in tasks.items())


def variant(settings: dict[str, Any]) -> str:
    """What a run has beside its strategy's usual settings; empty where that is nothing."""
    extra = [name for name in ("filter", "kv_window", "max_lookahead") if settings.get(name) is not None]
    words = [name for name in extra if (settings["strategy"], name) != ("learn2pd", "filter")]
    words += [f"{settings['cache']} cache"] * (settings["cache"] != "none")
    words += [f"EoT {settings['eot']}"] * (settings["eot"] != "commit")
    return ", ".join(words)


def draw(rows: Sequence[Row], target: Path, margin: float = MARGIN) -> None:
    """Draws quality against forwards and against tokens/s: a colour for each strategy, a line joins its usual settings.

    Other caches, EoT rules and components have a mark of their own, the oracle is a star. The dashed line is the first
    run's quality, the shaded band what counts as equally good. Runs on other prompts or of another length are left out.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    rows = [row for row in rows if (row["reference"], row["prompts"]) == (rows[0]["label"], rows[0]["prompts"])]
    names = list(dict.fromkeys(row["settings"]["strategy"] for row in rows))
    colours = {name: plt.get_cmap("tab10")(n % 10) for n, name in enumerate(names)}
    variants = [name for name in dict.fromkeys(variant(row["settings"]) for row in rows) if name]
    shapes = {name: "sD^vPX<>ph"[n % 10] for n, name in enumerate(variants)} | {"": "o"}
    words = {
        "nfe_mean": "forwards per answer (NFE)", "tokens_per_second": "generated tokens per second",
        "exact_match": "exact match, %", "sequence_agreement": "same text as full_step, %",
    }  # fmt: skip
    panels = [("nfe_mean", "exact_match"), ("tokens_per_second", "exact_match"), ("nfe_mean", "sequence_agreement")]
    figure, axes = plt.subplots(1, 3, figsize=(15, 5.4), constrained_layout=True)
    for axis, (cost, quality) in zip(axes, panels, strict=True):
        for name in names:
            own = [row for row in rows if row["settings"]["strategy"] == name]
            usual = sorted((row[cost], 100 * row[quality]) for row in own if not variant(row["settings"]))
            axis.plot(*zip(*usual, strict=True), color=colours[name], linewidth=1.5) if usual else None
            for row in own:
                kind = variant(row["settings"])
                shape, size = ("*", 15) if name == "oracle" and not kind else (shapes[kind], 6)
                fill = "white" if kind else colours[name]
                axis.plot(
                    row[cost], 100 * row[quality], shape, markersize=size, color=colours[name], markerfacecolor=fill
                )
        level = 100 * rows[0][quality]
        axis.axhline(level, color="grey", linestyle="--", linewidth=1)
        if quality == "exact_match":
            axis.axhspan(level - 100 * margin, level, color="grey", alpha=0.15, linewidth=0)
        axis.set(xlabel=words[cost], ylabel=words[quality], xscale="log")
        axis.grid(visible=True, which="both", alpha=0.25)
    marks = [Line2D([], [], color=colours[name], marker="*" if name == "oracle" else "o", label=name) for name in names]
    marks += [
        Line2D([], [], color="grey", linestyle="", marker=shapes[kind], markerfacecolor="white", label=kind)
        for kind in variants
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=8, frameon=False)
    figure.suptitle(f"{rows[0]['prompts']} prompts, gen_length {rows[0]['settings']['gen_length']}")
    with writing(target) as aside:
        figure.savefig(aside, dpi=120, format=target.suffix[1:])
    plt.close(figure)


def changes(before: dict[str, Any], after: dict[str, Any]) -> str:
    """What changed between two results, as Markdown; runs are matched by their names.

    Exact match is paired prompt by prompt where both used the same prompts. Speed is each result's own ratio to its first
    run, so that two machines can be compared; forwards do not depend on the machine.
    """
    lines = ["# Before and after", ""]
    lines += [f"- {name}: {ours} → {theirs}" for name, ours, theirs in _differences(before, after) if ours != theirs]
    olds, news = ({row["label"]: row for row in result["rows"]} for result in (before, after))
    same = before["prompts"]["hashes"] == after["prompts"]["hashes"]
    columns = (
        "decode",
        "exact match",
        "difference (95 %)",
        "same text",
        "NFE",
        "× forwards",
        "speed against first run",
    )
    lines += ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for label in [label for label in olds if label in news]:
        old, new = olds[label], news[label]
        speeds = [_speed(old, before["rows"][0]), _speed(new, after["rows"][0])]
        cells = [
            label,
            f"{percent(old['exact_match'])} → {percent(new['exact_match'])}",
            _paired_change(old["right"], new["right"])
            if same and old["prompts"] == new["prompts"]
            else "other prompts",
            f"{percent(old['sequence_agreement'])} → {percent(new['sequence_agreement'])}",
            f"{old['nfe_mean']:.2f} → {new['nfe_mean']:.2f}",
            f"{new['nfe_mean'] / old['nfe_mean']:.2f}",
            " → ".join(speeds),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for title, ours, theirs in (("before", olds, news), ("after", news, olds)):
        only = [label for label in ours if label not in theirs]
        lines += ["", f"Only {title}: {', '.join(only)}."] if only else []
    return "\n".join(lines) + "\n"


def _differences(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """What two results depend on: name, before, after."""
    facts = []
    for result in (before, after):
        fact = {"base model": result["base"]["fingerprint"], "scorers": ", ".join(result["scorers"])}
        fact["prompts"] = f"{len(result['prompts']['hashes'])} ({_listed(result['prompts']['tasks'])})"
        facts.append(fact | result["environment"])
    return [(name, facts[0][name], facts[1].get(name)) for name in facts[0]]


def _speed(row: Row, first: Row) -> str:
    speed = first["tokens_per_second"]
    return f"{row['tokens_per_second'] / speed:.2f}×" if speed else "–"


def _paired_change(old: str, new: str) -> str:
    won = sum(a + b == "01" for a, b in zip(old, new, strict=True))
    lost = sum(a + b == "10" for a, b in zip(old, new, strict=True))
    interval = paired(won, lost, len(old))
    return difference({"paired_difference": {"mean": (won - lost) / len(old), "interval": interval}})


def compare(before: Path, after: Path, out: Path | None = None) -> None:
    """Prints what changed between two results of ``eval/bench.py``.

    Args:
        before: The older result, a JSON file.
        after: The newer one.
        out: Also writes the comparison to this Markdown file.
    """
    if out is not None:
        check_writable("out", out, folder=False)
    text = changes(read(before), read(after))
    print(text)
    if out is not None:
        write_aside(out, text)


def render(result: Path, margin: float = MARGIN) -> None:
    """Works the headline, the Markdown and the picture of a result out again, and writes them beside it.

    Args:
        result: A JSON file written by ``eval/bench.py``.
        margin: Loss of exact match against full_step, from 0 to 1, up to which a decode counts as equally good.
    """
    check_margin(margin)
    write(read(result), result.parent, margin, result.stem)
    print(f"wrote {result.stem}.json, {result.stem}.md and {result.stem}.png to {result.parent}")


def write(result: dict[str, Any], folder: Path, margin: float, name: str = "bench") -> None:
    """Writes a result as JSON, Markdown and a picture, with its headline; helpers of several sizes have a picture of their own.

    Args:
        result: Everything but the headline.
        folder: Where to.
        margin: See :func:`eval.headline.headline`.
        name: Name of the files, without their ending.
    """
    picked_on = result.get("picked_on")
    result["headline"] = headline(result["rows"], margin, picked_on and picked_on["rows"])
    write_aside(folder / f"{name}.json", json.dumps(result, indent=1) + "\n")
    write_aside(folder / f"{name}.md", markdown(result))
    draw(result["rows"], folder / f"{name}.png", margin)
    if helper_sizes.by_weight(result["rows"]):
        helper_sizes.draw(result["rows"], folder / f"{name}_helpers.png")


if __name__ == "__main__":
    command({"compare": compare, "render": render})
