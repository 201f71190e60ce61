"""Every spelling of a config means what transformers takes it for, and what cannot be is refused in one line."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import asdict, fields, replace
from typing import Any

import pytest
from hypothesis import given
from strategies import TINY, configs

from neox.reference.checkpoint.tensors import tensor_table
from neox.reference.config import (
    GPT_NEOX_20B,
    PYTHIA,
    Config,
    config_from_dict,
    config_from_neox,
    config_to_dict,
    parameter_count,
    read_config,
)
from neox.reference.errors import InputError

REQUIRED = {"vocab_size": 101, "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
DEFAULT = config_from_dict(REQUIRED)

# The config.json of EleutherAI/gpt-neox-20b, as published.
PUBLISHED_20B = {
    "architectures": ["GPTNeoXForCausalLM"],
    "attention_probs_dropout_prob": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "gelu_fast",
    "hidden_dropout_prob": 0,
    "hidden_size": 6144,
    "initializer_range": 0.02,
    "intermediate_size": 24576,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neox",
    "num_attention_heads": 64,
    "num_hidden_layers": 44,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.19.0.dev0",
    "use_cache": True,
    "vocab_size": 50432,
}

PUBLISHED_COUNTS = {
    "70m": 70_426_624,
    "160m": 162_322_944,
    "410m": 405_334_016,
    "1b": 1_011_781_632,
    "1.4b": 1_414_647_808,
    "2.8b": 2_775_208_960,
    "6.9b": 6_857_302_016,
    "12b": 11_846_072_320,
}


def refusal(function: Any, *args: Any, **kwargs: Any) -> str:
    """The text of the InputError that the call must raise: one line."""
    with pytest.raises(InputError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


# Published models.


def test_parameter_counts_are_the_published_ones() -> None:
    assert parameter_count(GPT_NEOX_20B) == 20_554_567_680
    assert {name: parameter_count(PYTHIA[name]) for name in PUBLISHED_COUNTS} == PUBLISHED_COUNTS
    assert list(PYTHIA) == ["14m", "31m", *PUBLISHED_COUNTS]


@given(configs())
def test_the_count_is_the_sum_over_the_table_of_tensors(config: Config) -> None:
    assert parameter_count(config) == sum(spec.size for spec in tensor_table(config).values())


def test_the_published_20b_config_is_the_constant() -> None:
    assert config_from_dict(PUBLISHED_20B) == GPT_NEOX_20B
    assert (GPT_NEOX_20B.head_dim, GPT_NEOX_20B.rotary_ndims, GPT_NEOX_20B.hidden_act) == (96, 24, "gelu_fast")


def test_pythia_is_as_its_config_files_say() -> None:
    assert {config.hidden_act for config in PYTHIA.values()} == {"gelu"}
    assert {name for name, config in PYTHIA.items() if config.vocab_size != 50304} == {"6.9b", "12b"}
    assert all(config.intermediate_size == 4 * config.hidden_size for config in PYTHIA.values())


# Spellings.

ACCEPTED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"rotary_emb_base": 10000, "rotary_pct": 0.25, "hidden_act": "gelu", "intermediate_size": 384}),
    ({}, {"use_parallel_residual": True, "attention_bias": True, "tie_word_embeddings": False, "layer_norm_eps": 1e-5}),
    ({}, {"max_position_embeddings": 2048, "bos_token_id": 0, "eos_token_id": 0, "rotary_dtype": "float32"}),
    ({"rotary_emb_base": 500, "rotary_pct": 0.5}, {"rotary_emb_base": 500, "rotary_pct": 0.5}),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, {"rotary_emb_base": 500, "rotary_pct": 0.25}),
    (
        {"rope_parameters": {"partial_rotary_factor": 0.5}, "rotary_emb_base": 7},
        {"rotary_emb_base": 7, "rotary_pct": 0.5},
    ),
    ({"rope_parameters": {"type": "default", "rope_theta": 9}, "rotary_emb_base": 9.0}, {"rotary_emb_base": 9}),
    ({"rope_parameters": None, "rope_scaling": None}, {"rotary_emb_base": 10000, "rotary_pct": 0.25}),
    ({"rope_scaling": {"type": "default", "factor": 1.0}}, {"rotary_emb_base": 10000}),
    ({"rope_scaling": {"rope_type": "default", "rope_theta": 77}}, {"rotary_emb_base": 77}),
    ({"rope_theta": 500, "rotary_emb_base": 500}, {"rotary_emb_base": 500}),  # transformers 4.46 to 4.57
    ({"rope_theta": 500}, {"rotary_emb_base": 500}),
    ({"partial_rotary_factor": 0.5}, {"rotary_pct": 0.5}),
    ({"hidden_act": "gelu"}, {"hidden_act": "gelu"}),
    ({"hidden_act": "gelu_python"}, {"hidden_act": "gelu"}),
    ({"hidden_act": "gelu_fast"}, {"hidden_act": "gelu_fast"}),
    ({"hidden_act": "gelu_new"}, {"hidden_act": "gelu_fast"}),
    ({"hidden_act": "gelu_pytorch_tanh"}, {"hidden_act": "gelu_fast"}),
    ({"use_parallel_residual": False}, {"use_parallel_residual": False}),
    ({"use_parallel_residual": None}, {"use_parallel_residual": True}),
    ({"attention_bias": False}, {"attention_bias": False}),
    ({"tie_word_embeddings": True}, {"tie_word_embeddings": True}),
    ({"intermediate_size": 37}, {"intermediate_size": 37}),
    ({"layer_norm_eps": 1e-3, "max_position_embeddings": 64}, {"layer_norm_eps": 1e-3, "max_position_embeddings": 64}),
    ({"eos_token_id": 2, "bos_token_id": 1}, {"eos_token_id": 2, "bos_token_id": 1}),
    ({"eos_token_id": [5, 7]}, {"eos_token_id": 5}),
    ({"eos_token_id": None, "bos_token_id": None}, {"eos_token_id": None, "bos_token_id": None}),
    ({"rotary_dtype": "float16"}, {"rotary_dtype": "float16"}),
    ({"torch_dtype": "float16", "dtype": "float16", "hidden_dropout_prob": 0.1, "unheard_of": [1]}, {}),
]


@pytest.mark.parametrize(("extra", "expected"), ACCEPTED, ids=lambda d: json.dumps(d))
def test_a_spelling_sets_its_fields_and_no_others(extra: dict[str, Any], expected: dict[str, Any]) -> None:
    config = config_from_dict({**REQUIRED, **extra})
    assert {name: getattr(config, name) for name in expected} == expected
    assert config == replace(DEFAULT, **expected)


REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"hidden_size": None, "vocab_size": None}, ["missing vocab_size, hidden_size"]),
    ({"model_type": "llama"}, ["llama", "gpt_neox"]),
    ({"rotary_emb_base": 500, "rope_theta": 10000}, ["rotary_emb_base is 500", "rope_theta is 10000"]),
    (
        {"rotary_emb_base": 500, "rope_parameters": {"rope_theta": 7.0}},
        ["rotary_emb_base", "rope_parameters.rope_theta"],
    ),
    ({"rope_theta": 500, "rope_parameters": {"rope_theta": 7.0}}, ["rope_theta is 500", "7.0"]),
    ({"rotary_pct": 0.5, "partial_rotary_factor": 0.25}, ["rotary_pct is 0.5", "partial_rotary_factor is 0.25"]),
    ({"rotary_pct": 0.5, "rope_parameters": {"partial_rotary_factor": 0.25}}, ["rotary_pct", "partial_rotary_factor"]),
    ({"rope_scaling": {"rope_theta": 7}, "rope_parameters": {"rope_theta": 8}}, ["rope_scaling.rope_theta"]),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_scaling", "'linear'"]),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, ["'dynamic'"]),
    ({"rope_parameters": {"rope_type": "yarn"}}, ["rope_parameters", "'yarn'"]),
    ({"rope_parameters": {"rope_type": "default", "type": "linear"}}, ["rope_type", "linear"]),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1}}}, ["rope_parameters", "all layers"]),
    ({"rope_scaling": "linear"}, ["rope_scaling"]),
    ({"hidden_act": "relu"}, ["hidden_act", "gelu_fast", "'relu'"]),
    ({"hidden_act": ["gelu"]}, ["hidden_act"]),
    ({"hidden_size": 97}, ["97", "4 attention heads"]),
    ({"hidden_size": "96"}, ["hidden_size", "'96'"]),
    ({"hidden_size": 96.0}, ["hidden_size", "96.0"]),
    ({"vocab_size": 0}, ["vocab_size", "0"]),
    ({"num_hidden_layers": -1}, ["num_hidden_layers", "-1"]),
    ({"num_attention_heads": 0}, ["num_attention_heads", "0"]),
    ({"num_attention_heads": True}, ["num_attention_heads", "True"]),
    ({"intermediate_size": 0}, ["intermediate_size"]),
    ({"max_position_embeddings": 0}, ["max_position_embeddings"]),
    ({"layer_norm_eps": 0}, ["layer_norm_eps"]),
    ({"layer_norm_eps": float("nan")}, ["layer_norm_eps", "nan"]),
    ({"layer_norm_eps": "1e-5"}, ["layer_norm_eps", "'1e-5'"]),
    ({"rotary_emb_base": float("inf")}, ["rotary_emb_base", "inf"]),
    ({"rotary_emb_base": -10000}, ["rotary_emb_base"]),
    ({"rotary_pct": 0}, ["rotary_pct"]),
    ({"rotary_pct": 1.25}, ["rotary_pct", "1.25"]),
    ({"rotary_pct": 0.01}, ["rotates 0"]),
    ({"rotary_pct": 0.21}, ["rotates 5"]),
    ({"rotary_dtype": "bfloat16"}, ["rotary_dtype", "bfloat16"]),
    ({"use_parallel_residual": "false"}, ["use_parallel_residual", "'false'"]),
    ({"attention_bias": 1}, ["attention_bias", "1"]),
    ({"eos_token_id": "0"}, ["eos_token_id"]),
    ({"eos_token_id": []}, ["eos_token_id"]),
    ({"bos_token_id": False}, ["bos_token_id"]),
]


@pytest.mark.parametrize(("extra", "named"), REFUSED, ids=lambda d: json.dumps(d) if isinstance(d, dict) else "")
def test_what_cannot_be_is_refused_by_name(extra: dict[str, Any], named: list[str]) -> None:
    message = refusal(config_from_dict, {**REQUIRED, **extra})
    assert all(part in message for part in named), message


def test_names_of_the_activation_are_replaced_wherever_a_config_is_made() -> None:
    assert replace(TINY, hidden_act="gelu_new").hidden_act == "gelu_fast"
    assert replace(TINY, hidden_act="gelu_python").hidden_act == "gelu"


# Writing and reading back.


@given(configs())
def test_a_written_config_reads_back_equal(config: Config) -> None:
    again = replace(config, rotary_dtype="float16", eos_token_id=None)
    for c in (config, again):
        written = json.loads(json.dumps(config_to_dict(c)))
        assert config_from_dict(written) == c
        before_5 = {name: value for name, value in written.items() if name != "rope_parameters"}
        since_5 = {name: value for name, value in written.items() if name not in ("rotary_pct", "rotary_emb_base")}
        assert config_from_dict(before_5) == c == config_from_dict(since_5)
        assert written["rope_parameters"]["rope_type"] == "default"
        assert written["model_type"] == "gpt_neox"


def test_read_config_names_the_file(tmp_path: Any) -> None:
    path = tmp_path / "config.json"
    cases = [
        (None, "No such file"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "JSON object"),
        (b"{}", "missing vocab_size, hidden_size, num_hidden_layers, num_attention_heads"),
    ]
    for content, expected in cases:
        if content is not None:
            path.write_bytes(content)
        message = refusal(read_config, tmp_path)
        assert str(path) in message
        assert expected in message
    path.write_text(json.dumps(config_to_dict(TINY)), encoding="utf-8")
    assert read_config(tmp_path) == TINY
    assert read_config(str(tmp_path)) == TINY


# The yaml of EleutherAI/gpt-neox.

YAML_20B = {  # what shapes the model in configs/20B.yml: as there, some keys with hyphens and some with underscores
    "pipe-parallel-size": 4,
    "model-parallel-size": 2,
    "num-layers": 44,
    "hidden-size": 6144,
    "num-attention-heads": 64,
    "seq-length": 2048,
    "max-position-embeddings": 2048,
    "norm": "layernorm",
    "pos-emb": "rotary",
    "rotary_pct": 0.25,
    "no-weight-tying": True,
    "gpt_j_residual": True,
    "output_layer_parallelism": "column",
    "bias-gelu-fusion": True,
}


def test_the_20b_yaml_is_the_constant_in_either_spelling() -> None:
    assert config_from_neox(YAML_20B) == GPT_NEOX_20B
    assert config_from_neox({key.replace("-", "_"): value for key, value in YAML_20B.items()}) == GPT_NEOX_20B
    assert config_from_neox({key.replace("_", "-"): value for key, value in YAML_20B.items()}) == GPT_NEOX_20B


@pytest.mark.parametrize(("name", "ranks"), [("70m", 1), ("6.9b", 2), ("12b", 4)])
def test_the_vocabulary_is_padded_as_in_pythia(name: str, ranks: int) -> None:
    config = config_from_neox({**YAML_20B, "model-parallel-size": ranks})
    assert config.vocab_size == PYTHIA[name].vocab_size


NEOX_ACCEPTED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"padded-vocab-size": 51200}, {"vocab_size": 51200}),
    ({"make-vocab-size-divisible-by": 1, "model-parallel-size": 1}, {"vocab_size": 50277}),
    ({"bias-gelu-fusion": False}, {"hidden_act": "gelu"}),
    ({"bias-gelu-fusion": False, "activation": "gelu"}, {"hidden_act": "gelu"}),
    ({"rotary_pct": 1.0}, {"rotary_pct": 1.0}),
    ({"rotary-emb-base": 500}, {"rotary_emb_base": 500}),
    ({"layernorm-epsilon": 1e-3}, {"layer_norm_eps": 1e-3}),
    ({"gpt_j_residual": False}, {"use_parallel_residual": False}),
    ({"no-weight-tying": False}, {"tie_word_embeddings": True}),
    ({"use-bias-in-attn-linear": False}, {"attention_bias": False}),
    ({"intermediate-size": 1000}, {"intermediate_size": 1000}),
]


@pytest.mark.parametrize(("extra", "expected"), NEOX_ACCEPTED, ids=lambda d: json.dumps(d))
def test_a_neox_key_sets_its_field(extra: dict[str, Any], expected: dict[str, Any]) -> None:
    assert config_from_neox({**YAML_20B, **extra}) == replace(GPT_NEOX_20B, **expected)


def test_neox_defaults_are_those_of_neox() -> None:
    absent = ("rotary_pct", "no-weight-tying", "gpt_j_residual", "bias-gelu-fusion", "model-parallel-size")
    config = config_from_neox({key: value for key, value in YAML_20B.items() if key not in absent})
    assert config == replace(
        GPT_NEOX_20B,
        vocab_size=50304,
        rotary_pct=1.0,
        tie_word_embeddings=True,
        use_parallel_residual=False,
        hidden_act="gelu",
    )


NEOX_REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"hidden-size": None, "num-layers": None}, ["missing num_layers, hidden_size"]),
    ({"hidden_size": 4096}, ["hidden_size", "6144", "4096"]),
    ({"pos-emb": "learned"}, ["pos_emb", "'learned'", "'rotary'"]),
    ({"norm": "rmsnorm"}, ["norm", "rmsnorm"]),
    ({"activation": "swiglu"}, ["activation", "swiglu"]),
    ({"gpt-j-tied": True}, ["gpt_j_tied"]),
    ({"model-parallel-size": 0}, ["model_parallel_size"]),
    ({"hidden-size": "6144"}, ["hidden_size"]),
    ({"num-attention-heads": 7}, ["7 attention heads"]),
]


@pytest.mark.parametrize(("extra", "named"), NEOX_REFUSED, ids=lambda d: json.dumps(d) if isinstance(d, dict) else "")
def test_what_neox_trains_beyond_this_architecture_is_refused(extra: dict[str, Any], named: list[str]) -> None:
    message = refusal(config_from_neox, {**YAML_20B, **extra})
    assert all(part in message for part in named), message


def test_without_a_kind_of_position_neox_means_learned_ones() -> None:
    assert "learned" in refusal(config_from_neox, {key: v for key, v in YAML_20B.items() if key != "pos-emb"})


# What transformers makes of the same file.


def transformers_view(d: dict[str, Any]) -> dict[str, Any]:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    c = transformers.GPTNeoXConfig(**deepcopy(d))  # which completes the dicts it is given
    shared = {field.name: getattr(c, field.name) for field in fields(Config) if hasattr(c, field.name)}
    rope = c.rope_parameters
    rotary = {"rotary_emb_base": rope["rope_theta"], "rotary_pct": rope["partial_rotary_factor"]}
    return {**shared, **rotary, "hidden_act": replace(TINY, hidden_act=c.hidden_act).hidden_act}


def our_view(config: Config, names: Any) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names}


# Where this project differs on purpose: aliases that stand alone, and fields that a file leaves out or lists.
DIFFERENT = ("rope_theta", "partial_rotary_factor", "eos_token_id")


@pytest.mark.oracle
def test_transformers_reads_the_same_from_every_spelling() -> None:
    for extra, _ in ACCEPTED:
        if set(extra) & set(DIFFERENT) and "rotary_emb_base" not in extra:
            continue
        if extra.get("use_parallel_residual", True) is None:  # which transformers refuses
            continue
        d = {**REQUIRED, "intermediate_size": 384, "eos_token_id": 0, **extra}
        theirs = transformers_view(d)
        assert our_view(config_from_dict(d), theirs) == theirs, extra


@pytest.mark.oracle
@given(configs())
def test_transformers_reads_what_is_written_as_the_same_model(config: Config) -> None:
    theirs = transformers_view(config_to_dict(config))
    assert our_view(config, theirs) == theirs


def test_numbers_that_arithmetic_cannot_take_are_refused() -> None:
    for field, value in [("hidden_size", 10**400), ("num_hidden_layers", 1 << 50), ("rotary_emb_base", 10**400)]:
        with pytest.raises(InputError, match=f"{field} must be a positive"):
            Config(**{**asdict(GPT_NEOX_20B), field: value})
