"""A file mapped into memory: read from disk where and when it is used, and only as long as it stays what it was."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from neox.reference.errors import InputError
from neox.reference.model import Array

State = tuple[int, int, int, int]


def _state(stat: os.stat_result) -> State:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


@dataclass(frozen=True)
class Mapped:
    """content: all its bytes, read-only. state: which file it is, and when it was last written to."""

    path: Path
    content: Array
    state: State

    def check(self) -> None:
        """InputError if there is another file under the path by now, or it was written to.

        What is mapped then would be neither the old file nor the new one. One that is made shorter once this was
        asked is the business of errors.py.
        """
        try:
            same = _state(self.path.stat()) == self.state
        except OSError:
            same = False
        if not same:
            raise InputError(f"{self.path} was changed while it was read: wait until it is written, and start again")


def map_file(path: Path) -> Mapped:
    """InputError if it cannot be read. An empty file is mapped as no bytes."""
    try:
        with path.open("rb") as file:
            state = _state(os.fstat(file.fileno()))
            content = np.memmap(file, np.uint8, "r") if state[2] else np.empty(0, np.uint8)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    return Mapped(path, np.asarray(content), state)
