"""A rank's shard from a checkpoint: each rank reads its slices, and no other numbers.

Before anything is read, all ranks have to agree: that the files are whole, and that they are the same on every machine.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from neox.distributed.comm import AgreedError, Communicator, agreed
from neox.distributed.launch import hides_progress
from neox.distributed.model import Shard, new_shard
from neox.distributed.sharding import check_ranks, slices
from neox.reference.checkpoint.hub import find
from neox.reference.checkpoint.load import Opened, converts, open_model, reader
from neox.reference.checkpoint.stored import Stored
from neox.reference.checkpoint.tensors import TensorSpec, tensor_table
from neox.reference.errors import InputError
from neox.reference.model import Array

BACKENDS = ("reference",)  # what computes on a shard


def _ends(stored: Stored) -> bytes:
    """The first and the last row of a matrix; all of a vector."""
    if len(stored.shape) == 1:
        return np.ascontiguousarray(stored.read()).tobytes()
    rows, columns = stored.shape
    ends = (stored.part((slice(i, i + 1), slice(0, columns))) for i in (0, rows - 1))
    return b"".join(np.ascontiguousarray(row).tobytes() for row in ends)


def fingerprint(opened: Opened, of_one_rank: bool) -> int:
    """Tells checkpoints of one model apart, such as two of its revisions, by a few numbers of every tensor.

    of_one_rank: what is replicated is left out, since every rank has its own.
    """
    table = tensor_table(opened.config)
    total = zlib.crc32(repr((opened.config, opened.dtype)).encode())
    for name, stored in sorted(opened.tensors.items()):
        if of_one_rank and table[name].sharding == "replicated":
            continue
        total = zlib.crc32(repr((name, stored.dtype, stored.shape)).encode(), total)
        total = zlib.crc32(_ends(stored), total)
    return total


def _check_same(comm: Communicator, own: int) -> None:
    """AgreedError, on every rank, that names the first whose checkpoint is not rank 0's."""
    prints = [int(each[0]) for each in comm.gather(np.array([own]))]
    other = [rank for rank, each in enumerate(prints) if each != prints[0]]
    if other:
        raise AgreedError(f"rank {other[0]} of {comm.ranks} sees another checkpoint, or config, than rank 0")


def _open_alike(
    comm: Communicator,
    path: str | Path,
    dtype: str,
    revision: str | None,
    layer_norms: str,
    overrides: Mapping[str, Any],
) -> Opened:
    """The headers, if they are in order on every rank, and of one checkpoint."""

    def open_here() -> tuple[Opened, int]:
        opened = open_model(path, dtype, revision, layer_norms, comm.rank, comm.ranks, **overrides)
        check_ranks(opened.config, comm.ranks)
        return opened, fingerprint(opened, layer_norms == "per_rank")

    opened, own = agreed(comm, open_here)
    _check_same(comm, own)
    return opened


def load(
    path: str | Path,
    comm: Communicator,
    backend: str = "reference",
    dtype: str = "float32",
    weights: str = "auto",
    revision: str | None = None,
    layer_norms: str = "mean",
    **overrides: Any,
) -> Shard:
    """This rank's part of a model; called on every rank, with the arguments of reference.load.

    layer_norms may also be "per_rank": each rank keeps its own, of a checkpoint that as many ranks have trained.
    A rank's memory holds its slices only, and those that stay as they are stored not even that: they are mapped.
    InputError as reference.load; AgreedError if what is wrong shows in files' headers, or ranks see different files.
    """
    if backend not in BACKENDS:
        raise InputError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    agreed(comm, lambda: find(path, revision) if comm.rank == 0 else None)  # if it is downloaded, then once
    opened = _open_alike(comm, path, dtype, revision, layer_norms, overrides)
    # Decided once: the memory that is available changes while ranks look.
    upcast = comm.broadcast(agreed(comm, lambda: comm.rank == 0 and converts(opened, weights)))
    read = reader(opened.tensors, opened.dtype, upcast)
    size, hidden = opened.size // comm.ranks, hides_progress(comm)
    with tqdm(total=size, desc="loading", unit="weights", unit_scale=True, disable=hidden, leave=False) as bar:

        def get(spec: TensorSpec) -> Array:
            array = read(spec, slices(spec, comm.rank, comm.ranks))
            bar.update(array.size)
            comm.alive()
            return array

        return new_shard(opened.config, get, opened.dtype, comm)
