"""What a user can cause: one exception, and how programs end on it."""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

LONGEST = 8000  # characters of a message: four lists of twenty names fit


class InputError(ValueError):
    """A bad path, file, config, prompt or flag. Its text is one line: what was wrong and what to do.

    Text from files, as the names of tensors, may be part of it: control characters are escaped, and the middle of what
    is too long to be read is left out.
    """

    def __init__(self, text: str) -> None:
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
        super().__init__(line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}")


class Parser(argparse.ArgumentParser):
    """A parser of flags that ends on a bad one as programs end on any bad input."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see --help)")


# Files of weights are mapped into memory, and one that somebody makes shorter in the meantime has no pages to give any
# more: the system then ends the program by SIGBUS. Python's own handlers run between two instructions of Python, which
# such a program does not live to see; this one is called by the C library.
LOST_PAGES = b"error: a file of weights was made shorter while it was in use: wait until it is written, start again\n"


def _end(number: int) -> None:
    os.write(2, LOST_PAGES)
    os._exit(2)


_END = ctypes.CFUNCTYPE(None, ctypes.c_int)(_end)  # kept: the C library does not count references


@contextmanager
def _lost_pages_explained() -> Iterator[None]:
    if not hasattr(signal, "SIGBUS"):
        yield
        return
    handle = ctypes.CDLL(None).signal
    handle.argtypes, handle.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    before = handle(signal.SIGBUS, ctypes.cast(_END, ctypes.c_void_p))
    try:
        yield
    finally:
        handle(signal.SIGBUS, before)


def run(main: Callable[[], None]) -> None:
    """Run a program; end it with one line and status 2 on an InputError, 130 on Ctrl-C, quietly on a closed pipe."""
    try:
        with _lost_pages_explained():
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
