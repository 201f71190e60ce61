"""Tensor parallelism: which slice of every tensor a rank holds, and the whole from its slices.

    vocabulary   rank r holds some ids: rows of the embedding and of the head
    column       rank r computes some of the outputs, heads whole: rows of the matrix, entries of the bias
    row          rank r computes a part of every sum, from its own outputs of the column before: columns of the matrix
    summed       the bias of a row, added once, after the parts: every rank holds the whole
    replicated   every rank holds the whole

Rank r's slices are contiguous, and the earlier ranks hold one piece more where the pieces do not come out even. So the
number of ranks need not divide anything; it is at most that of the heads. The fused matrix of queries, keys and values
is ordered by head, so the rows of some heads are contiguous in it too.

The kinds stand beside the tensors in reference/checkpoint/tensors.py. Source: Shoeybi et al. 2019, "Megatron-LM" (arXiv
1909.08053), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from neox.reference.checkpoint.tensors import AXES, TensorSpec
from neox.reference.config import Config
from neox.reference.errors import InputError
from neox.reference.model import Array

TILE = 64  # neurons of the MLP that stay together where every rank gets some: kernels read weights in such tiles


def check_ranks(config: Config, ranks: int) -> None:
    """InputError unless every rank gets a head, a neuron and an id."""
    if ranks < 1:
        raise InputError(f"a model needs at least one rank, not {ranks}")
    pieces = {
        "attention heads": config.num_attention_heads,
        "neurons in its MLP": config.intermediate_size,
        "ids in its vocabulary": config.vocab_size,
    }
    for name, count in pieces.items():
        if ranks > count:
            raise InputError(f"the model has {count} {name}, too few for {ranks} ranks")


def share(count: int, rank: int, ranks: int) -> slice:
    """Rank's part of `count` pieces: contiguous, sizes differ by one at most, the larger ones first."""
    size, larger = divmod(count, ranks)
    start = rank * size + min(rank, larger)
    return slice(start, start + size + (rank < larger))


def grain(spec: TensorSpec, ranks: int) -> int:
    """How many entries along the cut make one piece.

    Shares that can be equal are: a checkpoint that as many ranks have trained was cut so.
    """
    if spec.sharding == "vocabulary" or spec.grain > 1:
        return spec.grain
    neurons = spec.shape[AXES[spec.sharding]]
    tile = math.gcd(neurons if neurons % ranks else neurons // ranks, TILE)
    return tile if neurons // tile >= ranks else 1


def slices(spec: TensorSpec, rank: int, ranks: int) -> tuple[slice, ...]:
    """What rank holds of a tensor, as an index into the whole."""
    index = [slice(0, length) for length in spec.shape]
    if spec.sharding in AXES:
        axis, size = AXES[spec.sharding], grain(spec, ranks)
        part = share(spec.shape[axis] // size, rank, ranks)
        index[axis] = slice(part.start * size, part.stop * size)
    return tuple(index)


def merge(spec: TensorSpec, parts: Sequence[Array]) -> Array:
    """The whole tensor from the slices of all ranks, in their order: the inverse of `slices`.

    ValueError if the ranks' copies of what is not cut differ: there is no one whole then.
    """
    if spec.sharding in AXES:
        return np.concatenate(parts, AXES[spec.sharding])
    if not all(np.array_equal(part, parts[0]) for part in parts):
        raise ValueError(f"the ranks hold different {spec.name}")
    return parts[0]
