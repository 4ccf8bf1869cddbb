"""The one kind of exception that is shown to the user as a single line."""


class UserError(Exception):
    """A mistake that the user can mend.

    Its message is one line: what was wrong, the value received, and what is
    allowed or what to do. The commands print it and exit with status 1.
    """
