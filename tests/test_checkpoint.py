"""What is loaded is what the files hold, to the bit, and files that do not fit are refused with all that is wrong."""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from closeness import assert_close
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save_file
from strategies import TINY, configs, draw_ids, random_model

from neox.reference.checkpoint import load as loading
from neox.reference.checkpoint.hub import find
from neox.reference.checkpoint.huggingface import BUFFERS, canonical
from neox.reference.checkpoint.load import is_finite, load
from neox.reference.checkpoint.tensors import EMBED_IN, EMBED_OUT, build_params, tensor_table
from neox.reference.config import GPT_NEOX_20B, Config, config_to_dict
from neox.reference.errors import InputError
from neox.reference.model import Model, forward
from neox.reference.project import project, widen
from neox.reference.random_weights import random_tensor

Tensors = dict[str, NDArray]

STORED_DTYPES = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32), np.dtype(np.float64)]
FIRST_LAYER = "gpt_neox.layers.0"
SMALL = replace(TINY, hidden_size=48, num_attention_heads=2, num_hidden_layers=2, intermediate_size=29, vocab_size=61)


def random_tensors(config: Config, dtype: Any = np.float16, seed: int = 0) -> Tensors:
    return {name: random_tensor(spec, seed).astype(dtype) for name, spec in tensor_table(config).items()}


def write_config(folder: Path, config: Config) -> None:
    (folder / "config.json").write_text(json.dumps(config_to_dict(config)), encoding="utf-8")


def write_single(folder: Path, config: Config, tensors: Tensors) -> Path:
    folder.mkdir(exist_ok=True)
    write_config(folder, config)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def write_sharded(folder: Path, config: Config, tensors: Tensors, shards: int = 3) -> Path:
    folder.mkdir(exist_ok=True)
    write_config(folder, config)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[shard::shards]}
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def read_index(folder: Path) -> dict[str, str]:
    weight_map: dict[str, str] = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return weight_map


def parameters(model: Model) -> Tensors:
    """The arrays of a model under their names in tensor_table."""
    p = model.params
    found: Tensors = {EMBED_IN: p.embed_in, EMBED_OUT: p.embed_out}
    modules: dict[str, Any] = {"gpt_neox.final_layer_norm": p.final_layer_norm}
    for i, layer in enumerate(p.layers):
        for name in ("input_layernorm", "post_attention_layernorm"):
            modules[f"gpt_neox.layers.{i}.{name}"] = getattr(layer, name)
        for name in ("query_key_value", "dense"):
            modules[f"gpt_neox.layers.{i}.attention.{name}"] = getattr(layer.attention, name)
        for name in ("dense_h_to_4h", "dense_4h_to_h"):
            modules[f"gpt_neox.layers.{i}.mlp.{name}"] = getattr(layer.mlp, name)
    for name, module in modules.items():
        found[f"{name}.weight"] = module.weight
        if module.bias is not None:
            found[f"{name}.bias"] = module.bias
    return found


def assert_holds(model: Model, tensors: Mapping[str, NDArray]) -> None:
    """Every tensor of the model is the stored one, at its own place, exactly."""
    found = parameters(model)
    if model.config.tie_word_embeddings:
        assert found.pop(EMBED_OUT) is found[EMBED_IN]
    assert set(found) == set(tensors)
    for name, array in found.items():
        np.testing.assert_array_equal(array.astype(np.float64), tensors[name].astype(np.float64), err_msg=name)


def is_mapped(array: NDArray) -> bool:
    base: Any = array
    while base is not None and not isinstance(base, np.memmap):
        base = base.base
    return base is not None


def refusal(function: Callable[..., object], *args: Any, **kwargs: Any) -> str:
    """The text of the InputError that the call must raise: one line."""
    with pytest.raises(InputError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


# The table.


def test_the_20b_has_532_tensors_of_the_published_shapes() -> None:
    table = tensor_table(GPT_NEOX_20B)
    assert len(table) == 44 * 12 + 4
    shapes = {
        "gpt_neox.embed_in.weight": (50432, 6144),
        "gpt_neox.layers.43.input_layernorm.weight": (6144,),
        "gpt_neox.layers.43.post_attention_layernorm.bias": (6144,),
        "gpt_neox.layers.43.attention.query_key_value.weight": (18432, 6144),
        "gpt_neox.layers.43.attention.query_key_value.bias": (18432,),
        "gpt_neox.layers.43.attention.dense.weight": (6144, 6144),
        "gpt_neox.layers.43.attention.dense.bias": (6144,),
        "gpt_neox.layers.43.mlp.dense_h_to_4h.weight": (24576, 6144),
        "gpt_neox.layers.43.mlp.dense_h_to_4h.bias": (24576,),
        "gpt_neox.layers.43.mlp.dense_4h_to_h.weight": (6144, 24576),
        "gpt_neox.layers.43.mlp.dense_4h_to_h.bias": (6144,),
        "gpt_neox.final_layer_norm.bias": (6144,),
        "embed_out.weight": (50432, 6144),
    }
    assert {name: table[name].shape for name in shapes} == shapes


def test_two_shards_of_the_20b_hold_what_the_published_two_hold() -> None:
    # Both halves of the 20B as trained have 20,556,201,984 numbers: what is not cut is there twice.
    copies = {"vocabulary": 1, "column": 1, "row": 1, "summed": 2, "replicated": 2}
    total = sum(spec.size * copies[spec.sharding] for spec in tensor_table(GPT_NEOX_20B).values())
    assert total == 20_556_201_984


def test_each_tensor_is_sharded_as_gpt_neox_does() -> None:
    table = tensor_table(SMALL)
    expected = {
        "gpt_neox.embed_in.weight": "vocabulary",
        "embed_out.weight": "vocabulary",
        f"{FIRST_LAYER}.attention.query_key_value.weight": "column",
        f"{FIRST_LAYER}.attention.query_key_value.bias": "column",
        f"{FIRST_LAYER}.mlp.dense_h_to_4h.weight": "column",
        f"{FIRST_LAYER}.mlp.dense_h_to_4h.bias": "column",
        f"{FIRST_LAYER}.attention.dense.weight": "row",
        f"{FIRST_LAYER}.mlp.dense_4h_to_h.weight": "row",
        f"{FIRST_LAYER}.attention.dense.bias": "summed",
        f"{FIRST_LAYER}.mlp.dense_4h_to_h.bias": "summed",
        f"{FIRST_LAYER}.input_layernorm.weight": "replicated",
        "gpt_neox.final_layer_norm.bias": "replicated",
    }
    assert {name: table[name].sharding for name in expected} == expected


@given(configs())
def test_params_are_built_from_each_tensor_once(config: Config) -> None:
    asked: list[str] = []

    def get(spec: Any) -> NDArray:
        asked.append(spec.name)
        return random_tensor(spec)

    model = Model(config, build_params(config, get))
    assert asked == list(tensor_table(config))
    assert_holds(model, random_tensors(config, np.float32))


# Random weights.


def test_random_models_of_one_seed_agree_between_dtypes_and_differ_between_seeds() -> None:
    single, double = (parameters(random_model(SMALL, 5, dtype)) for dtype in ("float32", "float64"))
    other = parameters(random_model(SMALL, 6))
    for name, array in single.items():
        assert array.dtype == np.float32
        assert double[name].dtype == np.float64
        np.testing.assert_array_equal(array, double[name])
        assert not np.array_equal(array, other[name])


def test_tensors_of_one_shape_are_drawn_apart() -> None:
    norms = [array for name, array in parameters(random_model(SMALL)).items() if name.endswith("norm.bias")]
    assert len(norms) == 5
    assert len({array.tobytes() for array in norms}) == 5


def test_random_weights_have_their_stated_scale() -> None:
    kinds: dict[str, list[NDArray]] = {"embedding": [], "matrix": [], "norm": [], "bias": []}
    for name, array in parameters(random_model(TINY, 1)).items():
        if name == EMBED_IN:
            kinds["embedding"].append(array)
        elif array.ndim == 2:
            kinds["matrix"].append(array * array.shape[1] ** 0.5)
        else:
            kinds["norm" if name.endswith("norm.weight") else "bias"].append(array)
    expected = {"embedding": (0, 1), "matrix": (0, 1), "norm": (1, 0.3), "bias": (0, 0.3)}
    for kind, (mean, deviation) in expected.items():
        values = np.concatenate([array.ravel() for array in kinds[kind]])
        error = deviation / values.size**0.5  # of the mean, and less of the deviation
        assert max(abs(values.mean() - mean), abs(values.std() - deviation)) < 5 * error, kind


# Loading.


@given(configs(), st.sampled_from(STORED_DTYPES), st.sampled_from(["float32", "float64"]), st.sampled_from([1, 3]))
def test_what_is_loaded_is_what_was_stored(
    tmp_path_factory: pytest.TempPathFactory, config: Config, stored: np.dtype, dtype: str, shards: int
) -> None:
    folder = tmp_path_factory.mktemp("model")
    tensors = random_tensors(config, stored)
    if shards == 1:
        write_single(folder, config, tensors)
    else:
        write_sharded(folder, config, tensors, shards)
    upcast = load(folder, dtype, weights="upcast")
    assert upcast.config == config
    assert upcast.dtype == np.dtype(dtype)
    assert all(array.dtype == upcast.dtype for array in parameters(upcast).values())
    assert_holds(upcast, {name: array.astype(dtype) for name, array in tensors.items()})
    kept = load(folder, dtype, weights="stored")
    assert all(a.dtype == (stored if a.ndim == 2 else np.dtype(dtype)) for a in parameters(kept).values())
    ids = draw_ids(config, 2, 7, seed=0)
    # Only the order of the sums differs: stored matrices are multiplied a few rows at a time.
    assert_close(forward(kept, ids), forward(upcast, ids), rtol=1e-5 if dtype == "float32" else 1e-13)


def test_logits_are_those_of_the_model_that_was_saved(tmp_path: Path) -> None:
    saved = random_model(TINY, 3)
    folder = write_sharded(tmp_path / "model", TINY, random_tensors(TINY, np.float32, seed=3))
    ids = draw_ids(TINY, 2, 11, seed=1)
    np.testing.assert_array_equal(forward(load(folder), ids), forward(saved, ids))


def test_stored_half_precision_gives_the_logits_of_upcast(tmp_path: Path) -> None:
    folder = write_single(tmp_path / "model", TINY, random_tensors(TINY))
    ids = draw_ids(TINY, 2, 37, seed=1)
    upcast = forward(load(folder, weights="upcast"), ids)
    assert_close(forward(load(folder, weights="stored"), ids), upcast, rtol=1e-6)
    assert_close(upcast, forward(load(folder, dtype="float64"), ids), rtol=1e-5)


@pytest.mark.parametrize(("stored", "dtype"), [(np.float32, "float32"), (np.float64, np.float64)])
@pytest.mark.parametrize("weights", ["auto", "upcast", "stored"])
def test_nothing_is_copied_when_the_file_has_the_dtype(tmp_path: Path, stored: Any, dtype: Any, weights: str) -> None:
    folder = write_single(tmp_path / "model", SMALL, random_tensors(SMALL, stored))
    for name, array in parameters(load(folder, dtype, weights)).items():
        assert (is_mapped(array), array.flags.writeable) == (True, False), name


def test_stored_matrices_stay_on_disk(tmp_path: Path) -> None:
    folder = write_single(tmp_path / "model", SMALL, random_tensors(SMALL))
    assert all(is_mapped(a) == (a.ndim == 2) for a in parameters(load(folder, weights="stored")).values())
    assert not any(is_mapped(a) for a in parameters(load(folder, weights="upcast")).values())


def test_tensors_that_are_not_aligned_are_aligned(tmp_path: Path) -> None:
    folder = write_single(tmp_path / "model", SMALL, random_tensors(SMALL, np.float32))
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    shifted = content[8 : 8 + length] + b" "  # JSON may end in a space
    path.write_bytes(struct.pack("<Q", length + 1) + shifted + content[8 + length :])
    model = load(folder)
    assert all(array.flags.aligned for array in parameters(model).values())
    assert_holds(model, random_tensors(SMALL, np.float32))


# Which way, and what is said about it.


def loaded_with_memory(monkeypatch: pytest.MonkeyPatch, folder: Path, available: int) -> Model:
    monkeypatch.setattr(loading, "available_memory", lambda: available)
    return load(folder)


def test_auto_converts_what_takes_half_of_the_available_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = random_tensors(SMALL)
    folder = write_single(tmp_path / "model", SMALL, tensors)
    needed = 4 * sum(array.size for array in tensors.values())
    converted = loaded_with_memory(monkeypatch, folder, 2 * needed)
    assert converted.params.embed_in.dtype == np.float32
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "upcast" in err
    assert "float16" in err
    assert f"{needed / 1e9:.3g} GB as float32" in err
    kept = loaded_with_memory(monkeypatch, folder, 2 * needed - 1)
    assert kept.params.embed_in.dtype == np.float16
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "stored" in err
    assert "float16" in err


def test_nothing_is_said_when_there_is_nothing_to_choose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    half = write_single(tmp_path / "half", SMALL, random_tensors(SMALL))
    single = write_single(tmp_path / "single", SMALL, random_tensors(SMALL, np.float32))
    load(half, weights="upcast")
    load(half, weights="stored")
    loaded_with_memory(monkeypatch, single, 0)
    assert capsys.readouterr() == ("", "")


def test_available_memory_is_a_part_of_the_machines() -> None:
    assert 0 < loading.available_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_overrides_replace_fields_of_the_config(tmp_path: Path) -> None:
    folder = write_single(tmp_path / "model", SMALL, random_tensors(SMALL, np.float32))
    model = load(folder, hidden_act="gelu_python", rotary_dtype="float16", layer_norm_eps=1e-3)
    assert model.config == replace(SMALL, hidden_act="gelu", rotary_dtype="float16", layer_norm_eps=1e-3)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"hidden_activation": "gelu"}, ["hidden_activation", "hidden_act"]),
        ({"hidden_act": "relu"}, ["relu"]),
        ({"dtype": "float16"}, ["float16", "float32", "float64"]),
        ({"dtype": np.int32}, ["int32"]),
        ({"weights": "mapped"}, ["mapped", "auto, upcast, stored"]),
        ({"num_hidden_layers": 1}, ["unexpected", "gpt_neox.layers.1.mlp.dense_4h_to_h.bias"]),
    ],
)
def test_arguments_that_cannot_be_are_refused(tmp_path: Path, arguments: dict[str, Any], named: list[str]) -> None:
    folder = write_single(tmp_path / "model", SMALL, random_tensors(SMALL, np.float32))
    message = refusal(load, folder, **arguments)
    assert all(part in message for part in named), message


# Names that have been in use.


@pytest.mark.parametrize("write", [write_single, write_sharded])
@pytest.mark.parametrize("rename", ["lm_head", "bare", "both"])
def test_other_names_of_the_same_tensors_are_accepted(tmp_path: Path, write: Any, rename: str) -> None:
    tensors = random_tensors(SMALL, np.float32)
    renamed = {}
    for name, array in tensors.items():
        if rename in ("lm_head", "both"):
            name = name.replace("embed_out.", "lm_head.")
        if rename in ("bare", "both"):
            name = name.removeprefix("gpt_neox.")
        renamed[name] = array
    assert set(renamed) != set(tensors)
    assert_holds(load(write(tmp_path / "model", SMALL, renamed)), tensors)


def test_canonical_names_stay() -> None:
    assert [canonical(name) for name in tensor_table(SMALL)] == list(tensor_table(SMALL))


def test_buffers_are_left_out_and_biases_are_not(tmp_path: Path) -> None:
    tensors = random_tensors(SMALL, np.float32)
    assert not any(BUFFERS.search(name) for name in tensors)
    mask = np.tril(np.ones((1, 1, 64, 64), np.uint8))
    buffers: Tensors = {
        f"{FIRST_LAYER}.attention.bias": mask,
        "gpt_neox.layers.1.attention.bias": mask.astype(bool),
        f"{FIRST_LAYER}.attention.masked_bias": np.array(-1e9, np.float32),
        f"{FIRST_LAYER}.attention.rotary_emb.inv_freq": np.ones(3, np.float16),
        f"{FIRST_LAYER}.attention.rotary_emb.cos_cached": np.ones((64, 6), np.float16),
        "gpt_neox.rotary_emb.sin_cached": np.full((64, 6), np.nan, np.float16),
    }
    assert_holds(load(write_single(tmp_path / "model", SMALL, {**tensors, **buffers})), tensors)


@pytest.mark.parametrize(
    "name",
    [
        f"{FIRST_LAYER}.attention.query_key_value.masked_bias",
        f"{FIRST_LAYER}.attention.bias.weight",
        f"{FIRST_LAYER}.attention.inv_freq",
        "bias",
        "gpt_neox.layers.2.input_layernorm.weight",
        f"model.{FIRST_LAYER}.attention.dense.weight",
    ],
)
def test_any_other_tensor_is_unexpected(tmp_path: Path, name: str) -> None:
    tensors = {**random_tensors(SMALL, np.float32), name: np.ones(3, np.float32)}
    message = refusal(load, write_single(tmp_path / "model", SMALL, tensors))
    assert f"unexpected: {name}" in message
    assert "missing" not in message


def test_biases_are_absent_or_refused_without_attention_bias(tmp_path: Path) -> None:
    config = replace(SMALL, attention_bias=False)
    without = random_tensors(config, np.float32)
    model = load(write_single(tmp_path / "model", config, without))
    assert model.params.layers[0].attention.dense.bias is None
    assert_holds(model, without)
    message = refusal(load, write_single(tmp_path / "more", config, random_tensors(SMALL)))
    for i in range(2):
        for name in ("query_key_value", "dense"):
            assert f"gpt_neox.layers.{i}.attention.{name}.bias" in message
    assert "missing" in refusal(load, write_single(tmp_path / "less", SMALL, without))


def test_a_tied_head_may_be_absent_repeated_or_different(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(SMALL, tie_word_embeddings=True, vocab_size=2500)  # more rows than are compared at a time
    tensors = random_tensors(config, np.float32)
    same = tensors[EMBED_IN].copy()
    for extra in ({}, {EMBED_OUT: same}, {"lm_head.weight": same}):
        model = load(write_single(tmp_path / "tied", config, {**tensors, **extra}))
        assert model.config == config
        assert capsys.readouterr() == ("", "")
        assert_holds(model, tensors)
    different = same.copy()
    different[-1, -1] += 1
    model = load(write_single(tmp_path / "untied", config, {**tensors, EMBED_OUT: different}))
    assert model.config == replace(config, tie_word_embeddings=False)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "embed_out.weight" in err
    assert_holds(model, {**tensors, EMBED_OUT: different})


def test_an_untied_head_must_be_there(tmp_path: Path) -> None:
    tensors = random_tensors(SMALL)
    del tensors[EMBED_OUT]
    assert "missing: embed_out.weight" in refusal(load, write_single(tmp_path / "model", SMALL, tensors))


def test_one_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    tensors = random_tensors(SMALL)
    tensors["lm_head.weight"] = tensors[EMBED_OUT]
    assert "embed_out.weight twice" in refusal(load, write_single(tmp_path / "model", SMALL, tensors))


# Files that do not fit.


def test_everything_that_is_wrong_is_listed_at_once(tmp_path: Path) -> None:
    tensors = random_tensors(SMALL, np.float32)
    for name in ("gpt_neox.final_layer_norm.bias", f"{FIRST_LAYER}.attention.dense.weight"):
        del tensors[name]
    tensors["adapter.weight"] = np.ones(2, np.float32)
    tensors["extra"] = np.ones(2, np.float32)
    qkv, norm = f"{FIRST_LAYER}.attention.query_key_value.weight", "gpt_neox.final_layer_norm.weight"
    tensors[qkv] = np.ascontiguousarray(tensors[qkv].T)
    tensors[norm] = tensors[norm][None]
    tensors[EMBED_OUT] = np.ones((61, 48), np.int8)
    folder = write_sharded(tmp_path / "model", SMALL, tensors)
    message = refusal(load, folder)
    assert str(folder) in message
    assert f"missing: {FIRST_LAYER}.attention.dense.weight, gpt_neox.final_layer_norm.bias;" in message
    assert "unexpected: " in message
    assert "adapter.weight" in message
    assert "extra" in message
    assert f"{qkv} [48, 144] instead of [144, 48]" in message
    assert f"{norm} [1, 48] instead of [48]" in message
    assert "not floating point: embed_out.weight (I8)" in message


def test_a_long_list_ends_in_a_count(tmp_path: Path) -> None:
    tensors = random_tensors(SMALL)
    missing = list(tensors)[1:26]
    message = refusal(
        load, write_single(tmp_path / "model", SMALL, {n: tensors[n] for n in tensors if n not in missing})
    )
    assert all(name in message for name in missing[:20])
    assert "and 5 more" in message
    assert missing[20] not in message


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("stored", STORED_DTYPES, ids=str)
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, value: float, stored: np.dtype) -> None:
    for name in (f"{FIRST_LAYER}.mlp.dense_4h_to_h.weight", "gpt_neox.final_layer_norm.bias"):
        tensors = random_tensors(SMALL, stored)
        tensors[name][..., -1] = value
        folder = write_single(tmp_path / "model", SMALL, tensors)
        for weights in ("upcast", "stored"):
            message = refusal(load, folder, weights=weights)
            assert name in message
            assert "not finite" in message


@pytest.mark.parametrize("stored", STORED_DTYPES, ids=str)
def test_the_largest_numbers_are_finite(stored: np.dtype) -> None:
    finfo: Any = ml_dtypes.finfo
    largest = finfo(stored).max
    assert is_finite(np.array([largest, -largest, 0, -0.0], stored))
    for bad in (np.inf, -np.inf, np.nan, -np.nan):
        assert not is_finite(np.array([[largest, bad, -largest]], stored))


@given(st.integers(0, 2**16 - 1), st.sampled_from(STORED_DTYPES[:2]))
def test_finite_is_what_numpy_calls_finite(bits: int, stored: np.dtype) -> None:
    array = np.array([bits], np.uint16).view(stored)
    with np.errstate(invalid="ignore"):  # some NaNs signal when they are converted
        expected = np.isfinite(array.astype(np.float64)).all()
    assert is_finite(array) == expected


def file_of(folder: Path) -> Path:
    return folder / "model.safetensors"


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda b: b"",
    "shorter than the length of its header": lambda b: b[:5],
    "cut off in the header": lambda b: b[:100],
    "cut off in the last tensor": lambda b: b[:-1],
    "with bytes at the end": lambda b: b + b"\0",
    "header longer than the file": lambda b: struct.pack("<Q", len(b)) + b[8:],
    "header of a terabyte": lambda b: struct.pack("<Q", 10**12) + b[8:],
    "header that is not JSON": lambda b: b[:8] + b"x" + b[9:],
    "an unknown dtype": lambda b: b.replace(b'"F16"', b'"Q16"', 1),
    "a shape that does not fit its bytes": lambda b: b.replace(b"[61,48]", b"[61,49]", 1),
    "a page of HTML": lambda b: b"<!DOCTYPE html><html><body>Not found</body></html>",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    folder = write_single(tmp_path / "model", SMALL, random_tensors(SMALL))
    path = file_of(folder)
    damaged = DAMAGES[damage](path.read_bytes())
    assert damaged != path.read_bytes()
    path.write_bytes(damaged)
    assert str(path) in refusal(load, folder)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "model", SMALL, random_tensors(SMALL))
    shard = folder / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert str(shard) in refusal(load, folder)


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    write_config(tmp_path, SMALL)
    file_of(tmp_path).mkdir()
    assert "Is a directory" in refusal(load, tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    assert "config.json" in refusal(load, tmp_path)
    write_config(tmp_path, SMALL)
    message = refusal(load, tmp_path)
    assert str(tmp_path) in message
    assert "no model.safetensors, no pytorch_model.bin" in message
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "pytorch_model.bin is not a whole file of torch" in refusal(load, tmp_path)


def test_an_index_that_names_missing_files_is_refused(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "model", SMALL, random_tensors(SMALL))
    for shard in (1, 3):
        (folder / f"model-0000{shard}-of-00003.safetensors").unlink()
    message = refusal(load, folder)
    assert "model-00001-of-00003.safetensors, model-00003-of-00003.safetensors" in message


def test_an_index_that_names_tensors_its_shards_lack_is_refused(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "model", SMALL, random_tensors(SMALL))
    weight_map = read_index(folder)
    file = weight_map[EMBED_OUT]
    write_index(folder, {**weight_map, "ghost.weight": file})
    assert f"ghost.weight in {file}" in refusal(load, folder)


@pytest.mark.parametrize("escape", ["../other.safetensors", "/etc/passwd", "a\\b.safetensors", "sub/x", "..", ".", ""])
def test_an_index_does_not_reach_out_of_its_folder(tmp_path: Path, escape: str) -> None:
    folder = write_sharded(tmp_path / "model", SMALL, random_tensors(SMALL))
    save_file(random_tensors(SMALL), tmp_path / "other.safetensors")
    write_index(folder, {**read_index(folder), EMBED_OUT: escape})
    message = refusal(load, folder)
    assert repr(escape) in message
    assert "not in its folder" in message


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    write_config(tmp_path, SMALL)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(content)
    assert str(index) in refusal(load, tmp_path)


def test_bfloat16_without_ml_dtypes_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_single(tmp_path / "model", SMALL, random_tensors(SMALL, ml_dtypes.bfloat16))
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)  # what Python does for a module that is not installed
    for weights in ("auto", "upcast", "stored"):
        assert 'pip install "neox20b[bf16]"' in refusal(load, folder, weights=weights)


# Widening.


@pytest.mark.parametrize("stored", STORED_DTYPES[:2], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_16_bit_number_is_widened_exactly(stored: np.dtype, dtype: Any) -> None:
    array = np.arange(2**16, dtype=np.uint16).view(stored)
    with np.errstate(invalid="ignore"):  # some NaNs signal when they are converted
        array = array[np.isfinite(array.astype(np.float64))]
    out = np.full(array.shape, np.nan, dtype)
    widen(array, out=out)
    expected = array.astype(dtype)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(np.signbit(out), np.signbit(expected))


@given(
    st.tuples(st.integers(1, 5), st.integers(1, 700), st.integers(1, 900)),
    st.sampled_from(STORED_DTYPES[:2]),
    st.integers(0, 2**32 - 1),
)
def test_a_product_with_a_stored_matrix_is_that_with_the_widened_one(
    shape: tuple[int, int, int], stored: np.dtype, seed: int
) -> None:
    rows, outputs, inputs = shape  # up to 2.5 MB widened: in several blocks, the last of which is cut
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((rows, inputs), np.float32)
    weight = generator.standard_normal((outputs, inputs), np.float32).astype(stored)
    expected = x.astype(np.float64) @ weight.astype(np.float64).T
    # A sum of `inputs` products of order one, each rounded to 2^-24: its error stays below inputs * 2^-24.
    assert np.abs(project(x, weight) - expected).max() <= inputs * 2.0**-24 * np.abs(x).max() * 6


# Where a model is.


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """The calls that would have gone to the hub; none succeeds."""
    import huggingface_hub

    asked: list[tuple[str, Any]] = []

    def refuse(repository: str, *, revision: Any, allow_patterns: list[str]) -> str:
        assert "*.safetensors" in allow_patterns
        assert "*.json" in allow_patterns
        asked.append((repository, revision))
        raise huggingface_hub.errors.LocalEntryNotFoundError("line one\nline two")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return asked


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("pythia-70m", "EleutherAI/pythia-70m"),
        ("pythia-1.4b-deduped", "EleutherAI/pythia-1.4b-deduped"),
        ("gpt-neox-20b", "EleutherAI/gpt-neox-20b"),
        ("EleutherAI/pythia-70m", "EleutherAI/pythia-70m"),
        ("someone/some.model_1", "someone/some.model_1"),
    ],
)
@pytest.mark.parametrize("revision", [None, "step1000"])
def test_names_are_asked_for_at_the_hub(
    no_network: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, repository: str, revision: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    message = refusal(find, name, revision)
    assert no_network == [(repository, revision)]
    assert repository in message
    assert "cannot be reached" in message


@pytest.mark.parametrize(
    "path",
    [
        "./here",
        "../there",
        "/no/such/folder",
        "a/b/c",
        "typo",
        "org/model.safetensors",
        "model.bin",
        "",
        "~/nothing-here",
    ],
)
def test_what_can_only_be_a_path_is_not_asked_for(
    no_network: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    message = refusal(find, path)
    assert "no such folder" in message
    assert repr(path) in message
    assert no_network == []


def test_a_folder_is_used_as_it_is(no_network: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "EleutherAI" / "pythia-70m"
    (folder / "step1000").mkdir(parents=True)
    assert find(folder) == folder
    assert find(str(folder)) == folder
    assert find("EleutherAI/pythia-70m").resolve() == folder
    assert find(folder, "step1000") == folder / "step1000"
    message = refusal(find, folder, "step2000")
    assert str(folder) in message
    assert "step2000" in message
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "is a file" in refusal(find, tmp_path / "model.safetensors")
    assert no_network == []


def test_a_revision_of_a_folder_is_loaded(tmp_path: Path) -> None:
    tensors = random_tensors(SMALL, np.float32, seed=4)
    write_single(tmp_path / "step16", SMALL, tensors)
    assert_holds(load(tmp_path, revision="step16"), tensors)


def hub_error(name: str) -> Exception:
    """An exception of the hub's library, made without what its constructor wants, which differs between releases."""
    from huggingface_hub import errors

    kind: type[Exception] = getattr(errors, name)
    error = kind.__new__(kind)
    error.args = (f"{name}\nwith a second line",)
    assert str(error) == error.args[0]
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ("GatedRepoError", "is gated"),
        ("RepositoryNotFoundError", "no model on huggingface.co"),
        ("RevisionNotFoundError", "has no revision step7"),
        ("HFValidationError", "cannot be a model's"),
        ("LocalEntryNotFoundError", "cannot be reached"),
        ("OfflineModeIsEnabled", "cannot be reached"),
        ("HfHubHTTPError", "could not be downloaded: HfHubHTTPError with a second line"),
        ("HTTPError", "could not be downloaded: HTTPError with a second line"),
    ],
)
def test_what_the_hub_answers_is_one_line(monkeypatch: pytest.MonkeyPatch, error: str, expected: str) -> None:
    import huggingface_hub

    def fail(*args: Any, **kwargs: Any) -> str:
        raise hub_error(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    message = refusal(find, "EleutherAI/no-such-model-here", "step7")
    assert "EleutherAI/no-such-model-here" in message
    assert expected in message


# What transformers writes.


@pytest.mark.oracle
@pytest.mark.parametrize("arguments", [{}, {"max_shard_size": "20KB"}, {"save_original_format": False}], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_what_transformers_saves_is_loaded(tmp_path: Path, arguments: dict[str, Any], tied: bool) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = replace(SMALL, tie_word_embeddings=tied)
    theirs = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**config_to_dict(config)))
    theirs.half().save_pretrained(tmp_path, **arguments)
    model = load(tmp_path)
    assert model.config == config
    tensors = {name.replace("lm_head.", "embed_out."): t.numpy() for name, t in theirs.state_dict().items()}
    assert_holds(model, {name: tensors[name] for name in tensor_table(config)})
    assert torch.equal(theirs.gpt_neox.embed_in.weight.float(), torch.tensor(model.params.embed_in))
