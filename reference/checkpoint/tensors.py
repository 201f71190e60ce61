"""Every tensor of a model: its name in a Hugging Face checkpoint, its shape, and how tensor parallelism shards it.

This is the only such list. All readers and writers of checkpoints and all of distributed/ go by it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from neox.reference.config import Config
from neox.reference.model import MLP, Array, Attention, Layer, LayerNorm, Linear, Params

Sharding = Literal[
    "vocabulary",  # (V,C) cut along V
    "column",  # (O,I) or (O,) cut along the outputs: each rank computes some of them, on whole heads of (q, k, v)
    "row",  # (O,I) cut along the inputs: each rank computes a part of every sum, and the parts are added up
    "summed",  # the bias of a row: every rank adds its own before the parts are added up, so the whole is their sum
    "replicated",  # the same on every rank
]

AXES = {"vocabulary": 0, "column": 0, "row": 1}  # along which a tensor is cut; the other kinds are not

EMBED_IN = "gpt_neox.embed_in.weight"
EMBED_OUT = "embed_out.weight"
FINAL_LAYER_NORM = "gpt_neox.final_layer_norm"


@dataclass(frozen=True)
class TensorSpec:
    name: str
    shape: tuple[int, ...]
    sharding: Sharding
    grain: int = 1  # entries along the cut that always stay together: those of a head

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return self.shape[0] if len(self.shape) == 1 else self.shape[0] * self.shape[1]


Get = Callable[[TensorSpec], Array]


def _layer_norm(prefix: str, width: int) -> list[TensorSpec]:
    return [TensorSpec(f"{prefix}.{part}", (width,), "replicated") for part in ("weight", "bias")]


def _linear(
    prefix: str, outputs: int, inputs: int, sharding: Literal["column", "row"], grain: int = 1, bias: bool = True
) -> list[TensorSpec]:
    weight = TensorSpec(f"{prefix}.weight", (outputs, inputs), sharding, grain)
    summed = TensorSpec(f"{prefix}.bias", (outputs,), "summed")
    added = summed if sharding == "row" else TensorSpec(f"{prefix}.bias", (outputs,), sharding, grain)
    return [weight, added] if bias else [weight]


def layer_prefix(index: int) -> str:
    return f"gpt_neox.layers.{index}"


def _layer(config: Config, prefix: str) -> list[TensorSpec]:
    c, f, d, bias = config.hidden_size, config.intermediate_size, config.head_dim, config.attention_bias
    return [
        *_layer_norm(f"{prefix}.input_layernorm", c),
        *_layer_norm(f"{prefix}.post_attention_layernorm", c),
        *_linear(f"{prefix}.attention.query_key_value", 3 * c, c, "column", 3 * d, bias),
        *_linear(f"{prefix}.attention.dense", c, c, "row", d, bias),
        *_linear(f"{prefix}.mlp.dense_h_to_4h", f, c, "column"),
        *_linear(f"{prefix}.mlp.dense_4h_to_h", c, f, "row"),
    ]


def tensor_table(config: Config) -> dict[str, TensorSpec]:
    """By name, in the order of the computation. Without embed_out.weight where it is tied to the embedding."""
    shape = (config.vocab_size, config.hidden_size)
    specs = [TensorSpec(EMBED_IN, shape, "vocabulary")]
    for index in range(config.num_hidden_layers):
        specs += _layer(config, layer_prefix(index))
    specs += _layer_norm(FINAL_LAYER_NORM, config.hidden_size)
    if not config.tie_word_embeddings:
        specs.append(TensorSpec(EMBED_OUT, shape, "vocabulary"))
    return {spec.name: spec for spec in specs}


def pipeline(config: Config) -> dict[int, dict[str, str]]:
    """The layers of gpt-neox's pipeline that have weights: by number, their names there and in tensor_table.

    The numbers between are of layers without weights. Source: `init_specs` of EleutherAI/gpt-neox,
    megatron/model/gpt2_model.py.
    """
    count = config.num_hidden_layers
    table = list(tensor_table(config))
    layers = {0: {"word_embeddings.weight": EMBED_IN}}
    for i in range(count):
        prefix = layer_prefix(i) + "."
        layers[i + 2] = {name.removeprefix(prefix): name for name in table if name.startswith(prefix)}
    layers[count + 3] = {f"norm.{p}": f"{FINAL_LAYER_NORM}.{p}" for p in ("weight", "bias")}
    if not config.tie_word_embeddings:
        layers[count + 4] = {"final_linear.weight": EMBED_OUT}
    return layers


def _norm(table: Mapping[str, TensorSpec], get: Get, prefix: str) -> LayerNorm:
    return LayerNorm(get(table[f"{prefix}.weight"]), get(table[f"{prefix}.bias"]))


def build_layer(config: Config, get: Get, index: int) -> Layer:
    """The parameters of one layer, each of its tensors asked for once, in the table's order."""
    table, prefix = tensor_table(config), layer_prefix(index)

    def linear(name: str) -> Linear:
        weight, bias = get(table[f"{prefix}.{name}.weight"]), table.get(f"{prefix}.{name}.bias")
        return Linear(weight, None if bias is None else get(bias))

    return Layer(
        _norm(table, get, f"{prefix}.input_layernorm"),
        _norm(table, get, f"{prefix}.post_attention_layernorm"),
        Attention(linear("attention.query_key_value"), linear("attention.dense")),
        MLP(linear("mlp.dense_h_to_4h"), linear("mlp.dense_4h_to_h")),
    )


def build_params(config: Config, get: Get) -> Params:
    """The parameters, each tensor of the table asked for once, in its order. A tied head is the embedding itself."""
    table = tensor_table(config)
    embed_in = get(table[EMBED_IN])
    return Params(
        embed_in=embed_in,
        layers=tuple(build_layer(config, get, index) for index in range(config.num_hidden_layers)),
        final_layer_norm=_norm(table, get, FINAL_LAYER_NORM),
        embed_out=get(table[EMBED_OUT]) if EMBED_OUT in table else embed_in,
    )


def named_tensors(config: Config, params: Params) -> dict[str, Array]:
    """The arrays of the parameters, or of anything in their shape, under the names of the table and in its order."""

    def find(name: str) -> Array:
        part: Any = params
        for step in name.removesuffix(".weight" if name in (EMBED_IN, EMBED_OUT) else "").split("."):
            if step != "gpt_neox":
                part = part[int(step)] if step.isdigit() else getattr(part, step)
        array: Array = part
        return array

    return {name: find(name) for name in tensor_table(config)}
