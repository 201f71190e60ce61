"""Files that are replaced, written to or made shorter while they are mapped: one line, exit status 2."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from strategies import TINY, random_model

from neox.reference.checkpoint.layouts import Source, huggingface_files, neox_files
from neox.reference.checkpoint.opening import open_checkpoint
from neox.reference.checkpoint.output import write_output
from neox.reference.checkpoint.tensors import EMBED_IN, named_tensors
from neox.reference.errors import LOST_PAGES, InputError

LAYOUTS = {
    "safetensors": (lambda source: huggingface_files(source, 1 << 30), "model.safetensors"),
    "layer files": (lambda source: neox_files(source, 1, 5), "global_step5/layer_00-model_00-model_states.pt"),
}


def source_of(seed: int) -> Source:
    tensors = named_tensors(TINY, random_model(TINY, seed).params)
    return Source("drawn", TINY, lambda spec: tensors[spec.name].dtype, lambda spec: tensors[spec.name])


def replaced(path: Path, other: Path) -> None:
    other.replace(path)


def written_over(path: Path, other: Path) -> None:
    path.write_bytes(other.read_bytes())


def touched_in_place(path: Path, other: Path) -> None:
    with path.open("rb+") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"x")


def made_shorter(path: Path, other: Path) -> None:
    os.truncate(path, 100)


def removed(path: Path, other: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("change", [replaced, written_over, touched_in_place, made_shorter, removed])
@pytest.mark.parametrize(("files", "name"), LAYOUTS.values(), ids=LAYOUTS)
def test_a_file_that_changed_since_it_was_opened_is_refused(
    tmp_path: Path, files: Callable, name: str, change: Callable[[Path, Path], None]
) -> None:
    for seed, folder in enumerate(("model", "other")):
        write_output(tmp_path / folder, files(source_of(seed)), {})
    stored = open_checkpoint(tmp_path / "model").tensors[EMBED_IN]
    assert np.array_equal(stored.read(), random_model(TINY, 0).params.embed_in)
    change(tmp_path / "model" / name, tmp_path / "other" / name)
    for read in (stored.read, lambda: stored.part((slice(0, 1), slice(0, 1)))):
        with pytest.raises(InputError, match="was changed while it was read"):
            read()


PROGRAM = """
import os, sys
from neox.reference.checkpoint.load import load
from neox.reference.errors import run
from neox.reference.model import forward

def main():
    model = load(sys.argv[1], weights="stored")
    os.truncate(sys.argv[2], 1000)
    print(forward(model, [[1, 2, 3]]))

run(main)
"""


def test_a_file_made_shorter_while_it_computes_ends_the_program_with_one_line(tmp_path: Path) -> None:
    files, name = LAYOUTS["safetensors"]
    write_output(tmp_path / "model", files(source_of(0)), {})
    arguments = [str(tmp_path / "model"), str(tmp_path / "model" / name)]
    ended = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, b"", LOST_PAGES)
