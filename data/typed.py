"""The boundary of files and commands: values go through a declared type, and errors name the field.

The types below stand in signatures: the command line and the YAML files are checked by them as they are read. What comes from
Python, or from a file, goes through :func:`check_fields` or :func:`checked`.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError, WrapValidator
from pydantic_core import PydanticCustomError

from models.errors import InputError
from models.rules import COUNT, LENGTH, LONGEST, NOT_NEGATIVE, SHARE, TEXT, whole


def _in_words(accepted: str) -> WrapValidator:
    """Says what a type accepts, whatever does not fit, as ``models/rules.py`` does; a flag is no number.

    Words that end in a bound which is itself refused would lose it: jsonargparse cuts what was found off the end.
    """

    def check(value: object, validate: Callable[[object], object]) -> object:
        try:
            if not isinstance(value, bool):
                return validate(value)
        except ValidationError:
            pass
        raise PydanticCustomError("accepted", accepted)  # pyright: ignore[reportArgumentType] - a literal, for pydantic

    return WrapValidator(check)


Count = Annotated[int, Field(ge=1, le=2**63 - 1), _in_words(COUNT.accepted)]
Length = Annotated[int, Field(ge=1, le=LONGEST), _in_words(LENGTH.accepted)]
Whole = Annotated[int, Field(ge=0, le=2**63 - 1), _in_words("a whole number of at least 0")]
Repeats = Annotated[int, Field(ge=1, le=1000), _in_words(whole(1, 1000).accepted)]
Rounds = Annotated[int, Field(ge=0, le=100), _in_words(whole(0, 100).accepted)]
Processes = Annotated[int, Field(ge=0, le=1024), _in_words(whole(0, 1024).accepted)]
Width = Annotated[int, Field(ge=1, le=4096), _in_words(whole(1, 4096).accepted)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1), _in_words(f"a whole number from 0 to {2**32 - 1}")]
"""What seeds NumPy, which Lightning seeds with everything else."""
Share = Annotated[float, Field(ge=0, le=1), _in_words(SHARE.accepted)]
Part = Annotated[float, Field(ge=0, lt=1), _in_words("a number below 1, and not negative")]
Number = Annotated[float, Field(allow_inf_nan=False), _in_words("a finite number")]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), _in_words("a number above 0, and finite")]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), _in_words(NOT_NEGATIVE.accepted)]
Temperature = Annotated[float, Field(ge=0, le=1000), _in_words("a number from 0 to 1000")]
Text = Annotated[str, Field(min_length=1), _in_words(TEXT.accepted)]


def checked(kind: Any, content: Any, where: str | Path) -> None:
    """Checks content against a declared type, as it is: text is no number, and 1.0 no whole one.

    Args:
        kind: A pydantic model, or any type that pydantic takes.
        content: What was read.
        where: The file or the field, for the message.

    Raises:
        InputError: The first field that does not fit.
    """
    try:
        TypeAdapter(kind).validate_python(content, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        # Of a union pydantic names the branch, too.
        field = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part.isidentifier())
        found = "nothing" if first["type"].startswith("missing") else repr(first["input"])[:80]
        accepted = (
            first["msg"].removeprefix("Value error, ").removeprefix("Input should be ").partition(" or instance of")[0]
        )
        if first["type"] in ("missing", "missing_argument", "unexpected_keyword_argument", "extra_forbidden"):
            accepted = "a value; every key is required" if "missing" in first["type"] else "no such key"
        if first["type"] == "literal_error":
            accepted = " | ".join(re.findall(r"'([^']+)'", first.get("ctx", {})["expected"]))
        raise InputError(f"{where}: {field}" if field else str(where), found, accepted) from None


def check_fields(settings: Any) -> None:
    """Checks the fields of a dataclass against the types it declares.

    Raises:
        InputError: The first field that does not fit.
    """
    for name, kind in get_type_hints(type(settings), include_extras=True).items():
        checked(kind, getattr(settings, name), name)
