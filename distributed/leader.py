"""Continuing texts over several ranks: rank 0 leads, the others follow.

    rank 0                                      every other rank
    order = what the loop asks for next
    broadcast(order)                            order = broadcast
    carry it out                                carry it out                      L+1 sums, one after the other
    gather                                      gather                            the logits, or what decides
    sample, look for stop strings, ...

The loop is that of reference/generate.py and runs on rank 0 only: it alone samples, and what it chose goes out with its
next order, as does the end. Ranks that each sampled for themselves would sooner or later read different texts.

A token so takes L+2 collectives: the sums, and one exchange, which is the gather to rank 0 and rank 0's answer to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from neox.distributed.backends import AnyShard, decoder_of
from neox.distributed.candidates import Selection, decided, select, selection_for, spread
from neox.distributed.comm import Communicator
from neox.distributed.decode import RankDecoder
from neox.distributed.sharding import share
from neox.reference.config import Config
from neox.reference.generate import Request, one_sequence, stream
from neox.reference.model import Array
from neox.reference.sampling import Sampling
from neox.reference.tokenizer import Tokenizer

# What rank 0 asks for.


@dataclass(frozen=True)
class Start:
    """Read these prompts."""

    prompts: tuple[tuple[int, ...], ...]
    capacity: int
    selection: Selection | None  # of the logits; None: all


@dataclass(frozen=True)
class Step:
    """Append an id to each text that goes on."""

    ids: tuple[int, ...]
    rows: tuple[int, ...] | None  # the texts that go on; None: all


@dataclass(frozen=True)
class All:
    """Send all logits of the last step: the selection was not enough."""


@dataclass(frozen=True)
class End:
    """There is nothing more to do."""

    ids: tuple[int, ...] = ()  # chosen last


Order = Start | Step | All | End


class Performer:
    """Carries out orders, the same way on every rank."""

    def __init__(self, decoder: RankDecoder, comm: Communicator) -> None:
        self._decoder, self._comm = decoder, comm
        self._held = share(decoder.config.vocab_size, comm.rank, comm.ranks)
        self._logits: Array  # of the last step, of this rank's ids
        self.selection: Selection | None = None

    def perform(self, order: Start | Step | All) -> list[Array]:
        """What every rank sends of its logits after it."""
        if isinstance(order, Start):
            self.selection = order.selection
            self._logits = self._decoder.start(order.prompts, order.capacity)
        elif isinstance(order, Step):
            if order.rows is not None:
                self._keep(order.rows)
            self._logits = self._decoder.step(order.ids)
        if self.selection is None or isinstance(order, All):
            return self._comm.gather(self._logits)
        return self._comm.gather(select(self._logits, self.selection, self._held))

    def _keep(self, rows: Sequence[int]) -> None:
        self._decoder.keep(rows)
        self.selection = self.selection and self.selection.keep(rows)


class Leader:
    """All ranks as one Decoder of reference/generate.py: on rank 0, within a `with`, while the others `follow`."""

    def __init__(
        self,
        decoder: RankDecoder,
        comm: Communicator,
        requests: Sequence[Request] = (),
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """requests: those that will be made, so that no more logits travel than they need; without them, all do."""
        allowed = None if tokenizer is None else tokenizer.has_token(decoder.config.vocab_size)
        self._selection = selection_for(requests, allowed) if requests else None
        self._comm = comm
        self._performer = Performer(decoder, comm)
        self._rows: tuple[int, ...] | None = None
        self._busy = False
        self.last: tuple[int, ...] = ()  # ids that were chosen and of which the others do not know yet
        self.config: Config = decoder.config

    def __enter__(self) -> Leader:
        return self

    def __exit__(self, *failure: object) -> None:
        """Let the others go; unless this rank failed in the middle of an order, when no call would match theirs."""
        if not self._busy:
            self._comm.broadcast(End(self.last))

    def start(self, prompts: Sequence[Sequence[int]], capacity: int) -> Array:
        self._rows = None
        return self._logits(Start(tuple(map(tuple, prompts)), capacity, self._selection))

    def step(self, ids: Sequence[int]) -> Array:
        order, self._rows, self.last = Step(tuple(ids), self._rows), None, ()
        return self._logits(order)

    def keep(self, rows: Sequence[int]) -> None:
        self._rows = tuple(rows) if self._rows is None else tuple(self._rows[row] for row in rows)

    def _logits(self, order: Start | Step | All) -> Array:  # (B,V)
        self._busy = True
        self._comm.broadcast(order)
        sent = self._performer.perform(order)
        self._busy = False
        selection = self._performer.selection
        if selection is None or isinstance(order, All):
            return np.concatenate(sent, axis=-1)
        rows = spread(sent, self.config.vocab_size)
        return rows if decided(sent, rows, selection) else self._logits(All())


def follow(decoder: RankDecoder, comm: Communicator) -> Iterator[tuple[int, ...]]:
    """On every rank but 0: carry out what rank 0 asks for; yields the ids it chose, step by step, until it ends."""
    performer = Performer(decoder, comm)
    while not isinstance(order := comm.broadcast(None), End):
        if isinstance(order, Step):
            yield order.ids
        performer.perform(order)
    if order.ids:
        yield order.ids


def generate(
    shard: AnyShard,
    ids: ArrayLike,
    max_tokens: int = 100,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    tokenizer: Tokenizer | None = None,
    ignore_eos: bool = False,
) -> Iterator[int]:
    """The ids that continue one text, as reference.generate, of the same arguments; called on every rank alike.

    Every rank gets the ids that rank 0 chooses, and if rank 0 stops early, all do.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    request = Request(one_sequence(ids).tolist(), max_tokens, sampling, ignore_eos=ignore_eos)
    if shard.comm.rank:
        return (index for (index,) in follow(decoder_of(shard), shard.comm))
    return _lead(shard, request, tokenizer)


def _lead(shard: AnyShard, request: Request, tokenizer: Tokenizer | None) -> Iterator[int]:
    with Leader(decoder_of(shard), shard.comm, [request], tokenizer) as leader:
        for piece in stream(leader, [request], tokenizer):
            leader.last = (piece.id,)
            yield piece.id
