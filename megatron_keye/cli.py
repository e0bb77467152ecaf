"""What every entry point and tool has around its main: one line on stderr for a mistake, a traceback only with --debug."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from omegaconf.errors import OmegaConfBaseException

from keye_data.errors import DataError
from megatron_keye.errors import ElsewhereError, UserError

EXPECTED = (UserError, DataError, OmegaConfBaseException)


def run_cli(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> NoReturn:
    """Run `main` with the arguments (the process's own for None) less `--debug`, then leave the process with its code.

    UserError and DataError: `error: ...` on stderr and exit code 1. Ctrl-C: 130. Anything else is a fault of
    the program and keeps its traceback. With --debug everything does.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        code = main([argument for argument in arguments if argument != "--debug"])
    except EXPECTED as error:
        if debug:
            raise
        print_error(error)
        sys.exit(1)
    except ElsewhereError:
        sys.exit(1)
    except KeyboardInterrupt:
        if debug:
            raise
        sys.exit(130)
    sys.exit(code or 0)


def print_error(error: Exception) -> None:
    """`error: ...` on stderr, a line per fault; ranks other than the first say who they are."""
    rank = os.environ.get("RANK", "0")
    prefix = "error" if rank == "0" else f"error (rank {rank})"
    text = str(error)
    if isinstance(error, OmegaConfBaseException):  # its further lines describe its insides
        text = f"{error.full_key}: {text.splitlines()[0]}"
    for line in text.splitlines() or [type(error).__name__]:
        print(f"{prefix}: {line}", file=sys.stderr)
    sys.stderr.flush()
