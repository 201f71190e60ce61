"""The engine of examples/harness.py on several ranks: rank 0 runs the harness and says what is to be computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neox import distributed
from neox.distributed import Communicator
from neox.distributed.scoring import LeadingReader, reader_of
from neox.reference.generate import Completion, Request, complete
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


def engine_of(shard: distributed.AnyShard) -> Engine:
    from harness import Engine

    comm = shard.comm

    def completed(requests: Sequence[Request], tokenizer: Tokenizer) -> list[Completion]:
        comm.broadcast(Writing())
        with distributed.Leader(distributed.decoder_of(shard), comm, requests, tokenizer) as decoder:
            return complete(decoder, requests, tokenizer)

    return Engine(LeadingReader(reader_of(shard), comm), completed)


@contextmanager
def lead(comm: Communicator, sums: str | None = None) -> Iterator[Open]:
    """On rank 0: what opens a model on all ranks. At the end the others are let go. sums: as of distributed.load."""

    def opener(folder: Path, device: str | None = None, **arguments: Any) -> Engine:
        from harness import device_named

        if arguments.get("backend") == "gpu":
            arguments |= {"device": device_named(device), "sums": sums}
        opening = Opening(folder, arguments)
        comm.broadcast(opening)
        return engine_of(distributed.load(folder, comm, **arguments))

    yield opener
    comm.broadcast(None)


def help_with(comm: Communicator) -> None:
    """On every other rank: do what rank 0 asks for, until it ends."""
    while (order := comm.broadcast(None)) is not None:
        if isinstance(order, Opening):
            shard = distributed.load(order.folder, comm, **order.arguments)
            reader = reader_of(shard)
        elif isinstance(order, Batch):
            reader.help(order)
        else:
            for _ in distributed.follow(distributed.decoder_of(shard), comm):
                pass
