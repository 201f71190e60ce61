"""From a folder or a name to a model, one tensor at a time: there is never a second copy of the weights in memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from neox.reference.checkpoint.hub import find
from neox.reference.checkpoint.opening import open_checkpoint
from neox.reference.checkpoint.stored import Index, Stored, numpy_dtype, size_of
from neox.reference.checkpoint.streaming import StreamedLayers
from neox.reference.checkpoint.tensors import (
    EMBED_IN,
    EMBED_OUT,
    FINAL_LAYER_NORM,
    TensorSpec,
    build_layer,
    build_params,
    tensor_table,
)
from neox.reference.config import Config
from neox.reference.errors import InputError
from neox.reference.model import Array, LayerNorm, Model, Params
from neox.reference.project import widen

DTYPES = ("float32", "float64")
WEIGHTS = ("auto", "upcast", "stored", "streamed")


# How.


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
    return str(value)


def _compute_dtype(dtype: str | np.dtype | type[np.floating]) -> np.dtype:
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    return np.dtype(_one_of("dtype", name, DTYPES))


def available_memory() -> int:
    """Bytes that can be used without swapping; on systems that do not say, the size of the memory."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _choose(tensors: Mapping[str, Stored], compute: np.dtype) -> str:
    """Convert if the result takes half of the available memory at most; says on stderr what was chosen and why."""
    converted = [stored for stored in tensors.values() if numpy_dtype(stored) != compute]
    if not converted:
        return "stored"
    needed, available = sum(map(size_of, converted)) * compute.itemsize, available_memory()
    kept = "/".join(sorted({numpy_dtype(stored).name for stored in converted}))
    size = f"{needed / 1e9:.3g} GB as {compute}, {available / 1e9:.3g} GB of memory available"
    if needed <= available / 2:
        print(f"weights: upcast, converted from {kept} once ({size})", file=sys.stderr)
        return "upcast"
    print(f"weights: stored, kept in {kept} on disk and converted as used ({size})", file=sys.stderr)
    return "stored"


# One tensor.


def is_finite(array: Array) -> bool:
    """Whether there is no infinity and no NaN, by two reductions over the bits and no temporary array.

    Without their sign, the bits of floating-point numbers are ordered as the numbers are; infinity and then NaN come
    last. As signed integers the largest is thus the last of the positive ones, as unsigned of the negative ones.
    """
    unsigned = np.dtype(f"u{array.itemsize}")
    signed = np.dtype(f"i{array.itemsize}")
    infinities = np.array([np.inf, -np.inf], array.dtype)
    positive, negative = infinities.view(signed)[0], infinities.view(unsigned)[1]
    return bool(array.view(signed).max() < positive and array.view(unsigned).max() < negative)


def _convert(array: Array, compute: np.dtype) -> Array:
    converted = np.empty(array.shape, compute)
    widen(array, out=converted)
    return converted


Read = Callable[[TensorSpec, Index | None], Array]  # a part of a tensor, or all of it


def reader(tensors: Mapping[str, Stored], compute: np.dtype, upcast: bool) -> Read:
    """How tensors are read for a model that computes in this dtype: as `load` says of its weights."""

    def read(spec: TensorSpec, part: Index | None) -> Array:
        stored = tensors[spec.name]
        array = stored.read() if part is None else stored.part(part)
        if not is_finite(array):
            raise InputError(f"{stored.path}: {spec.name} holds values that are not finite")
        if array.dtype != compute and (upcast or array.ndim == 1):  # vectors are small, and nothing widens them later
            return _convert(array, compute)
        # Some writers align nothing, and then every product would make a copy of its own.
        return np.require(array, requirements="A")

    return read


@dataclass(frozen=True)
class Opened:
    """A checkpoint of which nothing but headers was read."""

    config: Config
    tensors: Mapping[str, Stored]
    dtype: np.dtype  # to compute in

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return sum(map(size_of, self.tensors.values()))


def open_model(
    path: str | Path,
    dtype: str | np.dtype | type[np.floating] = "float32",
    revision: str | None = None,
    layer_norms: str = "mean",
    rank: int = 0,
    ranks: int = 1,
    **overrides: Any,
) -> Opened:
    """Arguments and InputError as those of `load`; rank of ranks: for which one norms are kept apart."""
    compute = _compute_dtype(dtype)
    checkpoint = open_checkpoint(find(path, revision), overrides, layer_norms, rank, ranks)
    return Opened(checkpoint.config, checkpoint.tensors, compute)


def converts(opened: Opened, weights: str) -> bool:
    """Whether `weights` means here that all are converted when they are read."""
    _one_of("weights", weights, WEIGHTS)
    return (_choose(opened.tensors, opened.dtype) if weights == "auto" else weights) == "upcast"


def _streamed(opened: Opened) -> Model:
    """A model of which nothing is read but what a pass comes to, and the layer after that."""
    config, read = opened.config, reader(opened.tensors, opened.dtype, upcast=False)

    def get(spec: TensorSpec) -> Array:
        return read(spec, None)

    embed_in = opened.tensors[EMBED_IN].read()  # not checked for what is not finite: only some rows of it are used
    table = tensor_table(config)
    return Model(
        config,
        Params(
            embed_in,
            StreamedLayers(config.num_hidden_layers, lambda index: build_layer(config, get, index)),
            LayerNorm(*(get(table[f"{FINAL_LAYER_NORM}.{part}"]) for part in ("weight", "bias"))),
            embed_in if config.tie_word_embeddings else get(table[EMBED_OUT]),
        ),
        opened.dtype,
    )


def load(
    path: str | Path,
    dtype: str | np.dtype | type[np.floating] = "float32",
    weights: str = "auto",
    revision: str | None = None,
    layer_norms: str = "mean",
    **overrides: Any,
) -> Model:
    """A model that computes in dtype, from a folder or a name that checkpoint/hub.py knows.

    weights: "upcast" converts every tensor to dtype once; "stored" leaves matrices on disk, in the dtype they are
    stored in, and widens them at every use; "streamed" does the same, but reads nothing now, and of a model that is
    larger than memory one layer while another computes; "auto" converts if that takes half of the available memory at
    most, and else leaves them. What is stored in dtype is mapped and not copied in any case. layer_norms: of a gpt-neox
    checkpoint of several ranks, "mean" or "fold" (checkpoint/neox.py). overrides replace fields of the config, such as
    hidden_act="gelu_fast".
    InputError for everything that can be wrong with the files.
    """
    _one_of("weights", weights, WEIGHTS)
    opened = open_model(path, dtype, revision, layer_norms, **overrides)
    if weights == "streamed":
        return _streamed(opened)
    read = reader(opened.tensors, opened.dtype, converts(opened, weights))
    with tqdm(total=opened.size, desc="loading", unit="weights", unit_scale=True, disable=None, leave=False) as bar:

        def read_and_count(spec: TensorSpec) -> Array:
            array = read(spec, None)
            bar.update(array.size)
            return array

        return Model(opened.config, build_params(opened.config, read_and_count), opened.dtype)
