"""The checks that the tests of training and the table of its mutants share: plain functions that raise AssertionError.

They need no torch. They reach every function through its module, so that they see what a mutant has put there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from checks import PARITY
from closeness import assert_close
from loops import logits as logits_by_loops
from numpy.typing import NDArray
from strategies import TINY, draw_ids, random_model

from neox.reference import backward, corpus, optimizer, train
from neox.reference.checkpoint.tensors import TensorSpec, build_params, named_tensors
from neox.reference.model import Model

Tensors = dict[str, NDArray]


def copied(m: Model) -> Model:
    """The same model in arrays of its own."""
    tensors = named_tensors(m.config, m.params)
    return Model(m.config, build_params(m.config, lambda spec: np.array(tensors[spec.name])), m.dtype)


def loss_of(m: Model, ids: NDArray) -> float:
    return float(backward.loss_and_gradient(m, ids)[0])


# The gradient.


def loss_is_of_the_next_id() -> None:
    """The loss is the mean of -log softmax(logits)[next id], of the logits that the loops find."""
    for name in ("20b", "sequential", "tied"):
        m = random_model(PARITY[name], seed=3, dtype="float64")
        ids = draw_ids(m.config, batch=2, length=7, seed=5)
        rows = logits_by_loops(m, ids[:, :-1])
        surprise = [
            math.log(sum(math.exp(x) for x in rows[b, t])) - rows[b, t, ids[b, t + 1]]
            for b in range(2)
            for t in range(6)
        ]
        assert_close(np.array(loss_of(m, ids)), np.mean(surprise), 1e-12)


def slope(m: Model, array: NDArray, direction: NDArray, ids: NDArray) -> float:
    """Of the loss along a direction of one tensor, by four differences.

    Their error is of order h^4 times a fifth derivative, and of the loss's rounding over h: both 1e-12 or so.
    """
    h, kept = 1e-3, array.copy()
    loss = {}
    for k in (-2, -1, 1, 2):
        array[...] = kept + k * h * direction
        loss[k] = loss_of(m, ids)
    array[...] = kept
    return (8 * (loss[1] - loss[-1]) - (loss[2] - loss[-2])) / (12 * h)


def gradient_is_the_slope() -> None:
    """In every kind of model, the gradient of every tensor gives the slope of the loss along a drawn direction."""
    for name, config in PARITY.items():
        m = copied(random_model(replace(config, num_hidden_layers=2), seed=3, dtype="float64"))
        ids = draw_ids(m.config, batch=2, length=6, seed=5)
        gradients = named_tensors(m.config, backward.loss_and_gradient(m, ids)[1])
        rng = np.random.default_rng(7)
        for tensor, array in named_tensors(m.config, m.params).items():
            direction = rng.standard_normal(array.shape)
            direction /= np.linalg.norm(direction)
            expected = slope(m, array, direction, ids)
            actual = float(np.vdot(gradients[tensor], direction))
            # Slopes are of order 0.01 to 1; the least of what a wrong rule changes is one term of a bias's.
            assert abs(actual - expected) <= 1e-8, (name, tensor, actual, expected)


def future_has_no_part() -> None:
    """The loss at one position does not depend on what comes after it, and neither does any gradient."""
    rng = np.random.default_rng(0)
    q, k, v, dz = rng.standard_normal((4, 2, 3, 5, 4))
    scores = q @ k.swapaxes(-1, -2) / 2 + np.triu(np.full((5, 5), -np.inf), 1)
    pattern = np.exp(scores - scores.max(-1, keepdims=True))
    pattern /= pattern.sum(-1, keepdims=True)
    dz[:, :, 3:] = 0  # the loss reads positions 0 to 2 only
    dq, dk, dv = backward.attend(dz, q, k, v, pattern)
    for gradient in (dq, dk, dv):
        assert np.all(gradient[:, :, 3:] == 0)
        assert np.all(gradient[:, :, :3] != 0) or np.all(gradient[:, :, 1:3] != 0)


def float32_stays() -> None:
    """Everything is computed in the dtype of the model."""
    for name in ("20b", "gelu"):
        m = random_model(PARITY[name], seed=3)
        gradients = named_tensors(m.config, backward.loss_and_gradient(m, draw_ids(m.config, 2, 6, 5))[1])
        assert {gradient.dtype for gradient in gradients.values()} == {np.dtype(np.float32)}


# The optimizer.


def by_hand(w: float, gradients: list[float], rates: list[float], decay: float) -> float:
    """AdamW of one number, as its authors write it (algorithm 2 of arXiv 1711.05101)."""
    m = v = 0.0
    for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        m = 0.9 * m + 0.1 * g
        v = 0.95 * v + 0.05 * g**2
        w -= rate * decay * w
        w -= rate * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.95**t)) + 1e-8)
    return w


def adamw_by_hand() -> None:
    """Five updates of a matrix and a vector, entry by entry; some entries have tiny gradients, where eps counts."""
    rng = np.random.default_rng(0)
    start = {"w": rng.standard_normal((2, 3)), "b": rng.standard_normal(3)}
    scale = np.array([1.0, 1e-8, 1e3])
    gradients = [{name: scale * rng.standard_normal(p.shape) for name, p in start.items()} for _ in range(5)]
    rates = [0.1, 0.2, 0.3, 0.2, 0.1]
    parameters = {name: p.copy() for name, p in start.items()}
    moments = optimizer.no_moments(parameters)
    adam = optimizer.AdamW(weight_decay=0.3)
    for step, (g, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        optimizer.update(adam, parameters, g, moments, step, rate)
    for name, p in start.items():
        decay = 0.3 if name == "w" else 0.0
        series = [[float(g[name][i]) for g in gradients] for i in np.ndindex(p.shape)]
        expected = [by_hand(w, g, rates, decay) for w, g in zip(p.reshape(-1).tolist(), series, strict=True)]
        assert_close(parameters[name].reshape(-1), np.array(expected), 1e-13)


def clipping() -> None:
    """A long gradient becomes one of length 1 in its direction, over all tensors together; a short one stays."""
    long = {"a": np.array([3.0, 0.0]), "b": np.array([[4.0]])}
    assert optimizer.clip(long, 1.0) == 5.0
    assert_close(long["a"], np.array([0.6, 0.0]), 1e-15)
    assert_close(long["b"], np.array([[0.8]]), 1e-15)
    short = {"a": np.array([0.3, 0.0]), "b": np.array([[0.4]])}
    assert optimizer.clip(short, 1.0) == 0.5
    assert np.array_equal(short["a"], [0.3, 0.0])


def schedule() -> None:
    """From a hundredth of the peak at the first of 100 warm-up steps, to the peak, to the middle, to a tenth."""
    rate = [optimizer.learning_rate(step, 1100, 2.0, 100 / 1100, 0.1) for step in range(1, 1101)]
    at = {1: 0.02, 50: 1.0, 100: 2.0, 600: 1.1, 1100: 0.2}
    assert_close(np.array([rate[step - 1] for step in at]), np.array(list(at.values())), 1e-12)
    assert np.all(np.diff(rate[99:]) < 0)
    # A quarter of the way down the cosine is at (1 + cos(45 degrees)) / 2.
    assert_close(np.array(rate[349]), np.array(2 * (0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)), 1e-12)


def first_weights() -> None:
    """The deviations of the 20B, which its sources state as numbers, at its own width; and nothing else drawn."""
    config = replace(TINY, hidden_size=6144, num_attention_heads=64, num_hidden_layers=44, intermediate_size=9)
    shapes = {"gpt_neox.embed_in.weight": 0.0080687, "gpt_neox.layers.0.attention.query_key_value.weight": 0.0080687}
    outputs = ("gpt_neox.layers.0.attention.dense.weight", "gpt_neox.layers.0.mlp.dense_4h_to_h.weight")
    shapes |= dict.fromkeys(outputs, 0.00057990)
    shapes |= {"gpt_neox.layers.0.mlp.dense_h_to_4h.weight": 0.0080687, "embed_out.weight": 0.0080687}
    for name, deviation in shapes.items():
        drawn = optimizer.initial_tensor(TensorSpec(name, (40, 1000), "replicated"), config, 0)
        # Of 40,000 draws the deviation is known to 0.35 %, the mean to 0.5 % of it: five times that.
        assert abs(drawn.std() / deviation - 1) < 0.018, name
        assert abs(drawn.mean() / deviation) < 0.025, name
    small = named_tensors(TINY, optimizer.initial_model(TINY, 0).params)
    for name, array in small.items():
        if array.ndim == 1:
            assert np.all(array == name.endswith("norm.weight")), name


# A step, and the order of the data.

SETTINGS = train.Settings(steps=20, batch=6, micro_batch=2, length=5, learning_rate=0.01, warmup=0.1, clip=0.05)


def batches(settings: train.Settings, vocab_size: int) -> Iterator[NDArray]:
    data = corpus.Packed(np.random.default_rng(1).integers(0, vocab_size, 20 * settings.length + 1), settings.length)
    for step in range(settings.steps):
        yield data[corpus.batch_rows(data.rows, settings.batch, step, settings.seed)]


def steps_are_their_equations() -> None:
    """Twenty steps of train.py against the same written without micro-batches, on the whole batch, from first to last.

    The gradient is clipped in every one of them, and only once it is that of the whole batch.
    """
    start = random_model(replace(TINY, num_hidden_layers=1), seed=1, dtype="float64")
    ours, plain = copied(start), copied(start)
    parameters = named_tensors(plain.config, plain.params)
    state = train.begin(ours)
    moments: Any = {name: (np.zeros_like(p), np.zeros_like(p)) for name, p in parameters.items()}
    for t, ids in enumerate(batches(SETTINGS, TINY.vocab_size), 1):
        state, progress = train.advance(state, SETTINGS, ids)
        loss, gradient = backward.loss_and_gradient(plain, ids)
        gradients = named_tensors(plain.config, gradient)
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
        assert norm > SETTINGS.clip
        rate = SETTINGS.rate(t)
        for name, p in parameters.items():
            g, (m, v) = gradients[name] * (SETTINGS.clip / norm), moments[name]
            moments[name] = m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
            p -= rate * (0.01 if p.ndim == 2 else 0) * p
            p -= rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
        assert_close(np.array([progress.loss, progress.norm]), np.array([loss, norm]), 1e-9)
    for name, p in named_tensors(ours.config, ours.params).items():
        assert_close(p, parameters[name], 1e-9)


def every_row_once_an_epoch() -> None:
    """Seven rows in batches of three: whatever the step begins in, each epoch has every row once, in its own order."""
    read = np.concatenate([corpus.batch_rows(7, 3, step, seed=5) for step in range(14)]).reshape(6, 7)
    assert np.array_equal(np.sort(read, axis=1), np.tile(np.arange(7), (6, 1)))
    assert len({tuple(epoch) for epoch in read.tolist()}) > 1
    assert not np.array_equal(corpus.batch_rows(7, 7, 0, seed=5), corpus.batch_rows(7, 7, 0, seed=6))


def rows_overlap_by_one() -> None:
    """Each row's last id is the next one's first, so that every id but the first is predicted exactly once."""
    data = corpus.Packed(np.arange(18, dtype=np.uint16), 5)
    assert data.rows == 3
    assert data[np.array([0, 2])].tolist() == [[0, 1, 2, 3, 4, 5], [10, 11, 12, 13, 14, 15]]
    train_on, held_out = data.split(1)
    assert train_on[np.arange(train_on.rows)].tolist() == [[0, 1, 2, 3, 4, 5], [5, 6, 7, 8, 9, 10]]
    assert held_out[np.arange(held_out.rows)].tolist() == [[10, 11, 12, 13, 14, 15]]


CHECKS = {
    check.__name__: check
    for check in (
        loss_is_of_the_next_id,
        gradient_is_the_slope,
        future_has_no_part,
        float32_stays,
        adamw_by_hand,
        clipping,
        schedule,
        first_weights,
        steps_are_their_equations,
        every_row_once_an_epoch,
        rows_overlap_by_one,
    )
}
