"""The boundary for what is read from files: content goes through a declared type, and errors name file and field."""

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from models.errors import InputError


def checked(kind: Any, content: Any, where: str | Path) -> None:
    """Checks content against a declared type, as it is: text is no number, and 1.0 no whole one.

    Args:
        kind: A pydantic model, or any type that pydantic takes.
        content: What was read.
        where: The file, for the message.

    Raises:
        InputError: The first field that does not fit.
    """
    try:
        TypeAdapter(kind).validate_python(content, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        found = "nothing" if first["type"] == "missing" else repr(first["input"])[:80]
        accepted = first["msg"][0].lower() + first["msg"][1:]
        raise InputError(f"{where}: {field}" if field else str(where), found, accepted) from None
