"""The boundary of files and commands: values go through a declared type, and errors name the field.

The types below stand in signatures: the command line and the YAML files are checked by them as they are read. What comes from
Python, or from a file, goes through :func:`check_fields` or :func:`checked`.
"""

import re
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from models.errors import InputError
from models.rules import LONGEST


def _no_flag(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a number, not true or false")
    return value


_Number = BeforeValidator(_no_flag)
Count = Annotated[int, _Number, Field(ge=1, le=2**63 - 1)]
Length = Annotated[int, _Number, Field(ge=1, le=LONGEST)]
Whole = Annotated[int, _Number, Field(ge=0, le=2**63 - 1)]
Seed = Annotated[int, _Number, Field(ge=0, le=2**32 - 1)]
"""What seeds NumPy, which Lightning seeds with everything else."""
Share = Annotated[float, _Number, Field(ge=0, le=1)]
Part = Annotated[float, _Number, Field(ge=0, lt=1)]
Positive = Annotated[float, _Number, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, _Number, Field(ge=0, allow_inf_nan=False)]
Temperature = Annotated[float, _Number, Field(ge=0, le=1000)]
Text = Annotated[str, Field(min_length=1)]


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
        found = "nothing" if first["type"] == "missing" else repr(first["input"])[:80]
        accepted = (
            first["msg"].removeprefix("Value error, ").removeprefix("Input should be ").partition(" or instance of")[0]
        )
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
