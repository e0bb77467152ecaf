"""Errors of the data side."""

from __future__ import annotations


class DataError(ValueError):
    """A source, file or sample that cannot be used. The message names it and says what to do.

    `reason` is the short form under which skipped samples are counted.
    """

    def __init__(self, message: str, reason: str = "unusable sample") -> None:
        super().__init__(message)
        self.reason = reason
