"""The exceptions that are no faults of the code."""


class UserError(Exception):
    """Something outside the code is wrong; the message is one clear sentence that names it and what would be right.

    The verbs print the message without a traceback and exit with code 1. What cannot be printed is escaped, so that a name with
    a line break in it leaves the sentence on one line.
    """

    def __init__(self, sentence: str):
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in sentence))


class Preempted(Exception):
    """Training was asked to stop, has done so after a whole step, and has saved it; the same command goes on.

    Attributes:
      step: the last one done.
    """

    def __init__(self, step: int):
        super().__init__(f"stopped after step {step}")
        self.step = step
