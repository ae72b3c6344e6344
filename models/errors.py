"""The one error for bad input: which field, what was found, what would be accepted."""


def first_line(error: BaseException) -> str:
    """What an error of somebody else's says, on one line; its name where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class InputError(ValueError):
    """Bad input from a user: a setting, a file or a prompt. Commands print its message and exit with status 2.

    Args:
        field: The setting, or the file and the field in it.
        found: What was there.
        accepted: What would be accepted.
    """

    def __init__(self, field: str, found: object, accepted: str) -> None:
        super().__init__(f"{field}: found {found}; accepted: {accepted}")
        self.field, self.found, self.accepted = field, found, accepted

    def within(self, where: object) -> "InputError":
        """The same error, with the file or the group that the field is in."""
        return InputError(f"{where}: {self.field}", self.found, self.accepted)
