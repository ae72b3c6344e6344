"""The one error for bad input: which field, what was found, what would be accepted."""


class InputError(ValueError):
    """Bad input from a user: a setting, a file or a prompt. Commands print its message and exit with status 2.

    Args:
        field: The setting, or the file and the field in it.
        found: What was there.
        accepted: What would be accepted.
    """

    def __init__(self, field: str, found: object, accepted: str) -> None:
        super().__init__(f"{field}: found {found}; accepted: {accepted}")
        self.field = field
