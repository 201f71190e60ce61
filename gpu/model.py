"""GPT-NeoX on a device, from token ids to logits: reference/model.py, name by name, as a sequence of kernels.

What differs from there:
  - Functions write to arrays that exist, those of a `Workspace`: a step of decoding must not allocate.
  - Texts do not stand in a rectangle. There are N positions, each of a text of the cache and somewhere in it (`Place`):
    texts of any lengths go through the model together, and nothing is computed for padding.
  - A product leaves its sums in float32, without the bias: whichever kernel reads them next adds it. Of more than MANY
    rows, what the branches compute is added to the residual stream by the product itself, its bias with it.

This is the readable form, and that of prompts. A step of few texts takes three launches a layer (decode.py, fused.py).

Weights, normed rows, queries, keys, values and activations are of one dtype, float32, float16 or bfloat16. The residual
stream, sums, scores, softmax, statistics and logits are float32 whatever that is.

Dimensions as in reference/model.py; N positions of any texts, P positions that the rotary tables hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from neox.gpu import ops
from neox.gpu.device import Array, Device
from neox.reference.config import Config
from neox.reference.model import checked, rotary_tables

# Parameters, under their names in the checkpoint.


@dataclass(frozen=True)
class Linear:
    weight: Array  # (O,I)
    bias: Array | None  # (O,)

    @cached_property
    def wide_bias(self) -> Array | None:
        """float32, as what is added to the residual stream. Not during capture, the first time."""
        return None if self.bias is None else self.bias.device.array(self.bias.get().astype(np.float32))


@dataclass(frozen=True)
class LayerNorm:
    weight: Array  # (C,)
    bias: Array  # (C,)


@dataclass(frozen=True)
class Attention:
    query_key_value: Linear  # C -> 3C, rows ordered (head, q|k|v, dim)
    dense: Linear  # C -> C


@dataclass(frozen=True)
class MLP:
    dense_h_to_4h: Linear  # C -> F
    dense_4h_to_h: Linear  # F -> C


@dataclass(frozen=True)
class Layer:
    input_layernorm: LayerNorm
    post_attention_layernorm: LayerNorm
    attention: Attention
    mlp: MLP


@dataclass(frozen=True)
class Params:
    embed_in: Array  # (V,C)
    layers: tuple[Layer, ...]
    final_layer_norm: LayerNorm
    embed_out: Array  # (V,C)


@dataclass(frozen=True)
class Model:
    config: Config
    params: Params
    cos: Array  # float32 (P,R/2)
    sin: Array

    @property
    def device(self) -> Device:
        return self.params.embed_in.device

    @property
    def dtype(self) -> np.dtype:
        return self.params.embed_in.dtype

    @property
    def heads(self) -> int:
        """All of them; of a rank's shard (distributed/device.py), its own."""
        return self.params.layers[0].attention.dense.weight.shape[1] // self.config.head_dim

    @property
    def neurons(self) -> int:
        """Of an MLP, likewise."""
        return self.params.layers[0].mlp.dense_4h_to_h.weight.shape[1]

    @property
    def rows_of_head(self) -> int:
        """Ids that get a logit, likewise."""
        return self.params.embed_out.shape[0]


def rotary_arrays(config: Config, device: Device) -> tuple[Array, Array]:  # 2 x (P,R/2)
    """cos and sin of every position of the context, as the reference rounds them."""
    tables = rotary_tables(config, np.arange(config.max_position_embeddings)[None])
    cos, sin = (device.array(table[0, 0].astype(np.float32)) for table in tables)
    return cos, sin


# What a pass over N positions reads and writes.


@dataclass(frozen=True)
class Place:
    """Where N positions stand."""

    texts: Array  # int32 (N): in which text of the cache
    positions: Array  # int32 (N): where in that text


@dataclass(frozen=True)
class Workspace:
    """Everything that is computed on the way through the layers, for up to N positions; each layer overwrites it."""

    x: Array  # float32 (N,C): the residual stream
    normed: Array  # (N,C): what the attention reads
    normed_mlp: Array  # (N,C): what the MLP reads
    qkv: Array  # float32 (N,3HD)
    q: Array  # (N,HD)
    z: Array  # (N,HD)
    attention: Array  # float32 (N,C), of up to MANY positions
    hidden: Array  # float32 (N,F)
    activated: Array  # (N,F)
    mlp: Array  # float32 (N,C), likewise

    def first(self, count: int) -> Workspace:
        """The same memory for fewer positions."""
        return Workspace(**{field.name: getattr(self, field.name)[:count] for field in fields(self)})


def new_workspace(model: Model, count: int) -> Workspace:
    config, dtype, empty = model.config, model.dtype, model.device.empty
    C, F, heads = config.hidden_size, model.neurons, model.heads * config.head_dim
    return Workspace(
        x=empty((count, C), np.float32),
        normed=empty((count, C), dtype),
        normed_mlp=empty((count, C), dtype),
        qkv=empty((count, 3 * heads), np.float32),
        q=empty((count, heads), dtype),
        z=empty((count, heads), dtype),
        attention=empty((count, C), np.float32),
        hidden=empty((count, F), np.float32),
        activated=empty((count, F), dtype),
        mlp=empty((count, C), np.float32),
    )


# Operations.


FEW = 4  # rows for which matvec has instructions to spare for each weight
MANY = 64  # rows up to which wide keeps up with the memory


def linear(x: Array, p: Linear, out: Array) -> None:  # (N,I) -> float32 (N,O)
    """x W^T. The bias is added by the kernel that reads the result.

    Up to MANY rows by kernels of ours, which a graph can hold. Tensor cores take no float32; where a multiprocessor has
    too little memory for wide, gemm takes its place.
    """
    rows = x.shape[0]
    if rows > MANY:
        x.device.matmul(x, p.weight, out)
    elif rows <= FEW or x.dtype == np.float32:
        ops.matvec(x, p.weight, out)
    elif ops.can_wide(x.device, x.dtype, rows):
        ops.wide(x, p.weight, out)
    else:
        ops.gemm(x, p.weight, out)


def add_linear(x: Array, p: Linear, sums: Array, residual: Array) -> None:  # (N,I) -> float32 (N,O)
    """residual += x W^T + bias. sums: float32 (N,O), where products of up to MANY rows are left on the way.

    Of more, each product adds its own bias in passing: that reads O numbers, where a kernel would read and write N O.
    """
    if x.shape[0] > MANY:
        x.device.matmul(x, p.weight, residual, p.wide_bias, add=True)
    else:
        linear(x, p, sums)
        ops.residual(sums, p.bias, x.dtype, residual)


def layer_norm(x: Array, p: LayerNorm, eps: float, out: Array) -> None:  # float32 (N,C) -> (N,C)
    ops.layer_norm(x, p.weight, p.bias, eps, out)


Keys = tuple[Array, Array, Array]  # keys and values of one layer, 2 x (pages,H,S,D); the texts' pages, int32 (B,P)
Rotary = tuple[Array, Array]  # cos, sin
Mix = Callable[
    [Array, Keys, Array], None
]  # q, keys and values -> z (N,C): attention over the cache, as decode.py has it


def heads(p: Attention, work: Workspace, place: Place, rotary: Rotary, cache: Keys, mix: Mix) -> None:
    """work.normed -> work.z; keys and values are appended to the cache."""
    linear(work.normed, p.query_key_value, work.qkv)
    bias = p.query_key_value.bias
    ops.rotary_append(work.qkv, bias, *rotary, place.texts, place.positions, work.q, *cache)
    mix(work.q, cache, work.z)


def attention(p: Attention, work: Workspace, place: Place, rotary: Rotary, cache: Keys, mix: Mix) -> None:
    """work.normed -> work.attention, without its bias; keys and values are appended to the cache."""
    heads(p, work, place, rotary, cache, mix)
    linear(work.z, p.dense, work.attention)


# The model.


def neurons(p: MLP, hidden_act: str, work: Workspace) -> None:
    """work.normed_mlp -> work.activated, of more than MANY positions without a stop at work.hidden if a library can."""
    x, up = work.normed_mlp, p.dense_h_to_4h
    assert up.bias is not None
    many = x.shape[0] > MANY and hidden_act == "gelu_fast"
    if not (many and x.device.matmul_gelu_fast(x, up.weight, up.bias, work.activated)):
        linear(x, up, work.hidden)
        ops.bias_gelu(work.hidden, up.bias, hidden_act, work.activated)


def mlp(p: MLP, hidden_act: str, work: Workspace) -> None:
    """work.normed_mlp -> work.mlp, without its bias."""
    neurons(p, hidden_act, work)
    linear(work.activated, p.dense_4h_to_h, work.mlp)


def layer(p: Layer, model: Model, work: Workspace, place: Place, cache: Keys, mix: Mix) -> None:
    """work.x -> work.x."""
    if model.config.use_parallel_residual:
        _parallel_layer(p, model, work, place, cache, mix)
    else:
        _sequential_layer(p, model, work, place, cache, mix)


def _parallel_layer(p: Layer, model: Model, work: Workspace, place: Place, cache: Keys, mix: Mix) -> None:
    config, first, second = model.config, p.input_layernorm, p.post_attention_layernorm
    norms = (first.weight, first.bias, second.weight, second.bias)
    ops.layer_norm_pair(work.x, *norms, config.layer_norm_eps, work.normed, work.normed_mlp)
    heads(p.attention, work, place, (model.cos, model.sin), cache, mix)
    neurons(p.mlp, config.hidden_act, work)
    _add_branches(p, work)


def _add_branches(p: Layer, work: Workspace) -> None:
    """work.z and work.activated -> work.x."""
    dense, down = p.attention.dense, p.mlp.dense_4h_to_h
    if work.x.shape[0] > MANY:
        add_linear(work.activated, down, work.mlp, work.x)
        add_linear(work.z, dense, work.attention, work.x)
    else:
        linear(work.z, dense, work.attention)
        linear(work.activated, down, work.mlp)
        ops.residual_pair(work.mlp, down.bias, work.attention, dense.bias, work.z.dtype, work.x)


def _sequential_layer(p: Layer, model: Model, work: Workspace, place: Place, cache: Keys, mix: Mix) -> None:
    config = model.config
    layer_norm(work.x, p.input_layernorm, config.layer_norm_eps, work.normed)
    heads(p.attention, work, place, (model.cos, model.sin), cache, mix)
    add_linear(work.z, p.attention.dense, work.attention, work.x)
    layer_norm(work.x, p.post_attention_layernorm, config.layer_norm_eps, work.normed_mlp)
    neurons(p.mlp, config.hidden_act, work)
    add_linear(work.activated, p.mlp.dense_4h_to_h, work.mlp, work.x)


def embed(model: Model, ids: Array, work: Workspace) -> None:  # int32 (N) -> work.x
    ops.embedding(ids, model.params.embed_in, work.x)


def unembed(model: Model, x: Array, normed: Array, logits: Array) -> None:  # float32 (N,C) -> float32 (N,V)
    """normed: (N,C), overwritten."""
    layer_norm(x, model.params.final_layer_norm, model.config.layer_norm_eps, normed)
    linear(normed, Linear(model.params.embed_out, None), logits)


def one_page_each(device: Device, count: int) -> Array:  # int32 (B,1)
    """The pages of texts each of which has one row of a cache (B,H,S,D)."""
    return device.array(np.arange(count, dtype=np.int32)[:, None])


def mix_together(tiles: Array) -> Mix:
    """Many positions of each text at a time. tiles: of ops.query_tiles."""

    def mix(q: Array, cache: Keys, z: Array) -> None:
        ops.attention_prefill(q, *cache, tiles, z)

    return mix


def mix_each(place: Place, partial: Array) -> Mix:
    """One position at a time, its keys shared out over splits: partial is float32 (N,H,splits,D+2)."""

    def mix(q: Array, cache: Keys, z: Array) -> None:
        ops.attention_decode(q, *cache, place.texts, place.positions, partial, z)

    return mix


def placed(model: Model, texts: NDArray[np.int32], positions: NDArray[np.int32]) -> tuple[Place, Mix]:  # 2 x (N)
    """N positions of any texts, and attention of each over its text so far."""
    config, device = model.config, model.device
    place = Place(device.array(texts), device.array(positions))
    if ops.can_prefill(model.dtype, config.head_dim):
        return place, mix_together(device.array(ops.query_tiles(texts, positions)))
    # Tensor cores multiply no float32. Its positions go one by one, as in decoding: it is there to compare with.
    partial = (len(texts), model.heads, 1, config.head_dim + 2)
    return place, mix_each(place, device.empty(partial, np.float32))


GROUP = 4096  # positions that forward takes through the model together, if a text is not longer


def forward(model: Model, ids: ArrayLike) -> NDArray[np.float32]:  # (B,T) -> (B,T,V)
    """Logits of the next token after every position.

    ids: integers [batch, seq]; returns float32 in host memory. InputError if an id or the length is out of range.
    """
    ids = checked(model.config, ids)
    together = max(1, GROUP // ids.shape[1])
    groups = [ids[first : first + together] for first in range(0, len(ids), together)]
    return np.concatenate([_forward(model, group) for group in groups])


def _forward(model: Model, ids: NDArray) -> NDArray[np.float32]:
    """What is cached of one layer serves no other: here each overwrites the last one's."""
    config, device, (B, T) = model.config, model.device, ids.shape
    shape = (B, config.num_attention_heads, T, config.head_dim)
    cache = device.empty(shape, model.dtype), device.empty(shape, model.dtype), one_page_each(device, B)
    place, mix = placed(model, *(a.ravel().astype(np.int32) for a in np.indices((B, T))))
    work = new_workspace(model, B * T)
    embed(model, device.array(ids.ravel().astype(np.int32)), work)
    for p in model.params.layers:
        layer(p, model, work, place, cache, mix)
    logits = device.empty((B * T, config.vocab_size), np.float32)
    unembed(model, work.x, work.normed, logits)
    return logits.get().reshape(B, T, -1)
