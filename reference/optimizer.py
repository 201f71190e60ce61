"""How the 20B was trained, apart from its data: first weights, learning rate, clipping, and AdamW.

Sources: EleutherAI/gpt-neox, configs/20B.yml and megatron/model/init_functions.py; Nguyen and Salazar 2019 (small
init); Wang and Komatsuzaki 2021 (wang init); Loshchilov and Hutter 2019 (AdamW).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from neox.reference.checkpoint.tensors import TensorSpec, build_params
from neox.reference.config import Config
from neox.reference.model import Array, Model

Tensors = Mapping[str, Array]  # by their names in a checkpoint

OUTPUTS = ("attention.dense.weight", "mlp.dense_4h_to_h.weight")  # the matrices whose products enter the residual


# The first weights.


def initial_tensor(spec: TensorSpec, config: Config, seed: int) -> Array:
    """small init N(0, 2/(5C)), but wang init N(0, (2/(L sqrt(C)))^2) for outputs; norms 1, biases 0; float32."""
    if len(spec.shape) == 1:
        return np.full(spec.shape, spec.name.endswith("norm.weight"), np.float32)
    deviation = math.sqrt(2 / (5 * config.hidden_size))
    if spec.name.endswith(OUTPUTS):
        deviation = 2 / config.num_hidden_layers / math.sqrt(config.hidden_size)
    generator = np.random.default_rng([seed, zlib.crc32(spec.name.encode())])
    return generator.standard_normal(spec.shape, np.float32) * np.float32(deviation)


def initial_model(config: Config, seed: int) -> Model:
    """Where training begins."""
    return Model(config, build_params(config, lambda spec: initial_tensor(spec, config, seed)))


# The learning rate.


def learning_rate(step: int, steps: int, peak: float, warmup: float, final: float) -> float:
    """Of update `step`, from 1 to `steps`: a line up to the peak, then half a cosine down to `final` of it.

    warmup: the part of all updates that the line takes.
    """
    rising = max(1, round(warmup * steps))
    if step <= rising:
        return peak * step / rising
    passed = (step - rising) / (steps - rising)
    return peak * (final + (1 - final) * (1 + math.cos(math.pi * passed)) / 2)


# Clipping.


def clip(gradients: Tensors, largest: float) -> float:
    """Scale all gradients down, in place, so that together they are no longer than `largest`; returns their length."""
    norm = math.sqrt(sum(float(np.vdot(gradient, gradient)) for gradient in gradients.values()))
    if norm > largest:
        for gradient in gradients.values():
            gradient *= largest / norm
    return norm


# AdamW.


@dataclass(frozen=True)
class AdamW:
    """m = mean of gradients, v = mean of their squares, both fading;  w -= rate (m' / (sqrt(v') + eps) + decay w)."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.01


@dataclass(frozen=True)
class Moments:
    m: dict[str, Array]
    v: dict[str, Array]


def no_moments(parameters: Tensors) -> Moments:
    """Before the first update."""
    return Moments(*({name: np.zeros_like(p) for name, p in parameters.items()} for _ in range(2)))


def update(adam: AdamW, parameters: Tensors, gradients: Tensors, moments: Moments, step: int, rate: float) -> None:
    """Change parameters and moments in place. step counts from 1: the first means are of few gradients, and too small.

    Weight decay is decoupled: it does not pass through the means. Vectors (biases and norms) are not decayed.
    """
    for name, p in parameters.items():
        g, m, v = gradients[name], moments.m[name], moments.v[name]
        m *= adam.beta1
        m += (1 - adam.beta1) * g
        v *= adam.beta2
        v += (1 - adam.beta2) * (g * g)
        if p.ndim > 1:
            p *= 1 - rate * adam.weight_decay
        denominator = np.sqrt(v)
        denominator /= math.sqrt(1 - adam.beta2**step)
        denominator += adam.eps
        np.divide(m, denominator, out=denominator)
        denominator *= rate / (1 - adam.beta1**step)
        p -= denominator
