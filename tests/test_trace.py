"""What is seen of a forward pass is what was computed, and what is put in its place is what goes on."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from closeness import FLOAT32_STEP, assert_close
from hypothesis import given
from hypothesis import strategies as st
from strategies import TINY, draw_ids, random_model, seeds

from neox.reference.config import Config
from neox.reference.errors import InputError
from neox.reference.model import Model, forward
from neox.reference.trace import (
    hook_names,
    instead,
    logit_difference,
    matching,
    patch_heads,
    patch_residual,
    run_with_cache,
    run_with_hooks,
)

# Two orders of the same float64 sums; see checks.FLOAT64.
FLOAT64 = 1e-12

GOLDEN = Path(__file__).with_name("golden")
HOOKED = replace(TINY, num_hidden_layers=2, hidden_act="gelu")  # of data/hooks.npz
NOT_THEIRS = ("hook_rot_q", "hook_rot_k")  # TransformerLens 4 shows queries and keys before rotation only
CONFIGS = [TINY, replace(TINY, use_parallel_residual=False, hidden_act="gelu")]
IDS = draw_ids(TINY, 2, 7, 0)


def model_of(config: Config = TINY, seed: int = 0) -> Model:
    return random_model(config, seed, "float64")


# Names.


@pytest.mark.parametrize("config", CONFIGS)
def test_every_name_is_seen_in_its_place(config: Config) -> None:
    seen = []

    def watch(name: str, array: np.ndarray) -> np.ndarray:
        seen.append(name)
        return array

    forward(model_of(config), IDS, watch)
    assert seen == hook_names(config)


def shape_of(name: str, config: Config) -> tuple[int, ...]:
    """As the table at the head of trace.py has it."""
    (B, T), C, F = IDS.shape, config.hidden_size, config.intermediate_size
    H, D = config.num_attention_heads, config.head_dim
    last = name.rsplit("hook_", 1)[1]
    if last == "scale":
        return B, T, 1
    if last in ("q", "k", "v", "rot_q", "rot_k", "z"):
        return B, T, H, D
    if last in ("attn_scores", "pattern"):
        return B, H, T, T
    return (B, T, F) if last in ("pre", "post") else (B, T, C)


@pytest.mark.parametrize("config", CONFIGS)
def test_all_is_kept_in_its_shape(config: Config) -> None:
    model = model_of(config)
    logits, cache = run_with_cache(model, IDS)
    assert np.array_equal(logits, forward(model, IDS))
    assert list(cache) == hook_names(config)
    assert {name: array.shape for name, array in cache.items()} == {n: shape_of(n, config) for n in cache}


def test_names_are_patterns_lists_or_functions() -> None:
    layers = TINY.num_hidden_layers
    assert matching(TINY, "blocks.*.attn.hook_z") == {f"blocks.{i}.attn.hook_z" for i in range(layers)}
    assert matching(TINY, ["hook_embed", "blocks.1.hook_resid_pre"]) == {"hook_embed", "blocks.1.hook_resid_pre"}
    assert matching(TINY, lambda name: name.startswith("ln_")) == {"ln_final.hook_scale", "ln_final.hook_normalized"}
    with pytest.raises(InputError, match=re.escape("'blocks.99.*'")):
        matching(TINY, ["hook_embed", "blocks.99.*"])


# Keeping.


def test_what_is_kept_is_what_was_computed() -> None:
    """Each by a way of its own; a cache that keeps what is overwritten later does not pass."""
    model = model_of()
    _, cache = run_with_cache(model, IDS)
    p, b = model.params.layers[1], "blocks.1."
    assert_close(cache["hook_embed"], model.params.embed_in[IDS], 0)
    assert np.array_equal(cache[b + "hook_resid_pre"], cache["blocks.0.hook_resid_post"])
    branches = cache[b + "hook_attn_out"] + cache[b + "hook_mlp_out"]
    assert_close(cache[b + "hook_resid_post"], cache[b + "hook_resid_pre"] + branches, FLOAT64)
    x = cache[b + "hook_resid_pre"]
    scale = np.sqrt(x.var(-1, keepdims=True) + TINY.layer_norm_eps)
    assert_close(cache[b + "ln1.hook_scale"], scale, FLOAT64)
    normalized = (x - x.mean(-1, keepdims=True)) / scale
    assert_close(cache[b + "ln1.hook_normalized"], normalized, FLOAT64)
    qkv = (normalized * p.input_layernorm.weight + p.input_layernorm.bias) @ p.attention.query_key_value.weight.T
    assert p.attention.query_key_value.bias is not None
    heads = (qkv + p.attention.query_key_value.bias).reshape(*IDS.shape, -1, 3, TINY.head_dim)
    for i, name in enumerate("qkv"):
        assert_close(cache[b + f"attn.hook_{name}"], heads[..., i, :], FLOAT64)
    pattern = np.exp(cache[b + "attn.hook_attn_scores"])
    assert_close(cache[b + "attn.hook_pattern"], pattern / pattern.sum(-1, keepdims=True), FLOAT64)
    z = np.einsum("bhts,bshd->bthd", cache[b + "attn.hook_pattern"], cache[b + "attn.hook_v"])
    assert_close(cache[b + "attn.hook_z"], z, FLOAT64)


@pytest.mark.parametrize("stop", range(TINY.num_hidden_layers + 1))
def test_stopping_early_gives_the_residual_stream_and_nothing_later(stop: int) -> None:
    model = model_of()
    x, cache = run_with_cache(model, IDS, stop_at_layer=stop)
    _, whole = run_with_cache(model, IDS)
    layers = {int(name.split(".")[1]) for name in cache if name.startswith("blocks.")}
    assert layers == set(range(stop))
    assert all(np.array_equal(array, whole[name]) for name, array in cache.items())
    assert np.array_equal(x, whole[f"blocks.{stop - 1}.hook_resid_post" if stop else "hook_embed"])


def test_a_layer_that_is_not_there_is_refused() -> None:
    for stop in (-1, TINY.num_hidden_layers + 1):
        with pytest.raises(InputError, match="stop_at_layer must be from 0 to"):
            run_with_cache(model_of(), IDS, stop_at_layer=stop)


# Changing.


def test_hooks_that_only_look_change_no_bit() -> None:
    model, seen = model_of(), []
    assert np.array_equal(run_with_hooks(model, IDS, {"*": lambda array: seen.append(array)}), forward(model, IDS))
    assert len(seen) == len(hook_names(TINY))


@pytest.mark.parametrize("name", ["hook_embed", "blocks.0.hook_resid_post", "ln_final.hook_normalized"])
def test_patching_everything_is_the_other_run(name: str) -> None:
    model, others = model_of(), draw_ids(TINY, 2, 7, 1)
    _, cache = run_with_cache(model, others, name)
    assert np.array_equal(run_with_hooks(model, IDS, {name: instead(cache[name])}), forward(model, others))
    assert not np.array_equal(forward(model, IDS), forward(model, others))


def test_every_name_can_be_replaced() -> None:
    model = model_of()
    right = forward(model, IDS)
    for name in hook_names(TINY):
        assert not np.array_equal(run_with_hooks(model, IDS, {name: lambda array: array * 1.5}), right), name


def test_hooks_of_one_name_follow_each_other() -> None:
    model = model_of()
    hooks = {"hook_embed": lambda x: x + 1, "hook_*": lambda x: x * 2}
    expected = run_with_hooks(model, IDS, {"hook_embed": lambda x: (x + 1) * 2})
    assert np.array_equal(run_with_hooks(model, IDS, hooks), expected)


def test_a_hook_that_returns_another_shape_is_refused() -> None:
    with pytest.raises(InputError, match=r"a hook made .* of hook_embed"):
        run_with_hooks(model_of(), IDS, {"hook_embed": lambda x: x[:, :1]})


# Rotated queries and keys, and the outputs of single heads.


@pytest.mark.parametrize("config", CONFIGS)
def test_scores_are_products_of_rotated_queries_and_keys(config: Config) -> None:
    _, cache = run_with_cache(model_of(config), IDS, "blocks.1.attn.*")
    q, k = (cache[f"blocks.1.attn.hook_rot_{name}"] for name in "qk")
    scores = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(config.head_dim)
    seen = np.tril(np.ones((7, 7), bool))
    assert_close(np.where(seen, cache["blocks.1.attn.hook_attn_scores"], 0), np.where(seen, scores, 0), FLOAT64)
    # Cosines and sines are rounded to float32: their squares add up to 1 within twice its step.
    before = np.linalg.norm(cache["blocks.1.attn.hook_q"], axis=-1)
    assert_close(np.linalg.norm(q, axis=-1), before, 2 * FLOAT32_STEP)


@pytest.mark.parametrize("config", [*CONFIGS, replace(TINY, attention_bias=False)])
def test_what_heads_add_and_the_bias_make_up_the_attentions_output(config: Config) -> None:
    model = model_of(config)
    logits, cache = run_with_cache(model, IDS, ["*", "blocks.*.attn.hook_result"])
    assert np.array_equal(logits, forward(model, IDS))
    for i, p in enumerate(model.params.layers):
        result = cache[f"blocks.{i}.attn.hook_result"]
        assert result.shape == (*IDS.shape, config.num_attention_heads, config.hidden_size)
        bias = 0 if p.attention.dense.bias is None else p.attention.dense.bias
        assert_close(result.sum(axis=2) + bias, cache[f"blocks.{i}.hook_attn_out"], FLOAT64)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_head_silenced_in_its_result_is_one_silenced_before(config: Config) -> None:
    def silence(array: np.ndarray) -> None:
        array[:, :, 2] = 0

    model = model_of(config)
    by_result, by_z = (
        run_with_hooks(model, IDS, {f"blocks.1.attn.{name}": silence}) for name in ("hook_result", "hook_z")
    )
    assert_close(by_result, by_z, FLOAT64)
    assert np.abs(by_z - forward(model, IDS)).max() > 1e-3


def test_results_that_are_only_looked_at_change_no_bit() -> None:
    model = random_model(TINY, 0)  # in float32
    for hook in (lambda array: None, np.copy):
        assert np.array_equal(run_with_hooks(model, IDS, {"blocks.*": hook}), forward(model, IDS))


# Patching.


def by_hooks(model: Model, clean: list[int], corrupt: list[int], name: str, index: tuple) -> np.ndarray:  # (1,V)
    """The logits after the corrupt text, with a part of an array of the clean run put in."""
    _, cache = run_with_cache(model, [clean], name)

    def patch(array: np.ndarray) -> np.ndarray:
        patched = array.copy()
        patched[index] = cache[name][index]
        return patched

    return run_with_hooks(model, [corrupt], {name: patch})[:, -1]


@given(seeds)
def test_sweeps_are_single_patches(seed: int) -> None:
    model = model_of(CONFIGS[seed % 2], seed)
    clean, corrupt = draw_ids(TINY, 2, 5, seed).tolist()
    corrupt[0] = clean[0]
    metric = logit_difference(3, 8)
    residual, heads = patch_residual(model, clean, corrupt, metric), patch_heads(model, clean, corrupt, metric)
    for i in range(TINY.num_hidden_layers):
        for t in range(5):
            logits = by_hooks(model, clean, corrupt, f"blocks.{i}.hook_resid_pre", np.s_[:, t])
            assert_close(residual[i, t : t + 1], metric(logits), FLOAT64)
        for h in range(TINY.num_attention_heads):
            logits = by_hooks(model, clean, corrupt, f"blocks.{i}.attn.hook_z", np.s_[:, :, h])
            assert_close(heads[i, h : h + 1], metric(logits), FLOAT64)
    before, after = (metric(forward(model, [ids])[:, -1]) for ids in (corrupt, clean))
    assert_close(residual[0, :1], before, FLOAT64)  # the same id there: nothing changes
    assert abs(before - after) > 1e-3


def test_texts_of_different_lengths_cannot_be_patched() -> None:
    with pytest.raises(InputError, match="equally long, not 2 and 3 tokens"):
        patch_residual(model_of(), [1, 2], [1, 2, 3], logit_difference(0, 1))


@given(st.integers(0, 2), seeds)
def test_a_head_without_its_output_is_a_model_without_its_columns(head: int, seed: int) -> None:
    """Zeroing z of a head is zeroing its columns of `dense`, which no other name of the pass can tell."""
    model = model_of(TINY, seed)
    p = model.params.layers[0].attention
    D = TINY.head_dim

    def silent(z: np.ndarray) -> np.ndarray:
        z = z.copy()
        z[..., head, :] = 0
        return z

    weight = p.dense.weight.copy()
    weight[:, head * D : (head + 1) * D] = 0
    cut = replace(p, dense=replace(p.dense, weight=weight))
    layers = [replace(model.params.layers[0], attention=cut), *model.params.layers[1:]]
    without = replace(model, params=replace(model.params, layers=layers))
    assert_close(run_with_hooks(model, IDS, {"blocks.0.attn.hook_z": silent}), forward(without, IDS), FLOAT64)


# TransformerLens, its names and its numbers.


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_hooks", GOLDEN / "make_hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_shared(found: Mapping[str, np.ndarray], config: Config, ids: np.ndarray) -> None:
    """1e-5 of the largest number of each array: some ten float32 roundings, of two orders of the sums."""
    _, cache = run_with_cache(random_model(config, 0), ids)
    assert set(found) == {name for name in cache if not name.endswith(NOT_THEIRS)}
    for name, array in found.items():
        seen = np.isfinite(cache[name])
        assert not (seen & (array == np.finfo(np.float32).min)).any()
        assert_close(np.where(seen, cache[name], 0), np.where(seen, array, 0), 1e-5)


def test_every_name_is_what_transformer_lens_calls_so() -> None:
    with np.load(Path(__file__).with_name("data") / "hooks.npz") as found:
        assert_shared(found, HOOKED, draw_ids(HOOKED, 2, 9, 0))


@pytest.mark.oracle
def test_every_name_is_what_transformer_lens_calls_so_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformer_lens", reason="transformer_lens is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    ids = draw_ids(TINY, 1, 50, 3)
    found = load_script().seen_by_transformer_lens(TINY, ids)
    assert_shared({name: found[name] for name in hook_names(TINY) if not name.endswith(NOT_THEIRS)}, TINY, ids)
