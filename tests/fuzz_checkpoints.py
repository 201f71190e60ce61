"""A coverage-guided fuzzer of everything that reads a checkpoint's files: whatever they hold, they are read or refused.

    pip install "atheris==3.0.0"
    python tests/fuzz_checkpoints.py -runs=100000             all targets in turn
    python tests/fuzz_checkpoints.py crash-0123...            once more an input that was found

Flags are those of libFuzzer. What holds for every input:

    it is read, or refused by an InputError of one line that a terminal can show; no other error gets out
    nothing is imported, started or opened for it but files of the checkpoint
    no tensor is larger than the file, and each can be read to its last number
    it takes little memory (-rss_limit_mb) and little time (-timeout)

Bytes changed at random are mostly no archive at all, so there is a target that puts a pickle and the bytes of its
tensors into an archive that is whole. The first byte of an input says which target it is for.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris
import ml_dtypes  # noqa: F401 - everything that is imported when it is needed has to be there before
import numpy as np

MODULES = [
    "neox.reference.checkpoint",
    "neox.reference.config",
    "neox.reference.errors",
    "pickletools",
    "yaml",
    "zipfile",
]

with atheris.instrument_imports(include=MODULES):
    from neox.reference.checkpoint.layouts import Source, huggingface_files, neox_files
    from neox.reference.checkpoint.neox import read_yaml
    from neox.reference.checkpoint.opening import open_checkpoint
    from neox.reference.checkpoint.output import write_output
    from neox.reference.checkpoint.tensors import named_tensors
    from neox.reference.checkpoint.torch_file import TRAINING_STATE, read_torch
    from neox.reference.config import Config, config_from_neox
    from neox.reference.errors import LONGEST, InputError
    from neox.reference.random_weights import random_model

GOLDEN = Path(__file__).parent / "golden" / "torch_files.tar.xz"
TINY = Config(8, 8, 1, 2, 6, rotary_pct=0.5)
FOLDER = Path(os.environ.get("NEOX_FUZZ_FOLDER", ""))


# What nothing in a file may bring about.

HARMLESS = {"builtins.id", "mmap.__new__", "os.listdir", "os.scandir", "glob.glob", "object.__getattr__"}
PLACES = {"open", "os.listdir", "os.scandir", "glob.glob"}
watching = False


class Forbidden(BaseException):
    """No Exception: nothing under test can catch it by accident."""


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if not watching or (event in HARMLESS and event not in PLACES):
        return
    if not (event in PLACES and Path(os.fsdecode(arguments[0])).is_relative_to(FOLDER)):
        raise Forbidden(f"{event} {arguments!r:.200}")


# What is made of an input's bytes, and what must hold of the answer.


def check(content: Any, limit: int) -> None:
    """Every tensor, however deep in a mapping, can be read and is no larger than the file."""
    waiting, seen = [content], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, np.ndarray):
            assert value.dtype.kind != "O"
            assert value.nbytes <= limit, (value.nbytes, limit)
            value.tobytes()
        elif isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, (list, tuple)):
            waiting.extend(value)


def torch_file(data: bytes) -> None:
    path = FOLDER / "x.pt"
    path.write_bytes(data)
    check(read_torch(path).content, len(data))


def pickle(data: bytes) -> None:
    """Two bytes for its length, the pickle, and the bytes of two tensors."""
    path, end = FOLDER / "x.pt", 2 + int.from_bytes(data[:2], "little")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data[2:end])
        for key in "01":
            archive.writestr(f"archive/data/{key}", data[end:])
    for left_out in (frozenset[str](), TRAINING_STATE):
        check(read_torch(path, left_out).content, path.stat().st_size)


def read_with(folder: Path, file: str, data: bytes) -> None:
    """All of a model, of which one file is this one."""
    (folder / file).write_bytes(data)
    for tensor in open_checkpoint(folder).tensors.values():
        tensor.read()


def layer_file(data: bytes) -> None:
    read_with(FOLDER / "neox", "global_step1/layer_02-model_01-model_states.pt", data)


def safetensors(data: bytes) -> None:
    read_with(FOLDER / "safetensors", "model.safetensors", data)


def index(data: bytes) -> None:
    read_with(FOLDER / "index", "pytorch_model.bin.index.json", data)


def latest(data: bytes) -> None:
    read_with(FOLDER / "latest", "latest", data)


def yaml(data: bytes) -> None:
    path = FOLDER / "x.yml"
    path.write_bytes(data)
    config_from_neox(read_yaml(path))


def config(data: bytes) -> None:
    """Of a model that is there, so that a config which fits nothing has to be refused too."""
    read_with(FOLDER / "config", "config.json", data)


TARGETS: tuple[Callable[[bytes], None], ...] = (
    torch_file,
    pickle,
    layer_file,
    safetensors,
    index,
    latest,
    yaml,
    config,
)


def one_input(data: bytes) -> None:
    global watching
    target = TARGETS[data[0] % len(TARGETS)] if data else torch_file
    refusal = ""
    watching = True
    try:
        target(data[1:])
    except InputError as error:
        refusal = str(error)
    finally:
        watching = False
    assert refusal.isprintable(), refusal
    assert len(refusal) <= LONGEST + len(" ... "), len(refusal)


# What it begins with.


def models() -> None:
    """The models of which one file is the input's."""
    tensors = named_tensors(TINY, random_model(TINY, 0).params)
    source = Source("drawn", TINY, lambda spec: tensors[spec.name].dtype, lambda spec: tensors[spec.name])
    for name in ("neox", "latest"):
        write_output(FOLDER / name, neox_files(source, 2, 1), {})
    for name in ("safetensors", "config"):
        write_output(FOLDER / name, huggingface_files(source, 1 << 30), {})
    write_output(FOLDER / "index", huggingface_files(source, 1 << 30), {})
    (FOLDER / "index" / "model.safetensors").unlink()


YAML = [
    b"num-layers: 8\n",
    b"a: &a [1e5, !!float 2]\nb: *a",
    b"a: &a {x: 1}\nb: {<<: *a}",
    b"a: !!timestamp 2001-01-01\nb: 2001-01-01",
    b"a: !!int '3'\nb: !!bool 'yes'\nc: !!binary aa==\nd: !!set {x}\ne: !!omap [x: 1]",
    b"? [a, b]\n: |\n  text\n",
]


def pickle_of(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        content = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    return len(content).to_bytes(2, "little") + content + bytes(2000)


def corpus() -> Path:
    """Whole files of each kind, by torch and by this project."""
    folder = FOLDER / "corpus"
    folder.mkdir()
    with tarfile.open(GOLDEN) as archive:
        archive.extractall(FOLDER / "golden", filter="data")
    golden = FOLDER / "golden"
    bins = sorted((golden / "bin in shards").glob("*.bin"))
    layers = sorted((golden / "transformer engine").glob("global_step5/layer_*.pt"))
    sequential = sorted((golden / "sequential of 2").glob("*/*.pt"))
    begin: dict[Callable[[bytes], None], list[bytes]] = {
        torch_file: [path.read_bytes() for path in (*bins, *layers, *sequential)],
        pickle: [pickle_of(path) for path in (*bins, *layers, *sequential)],
        layer_file: [(FOLDER / "neox/global_step1/layer_02-model_01-model_states.pt").read_bytes()],
        safetensors: [(FOLDER / "safetensors/model.safetensors").read_bytes()],
        index: [(golden / "bin in shards/pytorch_model.bin.index.json").read_bytes()],
        latest: [b"global_step1"],
        yaml: [(FOLDER / "neox/configs/model.yml").read_bytes(), *YAML],
        config: [(FOLDER / "config/config.json").read_bytes(), (golden / "bin/config.json").read_bytes()],
    }
    for number, target in enumerate(TARGETS):
        for i, data in enumerate(begin[target]):
            (folder / f"{target.__name__}-{i}").write_bytes(bytes([number]) + data)
    return folder


def fuzz() -> None:
    models()
    begin = corpus()
    for path in begin.iterdir():
        one_input(path.read_bytes())  # what is imported when it is needed is so before anything is forbidden
    sys.addaudithook(watch)
    defaults = ["-max_len=8192", "-timeout=20", "-rss_limit_mb=1024"]
    files = [] if any(not argument.startswith("-") for argument in sys.argv[1:]) else [str(begin)]
    atheris.Setup([sys.argv[0], *defaults, *sys.argv[1:], *files], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    if "NEOX_FUZZ_FOLDER" in os.environ:
        fuzz()
    with tempfile.TemporaryDirectory(prefix="neox-fuzz-") as folder:  # libFuzzer ends the process it runs in
        ended = subprocess.run([sys.executable, *sys.argv], env={**os.environ, "NEOX_FUZZ_FOLDER": folder}, check=False)
    sys.exit(ended.returncode)
