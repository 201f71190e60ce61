"""Models with drawn weights, for tests, benchmarks and walks through a model that was not downloaded.

The scale keeps every part of the model at work: products, norms and biases all of order one. At the scale at which
training starts (0.02, norms one, biases zero) attention is nearly uniform, and a model without rotary embeddings
could not be told from the right one.
"""

from __future__ import annotations

import math
import zlib

import numpy as np
from numpy.typing import DTypeLike

from neox.reference.checkpoint.tensors import EMBED_IN, TensorSpec, build_params
from neox.reference.config import Config
from neox.reference.model import Array, Model


def random_tensor(spec: TensorSpec, seed: int = 0) -> Array:
    """Matrices N(0, 1/fan_in), LayerNorm weights 1 + 0.3 N, biases 0.3 N; float32, the same for a seed and a name."""
    generator = np.random.default_rng([seed, zlib.crc32(spec.name.encode())])
    values = generator.standard_normal(spec.shape, np.float32)
    if spec.name == EMBED_IN:
        return values  # its rows are picked, not summed: a fan-in of one
    if len(spec.shape) == 2:
        values /= np.float32(math.sqrt(spec.shape[1]))
        return values
    values *= np.float32(0.3)
    if spec.name.endswith("norm.weight"):
        values += 1
    return values


def random_model(config: Config, seed: int = 0, dtype: DTypeLike = "float32") -> Model:
    """A model of this shape. Drawn in float32, so the models of one seed have the same values in every dtype."""
    params = build_params(config, lambda spec: random_tensor(spec, seed).astype(dtype, copy=False))
    return Model(config, params, np.dtype(dtype))
