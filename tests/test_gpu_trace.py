"""What a device shows of a pass is what the reference computes, and what is put in its place is what goes on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from closeness import assert_close
from devices import DTYPES, ROUNDING, all_devices, assert_no_worse, devices
from gpu_models import SMALL, STEP, device_configs, drawn, in_float64
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from strategies import draw_ids, seeds

from neox.gpu.device import Array, Device
from neox.gpu.load import to_device
from neox.gpu.model import forward
from neox.gpu.trace import POINTS, run_with_cache, run_with_hooks
from neox.reference import trace
from neox.reference.errors import InputError
from neox.reference.model import forward as reference_forward

SEQUENTIAL = replace(SMALL, use_parallel_residual=False)
IDS = draw_ids(SMALL, 2, 9, 0)


def on_device(dtype: str = "float32", config=SMALL):
    return to_device(drawn(config, 0, dtype), all_devices()[0], dtype)


@settings(max_examples=12)
@given(
    devices(), device_configs(), st.integers(1, 2), st.integers(1, 11), st.sampled_from(["float32", "float16"]), seeds
)
def test_what_is_shown_is_what_the_reference_computes(device, config, batch, length, dtype, seed) -> None:
    model = drawn(config, seed % 7, dtype)
    ids = draw_ids(config, batch, length, seed)
    logits, cache = run_with_cache(ours := to_device(model, device, dtype), ids)
    assert np.array_equal(logits, forward(ours, ids))
    _, exact = trace.run_with_cache(in_float64(model), ids)
    names = [name for name in trace.hook_names(config) if name.endswith(POINTS)]
    assert list(cache) == names
    assert len(names) == 1 + 3 * config.num_hidden_layers
    for name in names:
        # Some eight roundings follow each other in a layer, each moves a number by ROUNDING of the largest at most; a
        # head or a position in another's place is off by as much as the numbers. test_gpu_model.py is stricter.
        bound = 8 * (config.num_hidden_layers + 1) * ROUNDING[dtype]
        assert cache[name].dtype == np.float32
        assert_close(cache[name], exact[name], bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", [SMALL, SEQUENTIAL])
def test_hooks_that_change_nothing_change_no_bit(config, dtype) -> None:
    model, seen = on_device(dtype, config), []
    expected = forward(model, IDS)
    assert np.array_equal(run_with_hooks(model, IDS, {"*": lambda array: seen.append(array.shape)}), expected)
    assert np.array_equal(run_with_hooks(model, IDS, {"*": lambda array: array.copy()}), expected)
    stream, heads = (2, 9, config.hidden_size), (2, 9, config.num_attention_heads, config.head_dim)
    assert seen == [stream, *[stream, heads, stream] * config.num_hidden_layers]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["hook_embed", "blocks.0.hook_resid_post", "blocks.1.hook_resid_pre", "*"])
def test_patching_everything_is_the_other_run(name, dtype) -> None:
    model, others = on_device(dtype), draw_ids(SMALL, 2, 9, 1)
    expected, cache = run_with_cache(model, others)
    seen = iter(cache)

    def put(array: NDArray) -> NDArray:
        return cache[next(seen) if name == "*" else name]

    assert not np.array_equal(forward(model, IDS), expected)
    assert np.array_equal(run_with_hooks(model, IDS, {name: put}), expected)


@pytest.mark.parametrize("config", [SMALL, SEQUENTIAL])
@pytest.mark.parametrize(
    "name", ["hook_embed", "blocks.1.hook_resid_pre", "blocks.0.attn.hook_z", "blocks.2.attn.hook_z"]
)
def test_a_change_has_the_effect_it_has_in_the_reference(config, name) -> None:
    """A head, or a position of a text, is taken away; in place, or by another array."""

    def cut(array: NDArray) -> None:
        array[1, 2:, 1] = 0

    def without(array: NDArray) -> NDArray:
        array = array.copy()
        cut(array)
        return array

    model = drawn(config, 0, "float32")
    ours = to_device(model, all_devices()[0], "float32")
    changed = run_with_hooks(ours, IDS, {name: without})
    assert np.array_equal(run_with_hooks(ours, IDS, {name: cut}), changed)
    exact = trace.run_with_hooks(in_float64(model), IDS, {name: without})
    assert np.abs(exact - reference_forward(in_float64(model), IDS)).max() > 1e-3
    plainly = trace.run_with_hooks(model, IDS, {name: without})
    floor = 4 * (2 * config.num_hidden_layers + 2) * STEP * np.abs(exact).max()
    assert_no_worse(changed, plainly, exact, floor)


def test_a_stopped_run_is_a_prefix_of_the_whole() -> None:
    model = on_device()
    _, whole = run_with_cache(model, IDS)
    for stop in range(SMALL.num_hidden_layers + 1):
        x, cache = run_with_cache(model, IDS, stop_at_layer=stop)
        assert np.array_equal(x, whole[f"blocks.{stop - 1}.hook_resid_post" if stop else "hook_embed"])
        assert list(cache) == list(whole)[: 1 + 3 * stop]
        assert all(np.array_equal(array, whole[name]) for name, array in cache.items())
    for stop in (-1, SMALL.num_hidden_layers + 1):
        with pytest.raises(InputError, match="stop_at_layer must be from 0 to"):
            run_with_cache(model, IDS, stop_at_layer=stop)


def test_only_what_is_asked_for_is_copied(monkeypatch) -> None:
    model = on_device()
    copied: list[tuple[int, ...]] = []
    read = type(model.device)._read

    def counted(device: Device, array: Array) -> bytes | bytearray:
        copied.append(array.shape)
        return read(device, array)

    monkeypatch.setattr(type(model.device), "_read", counted)
    run_with_cache(model, IDS, "blocks.1.attn.hook_z")
    assert copied == [(18, SMALL.hidden_size), (18, SMALL.vocab_size)]  # and the logits


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("blocks.0.attn.hook_pattern", "a device shows .* only, not 'blocks.0.attn.hook_pattern'"),
        (["hook_embed", "ln_final.*"], "a device shows .* only, not 'ln_final"),
        ("blocks.7.hook_resid_pre", "nothing in the model is called"),
    ],
)
def test_names_that_a_device_does_not_show_are_refused(names, message) -> None:
    with pytest.raises(InputError, match=message):
        run_with_cache(on_device(), IDS, names)
    with pytest.raises(InputError, match=message):
        run_with_hooks(on_device(), IDS, dict.fromkeys([names] if isinstance(names, str) else names, np.copy))


def test_names_may_be_chosen_by_a_function() -> None:
    _, cache = run_with_cache(on_device(), IDS, lambda name: name.startswith("blocks.1."))
    assert list(cache) == [f"blocks.1.{name}" for name in ("hook_resid_pre", "attn.hook_z", "hook_resid_post")]
