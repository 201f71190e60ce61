"""Weights onto a device, piece by piece, from a checkpoint that stays on disk or from a model of the reference."""

from __future__ import annotations

import math
import os
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from neox.gpu.device import Array, Device, dtype_named, open_device
from neox.gpu.model import MLP, Attention, Layer, LayerNorm, Linear, Model, Params, rotary_arrays
from neox.gpu.ops import TYPES
from neox.reference import model as reference
from neox.reference.checkpoint.hub import find
from neox.reference.checkpoint.load import is_finite, open_model
from neox.reference.checkpoint.stored import Index, Stored, whole
from neox.reference.checkpoint.tensors import build_params, named_tensors, tensor_table
from neox.reference.config import GPT_NEOX_20B, PYTHIA, Config, parameter_count, read_config
from neox.reference.errors import InputError

Put = Callable[[Any], Array]

PUBLISHED = {f"pythia-{size}": config for size, config in PYTHIA.items()} | {"gpt-neox-20b": GPT_NEOX_20B}


# What fits.


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


def _what_fits(config: Config, dtype: np.dtype, free: int) -> str:
    half = 2 * parameter_count(config)
    if dtype.itemsize > 2 and half <= free:
        return f"as float16 they would take {_gigabytes(half)}"
    fitting = [name for name, published in PUBLISHED.items() if 2 * parameter_count(published) <= free]
    return f"of the published models, {fitting[-1]} in float16 would fit" if fitting else "no published model would fit"


def require_memory(config: Config, dtype: np.dtype, device: Device) -> None:
    """Says on stderr what the weights take; InputError if that is more than the device has, with what would fit."""
    sizes = check_memory(parameter_count(config), dtype, device, lambda free: _what_fits(config, dtype, free))
    print(f"weights: {sizes}", file=sys.stderr)


def check_memory(count: int, dtype: np.dtype, device: Device, advice: Callable[[int], str]) -> str:
    """What so many weights take and the device has, in words; InputError, with advice, if that is too little."""
    needed, free = count * dtype.itemsize, device.free_memory()
    if needed > free:
        sizes = f"the weights take {_gigabytes(needed)} as {dtype}, and the device has {_gigabytes(free)} free"
        raise InputError(f"{sizes}; {advice(free)}")
    return f"{_gigabytes(needed)} as {dtype}, {_gigabytes(free)} free on the device"


def require_kernels(config: Config) -> None:
    """InputError unless the kernels can read the model's rows in pieces of 8 numbers."""
    for name in ("head_dim", "hidden_size", "intermediate_size"):
        if getattr(config, name) % 8:
            raise InputError(f"the kernels need a {name} that is a multiple of 8, not {getattr(config, name)}")


# Piece by piece: some threads read, convert and check, into memory from which the device copies by itself, while what
# others have read before is on its way. Only the thread that was called speaks with the device.

READERS = min(8, os.cpu_count() or 1)
PIECE = 16 << 20  # numbers


@dataclass(frozen=True)
class Source:
    """A tensor whose numbers are read when they are used."""

    shape: tuple[int, ...]
    rows: Callable[[int, int], NDArray]  # from one to before another; of a vector, numbers
    name: str  # what a message calls it


def source_of(stored: Stored, name: str, index: Index | None = None) -> Source:
    """A tensor of a checkpoint, or a part of it."""
    first, *others = whole(stored.shape) if index is None else index
    shape = tuple(cut.stop - cut.start for cut in (first, *others))

    def rows(start: int, stop: int) -> NDArray:
        return stored.part((slice(first.start + start, first.start + stop), *others))

    return Source(shape, rows, f"{stored.path}: {name}")


def source_of_array(array: NDArray, name: str) -> Source:
    return Source(array.shape, lambda start, stop: array[start:stop], name)


def _rows_of_a_piece(shape: tuple[int, ...]) -> int:
    return max(1, PIECE // math.prod(shape[1:]))


def _fill(source: Source, start: int, out: NDArray) -> None:
    """The rows from `start` on, rounded to the dtype of `out`. InputError if they cannot be."""
    part = source.rows(start, start + len(out))
    with np.errstate(over="ignore"):
        np.copyto(out, part, casting="unsafe")
    if not is_finite(out):
        if not is_finite(part):
            raise InputError(f"{source.name} holds values that are not finite")
        raise InputError(f"some weights are too large for {out.dtype}: load the model as bfloat16 or float32")


def _stream(
    sources: Sequence[Source], targets: Sequence[Array], device: Device, hidden: bool | None, sent: Callable[[], object]
) -> None:
    """InputError of the first piece that cannot be read or rounded; what comes after it is not read."""
    pieces = [
        (source, target[start : start + _rows_of_a_piece(target.shape)], start)
        for source, target in zip(sources, targets, strict=True)
        for start in range(0, target.shape[0], _rows_of_a_piece(target.shape))
    ]
    largest = max(target.nbytes for _, target, _ in pieces)
    free = deque((device.staging(largest), device.mark()) for _ in range(min(READERS + 2, len(pieces))))
    pending: deque[tuple[Future[None], Array, NDArray, NDArray]] = deque()
    readers = ThreadPoolExecutor(READERS)

    def send(bar: tqdm) -> None:
        future, target, values, buffer = pending.popleft()
        future.result()
        device.copy_later(target, values)
        free.append((buffer, device.mark()))
        bar.update(values.size)
        sent()

    try:
        total = sum(target.size for target in targets)
        with tqdm(total=total, desc="to the device", unit="weights", unit_scale=True, disable=hidden) as bar:
            for source, target, start in pieces:
                if not free:
                    send(bar)
                buffer, used = free.popleft()
                device.wait(used)
                values = buffer[: target.nbytes].view(target.dtype).reshape(target.shape)
                pending.append((readers.submit(_fill, source, start, values), target, values, buffer))
            while pending:
                send(bar)
    finally:
        readers.shutdown(cancel_futures=True)
        device.synchronize()  # no copy is still to be made from the buffers


def _linear(p: reference.Linear, put: Put) -> Linear:
    return Linear(put(p.weight), None if p.bias is None else put(p.bias))


def _layer_norm(p: reference.LayerNorm, put: Put) -> LayerNorm:
    return LayerNorm(put(p.weight), put(p.bias))


def _layer(p: reference.Layer, put: Put) -> Layer:
    return Layer(
        _layer_norm(p.input_layernorm, put),
        _layer_norm(p.post_attention_layernorm, put),
        Attention(_linear(p.attention.query_key_value, put), _linear(p.attention.dense, put)),
        MLP(_linear(p.mlp.dense_h_to_4h, put), _linear(p.mlp.dense_4h_to_h, put)),
    )


def arranged(params: reference.Params, put: Put) -> Params:
    """The parameters in the same order, each once as `put` makes it. A tied head is the embedding itself."""
    embed_in = put(params.embed_in)
    layers = tuple(_layer(p, put) for p in params.layers)
    final = _layer_norm(params.final_layer_norm, put)
    return Params(embed_in, layers, final, embed_in if params.embed_out is params.embed_in else put(params.embed_out))


def upload(
    config: Config,
    sources: Mapping[str, Source],
    device: Device,
    dtype: str,
    hidden: bool | None = None,
    sent: Callable[[], object] = lambda: None,
) -> Model:
    """All tensors of a model, or of a rank's shard, onto the device as dtype. InputError if they cannot be rounded.

    hidden: of tqdm, `disable`. sent is called whenever something has been.
    """
    kind = dtype_named(dtype)
    arrays = {name: device.empty(sources[name].shape, kind) for name in tensor_table(config)}
    _stream([sources[name] for name in arrays], list(arrays.values()), device, hidden, sent)
    named: Any = build_params(config, lambda spec: spec)  # type: ignore[arg-type, return-value]
    return Model(config, arranged(named, lambda spec: arrays[spec.name]), *rotary_arrays(config, device))


def check_dtype(dtype: str) -> None:
    """InputError unless there are kernels for it."""
    if dtype not in TYPES:
        raise InputError(f"dtype must be one of {', '.join(TYPES)}, not {dtype!r}")


def to_device(model: reference.Model, device: Device, dtype: str = "float16") -> Model:
    """A model of the reference, its weights rounded to dtype. InputError if they cannot be, or no kernel takes them."""
    check_dtype(dtype)
    require_kernels(model.config)
    tensors = named_tensors(model.config, model.params)
    return upload(model.config, {name: source_of_array(array, name) for name, array in tensors.items()}, device, dtype)


def load(
    path: str | Path,
    dtype: str = "float16",
    device: str | Device = "cuda",
    revision: str | None = None,
    **overrides: Any,
) -> Model:
    """A model on a device, from a folder or a name that reference/checkpoint/hub.py knows.

    dtype: float32, float16 or bfloat16. device: "cuda", "host" (the same kernels on the CPU), or one that is open.
    overrides replace fields of the config, such as hidden_act="gelu_fast". InputError for everything that can be wrong
    with the files, and if device or memory are missing.
    """
    check_dtype(dtype)
    opened = open_device(device) if isinstance(device, str) else device
    folder = find(path, revision)
    require_memory(read_config(folder), dtype_named(dtype), opened)
    stored = open_model(folder, **overrides)
    require_kernels(stored.config)
    sources = {name: source_of(tensor, name) for name, tensor in stored.tensors.items()}
    return upload(stored.config, sources, opened, dtype)
