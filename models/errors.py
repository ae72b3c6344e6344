"""The one error for bad input: which field, what was found, what would be accepted, and what was probably meant."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

_UNKNOWN = re.compile(r"an unknown (setting|key)")


def first_line(error: BaseException) -> str:
    """What an error of somebody else's says, on one line; its name where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class InputError(ValueError):
    """Bad input from a user: a setting, a file or a prompt. Commands print its message and exit with status 2.

    Where names are accepted, and what was found is nearly one of them, the message says which.

    Args:
        field: The setting, or the file and the field in it.
        found: What was there.
        accepted: What would be accepted.
    """

    def __init__(self, field: str, found: object, accepted: str) -> None:
        word = re.split(r"[ .]", field)[-1] if _UNKNOWN.match(str(found)) else found
        hint = did_you_mean(word, re.split(r" \| |, ", accepted))
        super().__init__(f"{field}: found {found}; accepted: {accepted}{hint}")
        self.field, self.found, self.accepted = field, found, accepted

    def within(self, where: object) -> "InputError":
        """The same error, with the file or the group that the field is in."""
        return InputError(f"{where}: {self.field}", self.found, self.accepted)


def did_you_mean(found: object, names: Iterable[str]) -> str:
    """What to add to a message that lists ``names``: the one most like what was found, or nothing where none is."""
    word = str(found).strip("'\"")
    by_form = {name.lower().replace("-", "_"): name for name in names if re.fullmatch(r"[A-Za-z][\w.-]+", name)}
    near = get_close_matches(word.lower().replace("-", "_"), by_form, n=1)
    return f"; did you mean {by_form[near[0]]}?" if near and by_form[near[0]] != word else ""
