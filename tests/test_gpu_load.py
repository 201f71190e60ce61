"""Weights onto a device: which they are, what is said before, and what is refused in one line."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
from devices import DTYPES, all_devices
from gpu_models import SMALL, drawn, rounded

import neox.gpu as gpu
import neox.reference as reference
from neox.gpu.device import HostDevice
from neox.gpu.load import require_memory
from neox.reference import GPT_NEOX_20B, PYTHIA, Config, InputError, parameter_count, shipped
from neox.reference.config import read_config


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_the_checkpoints_rounded(dtype) -> None:
    model, source = gpu.load(shipped.path(), dtype, all_devices()[0]), reference.load(shipped.path())
    assert model.dtype == model.params.layers[-1].mlp.dense_4h_to_h.weight.dtype
    (*_, layer), (*_, same) = model.params.layers, source.params.layers
    for ours, theirs in [
        (model.params.embed_in, source.params.embed_in),
        (layer.attention.query_key_value.weight, same.attention.query_key_value.weight),
        (layer.mlp.dense_4h_to_h.bias, same.mlp.dense_4h_to_h.bias),
        (model.params.embed_out, source.params.embed_out),
    ]:
        assert ours is not None
        assert theirs is not None
        assert ours.dtype == model.dtype
        assert np.array_equal(ours.get().astype(np.float32), rounded(theirs, dtype))


def test_a_tied_head_is_the_embedding_itself() -> None:
    tied = replace(SMALL, tie_word_embeddings=True)
    params = gpu.to_device(drawn(tied, 0, "float32"), all_devices()[0], "float32").params
    assert params.embed_out is params.embed_in


def test_overrides_and_the_device_by_name() -> None:
    model = gpu.load(shipped.path(), device="host", hidden_act="gelu")
    assert isinstance(model.device, HostDevice)
    assert model.config.hidden_act == "gelu"
    assert model.dtype == np.float16


def test_the_memory_needed_is_said_before_anything_is_read(capsys, monkeypatch) -> None:
    module = sys.modules["neox.gpu.load"]  # neox.gpu.load is the function
    monkeypatch.setattr(module, "load_reference", lambda *_, **__: sys.exit("read"))
    monkeypatch.setattr(all_devices()[0], "_free_memory", lambda: 24_000_000_000)
    with pytest.raises(SystemExit, match="read"):
        gpu.load(shipped.path(), device=all_devices()[0])
    size = 2 * parameter_count(read_config(shipped.path())) / 1e9
    assert capsys.readouterr().err == f"weights: {size:.3g} GB as float16, 24 GB free on the device\n"


@pytest.mark.parametrize(
    ("config", "dtype", "free", "message"),
    [
        (GPT_NEOX_20B, "float32", 80e9, "the weights take 82.2 GB as float32, .* 80 GB free; as float16 .* 41.1 GB"),
        (GPT_NEOX_20B, "float16", 24e9, "take 41.1 GB as float16, .* 24 GB free; .* pythia-12b in float16 would fit"),
        (GPT_NEOX_20B, "float32", 10e9, "pythia-2.8b in float16 would fit"),
        (PYTHIA["70m"], "float16", 1e6, "no published model would fit"),
    ],
)
def test_too_small_a_card_is_one_line_with_what_would_fit(monkeypatch, config, dtype, free, message) -> None:
    device = HostDevice()
    monkeypatch.setattr(device, "_free_memory", lambda: int(free))
    with pytest.raises(InputError, match=message) as caught:
        require_memory(config, np.dtype(dtype), device)
    assert "\n" not in str(caught.value)


def test_what_just_fits_is_taken(monkeypatch) -> None:
    device = HostDevice()
    monkeypatch.setattr(device, "_free_memory", lambda: 2 * parameter_count(SMALL))
    require_memory(SMALL, np.dtype("float16"), device)


@pytest.mark.parametrize("dtype", ["float64", "int8", "half"])
def test_an_unknown_dtype_is_refused(dtype) -> None:
    with pytest.raises(InputError, match="dtype must be one of float32, float16, bfloat16"):
        gpu.load(shipped.path(), dtype, "host")


@pytest.mark.parametrize(
    "wrong", [Config(8, 60, 1, 3, 8, rotary_pct=0.2), replace(SMALL, intermediate_size=37)], ids=["head_dim", "MLP"]
)
def test_rows_that_the_kernels_cannot_read_are_refused(wrong) -> None:
    with pytest.raises(InputError, match=r"multiple of 8, not (20|37)"):
        gpu.to_device(drawn(wrong, 0, "float32"), all_devices()[0], "float32")


def test_weights_too_large_for_float16_are_refused() -> None:
    model = drawn(SMALL, 0, "float32")
    embed_in = model.params.embed_in.copy()
    embed_in[3, 5] = 70000
    large = replace(model, params=replace(model.params, embed_in=embed_in))
    with pytest.raises(InputError, match="too large for float16: load the model as bfloat16"):
        gpu.to_device(large, all_devices()[0], "float16")
    gpu.to_device(large, all_devices()[0], "bfloat16")
