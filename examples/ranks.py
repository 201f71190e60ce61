"""The engine of examples/harness.py on several ranks: rank 0 runs the harness and says what is to be computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neox import distributed
from neox.distributed import Communicator
from neox.distributed.scoring import LeadingReader, ShardReader
from neox.reference.errors import InputError
from neox.reference.generate import Decoder, Request
from neox.reference.scoring import Batch
from neox.reference.tokenizer import Tokenizer

if TYPE_CHECKING:
    from harness import Engine, Open


# What rank 0 asks for; besides, a batch of texts to read.


@dataclass(frozen=True)
class Opening:
    """Load this model."""

    folder: Path
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Writing:
    """Follow while texts are continued."""


def open_shard(comm: Communicator, opening: Opening) -> distributed.Shard:
    return distributed.load(opening.folder, comm, **opening.arguments)


def engine_of(shard: distributed.Shard) -> Engine:
    from harness import Engine

    comm = shard.comm

    def decoder(requests: Sequence[Request], tokenizer: Tokenizer) -> AbstractContextManager[Decoder]:
        comm.broadcast(Writing())
        return distributed.Leader(distributed.ShardDecoder(shard), comm, requests, tokenizer)

    return Engine(LeadingReader(ShardReader(shard), comm), decoder)


@contextmanager
def lead(comm: Communicator) -> Iterator[Open]:
    """On rank 0: what opens a model on all ranks. At the end the others are let go."""

    def opener(folder: Path, device: str | None = None, **arguments: Any) -> Engine:
        if arguments.pop("backend", "reference") != "reference":
            raise InputError("--tensor-parallel belongs to backend=reference")
        opening = Opening(folder, arguments)
        comm.broadcast(opening)
        return engine_of(open_shard(comm, opening))

    yield opener
    comm.broadcast(None)


def help_with(comm: Communicator) -> None:
    """On every other rank: do what rank 0 asks for, until it ends."""
    while (order := comm.broadcast(None)) is not None:
        if isinstance(order, Opening):
            shard = open_shard(comm, order)
            reader = ShardReader(shard)
        elif isinstance(order, Batch):
            reader.logits(order)
        else:
            for _ in distributed.follow(distributed.ShardDecoder(shard), comm):
                pass
