"""What ranks do with a shard, whatever computes on it: the reference (model.py, decode.py) or a device (device.py)."""

from __future__ import annotations

from collections.abc import Callable

from numpy.typing import ArrayLike, NDArray

from neox.distributed import device, model
from neox.distributed.decode import RankDecoder, ShardDecoder
from neox.distributed.device import DeviceShard
from neox.distributed.model import Shard

AnyShard = Shard | DeviceShard


def forward(shard: AnyShard, ids: ArrayLike) -> NDArray:  # (B,T) -> (B,T,V)
    """Logits of the next token after every position, on every rank; called on all with the same ids.

    InputError if an id or the length is out of range.
    """
    return device.forward(shard, ids) if isinstance(shard, DeviceShard) else model.forward(shard, ids)


def decoder_of(shard: AnyShard, progress: Callable[[int], object] = lambda positions: None) -> RankDecoder:
    """progress is called while prompts are read, with the number of positions that were."""
    if isinstance(shard, DeviceShard):
        return device.device_decoder(shard, progress)
    return ShardDecoder(shard, progress)
