"""The model of golden/torch_files.tar.xz, in which torch wrote it in every layout, and that it was read as it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from closeness import assert_close
from numpy.typing import NDArray

from neox.reference.checkpoint.load import load
from neox.reference.checkpoint.tensors import build_params, named_tensors
from neox.reference.config import Config
from neox.reference.model import Model, forward
from neox.reference.random_weights import random_model

ARCHIVE = Path(__file__).parent / "golden" / "torch_files.tar.xz"
SMALL = Config(20, 24, 2, 4, 28, rotary_pct=0.67, max_position_embeddings=64)  # R = 4 of D = 6; each divisible by 4
SEED = 0


def in_half(model: Model) -> dict[str, NDArray]:
    return {name: array.astype(np.float16) for name, array in named_tensors(model.config, model.params).items()}


def rounded_model(config: Config, seed: int) -> Model:
    """Drawn weights as half precision holds them, in float32."""
    model = random_model(config, seed)
    half = in_half(model)
    return replace(model, params=build_params(config, lambda spec: half[spec.name].astype(np.float32)))


def assert_is(folder: Path, model: Model, ids: NDArray, logits: NDArray) -> None:
    """The folder holds the model, bit for bit, and its logits are these of transformers."""
    read = load(folder, weights="upcast")
    assert replace(read.config, max_position_embeddings=model.config.max_position_embeddings) == model.config
    found = named_tensors(read.config, read.params)
    expected = named_tensors(model.config, model.params)
    assert sorted(found) == sorted(expected)
    for name, array in expected.items():
        assert found[name].tobytes() == array.tobytes(), name
    # The bound of every comparison with transformers in float32 (test_transformers.py).
    assert_close(forward(read, ids), logits, rtol=1e-5)
