"""GPT-NeoX over several ranks, by tensor parallelism. Imports mpi4py only where ranks of MPI are asked for.

To read: sharding.py (who holds what), comm.py (what is exchanged), model.py (where), leader.py (who decides);
device.py and sums.py: the same with GPUs.
"""

from neox.distributed.backends import AnyShard, decoder_of, forward
from neox.distributed.comm import Alone, Communicator, virtual
from neox.distributed.decode import ShardDecoder
from neox.distributed.device import DeviceShard, device_shard
from neox.distributed.launch import run_ranks
from neox.distributed.leader import Leader, follow, generate
from neox.distributed.load import load
from neox.distributed.model import Shard, shard
from neox.distributed.mpi import connect
from neox.distributed.sums import split_way

__all__ = [
    "Alone",
    "AnyShard",
    "Communicator",
    "DeviceShard",
    "Leader",
    "Shard",
    "ShardDecoder",
    "connect",
    "decoder_of",
    "device_shard",
    "follow",
    "forward",
    "generate",
    "load",
    "run_ranks",
    "shard",
    "split_way",
    "virtual",
]
