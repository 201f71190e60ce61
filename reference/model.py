"""GPT-NeoX, from token ids to logits: this file is the definition of the model.

    x = embed_in[ids]
    for each layer:
        q, k, v   = split(query_key_value(LN1(x)))             per head: its q, its k, its v     [1]
        q, k      = rotate the first R of their D dims by position                               [2]
        attention = dense(softmax(causal(q k^T / sqrt(D))) v)
        mlp       = dense_4h_to_h(gelu(dense_h_to_4h(LN2(x))))
        x         = (mlp + attention) + x                      both read the same x              [3, 4]
    logits = embed_out(LN(x))                                                                    [5, 6]

What differs from GPT-2:
    [1] The fused projection holds (q, k, v) of head 0, then of head 1, ...; GPT-2 holds all q, all k, all v.
    [2] Positions enter as a rotation of queries and keys (RoPE), and only in a quarter of each head; GPT-2 adds a
        learned vector to x.
    [3] Attention and MLP run side by side and are added at once (parallel residual); GPT-2 runs one after the other.
    [4] Each branch has a LayerNorm of its own although both normalize the same x.
    [5] The output matrix is not the embedding matrix.
    [6] The vocabulary is padded to a round number: the last rows of both matrices belong to no token.

Dimensions, here and in every file of the project:
    B batch   T positions (queries)   S positions attended to (keys)   L layers   V vocab_size
    C hidden_size   H heads   D head_dim = C/H   R rotary_ndims   F intermediate_size   I, O in and out of a linear

Every function returns the dtype it is given. Nothing here caches (decode.py), reads files (checkpoint/) or samples
(generate.py).

Sources: Black et al. 2022, "GPT-NeoX-20B" (arXiv 2204.06745), section 2; Su et al. 2021, "RoFormer" (2104.09864);
the layer is `ParallelTransformerLayer.forward` of EleutherAI/gpt-neox, megatron/model/transformer.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from neox.reference.config import Config
from neox.reference.errors import InputError
from neox.reference.normal import upper_tail
from neox.reference.project import project

Array = NDArray
FLOAT32 = np.dtype(np.float32)
Tap = Callable[[str, Array], Array]


# Parameters: every tensor of a checkpoint, under its name in the checkpoint.


@dataclass(frozen=True)
class Linear:
    weight: Array  # (O,I)
    bias: Array | None  # (O,); None in models with attention_bias=False


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
    input_layernorm: LayerNorm  # feeds the attention
    post_attention_layernorm: LayerNorm  # feeds the MLP; the name is GPT-2's, where it came after the attention
    attention: Attention
    mlp: MLP


@dataclass(frozen=True)
class Params:
    embed_in: Array  # (V,C)
    layers: Sequence[Layer]
    final_layer_norm: LayerNorm
    embed_out: Array  # (V,C)


@dataclass(frozen=True)
class Model:
    config: Config
    params: Params
    dtype: np.dtype = FLOAT32  # in which everything is computed; matrices may be stored in fewer bits


# Watching: each named intermediate passes through a tap, which may look at it, keep a copy, or replace it. The names
# are TransformerLens's. Arrays may be overwritten once the tap has returned.


def untapped(name: str, array: Array) -> Array:
    return array


def within(tap: Tap, prefix: str) -> Tap:
    """The same tap for one part of the model, whose names it completes with a prefix."""
    return tap if tap is untapped else lambda name, array: tap(prefix + name, array)


# Operations.


def linear(x: Array, p: Linear) -> Array:  # (...,I) -> (...,O)
    """x W^T + b."""
    y = project(x, p.weight)
    if p.bias is not None:
        y += p.bias
    return y


def layer_norm(x: Array, p: LayerNorm, eps: float, tap: Tap = untapped) -> Array:  # (...,C) -> (...,C)
    """(x - mean) / sqrt(variance + eps) * weight + bias, over the last axis.

    Two passes: the mean of squares minus the square of the mean loses all digits when the mean is large.
    """
    y = x - x.mean(axis=-1, keepdims=True)
    variance = np.mean(y * y, axis=-1, keepdims=True)  # (...,1)
    y /= tap("hook_scale", np.sqrt(variance + eps))
    y = tap("hook_normalized", y)
    return y * p.weight + p.bias


def gelu(x: Array) -> Array:
    """x P(Z < x) for a normal Z, as max(x, 0) - |x| Q(|x|), in which nothing cancels; Q is the normal's tail.

    Pythia's configs name this one, although Pythia was trained with gelu_fast.
    """
    size = np.abs(x)
    tail = size * upper_tail(size)
    return (x + size) / 2 - tail


def gelu_fast(x: Array) -> Array:
    """The tanh approximation of gelu, up to 4.7e-4 away from it: what the 20B was trained and published with."""
    inner = math.sqrt(2 / math.pi) * x * (1 + 0.044715 * x * x)
    return 0.5 * x * (1 + np.tanh(inner))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"gelu": gelu, "gelu_fast": gelu_fast}


def softmax(x: Array) -> Array:
    """exp(x) / sum(exp(x)) over the last axis; the largest entry is subtracted first, so that exp cannot overflow."""
    y = x - x.max(axis=-1, keepdims=True)
    np.exp(y, out=y)
    y /= y.sum(axis=-1, keepdims=True)
    return y


# Rotary position embedding.


def rotary_tables(config: Config, positions: Array) -> tuple[Array, Array]:  # (B,T) -> 2 x (B,1,T,R/2)
    """cos and sin of position * base^(-2i/R): dim pair i turns the slower, the larger i.

    Angles are rounded to `config.rotary_dtype` and so are cos and sin, whatever dtype the model computes in.
    float32 is what transformers does. The 20B and Pythia were trained with float16, because the frequencies were cast
    together with the weights: at position 2000 that moves a cosine by up to 0.3.
    """
    exponent = np.arange(0, config.rotary_ndims, 2, dtype=np.float32) / np.float32(config.rotary_ndims)  # (R/2,)
    # Powers and cosines are taken in float64 and rounded once, so that every machine gets the same bits.
    frequency = np.float32(1) / np.power(config.rotary_emb_base, exponent.astype(np.float64)).astype(np.float32)
    angle = positions[:, None, :, None].astype(config.rotary_dtype) * frequency.astype(config.rotary_dtype)
    angle = angle.astype(np.float64)  # (B,1,T,R/2)
    return np.cos(angle).astype(config.rotary_dtype), np.sin(angle).astype(config.rotary_dtype)


def apply_rotary(x: Array, cos: Array, sin: Array) -> Array:  # (B,H,T,D), 2 x (B,1,T,R/2) -> (B,H,T,D)
    """Rotate the first R dims by position; the other D-R pass through.

        (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin),  x1 = x[..., :R/2],  x2 = x[..., R/2:R]

    Dim i is paired with dim i + R/2, not with its neighbour as in the paper and GPT-J: the weights were trained so.
    """
    half = cos.shape[-1]
    cos, sin = cos.astype(x.dtype, copy=False), sin.astype(x.dtype, copy=False)
    x1, x2 = x[..., :half], x[..., half : 2 * half]
    y = np.empty_like(x)
    y[..., :half] = x1 * cos - x2 * sin
    y[..., half : 2 * half] = x2 * cos + x1 * sin
    y[..., 2 * half :] = x[..., 2 * half :]
    return y


# Attention: the only place where positions exchange information.


def causal_mask(length: int, dtype: np.dtype) -> Array:  # (T,T)
    """0 where a query may see a key, -inf in its future."""
    return np.triu(np.full((length, length), -np.inf, dtype), 1)


def attend(q: Array, k: Array, v: Array, mask: Array, tap: Tap = untapped) -> Array:
    """Each query's average of the values it may see, weighted by softmax(q k^T / sqrt(D) + mask).

    (B,H,T,D), 2 x (B,H,S,D), mask broadcast to (B,H,T,S) -> (B,H,T,D). Every query must see some key.
    """
    scores = (q / math.sqrt(q.shape[-1])) @ k.swapaxes(-1, -2)  # (B,H,T,S)
    scores += mask
    pattern = tap("hook_pattern", softmax(tap("hook_attn_scores", scores)))
    return pattern @ v  # (B,H,T,D)


def causal_attend(q: Array, k: Array, v: Array, tap: Tap = untapped) -> Array:
    """Attention in which position t sees the positions up to and including t."""
    return attend(q, k, v, causal_mask(q.shape[-2], q.dtype), tap)


Mix = Callable[[Array, Array, Array, Tap], Array]  # q, k, v -> (B,H,T,D): causal_attend, or decode.py's over a cache
Rotary = tuple[Array, Array]  # cos, sin


def attention(p: Attention, head_dim: int, x: Array, rotary: Rotary, mix: Mix, tap: Tap = untapped) -> Array:
    """(B,T,C) -> (B,T,C). The number of heads is read off the weights, so that this also runs on some of the heads."""
    batch, length, _ = x.shape
    qkv = linear(x, p.query_key_value).reshape(batch, length, -1, 3, head_dim)  # (B,T,H,3,D)
    q, k, v = (tap(f"hook_{name}", qkv[..., i, :]).swapaxes(1, 2) for i, name in enumerate("qkv"))  # 3 x (B,H,T,D)
    q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
    q, k = (tap(f"hook_rot_{name}", y.swapaxes(1, 2)).swapaxes(1, 2) for name, y in (("q", q), ("k", k)))
    z = mix(q, k, v, tap)
    z = tap("hook_z", z.swapaxes(1, 2))  # (B,T,H,D)
    return linear(z.reshape(batch, length, -1), p.dense)


# The model.


def mlp(p: MLP, hidden_act: str, x: Array, tap: Tap = untapped) -> Array:  # (B,T,C) -> (B,T,C)
    hidden = tap("hook_pre", linear(x, p.dense_h_to_4h))  # (B,T,F)
    return linear(tap("hook_post", ACTIVATIONS[hidden_act](hidden)), p.dense_4h_to_h)


def layer(p: Layer, config: Config, x: Array, rotary: Rotary, mix: Mix = causal_attend, tap: Tap = untapped) -> Array:
    """(B,T,C) -> (B,T,C)."""
    x = tap("hook_resid_pre", x)
    normed = layer_norm(x, p.input_layernorm, config.layer_norm_eps, within(tap, "ln1."))
    a = tap("hook_attn_out", attention(p.attention, config.head_dim, normed, rotary, mix, within(tap, "attn.")))
    if not config.use_parallel_residual:  # GPT-2's order, in some models of this architecture, not in the 20B
        x = tap("hook_resid_mid", a + x)
    # In the parallel form this is the same x that input_layernorm saw. The authors meant the two norms to be one; by
    # a bug they are not, and the 20B has learned two.
    normed = layer_norm(x, p.post_attention_layernorm, config.layer_norm_eps, within(tap, "ln2."))
    m = tap("hook_mlp_out", mlp(p.mlp, config.hidden_act, normed, within(tap, "mlp.")))
    return tap("hook_resid_post", m + a + x if config.use_parallel_residual else m + x)


def embed(model: Model, ids: Array) -> Array:  # (B,T) -> (B,T,C)
    return model.params.embed_in[ids].astype(model.dtype)


def unembed(model: Model, x: Array, tap: Tap = untapped) -> Array:  # (B,T,C) -> (B,T,V)
    x = layer_norm(x, model.params.final_layer_norm, model.config.layer_norm_eps, within(tap, "ln_final."))
    return project(x, model.params.embed_out)


def checked(config: Config, ids: ArrayLike) -> Array:
    """ids as an integer array (B,T), or an InputError: ids of the vocabulary, within the model's context."""
    array = np.asarray(ids)
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer) or array.size == 0:
        raise InputError(f"token ids must be integers of shape [batch, seq], not {array.dtype} of shape {array.shape}")
    if array.shape[1] > config.max_position_embeddings:
        raise InputError(f"{array.shape[1]} tokens, but the model's context is {config.max_position_embeddings}")
    if array.min() < 0 or array.max() >= config.vocab_size:
        wrong = array[(array < 0) | (array >= config.vocab_size)][0]
        raise InputError(f"token id {wrong} is outside the vocabulary of {config.vocab_size}")
    return array


def forward(model: Model, ids: ArrayLike, tap: Tap = untapped) -> Array:  # (B,T) -> (B,T,V)
    """Logits of the next token after every position.

    ids: integers [batch, seq]; returns model.dtype. InputError if an id or the length is out of range.
    """
    ids = checked(model.config, ids)
    x = tap("hook_embed", embed(model, ids))
    rotary = rotary_tables(model.config, np.arange(ids.shape[1])[None])
    for i, p in enumerate(model.params.layers):
        x = layer(p, model.config, x, rotary, tap=within(tap, f"blocks.{i}."))
    return unembed(model, x, tap)
