"""The one exception that a person is meant to read."""


class UserError(Exception):
    """Something outside the code is wrong; the message is one clear sentence that names it and what would be right.

    The verbs print the message without a traceback and exit with code 1.
    """
