"""Tables of figures that stand in small files of their own in ``eval/results``: what was counted, computed or measured once."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import TypedDict  # pydantic takes no other before Python 3.12

from data.typed import Count, Length, NotNegative, Positive, Text, Whole, checked
from eval.report import table
from models.checkpoint import read_json
from models.errors import InputError


class Plan(TypedDict):
    """A row of ``memory.json``: a decode, and the bytes that :class:`decoding.memory_plan.MemoryPlan` counts of it."""

    strategy: Text
    batch_size: Length
    gen_length: Length
    cache: Literal["none", "prefix", "dual"]
    weights: Whole
    keys: Whole
    state: Whole
    activations: Whole
    evidence: Whole
    peak: Count


class _Memory(TypedDict):
    config_file: Text
    dtype: Text
    prompt_length: Length
    block_length: Length
    eot: Text
    torch: Text
    rows: Annotated[list[Plan], Field(min_length=1)]


class _Measured(TypedDict):
    measured: Text
    columns: Annotated[list[Text], Field(min_length=1)]
    rows: list[list[str | float | None]]


class _Hours(TypedDict):
    prompts: Count
    prompt_length: Length
    gen_lengths: list[Length]
    weights: Count
    layers: Count
    width: Count
    vocab_size: Count
    block_length: Length
    flops: Positive
    state_bytes: NotNegative


def read_tables(file: Path) -> dict[str, Any]:
    """Reads a file of tables by name.

    Raises:
        InputError: It is none.
    """
    found = read_json(file, "JSON of tables by name")
    if not isinstance(found, dict):
        raise InputError(str(file), f"a JSON {type(found).__name__}", "JSON of tables by name")
    for name, content in found.items():
        kind = {"memory": _Memory, "hours": _Hours}.get(name, _Measured)
        checked(kind, content, f"{file}: {name}")
        if kind is _Measured and any(len(row) != len(content["columns"]) for row in content["rows"]):
            raise InputError(f"{file}: {name}.rows", "one of another length", "a cell for each column")
    return found


_MEMORY: dict[str, Callable[[Any], str]] = {
    "strategy": lambda row: row["strategy"],
    "batch": lambda row: str(row["batch_size"]),
    "gen_length": lambda row: str(row["gen_length"]),
    "cache": lambda row: row["cache"],
} | {
    name: lambda row, name=name: f"{row[name] / 2**30:.2f}"
    for name in ("weights", "keys", "state", "activations", "evidence", "peak")
}  # fmt: skip


def memory(found: dict[str, Any]) -> list[str]:
    """What decodes of one model take, in GiB."""
    what = found["memory"]
    words = (
        f"GiB for [`{Path(what['config_file']).name}`]({Path(what['config_file']).name}) in {what['dtype']}: prompts of "
        f"{what['prompt_length']} tokens, blocks of {what['block_length']}, EoT rule `{what['eot']}`, "
        f"torch {what['torch']}."
    )
    return [words, "", *table(what["rows"], _MEMORY)]


def hours(found: dict[str, Any]) -> list[str]:
    """Forwards, hours and disk of rollouts, from a model's sizes: two operations a weight and position, attention, the head."""
    what = found["hours"]
    columns = ["gen_length", "forwards a prompt", "TFLOP a forward", "hours"]
    lines = table([], dict.fromkeys([*columns, f"disk at {what['state_bytes']:g} bytes a state", "at most"]))
    for forwards in what["gen_lengths"]:  # a token each
        length = what["prompt_length"] + forwards
        flop = 2 * what["weights"] * length + 4 * what["layers"] * what["width"] * length**2
        flop += 2 * what["width"] * what["vocab_size"] * what["block_length"]
        seconds = what["prompts"] * forwards * flop / what["flops"]
        disk = what["prompts"] * forwards * what["state_bytes"] / 1e6
        cells = [f"{forwards}", f"{forwards:,}", f"{flop / 1e12:.1f}", f"{seconds / 3600:.1f}"]
        lines.append(f"| {' | '.join([*cells, f'{disk:.0f} MB', f'{2 * disk:.0f} MB'])} |")
    return lines


def measured(name: str) -> Callable[[dict[str, Any]], list[str]]:
    """The maker of a table of what was measured, with where and when below it."""

    def made(found: dict[str, Any]) -> list[str]:
        what = found[name]
        columns = {title: lambda row, at=at: _cell(row[at]) for at, title in enumerate(what["columns"])}
        return [*table(what["rows"], columns), "", f"{what['measured']}."]

    return made


def _cell(value: str | float | None) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else f"{value:,}"
