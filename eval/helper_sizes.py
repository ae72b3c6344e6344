"""What the helper of APD costs and is worth, by its size: a table's columns and a picture."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def _cell(name: str, form: Callable[[float], str]) -> Callable[[Row], str]:
    return lambda row: form(row["helper"][name]) if "helper" in row else "–"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "decode": lambda row: row["label"],
    "helper's parameters": _cell("parameters", lambda value: f"{value / 1e6:.2f} M"),
    "acceptance": _cell("acceptance", lambda value: f"{100 * value:.1f} %"),
    "helper's ms": _cell("milliseconds", lambda value: f"{value:.1f}"),
    "predictor's ms": _cell("predictor_milliseconds", lambda value: f"{value:.1f}"),
    "helper / predictor": lambda row: f"{relative_time(row):.2f}" if "helper" in row else "–",
    "NFE": lambda row: f"{row['nfe_mean']:.1f}",
    "tokens/forward": lambda row: f"{row['tokens_per_forward']:.2f}",
    "tokens/s": lambda row: f"{row['tokens_per_second']:.0f}",
}
NOTE = (
    "Acceptance: accepted positions among those that the helper accepted or refused. Helper's and predictor's ms: one forward "
    "of the rows of a batch; the helper's includes the mixture with the predictor's logits."
)


def relative_time(row: Row) -> float:
    """Time of the helper's forward in units of the predictor's."""
    return row["helper"]["milliseconds"] / row["helper"]["predictor_milliseconds"]


def by_weight(rows: Sequence[Row]) -> dict[float, list[Row]]:
    """The rows with a helper by R, smallest helper first; only those R at which more than one size was used."""
    found: dict[float, list[Row]] = {}
    for row in rows:
        if "helper" in row:
            found.setdefault(row["settings"]["mixture_weight"], []).append(row)
    return {
        weight: sorted(own, key=lambda row: row["helper"]["parameters"])
        for weight, own in sorted(found.items())
        if len({row["helper"]["parameters"] for row in own}) > 1
    }


def best(rows: Sequence[Row]) -> Row:
    """The row of most tokens a second."""
    return max(rows, key=lambda row: row["tokens_per_second"])


def draw(rows: Sequence[Row], target: Path) -> None:
    """Draws acceptance against the helper's time, and speed against its size; a line for each R, a star where it is fastest."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), constrained_layout=True)
    for weight, own in by_weight(rows).items():
        acceptance = [100 * row["helper"]["acceptance"] for row in own]
        sizes = [row["helper"]["parameters"] / 1e6 for row in own]
        times = [relative_time(row) for row in own]
        (line,) = left.plot(times, acceptance, "o-", label=f"R {weight:g}")
        for place in zip(sizes, times, acceptance, strict=True):
            left.annotate(f"{place[0]:.2f} M", place[1:], xytext=(4, -11), textcoords="offset points", fontsize=8)
        right.plot(sizes, [row["tokens_per_second"] for row in own], "o-", color=line.get_color())
        fastest = best(own)
        place = (fastest["helper"]["parameters"] / 1e6, fastest["tokens_per_second"])
        right.plot(*place, "*", markersize=16, color=line.get_color())
    left.set(xlabel="helper's forward / predictor's forward, time", ylabel="accepted of what is judged, %")
    right.set(xlabel="helper's parameters, millions", ylabel="generated tokens per second")
    for axis in (left, right):
        axis.grid(visible=True, alpha=0.25)
    left.legend(frameon=False)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)
    plt.close(figure)
