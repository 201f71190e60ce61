"""What a user can cause: one exception, and how programs end on it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn


class InputError(ValueError):
    """A bad path, file, config, prompt or flag. Its text is one line: what was wrong and what to do."""


class Parser(argparse.ArgumentParser):
    """A parser of flags that ends on a bad one as programs end on any bad input."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see --help)")


def run(main: Callable[[], None]) -> None:
    """Run a program; end it with one line and status 2 on an InputError, 130 on Ctrl-C, quietly on a closed pipe."""
    try:
        main()
        sys.stdout.flush()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader (head, say) has seen enough. Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
