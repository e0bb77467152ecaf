"""Errors of the data side."""


class DataError(ValueError):
    """A source, file or sample that cannot be used. The message names it and says what to do."""
