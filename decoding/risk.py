"""The risk a user names: the cheapest setting that calibration prompts vouch for, as ``eval/risk.py`` measured it."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from decoding.config import DecodeConfig
from models.checkpoint import CALIBRATION, read_json, writing
from models.errors import InputError
from models.rules import COUNT, NOT_NEGATIVE, SHARE, TEXT, Rule, check, list_of, number, one_of, whole

SCHEMA_VERSION = 1
DECODING = ("gen_length", "block_length", "steps", "temperature", "eot", "cache", "refresh")
"""Decode settings that a calibration is made for."""
_OBJECT = Rule("an object", lambda value: isinstance(value, dict))
_RULES = {
    "strategy": TEXT, "options": _OBJECT, "option": TEXT, "values": list_of(number("numbers"), "finite numbers"),
    "lost": list_of(NOT_NEGATIVE, "numbers of at least 0"), "bounds": list_of(SHARE, "numbers from 0 to 1"),
    "nfe": list_of(NOT_NEGATIVE, "numbers of at least 0"), "prompts": COUNT, "loss": one_of(("answer", "text", "tokens")),
    "confidence": number("a number between 0 and 1", lambda value: 0 < value < 1),
    "decoding": Rule(f"an object of {', '.join(DECODING)}", lambda value: isinstance(value, dict) and {*DECODING} <= {*value}),
    "fingerprints": Rule(
        "an object of text", lambda value: isinstance(value, dict) and all(map(TEXT.accepts, value.values()))
    ),
    "made": _OBJECT,
}  # fmt: skip


@dataclass(frozen=True)
class Calibration:
    """What a strategy lost against full_step on calibration prompts, setting by setting.

    Attributes:
        strategy: Its name.
        options: Its settings that are the same throughout, components left out.
        option: The setting that varies.
        values: Its values, from the safest to the cheapest; the order was fixed before anything was decoded.
        lost: Of each value, how many prompts lost something; of ``tokens`` the sum of the shares that they lost.
        bounds: Of each value, the upper end of a one-sided confidence interval of the mean loss, from 0 to 1.
        nfe: Of each value, mean forwards.
        prompts: Number of prompts.
        loss: What counts as lost: a right ``answer``, the ``text`` of full_step, or of that text the share of ``tokens``.
        confidence: Confidence of ``bounds``, from 0 to 1.
        decoding: Decode settings, of :data:`DECODING`.
        fingerprints: Of the base model and the strategy's components.
        made: What it was made with: prompts, device, versions.
        schema_version: Version of this description.
    """

    strategy: str
    options: dict[str, Any]
    option: str
    values: list[float]
    lost: list[float]
    bounds: list[float]
    nfe: list[float]
    prompts: int
    loss: str
    confidence: float
    decoding: dict[str, Any]
    fingerprints: dict[str, str]
    made: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def value(self, risk: float) -> float:
        """The cheapest setting that loses at most ``risk`` in the mean over prompts, with the calibration's confidence.

        Settings are tested from the safest on until one fails (learn then test, arXiv 2110.01052, by fixed sequence), so
        that trying many does not make a lucky one look good.

        Args:
            risk: Share of prompts, or where ``tokens`` count of a text's positions, from 0 to 1.

        Raises:
            InputError: Not even the safest setting is vouched for.
        """
        accepted = "a share between 0 and 1, 0.01 for one in a hundred"
        check({"risk": risk}, {"risk": number(accepted, lambda value: 0 < value < 1)})
        passed = 0
        while passed < len(self.values) and self.bounds[passed] <= risk:
            passed += 1
        if not passed:
            raise InputError(
                "risk", risk, f"at least {self.bounds[0]:.3g}, which {self.prompts} calibration prompts vouch for"
            )
        return self.values[passed - 1]

    def check(self, strategy: str, options: dict[str, Any], fingerprints: dict[str, str]) -> None:
        """Raises an InputError where it was made for other weights, another strategy or other settings of it."""
        for name, ours, found in (
            ("strategy", strategy, self.strategy),
            ("options", options, self.options),
            ("fingerprints", fingerprints, self.fingerprints),
        ):
            if ours != found:
                raise InputError(f"risk calibration: {name}", found, f"{ours}, those of this decoder")

    def compare(self, config: DecodeConfig) -> None:
        """Warns of decode settings other than those that it was made for."""
        used = config.settings()
        for name in DECODING:
            if (ours := used[name]) != self.decoding[name]:
                warnings.warn(
                    f"risk: calibrated with {name} {self.decoding[name]}, used with {ours}; the promise was made for the first",
                    stacklevel=3,
                )


def plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """A strategy's settings without the folders of its components, which their fingerprints stand for."""
    return {name: value for name, value in options.items() if name not in ("filter", "helper")}


def calibration_file(options: Mapping[str, Any], file: str | Path | None) -> Path:
    """The calibration that is meant: a file, or what lies in the folder of a strategy's component.

    Raises:
        InputError: Neither is given.
    """
    folder = options.get("filter") or options.get("helper")
    if file is None and folder is None:
        raise InputError("calibration", None, "a file written by eval/risk.py")
    return Path(file) if file is not None else Path(str(folder)) / CALIBRATION


def save_calibration(file: Path, calibration: Calibration) -> None:
    """Writes a calibration aside and renames it."""
    with writing(file) as aside:
        aside.write_text(json.dumps(asdict(calibration), indent=1) + "\n", encoding="utf-8")


def load_calibration(file: str | Path) -> Calibration:
    """Reads a calibration.

    Raises:
        InputError: It is not there, or not one of this version.
    """
    file = Path(file)
    content = read_json(file, "a calibration written by eval/risk.py")
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise InputError(f"{file}: schema_version", version, str(SCHEMA_VERSION))
    names = [part.name for part in fields(Calibration)]
    for name in {*names, *content}:
        if name not in content or name not in names:
            raise InputError(f"{file}: {name}", "unknown" if name in content else "missing", ", ".join(names))
    check(content, _RULES, f"{file}: ")
    if content["loss"] != "tokens":
        check(content, {"lost": list_of(whole(0), "whole numbers of at least 0")}, f"{file}: ")
    lengths = {len(content[name]) for name in ("values", "lost", "bounds", "nfe")}
    if len(lengths) != 1 or not content["values"]:
        raise InputError(
            f"{file}: values, lost, bounds, nfe", f"{sorted(lengths)} entries", "as many of each, at least one"
        )
    return Calibration(**content)
