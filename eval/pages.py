"""Writes the figures of README and docs from the committed results: ``python eval/pages.py``."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

from data.provenance import write_aside
from eval import helper_sizes, recorded
from eval.command import command
from eval.headline import MARGIN
from eval.headline import pick as cheapest
from eval.recorded import read_tables
from eval.report import ALL, Row, difference, filter_share, markdown, percent, table, times
from eval.result_file import read
from eval.risk import broken_promises
from models.errors import InputError, first_line


def main(results: Path = Path("eval/results"), root: Path = Path()) -> None:
    """Writes the figures of README and docs anew, each table between the comments ``<!-- name -->`` and ``<!-- /name -->``.

    The Markdown beside each result of ``eval/bench.py`` is written, too.

    Args:
        results: Folder of the results; the table of a missing one other than ``bench.json`` stays as it is.
        root: Folder of README and docs.

    Raises:
        InputError: ``bench.json`` is missing, a result is not one, or a page lacks the comments.
    """
    pages: dict[Path, str] = {}
    known: dict[Path, dict[str, Any]] = {}
    written, kept = [], []
    for name, (result, where, made) in TABLES.items():
        file, page = results / result, root / where
        if result != "bench.json" and not file.is_file():
            kept.append(f"no {file}: {name} stays as it is in {page}")
            continue
        if file not in known:
            known[file] = _content(file)
            if file.name == "bench.json":
                pages[file.with_suffix(".md")] = markdown(known[file])
        pages[page] = _filled(page, pages.get(page) or _text(page), name, made(known[file]))
        written.append(f"wrote {name} to {page}")
    for page, text in pages.items():  # all of them, or none
        write_aside(page, text)
    print("\n".join(kept + written))


def _content(file: Path) -> dict[str, Any]:
    if file.name != "bench.json":
        return read_tables(file)
    content = read(file)
    if not content.get("headline"):
        raise InputError(f"{file}: headline", "nothing", "a result that `eval/report.py render` has worked out")
    return content


def _text(page: Path) -> str:
    try:
        return page.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(str(page), first_line(error), "a page in UTF-8") from error


def _filled(page: Path, text: str, name: str, lines: Sequence[str]) -> str:
    """The text of a page with a table in its place."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    if text.count(begin) != 1 or end not in text.split(begin)[1]:
        raise InputError(str(page), f"no lines {begin.strip()} and {end}", "both, in this order")
    before, rest = text.split(begin)
    return "".join([before, begin, *(f"{line}\n" for line in lines), end, rest.split(end, 1)[1]])


def _front(result: dict[str, Any]) -> list[str]:
    """The first look: the cheapest setting as good as full_step of a few strategies."""
    kept = ("full_step", "threshold", "factor", "learn2pd", "apd", "oracle")
    entries = {entry["strategy"]: entry["forwards"] for entry in result["headline"][0]["strategies"]}
    rows = {row["label"]: row for row in result["rows"]}
    lines = table([], dict.fromkeys(("decode", "exact match", "valid", "NFE", "tokens/s")))
    for name in kept:
        if (pick := entries.get(name)) is not None:
            cells = [pick["label"], percent(pick["exact_match"]), ALL["valid"](rows[pick["label"]])]
            cells += [f"{pick['nfe_mean']:.1f}", f"{pick['tokens_per_second']:.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _short_headline(result: dict[str, Any]) -> list[str]:
    """The cheapest setting of each strategy at equal quality, in forwards, of the first group of rows."""
    columns = ["strategy", "cheapest setting as good", "exact match", "difference (95 %)", "valid", "same text", "NFE"]
    columns += [f"× fewer than {name}" for name in ("full_step", "best threshold", "oracle")] + ["tokens/s"]
    rows = {row["label"]: row for row in result["rows"]}
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for entry in result["headline"][0]["strategies"]:
        cells, pick = [entry["strategy"]], entry["forwards"]
        if pick is None:
            cells += [f"none of {entry['settings_tried']}", *["–"] * 9]
        else:
            mark = " ✓" if pick["confirmed"] and pick["label"] != pick["reference"] else ""
            cells += [pick["label"], percent(pick["exact_match"]), difference(pick) + mark]
            row = rows[pick["label"]]
            cells += [ALL["valid"](row), percent(row["sequence_agreement"]), f"{pick['nfe_mean']:.1f}"]
            cells += [times(pick, name) for name in ("full_step", "threshold", "oracle")]
            cells += [f"{pick['tokens_per_second']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


_COST = {
    "decode": ALL["decode"],
    "prompts": ALL["prompts"],
    "batch": lambda row: str(row["settings"]["batch_size"]),
    "dtype": lambda row: row["settings"]["dtype"].replace("float32", "fp32").replace("bfloat16", "bf16"),
    "exact match": lambda row: percent(row["exact_match"]),
    "same text": ALL["same text"],
    "NFE": lambda row: f"{row['nfe_mean']:.1f}",
    "tokens/s": ALL["tokens/s"],
    "loop's share of the wall": lambda row: percent(row["loop_share"]),
}
_APD = {
    "decode": ALL["decode"],
    "exact match": _COST["exact match"],
    "difference (95 %)": difference,
    "same text": ALL["same text"],
    "NFE": _COST["NFE"],
    "tokens/forward": ALL["tokens/forward"],
}


def _beside_apd(row: Row) -> bool:
    """APD's rows, and what the reader compares them with."""
    return row["settings"]["strategy"] == "apd" or row["label"] in ("full_step", "threshold 0.9", "oracle")


def _cost_shown(row: Row, first: Row) -> bool:
    """Rows of the first one's lengths, of four strategies that stand for the others."""
    same = all(row["settings"][name] == first["settings"][name] for name in ("gen_length", "block_length"))
    return same and row["settings"]["strategy"] in ("full_step", "threshold", "dico", "learn2pd")


def _costs(result: dict[str, Any]) -> list[str]:
    rows = [row for row in result["rows"] if _cost_shown(row, result["rows"][0])]
    known = any(filter_share(row) != "–" for row in rows)
    return table(rows, _COST | ({"filter's time, of a forward": filter_share} if known else {}))


def _long(result: dict[str, Any]) -> list[str]:
    """What caches save in the longest region."""
    most = max(row["settings"]["gen_length"] for row in result["rows"])
    columns = {name: _COST[name] for name in ("decode", "prompts", "same text", "NFE")}
    columns["seconds"] = lambda row: f"{row['seconds']:.1f}"
    return table([row for row in result["rows"] if row["settings"]["gen_length"] == most], columns)


def _tried(result: dict[str, Any]) -> list[Row]:
    """Rows of every setting: of the prompts that settings were picked on, where there are such."""
    return (result["picked_on"] or result)["rows"]


def _apd(result: dict[str, Any]) -> list[str]:
    return table([row for row in _tried(result) if _beside_apd(row)], _APD)


_QUALITY = {name: _COST[name] for name in ("decode", "exact match")}
_QUALITY |= {name: ALL[name] for name in ("difference (95 %)", "valid", "same text")}
_QUALITY["NFE"] = _COST["NFE"]
_ENDS = {name: ALL[name] for name in ("empty", "cut", "saved by EoT")}


def _sweep(result: dict[str, Any]) -> list[str]:
    return [*table(_tried(result), _QUALITY), "", f"{_tried(result)[0]['prompts']} prompts."]


def _beside(result: dict[str, Any]) -> list[str]:
    """What is no setting of a strategy: caches, lengths and EoT rules, each beside the reference of its length."""
    whole = result["rows"][0]["prompts"]
    rows = [row for row in result["rows"] if row["prompts"] != whole]
    return [*table(rows, _QUALITY | _ENDS), "", f"{rows[0]['prompts']} prompts."] if rows else ["Not measured."]


def _saved(row: Row) -> str:
    """What a full_step decode saves, of what it would if it decoded the tokens of its text and nothing else."""
    if row["settings"]["strategy"] != "full_step":
        return "–"
    region, text = row["settings"]["gen_length"], row["tokens"] / row["prompts"]
    return percent((region - row["nfe_mean"]) / (region - text))


_EOT = {
    "decode": lambda row: f"{row['label']}{' (commit)' * (row['settings']['eot'] == 'commit')}",
    **{name: _QUALITY[name] for name in ("exact match", "difference (95 %)", "valid", "NFE")},
    **{name: ALL[name] for name in ("empty", "cut")},
    "of an oracle's saving": _saved,
}


def _eot(result: dict[str, Any]) -> list[str]:
    """Rules of the end of the text: settings on validation, what was picked on test, and the share of an oracle's saving."""
    lines = []
    for rows, what in ((_tried(result), "validation prompts"), (result["rows"], "test prompts")):
        (full, *_) = rows
        lines += [
            *table(rows, _EOT),
            "",
            f"{full['prompts']} {what}; texts of {full['tokens'] / full['prompts']:.1f} tokens.",
            "",
        ]
    return lines[:-1]


def _risk(result: dict[str, Any]) -> list[str]:
    """Promises on validation prompts drawn anew 200 times, judged on test prompts; settings lie in the result safest first."""
    fresh_full, fresh = result["rows"][0], {row["label"]: row for row in result["rows"]}
    full, *tried = (row for row in _tried(result) if row["label"] in fresh)
    said = (
        f"Whether such promises are kept on fresh prompts: 200 times, {full['prompts']} prompts are drawn from as many of the "
        "validation split, with repeats, and what they promise is compared with what the setting taken loses on "
        f"{fresh_full['prompts']} test prompts. Lost: the share of these that lose a right answer of full_step, in the mean over "
        "draws. Broken: it is more than the risk. No promise: not even the safest setting is vouched for."
    )
    columns = ("strategy", "risk", "taken most often", "NFE, mean", "lost, mean", "broken", "no promise")
    lines = [*wrap(said, 136), "", *table([], dict.fromkeys(columns))]
    for strategy in dict.fromkeys(row["settings"]["strategy"] for row in tried):
        own = [row for row in tried if row["settings"]["strategy"] == strategy]
        for risk in (0.01, 0.02, 0.03, 0.05, 0.1):
            others = [fresh[row["label"]] for row in own]
            broken, none, taken = broken_promises(full, own, fresh_full, others, risk)
            cells = [strategy, f"{100 * risk:g} %", "–", "–", "–"]
            if taken:
                cells[2] = Counter(row["label"] for row in taken).most_common(1)[0][0]
                cells[3] = f"{sum(row['nfe_mean'] for row in taken) / len(taken):.1f}"
                cells[4] = percent(sum(row["paired_difference"]["lost"] / row["prompts"] for row in taken) / len(taken))
            lines.append(f"| {' | '.join(cells)} | {broken} of 200 | {none} of 200 |")
    return [*lines, "", "95 % confidence; made by `python eval/bench.py --config configs/eval/risk.yaml`."]


def _budget(result: dict[str, Any]) -> list[str]:
    """The filter's rule with a budget beside its thresholds, and what was picked."""
    said = (
        "With `budget` in place of `threshold` the filter's most probable guesses are committed, as many as keep the sum of "
        "1 − p among those of a row's step within it (`python eval/bench.py --config configs/eval/budget.yaml`):"
    )
    picks = {entry["strategy"]: entry["forwards"] for entry in result["headline"][0]["strategies"]}
    pick, prompts = picks.get("learn2pd"), _tried(result)[0]["prompts"]
    picked = f"Picked on {prompts} validation prompts: {'none' if pick is None else pick['label']}."
    return [*wrap(said, 136), "", *_whole(result), "", picked]


def _whole(result: dict[str, Any]) -> list[str]:
    """Every row of a result."""
    return table(result["rows"], _QUALITY | {"prompts": ALL["prompts"]})


def _filters(result: dict[str, Any]) -> list[str]:
    """Filters side by side at several thresholds, and the threshold picked for each."""
    columns = {"decode": ALL["decode"], "parameters": _parameters} | _QUALITY
    own: dict[str, list[Row]] = {}
    for row in _tried(result):
        if folder := row["settings"].get("filter"):
            own.setdefault(folder, []).append(row)
    picked = ", ".join(cheapest(rows, MARGIN)["label"] for rows in own.values()) or "none"
    full, count = result["rows"][0], _tried(result)[0]["prompts"]
    where = f"{full['prompts']} test prompts, {full['settings']['dtype']}, {result['environment']['device']}."
    return [*table(result["rows"], columns), "", f"{where} Picked on {count} validation prompts: {picked}."]


def _parameters(row: Row) -> str:
    found = row.get("component", {}).get("parameters")
    return "–" if found is None else f"{found:,}"


_DREAM = {name: _APD[name] for name in ("decode", "exact match", "difference (95 %)", "same text")}
_DREAM |= {name: helper_sizes.COLUMNS[name] for name in ("acceptance", "NFE", "tokens/forward")}


def _dream(result: dict[str, Any]) -> list[str]:
    where = f"{result['rows'][0]['prompts']} prompts, batch {result['rows'][0]['settings']['batch_size']}."
    return [*table(result["rows"], _DREAM), "", where]


_SIZES = helper_sizes.COLUMNS | {"exact match": _COST["exact match"], "difference (95 %)": difference}


def _helper_sizes(result: dict[str, Any]) -> list[str]:
    """Helpers of several sizes, where the optimum lies, and the picture."""
    rows = result["rows"]
    lines = [*table(rows, _SIZES), "", helper_sizes.NOTE]
    found = helper_sizes.by_weight(rows)
    bests = [(weight, helper_sizes.best(own)) for weight, own in found.items()]
    words = [
        f"{row['helper']['parameters'] / 1e6:.2f} M parameters at R {weight:g} ({row['tokens_per_second']:.0f})"
        for weight, row in bests
    ]
    lines += ["", f"Most tokens a second: {', '.join(words)}. {result['rows'][0]['prompts']} prompts, "]
    lines[-1] += f"batch {rows[0]['settings']['batch_size']}, {result['environment']['threads']} threads."
    return [
        *lines,
        "",
        "![Acceptance against time, and speed against size](../eval/results/helper_sizes/bench_helpers.png)",
    ]


TABLES = {
    "front": ("bench.json", "README.md", _front),
    "headline": ("bench.json", "docs/decoders.md", _short_headline),
    "sweep": ("bench.json", "docs/decoders.md", _sweep),
    "beside": ("bench.json", "docs/decoders.md", _beside),
    "held_out": ("held_out/bench.json", "docs/decoders.md", _whole),
    "fresh": ("fresh/bench.json", "docs/decoders.md", _whole),
    "eot": ("eot/bench.json", "docs/decoders.md", _eot),
    "risk": ("risk/bench.json", "docs/decoders.md", _risk),
    "budget": ("budget/bench.json", "docs/decoders.md", _budget),
    "filters": ("filters/bench.json", "docs/decoders.md", _filters),
    "cost": ("cost/bench.json", "docs/decoders.md", _costs),
    "long": ("cost/bench.json", "docs/decoders.md", _long),
    "apd": ("bench.json", "docs/apd.md", _apd),
    "helper_sizes": ("helper_sizes/bench.json", "docs/apd.md", _helper_sizes),
    "dream": ("dream/bench.json", "docs/families.md", _dream),
    "memory": ("memory.json", "docs/memory.md", recorded.memory),
    "checked": ("reliability.json", "docs/reliability.md", recorded.measured("checked")),
    "kills": ("reliability.json", "docs/reliability.md", recorded.measured("kills")),
    "hours": ("scale.json", "docs/scale.md", recorded.hours),
    "gpu": ("scale.json", "docs/scale.md", recorded.measured("gpu")),
    "labelling": ("scale.json", "docs/scale.md", recorded.measured("labelling")),
    "records": ("scale.json", "docs/scale.md", recorded.measured("records")),
}
"""Every table of README and docs: its result, the page it stands on, and how it is made."""


if __name__ == "__main__":
    command(main)
