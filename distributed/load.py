"""A rank's shard from a checkpoint: each rank reads its slices, and no other numbers.

Before anything is read, all ranks have to agree: that the files are whole, and that they are the same on every machine.

On a device (`backend="gpu"`) slices go from the mapped files to the device, piece by piece, as in gpu/load.py.
"""

from __future__ import annotations

import math
import platform
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from neox.distributed.comm import AgreedError, Communicator, agreed
from neox.distributed.device import DeviceShard, check_pieces, new_device_shard
from neox.distributed.launch import hides_progress
from neox.distributed.model import Shard, new_shard
from neox.distributed.sharding import check_ranks, slices
from neox.distributed.sums import choose_sums
from neox.gpu.device import Device, dtype_named, open_device
from neox.gpu.load import check_dtype, check_memory, require_kernels, source_of, upload
from neox.reference.checkpoint.hub import find
from neox.reference.checkpoint.load import Opened, converts, open_model, reader
from neox.reference.checkpoint.stored import Stored
from neox.reference.checkpoint.tensors import TensorSpec, tensor_table
from neox.reference.errors import InputError
from neox.reference.model import Array

BACKENDS = {"reference": "float32", "gpu": "float16"}  # what computes on a shard, and in which dtype by default


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
    dtype: str | None = None,
    weights: str = "auto",
    revision: str | None = None,
    layer_norms: str = "mean",
    device: str | Device = "cuda",
    sums: str | None = None,
    **overrides: Any,
) -> Shard | DeviceShard:
    """This rank's part of a model; called on every rank, with the arguments of reference.load or gpu.load.

    layer_norms may also be "per_rank": each rank keeps its own, of a checkpoint that as many ranks have trained.
    sums: how devices add up, of sums.py; None: the best that works here.
    A rank's memory holds its slices only, and those that stay as they are stored not even that: they are mapped.
    InputError as reference.load; AgreedError if what is wrong shows in files' headers, or ranks see different files.
    """
    if backend not in BACKENDS:
        raise InputError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    kind = dtype or BACKENDS[backend]
    agreed(comm, lambda: find(path, revision) if comm.rank == 0 else None)  # if it is downloaded, then once
    if backend == "gpu":
        agreed(comm, lambda: check_dtype(kind))
        own = own_device(device, comm)
        opened = _open_alike(comm, path, "float32", revision, layer_norms, overrides)
        return _load_on(own, opened, comm, kind, sums)
    return _load(_open_alike(comm, path, kind, revision, layer_norms, overrides), comm, weights)


def _load(opened: Opened, comm: Communicator, weights: str) -> Shard:
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


# On a device.


def number_of_card(machines: list[str], rank: int) -> int:
    """The ranks of each machine take its cards in turn. machines: that of every rank."""
    return machines[:rank].count(machines[rank])


def own_device(device: str | Device, comm: Communicator) -> Device:
    """AgreedError if it cannot be opened on some rank."""
    machines = [each.tobytes().decode() for each in comm.gather(np.frombuffer(platform.node().encode(), np.uint8))]

    def open_here() -> Device:
        if not isinstance(device, str):
            return device
        return (
            open_device(device, number=number_of_card(machines, comm.rank)) if device == "cuda" else open_device(device)
        )

    return agreed(comm, open_here)


def _load_on(device: Device, opened: Opened, comm: Communicator, dtype: str, sums: str | None) -> DeviceShard:
    table, config = tensor_table(opened.config), opened.config
    sources = {
        name: source_of(stored, name, slices(table[name], comm.rank, comm.ranks))
        for name, stored in opened.tensors.items()
    }
    count = sum(math.prod(source.shape) for source in sources.values())

    def check() -> str:
        require_kernels(config)
        check_pieces(config, comm)
        return check_memory(count, dtype_named(dtype), device, lambda _: "more ranks would each hold less")

    sizes = agreed(comm, check)
    if comm.rank == 0:
        print(f"weights: of each rank {sizes}", file=sys.stderr)
    model = upload(config, sources, device, dtype, hides_progress(comm), comm.alive)
    return new_device_shard(model, comm, choose_sums(comm, device, sums))
