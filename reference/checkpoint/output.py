"""Writing a model's folder file by file: it is there when it is whole, and what was written is not written again.

The files go to a folder beside the one that is asked for, each first under a temporary name. Once all are there, that
folder is renamed. A run that was interrupted leaves it behind, and the next one with the same source and the same
options goes on where it ended.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neox.reference.errors import InputError

PLAN = "plan.json"  # in the unfinished folder: what it is made from
TEMPORARY = ".unfinished"

Progress = Callable[[int], object]  # called with numbers of bytes as they are written


@dataclass(frozen=True)
class OutputFile:
    """A file of the new folder, and how it is written to a path."""

    name: str  # below the folder
    nbytes: int  # of the tensors in it
    write: Callable[[Path, Progress], None]


def text_file(name: str, text: str) -> OutputFile:
    """In UTF-8."""

    def write(path: Path, progress: Progress) -> None:
        path.write_text(text, encoding="utf-8")

    return OutputFile(name, 0, write)


def json_file(name: str, content: Mapping[str, Any]) -> OutputFile:
    return text_file(name, json.dumps(content, indent=2) + "\n")


def copied_file(name: str, source: Path) -> OutputFile:
    """The same bytes as another file, without its permissions."""

    def write(path: Path, progress: Progress) -> None:
        shutil.copyfile(source, path)

    return OutputFile(name, 0, write)


def _write(file: OutputFile, path: Path, progress: Progress) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + TEMPORARY)
    file.write(temporary, progress)
    with temporary.open("rb+") as written:
        os.fsync(written.fileno())
    temporary.replace(path)


def _begin(unfinished: Path, plan: Mapping[str, Any]) -> None:
    """Keep what an interrupted run has written, if it was of the same plan."""
    written = json.dumps(plan, sort_keys=True)
    path = unfinished / PLAN
    if unfinished.exists() and not (path.is_file() and path.read_text(encoding="utf-8") == written):
        shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True, exist_ok=True)
    for half in unfinished.rglob("*" + TEMPORARY):
        half.unlink()
    path.write_text(written, encoding="utf-8")


def write_output(
    folder: Path, files: Sequence[OutputFile], plan: Mapping[str, Any], progress: Progress = lambda _: None
) -> None:
    """Make `folder` of these files. plan: what they follow from; files of another plan are not gone on with.

    InputError if the folder exists, or if it cannot be written, as when the disk is full: then what was finished
    stays beside it for the next run.
    """
    if folder.exists():
        raise InputError(f"{folder} exists already: name another folder, or remove it")
    unfinished = folder.with_name(folder.name + TEMPORARY)
    try:
        _begin(unfinished, plan)
        for file in files:
            path = unfinished / file.name
            if path.exists():
                progress(file.nbytes)
            else:
                _write(file, path, progress)
        unfinished.rename(folder)
        (folder / PLAN).unlink()
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}; run it again to go on") from error
