"""Weights onto a device, tensor by tensor, from a checkpoint that stays on disk or from a model of the reference."""

from __future__ import annotations

import sys
from collections.abc import Callable
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
from neox.reference.checkpoint.load import is_finite
from neox.reference.checkpoint.load import load as load_reference
from neox.reference.config import GPT_NEOX_20B, PYTHIA, Config, parameter_count, read_config
from neox.reference.errors import InputError

Put = Callable[[NDArray], Array]

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
    needed, free = parameter_count(config) * dtype.itemsize, device.free_memory()
    if needed > free:
        sizes = f"the weights take {_gigabytes(needed)} as {dtype}, and the device has {_gigabytes(free)} free"
        raise InputError(f"{sizes}; {_what_fits(config, dtype, free)}")
    print(f"weights: {_gigabytes(needed)} as {dtype}, {_gigabytes(free)} free on the device", file=sys.stderr)


def require_kernels(config: Config) -> None:
    """InputError unless the kernels can read the model's rows in pieces of 8 numbers."""
    for name in ("head_dim", "hidden_size", "intermediate_size"):
        if getattr(config, name) % 8:
            raise InputError(f"the kernels need a {name} that is a multiple of 8, not {getattr(config, name)}")


# Tensor by tensor.


def _converter(device: Device, dtype: np.dtype) -> Put:
    def put(array: NDArray) -> Array:
        with np.errstate(over="ignore"):
            converted = np.asarray(array.astype(dtype, copy=False))
        if not is_finite(converted):
            raise InputError(f"some weights are too large for {dtype}: load the model as bfloat16 or float32")
        return device.array(converted)

    return put


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


def arranged(params: reference.Params, put: Callable[[Any], Array]) -> Params:
    """The parameters in the same order, each once as `put` makes it. A tied head is the embedding itself."""
    embed_in = put(params.embed_in)
    layers = tuple(_layer(p, put) for p in params.layers)
    final = _layer_norm(params.final_layer_norm, put)
    return Params(embed_in, layers, final, embed_in if params.embed_out is params.embed_in else put(params.embed_out))


def to_device(model: reference.Model, device: Device, dtype: str = "float16") -> Model:
    """A model of the reference, its weights rounded to dtype. InputError if they cannot be, or no kernel takes them."""
    if dtype not in TYPES:
        raise InputError(f"dtype must be one of {', '.join(TYPES)}, not {dtype!r}")
    config, params, kind = model.config, model.params, dtype_named(dtype)
    require_kernels(config)
    convert = _converter(device, kind)
    with tqdm(
        total=parameter_count(config), desc="to the device", unit="weights", unit_scale=True, disable=None
    ) as bar:

        def put(array: NDArray) -> Array:
            bar.update(array.size)
            return convert(array)

        on_device = arranged(params, put)
    return Model(config, on_device, *rotary_arrays(config, device))


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
    if dtype not in TYPES:
        raise InputError(f"dtype must be one of {', '.join(TYPES)}, not {dtype!r}")
    opened = open_device(device) if isinstance(device, str) else device
    folder = find(path, revision)
    require_memory(read_config(folder), dtype_named(dtype), opened)
    return to_device(load_reference(folder, weights="stored", **overrides), opened, dtype)
