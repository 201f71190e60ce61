"""Trees of texts on shards: reference/scoring.py over several ranks.

The tokens of a batch go through the layers side by side, so a batch of any size makes the collectives of model.py once.
Rank 0 has the batches and what is asked of them; the others follow.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from neox.distributed.backends import AnyShard
from neox.distributed.comm import Communicator
from neox.distributed.device import DeviceShard, ways_of
from neox.distributed.model import Shard, embed, layer
from neox.gpu.scoring import DeviceReader
from neox.reference.config import Config
from neox.reference.decode import Cache, nothing
from neox.reference.model import Array, rotary_tables, unembed
from neox.reference.scoring import Batch, Judgement, Limits, cache_after, judged, mix_tree, reaches


class RankReader(Protocol):
    """A rank's share in reading trees. All ranks are given the same batches, in the same order."""

    limits: Limits

    @property
    def config(self) -> Config: ...

    def read(self, batch: Batch) -> Judgement:
        """As of Reader, on rank 0."""
        ...

    def help(self, batch: Batch) -> None:
        """On every other rank."""
        ...


class ShardReader:
    """A shard of the reference model that reads trees."""

    limits = Limits()

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._cache: Cache | None = None

    @property
    def config(self) -> Config:
        return self._shard.config

    def logits(self, batch: Batch) -> Array:  # (M,V)
        """Of the rows that are asked for, on every rank."""
        shard, config, kept = self._shard, self.config, batch.kept_length
        model = shard.model
        heads = model.params.layers[0].attention.dense.weight.shape[1] // config.head_dim
        self._cache = cache_after(self._cache, batch, (config.num_hidden_layers, heads, config.head_dim), model.dtype)
        reach = reaches(batch, 0, len(batch.ids), model.dtype)
        rotary = rotary_tables(config, batch.positions[None])
        x = embed(shard, batch.ids[None])
        for index in range(config.num_hidden_layers):
            mix = mix_tree(self._cache, index, slice(kept, kept + len(batch.ids)), reach, nothing)
            x = layer(shard, index, x, rotary, mix)
        return np.concatenate(shard.comm.gather(unembed(model, x[:, batch.asked.rows])[0]), axis=-1)

    def read(self, batch: Batch) -> Judgement:
        """What is asked, found in the logits."""
        return judged(self.logits(batch), batch.asked)

    def help(self, batch: Batch) -> None:
        """This rank's part of a `read` by rank 0."""
        self.logits(batch)


class DeviceShardReader:
    """The same on a device: gpu/scoring.py, level by level of a tree, with all ranks' logits after each."""

    def __init__(self, shard: DeviceShard) -> None:
        comm = shard.comm
        self._reader = DeviceReader(shard.model, ways_of(shard), lambda own: np.concatenate(comm.gather(own), axis=-1))
        self.limits = self._reader.limits

    @property
    def config(self) -> Config:
        return self._reader.config

    def read(self, batch: Batch) -> Judgement:
        return self._reader.read(batch)

    def help(self, batch: Batch) -> None:
        self._reader.read(batch)


def reader_of(shard: AnyShard) -> RankReader:
    return DeviceShardReader(shard) if isinstance(shard, DeviceShard) else ShardReader(shard)


class LeadingReader:
    """All ranks as one Reader of reference/scoring.py: on rank 0, while the others `help` with what it broadcasts."""

    def __init__(self, reader: RankReader, comm: Communicator) -> None:
        self._reader, self._comm = reader, comm
        self.limits = reader.limits

    @property
    def config(self) -> Config:
        return self._reader.config

    def read(self, batch: Batch) -> Judgement:
        """As of Reader."""
        self._comm.broadcast(batch)
        return self._reader.read(batch)
