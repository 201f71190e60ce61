"""Long prompts through the cache, on every core.

The positions of a chunk are cut into shares, one a core. A share passes through all layers by itself: only attention
looks at other positions, and only at keys and values that lie in the cache. So the shares wait for each other at one
point of a layer, when all have appended theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
from numpy.typing import ArrayLike

from neox.reference.cores import cores, one_blas_thread
from neox.reference.decode import Cache, checked_for, through_layers
from neox.reference.model import Array, Model, unembed

CHUNK = 512  # positions that go through the model at a time: bounds the memory that a long prompt takes
SMALLEST_SHARE = 64  # positions; with fewer, a product is too thin to keep a core busy


def prefill(
    model: Model, cache: Cache, ids: ArrayLike, progress: Callable[[int], object] = lambda positions: None
) -> Array:
    """Append whole prompts; returns the logits after the last token.  (B,T) -> (B,V)

    progress is called after each chunk with the number of positions it had. InputError as in decode.extend.
    """
    ids = checked_for(model, cache, ids)
    for start in range(0, ids.shape[1], CHUNK):
        chunk = ids[:, start : start + CHUNK]
        x = in_shares(model, cache, chunk)
        cache.length += chunk.shape[1]
        progress(chunk.shape[1])
    return unembed(model, x[:, -1:])[:, 0]


def in_shares(model: Model, cache: Cache, ids: Array) -> Array:  # (B,T) -> (B,T of the last share,C)
    """through_layers, the positions shared out over the cores; returns what becomes of the last share."""
    length = ids.shape[1]
    count = max(1, min(cores(), length // SMALLEST_SHARE))
    if count == 1:
        return through_layers(model, cache, ids, cache.length)
    bounds = np.linspace(0, length, count + 1).astype(int)
    barrier = Barrier(count)

    def share(first: int, last: int) -> Array:
        try:
            return through_layers(model, cache, ids[:, first:last], cache.length + first, barrier.wait)
        except BaseException:
            barrier.abort()  # or the others would wait for this share for ever
            raise

    with one_blas_thread(), ThreadPoolExecutor(count) as pool:
        return list(pool.map(share, bounds[:-1], bounds[1:]))[-1]
