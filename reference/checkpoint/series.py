"""The partially trained checkpoints of one training, by step: folders beside each other, or revisions on the Hub."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neox.reference.checkpoint.hub import find, remote_steps
from neox.reference.checkpoint.load import load
from neox.reference.errors import InputError
from neox.reference.model import Model

STEP = re.compile(r"(?:global_)?step(\d+)")  # as Pythia's revisions and as gpt-neox's folders are called


@dataclass(frozen=True)
class Series:
    """Checkpoints that are found but not read: series[step] loads one.

    names: of the folder or revision of each step, ascending. how: passed to load.
    """

    place: str | Path
    names: Mapping[int, str]
    how: Mapping[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[int]:
        return iter(self.names)

    def __getitem__(self, step: int) -> Model:
        """The model after so many steps. InputError if that one was not kept."""
        return load(self.place, revision=self._name(step), **self.how)

    def folder(self, step: int) -> Path:
        """Where its files are; of a name on the Hub, downloaded."""
        return find(self.place, self._name(step))

    def nearest(self, step: int) -> int:
        """The step that was kept and is closest to this one; of two, the earlier."""
        return min(self.names, key=lambda kept: (abs(kept - step), kept))

    def _name(self, step: int) -> str:
        if step not in self.names:
            raise InputError(f"{self.place} has no step {step}; the nearest is {self.nearest(step)}")
        return self.names[step]


def open_series(place: str | Path, **how: Any) -> Series:
    """The series in a folder that holds step0, step1, ... or global_step1000, ..., or of a name such as pythia-70m.

    how: as for load, for example dtype="float64". InputError if there are no steps.
    """
    folder = Path(place).expanduser()
    local = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else None
    found = {int(match[1]): name for name in (local or []) if (match := STEP.fullmatch(name))}
    if local is None:
        found = {int(match[1]): name for name in remote_steps(str(place)) if (match := STEP.fullmatch(name))}
    if not found:
        raise InputError(f"{place} holds no steps of a training: no step0, step1000 or global_step1000")
    return Series(place, dict(sorted(found.items())), how)
