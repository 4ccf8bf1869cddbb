"""The one kind of exception that is shown to the user as a single line."""


class UserError(Exception):
    """A mistake that the user can mend.

    Its message is one line: what was wrong, the value received, and what is
    allowed or what to do. The commands print it and exit with status 1.
    """


def printable(text: str) -> str:
    """Return a text in which what is no letter to a terminal or a page is written out.

    What a file or its name says must be no command to the terminal that shows it.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
