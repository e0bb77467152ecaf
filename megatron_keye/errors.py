"""The one error that a user can cause: printed as a single line, exit code 1, no traceback unless --debug."""


class UserError(Exception):
    """Something the user can put right. The message names the file, key or sample and says what to do."""


class ElsewhereError(Exception):
    """Another rank has met, and prints, the error that ends this one."""
