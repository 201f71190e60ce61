"""Lenses show what the model would say, attributions add up to it, and induction is found where it is."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from closeness import assert_close
from hypothesis import given
from safetensors.numpy import save_file
from strategies import TINY, configs, draw_ids, random_model, seeds

from neox.reference.checkpoint.torch_writer import write_torch
from neox.reference.errors import InputError
from neox.reference.lens import (
    Attribution,
    attribute,
    induction_scores,
    load_tuned_lens,
    logit_lens,
    repeated_tokens,
)
from neox.reference.model import Attention, Linear, Model, forward, unembed
from neox.reference.trace import instead, run_with_cache, run_with_hooks

FLOAT64 = 1e-12  # two orders of the same sums; see checks.FLOAT64
IDS = draw_ids(TINY, 2, 7, 0)


# Lenses.


def test_the_lens_is_the_model_cut_short() -> None:
    model = random_model(TINY, 0, "float64")
    depths = list(logit_lens(model, IDS))
    assert len(depths) == TINY.num_hidden_layers + 1
    for depth, logits in enumerate(depths):
        layers = model.params.layers[:depth]
        assert np.array_equal(logits, forward(replace(model, params=replace(model.params, layers=layers)), IDS)) or (
            depth == 0 and np.array_equal(logits, unembed(model, model.params.embed_in[IDS]))
        )


def translators(seed: int) -> dict[str, np.ndarray]:
    rng, C = np.random.default_rng(seed), TINY.hidden_size
    tensors = {}
    for i in range(TINY.num_hidden_layers):
        tensors[f"{i}.weight"] = (rng.standard_normal((C, C)) / math.sqrt(C)).astype(np.float32)
        tensors[f"{i}.bias"] = rng.standard_normal(C).astype(np.float32)
    return tensors


@pytest.mark.parametrize("form", ["params.pt", "lens.safetensors"])
def test_a_tuned_lens_moves_each_state_by_its_own_translator(tmp_path: Path, form: str) -> None:
    model, tensors = random_model(TINY, 0, "float64"), translators(1)
    path = tmp_path / form
    (write_torch(path, tensors) if form.endswith("pt") else save_file(tensors, path))
    tuned = load_tuned_lens(tmp_path if form == "params.pt" else path, TINY)
    _, cache = run_with_cache(model, IDS, "blocks.*.hook_resid_pre")
    for i, logits in zip(range(TINY.num_hidden_layers), logit_lens(model, IDS, tuned), strict=False):
        x = cache[f"blocks.{i}.hook_resid_pre"]
        moved = x + np.einsum("oi,bti->bto", tensors[f"{i}.weight"], x) + tensors[f"{i}.bias"]
        assert_close(logits, unembed(model, moved), FLOAT64)
    assert np.array_equal([*logit_lens(model, IDS, tuned)][-1], forward(model, IDS))


def test_a_lens_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"params.pt is not there"):
        load_tuned_lens(tmp_path, TINY)
    write_torch(tmp_path / "params.pt", translators(0))
    with pytest.raises(InputError, match=r"has no 3.weight of shape \(120, 120\)"):
        load_tuned_lens(tmp_path, replace(TINY, num_hidden_layers=4))
    with pytest.raises(InputError, match=r"has no 0.weight of shape \(96, 96\)"):
        load_tuned_lens(tmp_path, replace(TINY, hidden_size=96, num_attention_heads=4))
    broken = tmp_path / "x.safetensors"
    broken.write_bytes(b"not a header")
    with pytest.raises(InputError, match="is no safetensors file"):
        load_tuned_lens(broken, TINY)


# Direct logit attribution.


def targets_of(model: Model, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(model.config.vocab_size, size=IDS.shape)


def picked(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:  # (B,T,V) -> (B,T)
    return np.take_along_axis(logits, targets[..., None], -1)[..., 0]


@given(configs(), seeds)
def test_contributions_add_up_to_the_logit(config, seed: int) -> None:
    model = random_model(config, seed, "float64")
    ids = draw_ids(config, 2, 5, seed)
    targets = np.random.default_rng(seed).integers(config.vocab_size, size=ids.shape)
    found = attribute(model, ids, targets)
    assert_close(found.values.sum(-1), picked(forward(model, ids), targets), FLOAT64)
    assert found.of_heads(config).shape == (2, 5, config.num_hidden_layers, config.num_attention_heads)


def test_what_is_taken_away_is_what_was_contributed() -> None:
    """Of parts that no other part reads: the heads and the MLP of the last layer, the scale of the last norm held."""
    model, targets = random_model(TINY, 0, "float64"), targets_of(random_model(TINY, 0), 1)
    found, last = attribute(model, IDS, targets), TINY.num_hidden_layers - 1
    _, cache = run_with_cache(model, IDS)
    scale = {"ln_final.hook_scale": instead(cache["ln_final.hook_scale"])}
    z = cache[f"blocks.{last}.attn.hook_z"]
    for h in range(TINY.num_attention_heads):
        without = z.copy()
        without[..., h, :] = 0
        logits = run_with_hooks(model, IDS, {**scale, f"blocks.{last}.attn.hook_z": instead(without)})
        lost = picked(forward(model, IDS) - logits, targets)
        assert_close(found.of_heads(TINY)[..., last, h], lost, 1e-11)
    mlp = cache[f"blocks.{last}.hook_mlp_out"]
    logits = run_with_hooks(model, IDS, {**scale, f"blocks.{last}.hook_mlp_out": instead(np.zeros_like(mlp))})
    lost = picked(forward(model, IDS) - logits, targets)
    assert_close(found.values[..., found.names.index(f"blocks.{last}.mlp")], lost, 1e-11)


def test_every_part_has_one_name() -> None:
    found: Attribution = attribute(random_model(TINY, 0), IDS, IDS)
    assert len(set(found.names)) == len(found.names) == found.values.shape[-1]
    parts = TINY.num_attention_heads + 2  # heads, their bias, the MLP
    assert len(found.names) == 1 + TINY.num_hidden_layers * parts + 1


# Induction.


def looking_back(model: Model, distance: int) -> Model:
    """The model with heads of layer 1 that look `distance` positions back, whatever stands there.

    The first pair of dims turns by one radian a position: a query that starts `distance` radians behind meets its key.
    """
    p = model.params.layers[1].attention
    bias = np.zeros((TINY.num_attention_heads, 3, TINY.head_dim))
    bias[:, 1, 0] = 40
    bias[:, 0, 0], bias[:, 0, TINY.rotary_ndims // 2] = 40 * math.cos(distance), -40 * math.sin(distance)
    own = Attention(Linear(np.zeros_like(p.query_key_value.weight), bias.reshape(-1)), p.dense)
    layers = list(model.params.layers)
    layers[1] = replace(layers[1], attention=own)
    return replace(model, params=replace(model.params, layers=layers))


def test_scores_are_the_attention_to_what_followed() -> None:
    model, length = random_model(TINY, 0, "float64"), 9
    ids = repeated_tokens(TINY, 3, length, seed=5)
    assert np.array_equal(ids[:, :length], ids[:, length:])
    _, cache = run_with_cache(model, ids)
    found = induction_scores(model, 3, length, seed=5)
    for i in range(TINY.num_hidden_layers):
        for h in range(TINY.num_attention_heads):
            seen = [
                cache[f"blocks.{i}.attn.hook_pattern"][b, h, t, t - length + 1]
                for b in range(3)
                for t in range(length, 2 * length)
            ]
            assert_close(found[i, h], np.mean(seen), FLOAT64)
            assert all(ids[b, t] == ids[b, t - length] for b in range(3) for t in range(length, 2 * length))


def test_heads_that_look_at_what_followed_are_found() -> None:
    model = random_model(TINY, 0, "float64")
    assert induction_scores(looking_back(model, 16), 2, 17)[1].min() > 0.99
    for other in (0, 15, 17):
        assert induction_scores(looking_back(model, other), 2, 17)[1].max() < 1e-6
