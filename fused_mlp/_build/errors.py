"""The two ways in which a library cannot be had."""


class BuildUnavailable(RuntimeError):
    """No library, and none can be built here.

    ``reason`` says why in one line, ``remedy`` what the user can do about it.
    """

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(f"{reason}. {remedy}" if remedy else reason)
        self.reason = reason
        self.remedy = remedy


class BuildFailed(BuildUnavailable):
    """A compiler ran and gave an error; ``output`` is all it printed."""

    def __init__(self, reason: str, remedy: str = "", output: str = "") -> None:
        super().__init__(reason, remedy)
        self.output = output
