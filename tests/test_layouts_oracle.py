"""Files that torch and transformers write now, in every layout: the same parameters and logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torch_files import assert_is, in_half, rounded_model

from neox.reference.config import Config

pytestmark = pytest.mark.oracle

WIDE_HEADS = Config(104, 384, 2, 4, 136, rotary_pct=0.25, max_position_embeddings=64)  # R = 24 of D = 96, as the 20B's
IDS = np.array([[5, 17, 3, 99, 60, 2, 8], [1, 1, 2, 3, 5, 8, 13]])

# Not named by layouts_by_torch.LAYOUTS, which needs torch to be imported.
RANKS = [f"{form} of {ranks}" for form in ("layer files", "sequential") for ranks in (1, 2, 4)]
OTHERS = ["safetensors", "safetensors in shards", "bin", "bin in shards", "linear1", "transformer engine"]


@pytest.mark.parametrize("layout", RANKS + OTHERS)
def test_every_layout_is_the_model(tmp_path: Path, layout: str) -> None:
    from layouts_by_torch import LAYOUTS
    from oracle import oracle, oracle_logits

    model = rounded_model(WIDE_HEADS, 0)
    LAYOUTS[layout](tmp_path, WIDE_HEADS, in_half(model))
    assert_is(tmp_path, model, IDS, oracle_logits(oracle(model), IDS))


@pytest.mark.parametrize("change", [{"attention_bias": False}, {"use_parallel_residual": False, "hidden_act": "gelu"}])
def test_other_architectures_too(tmp_path: Path, change: dict) -> None:
    from layouts_by_torch import LAYOUTS
    from oracle import oracle, oracle_logits

    config = replace(WIDE_HEADS, **change)
    model = rounded_model(config, 0)
    logits = oracle_logits(oracle(model), IDS)
    for layout in ("bin", "sequential of 2", "layer files of 4"):
        folder = tmp_path / layout
        folder.mkdir()
        LAYOUTS[layout](folder, config, in_half(model))
        assert_is(folder, model, IDS, logits)
