"""The one kind of exception that is shown to the user as a single line."""


class UserError(Exception):
    """A mistake that the user can mend.

    Its message is one line: what was wrong, the value received, and what is
    allowed or what to do. The commands print it and exit with status 1. Names in it
    need no care: it is made `printable`.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(name: object) -> str:
    """Write a name in one line: a newline, or what else does not print, by its escape.

    So no file's name can move the cursor, hide a part of itself, or pass for another line.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(name))
