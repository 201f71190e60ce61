"""Caches of one row for each text, cut into pages that lie anywhere."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NOWHERE = 1 << 20  # of no page: a kernel that looks there is told so


def paged(size: int, *caches: NDArray, seed: int = 0) -> tuple[list[NDArray], NDArray[np.int32]]:
    """k x (B,H,S,D) -> k x (pages,H,size,D) and (B,P), P size >= S. size 0: each text's row is its page.

    Pages are shuffled, those that are equal in all caches are one, those that are NaN throughout are in no table, and
    NaN lies in pages of no text.
    """
    B, H, S, D = caches[0].shape
    if not size:
        return list(caches), np.arange(B, dtype=np.int32)[:, None]
    P, rng = -(-S // size), np.random.default_rng(seed)
    wide = [np.full((B, H, P * size, D), np.nan, cache.dtype) for cache in caches]
    for padded, cache in zip(wide, caches, strict=True):
        padded[:, :, :S] = cache
    cut = [a.reshape(B, H, P, size, D).swapaxes(1, 2).reshape(B * P, H, size, D) for a in wide]
    places = rng.permutation(B * P + 2)
    spread = [np.full((len(places), H, size, D), np.nan, cache.dtype) for cache in caches]
    table, known = np.full(B * P, NOWHERE, np.int32), dict[bytes, int]()
    for i in range(B * P):
        if not all(np.isnan(a[i].astype(np.float32)).all() for a in cut):
            table[i] = known.setdefault(b"".join(a[i].tobytes() for a in cut), places[i])
            for pages, a in zip(spread, cut, strict=True):
                pages[table[i]] = a[i]
    return spread, table.reshape(B, P)
