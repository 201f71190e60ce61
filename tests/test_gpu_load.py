"""Weights onto a device: which they are, what is said before, and what is refused in one line."""

from __future__ import annotations

import sys
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from devices import DTYPES, all_devices
from gpu_models import SMALL, drawn, rounded

import neox.gpu as gpu
import neox.reference as reference
from neox.gpu.device import Array, HostDevice
from neox.gpu.load import require_memory
from neox.reference import GPT_NEOX_20B, PYTHIA, Config, InputError, parameter_count, shipped
from neox.reference.checkpoint.save import model_files, write_folder
from neox.reference.checkpoint.tensors import named_tensors
from neox.reference.config import read_config
from neox.reference.random_weights import random_model

loading = sys.modules["neox.gpu.load"]  # neox.gpu.load is the function


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
    monkeypatch.setattr(loading, "open_model", lambda *_, **__: sys.exit("read"))
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


# Readers.


class LateDevice(HostDevice):
    """Copies from staging memory as late as a card may: when a mark after them is waited for."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.late: list[tuple[Array, np.ndarray]] = []
        self.done = 0

    def _copy_later(self, target: Array, values: np.ndarray) -> None:
        self.late.append((target, values))

    def _mark(self) -> int:
        return len(self.late)

    def _wait(self, mark: float) -> None:
        for target, values in self.late[self.done : int(mark)]:
            super()._copy_later(target, values)
        self.done = max(self.done, int(mark))

    def _synchronize(self) -> None:
        self._wait(len(self.late))


@pytest.mark.parametrize(("piece", "readers"), [(7, 3), (61 * 48, 1), (1 << 20, 8)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_arrives_whatever_the_pieces_and_however_late(monkeypatch, piece, readers, dtype) -> None:
    monkeypatch.setattr(loading, "PIECE", piece)
    monkeypatch.setattr(loading, "READERS", readers)
    source = drawn(SMALL, 3, "float32")
    model = gpu.to_device(source, LateDevice(), dtype)
    ours: dict[str, Any] = named_tensors(SMALL, model.params)  # type: ignore[arg-type]
    theirs = named_tensors(SMALL, source.params)
    assert list(ours) == list(theirs)
    for name, array in theirs.items():
        assert np.array_equal(ours[name].get().astype(np.float32), rounded(array, dtype)), name


def test_readers_work_at_the_same_time(monkeypatch) -> None:
    """Each of the first two waits until the other has begun."""
    both, fill = threading.Barrier(2), loading._fill
    monkeypatch.setattr(loading, "READERS", 2)

    def together(source, start, out) -> None:
        if source.name.endswith(("embed_in.weight", "layers.0.input_layernorm.weight")):
            both.wait(timeout=30)
        fill(source, start, out)

    monkeypatch.setattr(loading, "_fill", together)
    gpu.to_device(drawn(SMALL, 0, "float32"), HostDevice(), "float32")


def test_one_reader_that_fails_ends_all_with_one_line(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(loading, "PIECE", 100)
    model = random_model(SMALL)
    model.params.layers[1].mlp.dense_4h_to_h.weight[3, 5] = np.nan
    folder = tmp_path / "model"
    write_folder(folder, model_files(model, "float32", b"{}"))
    before = threading.active_count()
    with pytest.raises(
        InputError, match=r"layers.1.mlp.dense_4h_to_h.weight holds values that are not finite"
    ) as caught:
        gpu.load(folder, "float16", LateDevice())
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert threading.active_count() == before


def test_what_comes_after_a_failure_is_not_read(monkeypatch) -> None:
    monkeypatch.setattr(loading, "READERS", 1)
    read: list[str] = []

    def fails(source, start, out) -> None:
        read.append(source.name)
        raise InputError("the disk is gone")

    monkeypatch.setattr(loading, "_fill", fails)
    with pytest.raises(InputError, match="the disk is gone"):
        gpu.to_device(drawn(SMALL, 0, "float32"), HostDevice(), "float32")
    assert len(read) <= 4  # as many as there are buffers, of dozens


def test_staging_of_another_shape_is_refused() -> None:
    device = all_devices()[0]
    with pytest.raises(ValueError, match="cannot be copied to"):
        device.copy_later(device.empty(3, "float32"), device.staging(16).view("float32"))
