"""The gradient of the loss with respect to every parameter, written out: the mirror of model.py, function by function.

    dlogits = (softmax(logits) - one_hot(next ids)) / positions
    dx      = unembed'(dlogits)
    for each layer, the last first:
        dx   = LN1'(attention'(dx)) + LN2'(mlp'(dx)) + dx     both branches receive the same dx
    dembed_in[id] = sum of dx over the positions of that id

Each function here stands for the one of its name in model.py. It takes the gradient of the loss with respect to what
that function returned (dy, dz), and what that function was given or had computed on the way; it returns the gradient
with respect to what it was given, and that of its parameters in the dataclass they come in. What was computed on the
way is what forward() shows its tap: nothing of it is computed in a second way here.

Source of the rules: the chain rule. Dimensions as in model.py; N = B T.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from neox.reference import model as forwards
from neox.reference.config import Config
from neox.reference.model import MLP, Array, Attention, Layer, LayerNorm, Linear, Model, Params, Rotary
from neox.reference.normal import upper_tail

Kept = Mapping[str, Array]  # intermediates of a forward pass by name

# What no rule below can do without. Kept as they are shown: forward() does not write to an array it has shown.
NEEDED = ("scale", "normalized", "q", "k", "v", "pattern", "z", "pre", "post")


def inside(kept: Kept, prefix: str) -> Kept:
    """The intermediates of one part of the model, under their names in that part."""
    return {name.removeprefix(prefix): array for name, array in kept.items() if name.startswith(prefix)}


def summed(x: Array) -> Array:  # (...,O) -> (O,)
    """The sum over all positions, which is the gradient of what was added at each."""
    total: Array = x.reshape(-1, x.shape[-1]).sum(axis=0)
    return total


# Operations.


def linear(dy: Array, x: Array, p: Linear) -> tuple[Array, Linear]:  # (...,O), (...,I) -> (...,I)
    """y = x W^T + b:  dx = dy W,  dW = dy^T x,  db = sum dy."""
    rows = dy.reshape(-1, dy.shape[-1])  # (N,O)
    dx = (rows @ p.weight).reshape(x.shape)
    return dx, Linear(rows.T @ x.reshape(-1, x.shape[-1]), None if p.bias is None else summed(dy))


def layer_norm(dy: Array, kept: Kept, p: LayerNorm) -> tuple[Array, LayerNorm]:  # (...,C) -> (...,C)
    """y = n w + b, n = (x - mean) / scale:  dx = (dn - mean(dn) - n mean(dn n)) / scale,  dn = dy w.

    The two means are what moving x would change in the mean and in the scale of the norm itself.
    """
    normalized, scale = kept["hook_normalized"], kept["hook_scale"]
    product = dy * normalized
    gradient = LayerNorm(summed(product), summed(dy))
    dx = dy * p.weight
    product *= p.weight  # dn n
    mean = dx.mean(axis=-1, keepdims=True)  # (...,1)
    np.multiply(normalized, product.mean(axis=-1, keepdims=True), out=product)
    dx -= mean
    dx -= product
    dx /= scale
    return dx, gradient


def normed(kept: Kept, p: LayerNorm) -> Array:
    """What the LayerNorm returned, from its entries before weight and bias."""
    y = kept["hook_normalized"] * p.weight
    y += p.bias
    return y


def gelu(dy: Array, x: Array) -> Array:
    """y = x P(Z < x):  dy/dx = P(Z < x) + x density(x)."""
    tail = upper_tail(np.abs(x))
    slope = np.where(x > 0, 1 - tail, tail)
    slope += x * np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    slope *= dy
    return slope


def gelu_fast(dy: Array, x: Array) -> Array:
    """y = x (1 + t) / 2, t = tanh(u), u = x (c + d x^2):  dy/dx = (1 + t) (1 + (1 - t) x du/dx) / 2."""
    c = math.sqrt(2 / math.pi)
    d = 0.044715 * c
    square = x * x
    t = d * square
    t += c
    t *= x
    np.tanh(t, out=t)
    square *= 3 * d
    square += c  # du/dx
    square *= x
    square *= 1 - t
    square += 1
    t += 1
    t *= square
    t *= 0.5
    t *= dy
    return t


ACTIVATIONS = {"gelu": gelu, "gelu_fast": gelu_fast}


def softmax(dy: Array, y: Array) -> Array:
    """dx = y (dy - sum(dy y)), over the last axis, in the place of dy. Where y is 0, as in the future, so is dx."""
    dy -= np.einsum("...s,...s->...", dy, y)[..., None]
    dy *= y
    return dy


def apply_rotary(dy: Array, cos: Array, sin: Array) -> Array:  # (B,H,T,D) -> (B,H,T,D)
    """The transpose of a rotation is the rotation back."""
    return forwards.apply_rotary(dy, cos, -sin)


# Attention.


def attend(dz: Array, q: Array, k: Array, v: Array, pattern: Array) -> tuple[Array, Array, Array]:
    """z = P v, P = softmax(q k^T / sqrt(D)):  dv = P^T dz, dP = dz v^T;  then dq and dk from the scores'.

    All (B,H,T,D) but the pattern, (B,H,T,S).
    """
    dv = pattern.swapaxes(-1, -2) @ dz
    dscores = softmax(dz @ v.swapaxes(-1, -2), pattern)
    dq, dk = dscores @ k, dscores.swapaxes(-1, -2) @ q
    dq /= math.sqrt(q.shape[-1])
    dk /= math.sqrt(q.shape[-1])
    return dq, dk, dv


def attention(dy: Array, x: Array, kept: Kept, p: Attention, rotary: Rotary) -> tuple[Array, Attention]:
    """(B,T,C) -> (B,T,C)."""
    batch, length, heads, head_dim = kept["hook_z"].shape
    dz, ddense = linear(dy, kept["hook_z"].reshape(batch, length, -1), p.dense)
    q, k, v = (kept[f"hook_{name}"].swapaxes(1, 2) for name in "qkv")  # 3 x (B,H,T,D), not rotated
    q, k = forwards.apply_rotary(q, *rotary), forwards.apply_rotary(k, *rotary)
    dz = dz.reshape(batch, length, heads, head_dim).swapaxes(1, 2)  # (B,H,T,D)
    dq, dk, dv = attend(dz, q, k, v, kept["hook_pattern"])
    dqkv = np.empty((batch, length, heads, 3, head_dim), dy.dtype)
    for i, gradient in enumerate((apply_rotary(dq, *rotary), apply_rotary(dk, *rotary), dv)):
        dqkv[..., i, :] = gradient.swapaxes(1, 2)
    dx, dquery_key_value = linear(dqkv.reshape(batch, length, -1), x, p.query_key_value)
    return dx, Attention(dquery_key_value, ddense)


# The model.


def mlp(dy: Array, x: Array, kept: Kept, p: MLP, hidden_act: str) -> tuple[Array, MLP]:  # (B,T,C) -> (B,T,C)
    """y = down(activation(up(x)))."""
    dpost, ddown = linear(dy, kept["hook_post"], p.dense_4h_to_h)
    dx, dup = linear(ACTIVATIONS[hidden_act](dpost, kept["hook_pre"]), x, p.dense_h_to_4h)
    return dx, MLP(dup, ddown)


def layer(dy: Array, kept: Kept, p: Layer, config: Config, rotary: Rotary) -> tuple[Array, Layer]:
    """(B,T,C) -> (B,T,C)."""
    ln1, ln2 = inside(kept, "ln1."), inside(kept, "ln2.")
    dnormed, dmlp = mlp(dy, normed(ln2, p.post_attention_layernorm), inside(kept, "mlp."), p.mlp, config.hidden_act)
    dx, dln2 = layer_norm(dnormed, ln2, p.post_attention_layernorm)
    dx += dy
    # In the parallel form the attention's result reaches the loss through the sum alone, not also through the MLP.
    da = dy if config.use_parallel_residual else dx
    attended = inside(kept, "attn.")
    dnormed, dattention = attention(da, normed(ln1, p.input_layernorm), attended, p.attention, rotary)
    through_attention, dln1 = layer_norm(dnormed, ln1, p.input_layernorm)
    dx += through_attention
    return dx, Layer(dln1, dln2, dattention, dmlp)


def embed(dx: Array, ids: Array, vocab_size: int) -> Array:  # (B,T,C), (B,T) -> (V,C)
    """Each row is the sum over the positions that its id stands at."""
    order = np.argsort(ids, axis=None, kind="stable")
    found, starts = np.unique(ids.reshape(-1)[order], return_index=True)
    gradient = np.zeros((vocab_size, dx.shape[-1]), dx.dtype)
    gradient[found] = np.add.reduceat(dx.reshape(-1, dx.shape[-1])[order], starts)
    return gradient


def unembed(dlogits: Array, kept: Kept, model: Model) -> tuple[Array, LayerNorm, Array]:  # (B,T,V) -> (B,T,C)
    """The gradients of its input, of the final norm, and of the output matrix (V,C)."""
    p = model.params.final_layer_norm
    dx, dhead = linear(dlogits, normed(kept, p), Linear(model.params.embed_out, None))
    dx, gradient = layer_norm(dx, kept, p)
    return dx, gradient, dhead.weight


def cross_entropy(logits: Array, targets: Array) -> tuple[float, Array]:  # (B,T,V), (B,T) -> (B,T,V)
    """The mean of -log softmax(logits)[target] over all positions, and its gradient, which takes the logits' place."""
    logits -= logits.max(axis=-1, keepdims=True)
    at_target = targets[..., None]
    score = np.take_along_axis(logits, at_target, axis=-1)
    np.exp(logits, out=logits)
    total = logits.sum(axis=-1, keepdims=True)
    loss = float(np.mean(np.log(total) - score, dtype=np.float64))
    logits *= 1 / (targets.size * total)
    np.put_along_axis(logits, at_target, np.take_along_axis(logits, at_target, axis=-1) - 1 / targets.size, axis=-1)
    return loss, logits


def loss_and_gradient(model: Model, ids: Array) -> tuple[float, Params]:
    """The mean loss of predicting each id from those before it in its row, and its gradient in the shape of the model.

    ids: integers [batch, seq + 1]. Of tied embeddings, both fields hold the gradient of the one matrix.
    """
    inputs, targets = ids[:, :-1], ids[:, 1:]
    kept: dict[str, Array] = {}

    def keep(name: str, array: Array) -> Array:
        if name.rpartition("hook_")[2] in NEEDED:
            kept[name] = array
        return array

    loss, dlogits = cross_entropy(forwards.forward(model, inputs, keep), targets)
    rotary = forwards.rotary_tables(model.config, np.arange(inputs.shape[1])[None])
    dx, dfinal, dembed_out = unembed(dlogits, inside(kept, "ln_final."), model)
    layers: list[Layer] = []
    for i, p in reversed(list(enumerate(model.params.layers))):
        dx, gradient = layer(dx, inside(kept, f"blocks.{i}."), p, model.config, rotary)
        layers.insert(0, gradient)
    dembed_in = embed(dx, inputs, model.config.vocab_size)
    if model.config.tie_word_embeddings:
        dembed_in = dembed_out = dembed_in + dembed_out
    return loss, Params(dembed_in, tuple(layers), dfinal, dembed_out)
