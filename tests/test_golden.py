"""Parity with transformers where it is not installed: against its logits, kept in golden/ by make_golden.py."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from closeness import assert_close
from numpy.typing import NDArray
from strategies import checksum, random_model

from neox.reference.config import Config
from neox.reference.decode import extend, new_cache
from neox.reference.model import Model, forward

FILES = sorted((Path(__file__).parent / "golden").glob("*.npz"))

# In float32 two correct programs differ by their rounding, some 5e-7 here; 1e-5 is the parity this project declares.
# In float64 transformers takes cosines and sines in float32 with torch's own functions, which are a step of 6e-8 off
# in places. The logits are off by some 1e-8; 2e-7 is declared. The smallest architectural mistake, the other GELU,
# moves them by 1e-4.
TOLERANCE = {"float32": 1e-5, "float64": 2e-7}


@dataclass(frozen=True)
class Golden:
    config: Config
    seed: int
    checksum: int
    made_with: str
    ids: NDArray  # (B,T)
    padding: NDArray  # (B,)
    positions: NDArray  # whose logits are kept
    logits: dict[str, NDArray]  # of each dtype (B,kept,V)


def read(path: Path) -> Golden:
    with np.load(path) as f:
        return Golden(
            config=Config(**json.loads(str(f["config"]))),
            seed=int(f["seed"]),
            checksum=int(f["checksum"]),
            made_with=str(f["made_with"]),
            ids=f["ids"],
            padding=f["padding"],
            positions=f["positions"],
            logits={dtype: f[dtype] for dtype in TOLERANCE},
        )


def compare(golden: Golden, dtype: str, row: int, answers: NDArray) -> None:  # (text of the row,V)
    """Wherever there is text; what comes of padding means nothing."""
    places = golden.positions - golden.padding[row]
    assert_close(answers[places[places >= 0]], golden.logits[dtype][row, places >= 0], TOLERANCE[dtype])


def drawn(golden: Golden, dtype: str) -> Model:
    found = checksum(random_model(golden.config, golden.seed))
    assert found == golden.checksum, "the drawn weights have changed, not the model: make the golden files again"
    return random_model(golden.config, golden.seed, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_forward_is_transformers(path: Path, dtype: str):
    """Each text by itself: forward knows no padding."""
    golden = read(path)
    m = drawn(golden, dtype)
    for row, padding in enumerate(golden.padding):
        compare(golden, dtype, row, forward(m, golden.ids[row : row + 1, padding:])[0])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_decoding_is_transformers(path: Path, dtype: str):
    """The same through the cache, in two pieces, padding included."""
    golden = read(path)
    m = drawn(golden, dtype)
    cache = new_cache(m, len(golden.ids), golden.ids.shape[1], golden.padding)
    half = golden.ids.shape[1] // 2
    answers = np.concatenate([extend(m, cache, ids) for ids in (golden.ids[:, :half], golden.ids[:, half:])], axis=1)
    for row, padding in enumerate(golden.padding):
        compare(golden, dtype, row, answers[row, padding:])


def test_the_golden_files_cover_every_choice():
    golden = [read(path) for path in FILES]
    configs = [g.config for g in golden]
    for field in ("hidden_act", "use_parallel_residual", "tie_word_embeddings", "attention_bias", "rotary_emb_base"):
        assert len({getattr(config, field) for config in configs}) > 1, field
    assert (96, 24) in {(config.head_dim, config.rotary_ndims) for config in configs}
    assert any(config.rotary_ndims == config.head_dim for config in configs)
    assert max(g.positions.max() for g in golden) > 1000
    assert any(g.padding.any() for g in golden)
    assert {g.made_with.partition(" ")[0] for g in golden} == {"transformers"}
