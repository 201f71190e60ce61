"""The shape of a model and the choices its arithmetic makes, under Hugging Face's field names.

Read from a config.json as any release of transformers wrote it, or from the yaml of EleutherAI/gpt-neox. A config that
contradicts itself is refused: guessing would give a model that runs and is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Integral
from pathlib import Path
from typing import Any

from neox.reference.errors import InputError

# Names in config.json of the two functions; those in a row differ in rounding at most.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_fast": "gelu_fast",
    "gelu_new": "gelu_fast",
    "gelu_pytorch_tanh": "gelu_fast",
}
ROTARY_DTYPES = ("float32", "float16")

SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)
NUMBERS = ("rotary_pct", "rotary_emb_base", "layer_norm_eps")
SWITCHES = ("use_parallel_residual", "tie_word_embeddings", "attention_bias")
TOKEN_IDS = ("bos_token_id", "eos_token_id")
LARGEST = 1 << 40  # far more than any size or number of a model is: with larger ones, arithmetic would not be exact


@dataclass(frozen=True)
class Config:
    """Every field is checked: InputError if one is out of range or two do not fit together."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str = "gelu_fast"  # or "gelu"; other names of the two are accepted and replaced
    rotary_pct: float = 0.25  # the part of each head that is rotated
    rotary_emb_base: float = 10000.0
    rotary_dtype: str = "float32"  # of angles and their cosines; "float16" as the 20B was trained
    max_position_embeddings: int = 2048
    layer_norm_eps: float = 1e-5
    use_parallel_residual: bool = True
    tie_word_embeddings: bool = False
    attention_bias: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | None = 0

    def __post_init__(self) -> None:
        _check_kinds(self)
        _check_choices(self)
        _check_heads(self)
        object.__setattr__(self, "hidden_act", ACTIVATIONS[self.hidden_act])

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_ndims(self) -> int:
        return int(self.head_dim * self.rotary_pct)


# Checks.


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < LARGEST


def _check_kinds(config: Config) -> None:
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    for name in SIZES:
        if not (_is_integer(values[name]) and 0 < values[name] < LARGEST):
            raise InputError(f"{name} must be a positive integer, not {values[name]!r}")
    for name in NUMBERS:
        if not _is_positive(values[name]):
            raise InputError(f"{name} must be a positive number, not {values[name]!r}")
    for name in SWITCHES:
        if not isinstance(values[name], bool):
            raise InputError(f"{name} must be true or false, not {values[name]!r}")
    for name in TOKEN_IDS:
        if not (values[name] is None or _is_integer(values[name])):
            raise InputError(f"{name} must be a token id or null, not {values[name]!r}")


def _check_choices(config: Config) -> None:
    for name, choices in (("hidden_act", tuple(ACTIVATIONS)), ("rotary_dtype", ROTARY_DTYPES)):
        if getattr(config, name) not in choices:
            raise InputError(f"{name} must be one of {', '.join(choices)}, not {getattr(config, name)!r}")


def _check_heads(config: Config) -> None:
    hidden, heads = config.hidden_size, config.num_attention_heads
    if hidden % heads:
        raise InputError(f"hidden_size {hidden} cannot be divided among {heads} attention heads")
    if config.rotary_pct > 1:
        raise InputError(f"rotary_pct is the part of a head that is rotated: at most 1, not {config.rotary_pct}")
    if config.rotary_ndims < 2 or config.rotary_ndims % 2:
        raise InputError(
            f"rotary_pct {config.rotary_pct} of {config.head_dim} dims rotates {config.rotary_ndims} of them: "
            "dims are rotated in pairs, so it must be an even number, at least 2"
        )


def parameter_count(config: Config) -> int:
    """How many numbers the model has learned; a head tied to the embedding counts once."""
    c, f = config.hidden_size, config.intermediate_size
    attention = 4 * c * c + (4 * c if config.attention_bias else 0)
    mlp = 2 * c * f + f + c
    layer = attention + mlp + 4 * c
    embeddings = config.vocab_size * c * (1 if config.tie_word_embeddings else 2)
    return embeddings + config.num_hidden_layers * layer + 2 * c


# Reading.


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; InputError if the file is not there or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested without end
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


def read_config(folder: str | Path) -> Config:
    """The config of a model's folder; InputError names the file."""
    path = Path(folder) / "config.json"
    content = read_json(path)
    try:
        return config_from_dict(content)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _agreed(found: Mapping[str, Any], default: Any) -> Any:
    """The one value that all names give which are given at all."""
    given = {name: value for name, value in found.items() if value is not None}
    if not given:
        return default
    (name, value), *others = given.items()
    for other, different in others:
        if different != value:
            raise InputError(f"{name} is {value!r} but {other} is {different!r}: remove the wrong one")
    return value


def _require(d: Mapping[str, Any], names: tuple[str, ...]) -> None:
    missing = [name for name in names if d.get(name) is None]
    if missing:
        raise InputError(f"missing {', '.join(missing)}")


def _rope_section(d: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """rope_parameters or rope_scaling, unless it asks for a rotation other than the model's own."""
    section = d.get(name)
    if section is None:
        return {}
    if not isinstance(section, Mapping) or any(isinstance(value, Mapping) for value in section.values()):
        raise InputError(f"{name} must be one set of values for all layers, not {section!r}")
    kind = _agreed({f"{name}.rope_type": section.get("rope_type"), f"{name}.type": section.get("type")}, "default")
    if kind != "default":
        raise InputError(f"{name} asks for rotary embeddings of type {kind!r}; only 'default' is implemented")
    return section


def _rotary(d: Mapping[str, Any]) -> tuple[Any, Any]:
    """Base and fraction, under any of their names.

    transformers wrote rotary_emb_base and rotary_pct up to 4.45, from 4.46 rope_theta beside them, from 5.0
    rope_parameters only. It ignores a lone rope_theta or partial_rotary_factor; here it counts.
    """
    sections = {name: _rope_section(d, name) for name in ("rope_parameters", "rope_scaling")}

    def value(inner: str, older: str, default: float) -> Any:
        found = {f"{name}.{inner}": section.get(inner) for name, section in sections.items()}
        return _agreed({**found, older: d.get(older), inner: d.get(inner)}, default)

    return value("rope_theta", "rotary_emb_base", 10000), value("partial_rotary_factor", "rotary_pct", 0.25)


def _first(ids: Any) -> Any:
    """eos_token_id may be a list; the first is the one that ends a text."""
    return ids[0] if isinstance(ids, list) and ids else ids


def _four_hidden(d: Mapping[str, Any]) -> int:
    if not _is_integer(d["hidden_size"]):
        raise InputError(f"hidden_size must be a positive integer, not {d['hidden_size']!r}")
    return 4 * int(d["hidden_size"])


def config_from_dict(d: Mapping[str, Any]) -> Config:
    """A config.json as any release of transformers wrote it; names that do not shape the computation are ignored.

    InputError if a required field is missing, two names of one field disagree, or a value cannot be.
    """
    if d.get("model_type", "gpt_neox") != "gpt_neox":
        raise InputError(f"model_type is {d['model_type']!r}; only gpt_neox is implemented")
    _require(d, ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"))
    names = {field.name for field in fields(Config)}
    given = {name: value for name, value in d.items() if name in names and (value is not None or name in TOKEN_IDS)}
    base, fraction = _rotary(d)
    given |= {name: _first(given[name]) for name in TOKEN_IDS if name in given}
    given.setdefault("intermediate_size", _four_hidden(d))
    given.setdefault("hidden_act", "gelu")  # the default of transformers, which is not what the 20B uses
    return Config(**{**given, "rotary_emb_base": base, "rotary_pct": fraction})


def config_to_dict(config: Config) -> dict[str, Any]:
    """A config.json that every release of transformers reads as this model.

    Rotary base and fraction stand under their names of before and after 5.0. rotary_dtype is a name of this project:
    transformers carries it along and rotates in float32.
    """
    rope = {
        "rope_type": "default",
        "rope_theta": float(config.rotary_emb_base),
        "partial_rotary_factor": config.rotary_pct,
    }
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        **asdict(config),
        "rope_parameters": rope,
    }


# The yaml files of EleutherAI/gpt-neox. Its own defaults are given here, which are not those of transformers.

NEOX_NEEDED = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings")
NEOX_ONLY = {  # what this architecture is, among the many that gpt-neox trains: the one value, and gpt-neox's default
    "pos_emb": ("rotary", "learned"),
    "norm": ("layernorm", "layernorm"),
    "activation": ("gelu", "gelu"),
    "gpt_j_tied": (False, False),
    "use_bias_in_norms": (True, True),
    "mlp_type": ("regular", "regular"),
}
NEOX_SWITCHES = ("bias_gelu_fusion", "no_weight_tying")  # others are switches of Config too, and checked there
TOKENS_20B = 50277  # ids that the tokenizer of the 20B and of Pythia has


def _underscored(d: Mapping[str, Any]) -> dict[str, Any]:
    """Keys with every hyphen an underscore: the files mix both."""
    spellings: dict[str, dict[str, Any]] = {}
    for key, value in d.items():
        spellings.setdefault(key.replace("-", "_"), {})[key] = value
    return {name: _agreed(found, None) for name, found in spellings.items()}


def _padded_vocab_size(d: Mapping[str, Any], tokens: int) -> int:
    """Rows of the embedding: the ids of the tokenizer, rounded up so that every rank gets a round number."""
    multiple = 1
    for name, default in (("make_vocab_size_divisible_by", 128), ("model_parallel_size", 1)):
        value = default if d.get(name) is None else d[name]
        if not (_is_integer(value) and value > 0):
            raise InputError(f"{name} must be a positive integer, not {value!r}")
        multiple *= value
    return -(-tokens // multiple) * multiple


def config_from_neox(mapping: Mapping[str, Any], tokens: int = TOKENS_20B) -> Config:
    """The contents of a gpt-neox yaml, with hyphens or underscores. tokens: ids of the tokenizer, before padding.

    A padded_vocab_size overrides tokens. bias_gelu_fusion is not only a matter of speed: the fused function is the
    tanh approximation. InputError as config_from_dict, and for an architecture that is not GPT-NeoX's.
    """
    d = _underscored(mapping)
    _require(d, NEOX_NEEDED)
    for name, (needed, default) in NEOX_ONLY.items():
        value = default if d.get(name) is None else d[name]
        if value != needed:
            raise InputError(f"{name} is {value!r}; only {needed!r} is implemented")
    for name in NEOX_SWITCHES:
        if not isinstance(d.get(name, False), bool):
            raise InputError(f"{name} must be true or false, not {d[name]!r}")
    sizes = {"num_hidden_layers" if name == "num_layers" else name: d[name] for name in NEOX_NEEDED}
    return Config(
        **sizes,
        vocab_size=d.get("padded_vocab_size") or _padded_vocab_size(d, tokens),
        intermediate_size=d.get("intermediate_size") or _four_hidden(d),
        hidden_act="gelu_fast" if d.get("bias_gelu_fusion", False) else "gelu",
        rotary_pct=d.get("rotary_pct", 1.0),
        rotary_emb_base=d.get("rotary_emb_base", 10000),
        layer_norm_eps=d.get("layernorm_epsilon", 1e-5),
        use_parallel_residual=d.get("gpt_j_residual", False),
        tie_word_embeddings=not d.get("no_weight_tying", False),
        attention_bias=d.get("use_bias_in_attn_linear", True),
    )


def config_to_neox(config: Config, ranks: int = 1) -> dict[str, Any]:
    """The contents of a gpt-neox yaml for this model on so many model-parallel ranks.

    gpt-neox pads the vocabulary to a multiple that it computes from the ranks; here it is given as it is.
    """
    return {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "seq_length": config.max_position_embeddings,
        "padded_vocab_size": config.vocab_size,
        **{name: needed for name, (needed, _) in NEOX_ONLY.items()},
        "bias_gelu_fusion": config.hidden_act == "gelu_fast",
        "rotary_pct": config.rotary_pct,
        "rotary_emb_base": config.rotary_emb_base,
        "layernorm_epsilon": config.layer_norm_eps,
        "gpt_j_residual": config.use_parallel_residual,
        "no_weight_tying": not config.tie_word_embeddings,
        "use_bias_in_attn_linear": config.attention_bias,
        "model_parallel_size": ranks,
    }


# Published models.

GPT_NEOX_20B = Config(
    vocab_size=50432,
    hidden_size=6144,
    num_hidden_layers=44,
    num_attention_heads=64,
    intermediate_size=24576,
)


def _pythia(layers: int, hidden: int, heads: int, vocab: int = 50304) -> Config:
    return Config(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        hidden_act="gelu",  # as published; it was trained with gelu_fast
    )


PYTHIA = {
    "14m": _pythia(6, 128, 4),
    "31m": _pythia(6, 256, 8),
    "70m": _pythia(6, 512, 8),
    "160m": _pythia(12, 768, 12),
    "410m": _pythia(24, 1024, 16),
    "1b": _pythia(16, 2048, 8),
    "1.4b": _pythia(24, 2048, 16),
    "2.8b": _pythia(32, 2560, 32),
    "6.9b": _pythia(32, 4096, 32, vocab=50432),
    "12b": _pythia(36, 5120, 40, vocab=50688),
}
