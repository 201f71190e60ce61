"""The whole model on a device against the reference: drawn shapes, dtypes and schedules, and numbers that overflow."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from devices import DTYPES, ROUNDING, all_devices, devices, error, stopped_by_the_host
from gpu_models import SMALL, STEP, assert_right, device_configs, drawn, in_float64
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutants import mutant
from numpy.typing import NDArray
from strategies import draw_ids, seeds

from neox.gpu import model as gpu_model
from neox.gpu.device import Device
from neox.gpu.load import to_device
from neox.gpu.model import forward, new_workspace
from neox.reference.config import Config
from neox.reference.errors import InputError
from neox.reference.model import Model
from neox.reference.model import forward as reference_forward


@settings(max_examples=25)
@given(devices(), device_configs(), st.integers(1, 3), st.integers(1, 20), st.sampled_from(DTYPES), seeds)
def test_logits_err_no_more_than_a_plain_computation(device, config, batch, length, dtype, seed) -> None:
    model = drawn(config, seed % 7, dtype)
    ids = draw_ids(config, batch, length, seed)
    assert_right(forward(to_device(model, device, dtype), ids), model, ids, dtype)


def test_texts_in_groups_are_the_texts_together(monkeypatch) -> None:
    device, ids = all_devices()[0], draw_ids(SMALL, 5, 7, 0)
    model = to_device(drawn(SMALL, 0, "float32"), device, "float32")
    together = forward(model, ids)
    monkeypatch.setattr(gpu_model, "GROUP", 15)
    assert np.array_equal(forward(model, ids), together)


def test_wrong_ids_are_refused() -> None:
    model = to_device(drawn(SMALL, 0, "float32"), all_devices()[0], "float32")
    for ids, message in [([[101]], "outside the vocabulary"), ([[0] * 65], "context is 64"), ([0], "batch, seq")]:
        with pytest.raises(InputError, match=message):
            forward(model, np.array(ids))


def with_scores_beyond_float16(model: Model) -> Model:
    """Queries and keys of some hundreds: their products exceed 65504 before they are scaled."""
    layers = []
    for p in model.params.layers:
        qkv = p.attention.query_key_value
        grown = replace(qkv, weight=np.float32(128) * qkv.weight)
        layers.append(replace(p, attention=replace(p.attention, query_key_value=grown)))
    return replace(model, params=replace(model.params, layers=tuple(layers)))


def with_a_channel_beyond_float16(model: Model) -> Model:
    """The bias of each MLP adds 50000 to one channel of the residual stream."""
    layers = []
    for p in model.params.layers:
        assert p.mlp.dense_4h_to_h.bias is not None
        bias = p.mlp.dense_4h_to_h.bias.copy()
        bias[3] = 49984  # representable in float16
        layers.append(replace(p, mlp=replace(p.mlp, dense_4h_to_h=replace(p.mlp.dense_4h_to_h, bias=bias))))
    return replace(model, params=replace(model.params, layers=tuple(layers)))


def largest(model: Model, ids: np.ndarray, part: str) -> float:
    """Of an intermediate of the reference."""
    found = []

    def tap(name, array):
        if part in name:
            found.append(float(np.abs(array[np.isfinite(array)]).max()))
        return array

    reference_forward(model, ids, tap)
    return max(found)


@pytest.mark.parametrize("parallel", [True, False])
def test_scores_beyond_float16_stay_finite(parallel) -> None:
    config = replace(SMALL, use_parallel_residual=parallel, num_hidden_layers=1)
    model = with_scores_beyond_float16(drawn(config, 0, "float16"))
    ids = draw_ids(config, 2, 11, 0)
    assert largest(in_float64(model), ids, "attn_scores") * np.sqrt(24) > 65504
    for device in all_devices():
        logits = forward(to_device(model, device, "float16"), ids)
        assert_right(logits, model, ids, "float16", wide=("scores",))


@pytest.mark.parametrize("parallel", [True, False])
def test_a_residual_channel_beyond_float16_stays_finite(parallel) -> None:
    config = replace(SMALL, use_parallel_residual=parallel)
    model = with_a_channel_beyond_float16(drawn(config, 0, "float16"))
    ids = draw_ids(config, 2, 11, 0)
    assert largest(in_float64(model), ids, "resid_post") > 65504
    for device in all_devices():
        logits = forward(to_device(model, device, "float16"), ids)
        assert_right(logits, model, ids, "float16", wide=("resid", "out", "scale"))


# Prompts, whose products are a library's, and add into the residual stream.


@pytest.fixture
def many(monkeypatch) -> None:
    """Three rows are many."""
    monkeypatch.setattr(gpu_model, "MANY", 2)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(devices(), device_configs(), st.integers(1, 3), st.integers(3, 20), st.sampled_from(DTYPES), seeds)
def test_prompts_err_no_more_than_a_plain_computation(many, device, config, batch, length, dtype, seed) -> None:
    model = drawn(config, seed % 7, dtype)
    ids = draw_ids(config, batch, length, seed)
    assert_right(forward(to_device(model, device, dtype), ids), model, ids, dtype)


def check_prompt(config: Config, dtype: str) -> NDArray:
    """5 texts of 52 positions are more rows than MANY."""
    model, ids = drawn(config, 3, dtype), draw_ids(config, 5, 52, 1)
    logits = forward(to_device(model, all_devices()[0], dtype), ids)
    assert_right(logits, model, ids, dtype)
    return logits


PROMPTS = [
    replace(SMALL, num_hidden_layers=2, use_parallel_residual=parallel, hidden_act=act)
    for parallel in (True, False)
    for act in ("gelu", "gelu_fast")
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", PROMPTS)
def test_a_prompt_of_many_rows_is_what_kernels_compute(config, dtype, monkeypatch) -> None:
    by_library = check_prompt(config, dtype)
    monkeypatch.setattr(gpu_model, "MANY", 5 * 52)
    for method in ("matmul", "matmul_gelu_fast"):
        monkeypatch.setattr(Device, method, None)
    by_kernels = check_prompt(config, dtype)
    # Two orders of additions. Where rows are rounded to 16 bits, a number close to the middle may go either way.
    order = 4 * (2 * config.num_hidden_layers + 2) * STEP
    floor = order if dtype == "float32" else 2 * ROUNDING[dtype]
    assert error(by_library, by_kernels) <= floor * np.abs(by_kernels).max()


@pytest.mark.parametrize("config", PROMPTS)
def test_sums_of_a_prompt_are_neither_written_nor_read(config, monkeypatch) -> None:
    def without(model: gpu_model.Model, count: int) -> gpu_model.Workspace:
        work = new_workspace(model, count)
        nothing = model.device.empty((count, 0), np.float32)
        hidden = nothing if config.hidden_act == "gelu_fast" else work.hidden
        return replace(work, attention=nothing, mlp=nothing, hidden=hidden)

    monkeypatch.setattr(gpu_model, "new_workspace", without)
    check_prompt(config, "float16")


@pytest.mark.parametrize("config", PROMPTS)
def test_a_library_without_epilogues_does_as_well(config, monkeypatch) -> None:
    monkeypatch.setattr(Device, "matmul_gelu_fast", lambda *_: False)
    check_prompt(config, "float16")


WRONG_PROMPTS = [
    ("add_linear", "p.wide_bias", "None"),
    ("add_linear", "add=True", "add=False"),
    (
        "add_linear",
        "        x.device.matmul",
        "        x.device.matmul(x, p.weight, residual, add=True)\n        x.device.matmul",
    ),
    ("add_linear", "        x.device.matmul", "        residual.set(2 * residual.get())\n        x.device.matmul"),
    ("_add_branches", "add_linear(work.activated, down, work.mlp, work.x)", "pass"),
    ("_add_branches", "add_linear(work.z, dense, work.attention, work.x)", "pass"),
    ("_add_branches", "add_linear(work.z, dense,", "add_linear(work.z, Linear(dense.weight, None),"),
    ("_add_branches", "add_linear(work.activated, down,", "add_linear(work.activated, Linear(down.weight, None),"),
    ("_add_branches", "add_linear(work.z, dense,", "add_linear(work.z, Linear(dense.weight, down.bias),"),
    ("_sequential_layer", "add_linear(work.z, p.attention.dense, work.attention, work.x)", "pass"),
    (
        "_sequential_layer",
        "p.attention.dense, work.attention",
        "Linear(p.attention.dense.weight, None), work.attention",
    ),
    ("_sequential_layer", "dense_4h_to_h, work.mlp, work.x)", "dense_4h_to_h, work.x, work.mlp)"),
]


@stopped_by_the_host
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("function", "right", "wrong"), WRONG_PROMPTS)
def test_a_wrong_prompt_is_noticed(function, right, wrong, dtype, monkeypatch) -> None:
    changed = mutant(wrong, "check_prompt", function, (right, wrong), module=gpu_model)
    monkeypatch.setattr(gpu_model, function, changed.build())
    with pytest.raises(AssertionError):
        check_prompt(replace(SMALL, num_hidden_layers=1, use_parallel_residual=function != "_sequential_layer"), dtype)


def check_both_ways_up() -> None:
    """gelu_fast is up to 4.7e-4 away from gelu, which float32 shows."""
    for hidden_act in ("gelu", "gelu_fast"):
        check_prompt(replace(SMALL, num_hidden_layers=1, hidden_act=hidden_act), "float32")


@stopped_by_the_host
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ('hidden_act == "gelu_fast"', "True"),
        ("if not (many and", "if False and not (many and"),
        ("if not (many and", "if many and not (many and"),
        ("up.weight, up.bias,", "up.weight, x.device.zeros(up.bias.shape, up.bias.dtype),"),
    ],
)
def test_a_wrong_way_up_is_noticed(right, wrong, monkeypatch) -> None:
    changed = mutant(wrong, "check_both_ways_up", "neurons", (right, wrong), module=gpu_model)
    monkeypatch.setattr(gpu_model, "neurons", changed.build())
    with pytest.raises(AssertionError):
        check_both_ways_up()
