"""How texts are sampled, as the arrays that kernels/sample.cu reads. What the values mean: reference/sampling.py.

A text's numbers depend on its seed and on where they are drawn, not on the other texts nor on when it came.

The repetition penalty is not among them: it needs the text, of which a step has only the last token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from neox.gpu import ops
from neox.gpu.device import Array, Device
from neox.reference.sampling import Sampling, new_seed

COLDEST, HOTTEST = 2.0**-126, 2.0**126  # whose inverses are normal numbers in float32, too
PARTS = 2**64  # of which a fraction is a whole number


@dataclass(frozen=True)
class Samplings:
    """Of B texts, each sampled in its own way."""

    temperatures: Array  # float32 (B); 0 takes the likeliest id
    top_k: Array  # int32 (B), as the two below 0 for off
    top_p: Array  # uint64 (B), in parts of 2^64
    min_p: Array  # uint64 (B), in parts of 2^64
    seeds: Array  # uint64 (B)

    def set(self, samplings: Sequence[Sampling]) -> None:
        """Of the first texts. Of a seed the lowest 64 bits count; who has none is given one.

        ValueError if one has a repetition penalty.
        """
        if any(s.repetition_penalty != 1 for s in samplings):
            raise ValueError("a repetition penalty needs the text, which the device does not keep")
        seeds = [new_seed() if s.seed is None else s.seed for s in samplings]
        for array, values in (
            (self.temperatures, [temperature_of(s) for s in samplings]),
            (self.top_k, [min(s.top_k, ops.LARGEST_SAMPLED_VOCAB) for s in samplings]),
            (self.top_p, [parts_of(s.top_p) for s in samplings]),
            (self.min_p, [parts_of(s.min_p) for s in samplings]),
            (self.seeds, [seed % PARTS for seed in seeds]),
        ):
            array[: len(samplings)].set(np.array(values, array.dtype))


def temperature_of(sampling: Sampling) -> float:
    """The nearest that the kernel can take; 0 stays 0, which means something else than nearly 0."""
    return min(max(sampling.temperature, COLDEST), HOTTEST) if sampling.temperature else 0.0


def parts_of(fraction: float) -> int:
    """A fraction in parts of 2^64; 0 for 1 and for 0, with which top-p and min-p are off."""
    return max(1, int(fraction * PARTS)) % PARTS if fraction else 0


def new_samplings(device: Device, count: int) -> Samplings:
    return Samplings(*(device.empty(count, dtype) for dtype in (np.float32, np.int32, np.uint64, np.uint64, np.uint64)))


def on_device(samplings: Sequence[Sampling], device: Device) -> Samplings:
    """ValueError if one has a repetition penalty."""
    copy = new_samplings(device, len(samplings))
    copy.set(samplings)
    return copy


def sample(
    logits: Array, allowed: Array | None, samplings: Samplings, texts: Array, numbers: Array, ids: Array
) -> None:
    """ids[n] drawn from logits[n] as texts[n] is sampled, by numbers[n]: as ops.sample."""
    s = samplings
    ops.sample(logits, allowed, s.temperatures, s.top_k, s.top_p, s.min_p, texts, numbers, ids)


def draw(
    logits: Array,
    allowed: Array | None,
    samplings: Samplings,
    texts: Array,
    positions: Array,
    numbers: Array,
    ids: Array,
) -> None:
    """The same by a number of the text's seed and positions[n], of its last token: another at each replay of a graph.

    The numbers are left in `numbers`.
    """
    ops.uniform(samplings.seeds, texts, positions, numbers)
    sample(logits, allowed, samplings, texts, numbers, ids)
