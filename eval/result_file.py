"""What a result of ``eval/bench.py`` holds, as far as it is read again: declared, and checked before anything is made of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import Field
from typing_extensions import TypedDict  # pydantic takes no other before Python 3.12

from data.typed import Count, Length, NotNegative, Number, Positive, Share, Text, Whole, checked
from models.checkpoint import current_eot_rule, read_json
from models.errors import InputError

SCHEMA_VERSION = 4

_Interval = Annotated[list[Number], Field(min_length=2, max_length=2)]
_Span = Annotated[str, Field(pattern="^[0-9]{1,9} ")]


class _Difference(TypedDict):
    mean: Annotated[float, Field(ge=-1, le=1)]
    interval: _Interval
    won: Whole
    lost: Whole


class _Figures(TypedDict):
    prompts: Count
    exact_match: Share
    sequence_agreement: Share
    nfe_mean: Positive


class _Settings(TypedDict):
    strategy: Text
    eot: Text
    cache: Text
    gen_length: Length
    block_length: Length
    batch_size: Length
    dtype: Text
    temperature: NotNegative
    mixture_weight: NotRequired[NotNegative]
    filter: NotRequired[Text | None]


class _Helper(TypedDict):
    acceptance: Share
    milliseconds: NotNegative
    predictor_milliseconds: Positive
    parameters: Count


class _Component(TypedDict):
    per_forward: NotNegative
    share_of_forward: NotRequired[NotNegative]
    parameters: NotRequired[Count]


class _Memory(TypedDict):
    peak: NotNegative


class _Row(_Figures):
    label: Text
    reference: Text
    settings: _Settings
    exact_match_interval: _Interval
    paired_difference: _Difference
    valid: NotRequired[Share | None]
    right: Annotated[str, Field(pattern="^[01]+$")]
    token_agreement: Share
    nfe_median: Positive
    nfe_p95: Positive
    tokens_per_forward: NotNegative
    tokens_per_second: NotNegative
    tokens_per_second_without_helper: Number
    seconds: Positive
    predictor_seconds: NotNegative
    helper_seconds: NotNegative
    loop_seconds: Number
    loop_share: Number
    by_task: dict[str, _Figures]
    by_length: dict[_Span, _Figures]
    empty_answers: Share
    truncated_correct_answers: Share
    forwards_saved_by_eot: Number | None
    tokens: Whole
    memory: _Memory | None
    component: NotRequired[_Component]
    helper: NotRequired[_Helper]


_Rows = Annotated[list[_Row], Field(min_length=1)]


class _Times(TypedDict):
    full_step: NotNegative | None
    threshold: NotNegative | None
    oracle: NotNegative | None


class _Pick(TypedDict):
    label: Text
    reference: Text
    exact_match: Share
    paired_difference: _Difference
    nfe_mean: Positive
    tokens_per_second: NotNegative
    confirmed: bool
    times: _Times


class _Entry(TypedDict):
    strategy: Text
    settings_tried: Whole
    forwards: _Pick | None


class _Group(TypedDict):
    strategies: list[_Entry]


class _Prompts(TypedDict):
    hashes: Annotated[list[str], Field(min_length=1)]
    tasks: dict[str, Count]


class _PickedOn(TypedDict):
    hashes: Annotated[list[str], Field(min_length=1)]
    rows: _Rows


class _Environment(TypedDict):
    device: str
    threads: Count
    torch: str
    transformers: str
    git: str | None


class _Base(TypedDict):
    name: str
    fingerprint: str


class _Result(TypedDict):
    command: str
    time: str
    environment: _Environment
    base: _Base
    prompts: _Prompts
    scorers: list[str]
    picked_on: _PickedOn | None
    rows: _Rows
    headline: NotRequired[list[_Group]]


def read(file: Path) -> dict[str, Any]:
    """Reads a result.

    Raises:
        InputError: Not a result of ``eval/bench.py`` of this version.
    """
    result = read_json(file, "a JSON file written by eval/bench.py")
    found = result.get("schema_version") if isinstance(result, dict) else None
    if found not in (3, SCHEMA_VERSION):  # version 3 knew no prompts to pick on
        raise InputError(f"{file}: schema_version", found, f"3 | {SCHEMA_VERSION}")
    result |= {"schema_version": SCHEMA_VERSION, "picked_on": result.get("picked_on")}
    checked(_Result, result, file)
    _check_rows(result["rows"], len(result["prompts"]["hashes"]), f"{file}: rows")
    if result["picked_on"] is not None:
        _check_rows(result["picked_on"]["rows"], len(result["picked_on"]["hashes"]), f"{file}: picked_on.rows")
    labels = [row["label"] for row in result["rows"]]
    for entry in (entry for group in result.get("headline", ()) for entry in group["strategies"]):
        if entry["forwards"] is not None and entry["forwards"]["label"] not in labels:
            raise InputError(f"{file}: headline", repr(entry["forwards"]["label"]), "the label of a row")
    for row in result["rows"]:
        row["settings"]["eot"] = current_eot_rule(row["settings"]["eot"], f"{file}: eot")
    return result


def _check_rows(rows: Sequence[dict[str, Any]], prompts: int, where: str) -> None:
    """What the fields of rows have to do with each other.

    Raises:
        InputError: The first that does not fit.
    """
    labels = [row["label"] for row in rows]
    for number, row in enumerate(rows):
        name, difference = f"{where}.{number}", row["paired_difference"]
        if row["label"] in labels[:number]:
            raise InputError(f"{name}.label", repr(row["label"]), "a name that no other row has")
        if row["reference"] not in labels[: number + 1]:
            raise InputError(f"{name}.reference", repr(row["reference"]), "the label of a row, the first one's its own")
        if row["prompts"] > prompts:
            raise InputError(f"{name}.prompts", row["prompts"], f"at most {prompts}, as many as there are hashes")
        if len(row["right"]) != row["prompts"]:
            raise InputError(f"{name}.right", f"{len(row['right'])} marks", f"{row['prompts']}, one for each prompt")
        if difference["won"] + difference["lost"] > row["prompts"]:
            found = f"{difference['won']} won, {difference['lost']} lost"
            raise InputError(f"{name}.paired_difference", found, f"at most {row['prompts']} in all")
        if "helper" in row and "mixture_weight" not in row["settings"]:
            raise InputError(f"{name}.settings.mixture_weight", "nothing", "a number of at least 0 beside a helper")
