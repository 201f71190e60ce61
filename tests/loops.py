"""GPT-NeoX a second time, in float64, one position and one head at a time, from the equations.

It shares no code with model.py (only the dataclasses that hold the weights), so a mistake would have to be made twice
to go unseen. Slow and plain on purpose: no batched product, no mask (a query walks over the keys it may see), the C
library's erf, exp and tanh.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from neox.reference.config import Config
from neox.reference.model import Layer, LayerNorm, Linear, Model

Vector = NDArray[np.float64]


def affine(p: Linear, x: Vector) -> Vector:
    y = np.array([math.fsum(row * x) for row in p.weight.astype(np.float64)])
    return y if p.bias is None else y + p.bias.astype(np.float64)


def normalized(p: LayerNorm, eps: float, x: Vector) -> Vector:
    mean = math.fsum(x) / len(x)
    variance = math.fsum((x - mean) ** 2) / len(x)
    return (x - mean) / math.sqrt(variance + eps) * p.weight.astype(np.float64) + p.bias.astype(np.float64)


def gelu_erf(x: float) -> float:
    return 0.5 * x * math.erfc(-x / math.sqrt(2))  # erfc, where 1 + erf would cancel for negative x


def gelu_tanh(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATION = {"gelu": gelu_erf, "gelu_fast": gelu_tanh}


def frequencies(rotary_ndims: int, base: float) -> list[np.float32]:
    """1 / base^(2i/R), each operation rounded to float32, as the declared numerics have it."""
    exponents = [np.float32(2 * i) / np.float32(rotary_ndims) for i in range((rotary_ndims + 1) // 2)]
    return [np.float32(1) / np.float32(base ** float(exponent)) for exponent in exponents]


def rotated(config: Config, x: Vector, position: int) -> Vector:  # (D,) -> (D,)
    """Turn each pair (i, i + R/2) of the first R dims by its own angle."""
    kind = np.dtype(config.rotary_dtype).type
    y = x.copy()
    half = config.rotary_ndims // 2
    for i, frequency in enumerate(frequencies(config.rotary_ndims, config.rotary_emb_base)):
        angle = float(kind(position) * kind(frequency))
        cos, sin = float(kind(math.cos(angle))), float(kind(math.sin(angle)))
        y[i] = x[i] * cos - x[i + half] * sin
        y[i + half] = x[i + half] * cos + x[i] * sin
    return y


def averaged(q: Vector, keys: list[Vector], values: list[Vector]) -> Vector:
    """The values weighted by softmax(q k / sqrt(D)) over exactly these keys."""
    scores = [math.fsum(q * k) / math.sqrt(len(q)) for k in keys]
    weights = [math.exp(score - max(scores)) for score in scores]
    total = math.fsum(weights)
    return sum((w / total * v for w, v in zip(weights, values, strict=True)), np.zeros_like(q))


def attention(p: Layer, config: Config, normed: list[Vector]) -> list[Vector]:
    """For each position: every head looks at the positions up to and including it."""
    width = config.head_dim
    fused = [affine(p.attention.query_key_value, x) for x in normed]  # T x (3C,)
    joined = [np.empty(config.hidden_size) for _ in normed]
    for head in range(config.num_attention_heads):
        first = head * 3 * width  # rows of this head: its q, its k, its v
        queries = [rotated(config, y[first : first + width], t) for t, y in enumerate(fused)]
        keys = [rotated(config, y[first + width : first + 2 * width], t) for t, y in enumerate(fused)]
        values = [y[first + 2 * width : first + 3 * width] for y in fused]
        for t, q in enumerate(queries):
            z = averaged(q, keys[: t + 1], values[: t + 1])
            joined[t][head * width : (head + 1) * width] = z
    return [affine(p.attention.dense, z) for z in joined]


def mlp(p: Layer, config: Config, x: Vector) -> Vector:
    hidden = affine(p.mlp.dense_h_to_4h, x)
    return affine(p.mlp.dense_4h_to_h, np.array([ACTIVATION[config.hidden_act](float(h)) for h in hidden]))


def layer(p: Layer, config: Config, xs: list[Vector]) -> list[Vector]:
    eps = config.layer_norm_eps
    attended = attention(p, config, [normalized(p.input_layernorm, eps, x) for x in xs])
    if config.use_parallel_residual:
        return [
            x + a + mlp(p, config, normalized(p.post_attention_layernorm, eps, x))
            for x, a in zip(xs, attended, strict=True)
        ]
    middle = [x + a for x, a in zip(xs, attended, strict=True)]
    return [y + mlp(p, config, normalized(p.post_attention_layernorm, eps, y)) for y in middle]


def logits(model: Model, ids: NDArray) -> NDArray[np.float64]:  # (B,T) -> (B,T,V)
    """What the model should answer after every position of every text."""
    config, params = model.config, model.params
    head = Linear(params.embed_in if config.tie_word_embeddings else params.embed_out, None)
    result = []
    for text in ids:
        xs = [params.embed_in[token].astype(np.float64) for token in text]
        for p in params.layers:
            xs = layer(p, config, xs)
        result.append([affine(head, normalized(params.final_layer_norm, config.layer_norm_eps, x)) for x in xs])
    return np.array(result)
