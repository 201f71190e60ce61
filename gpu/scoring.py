"""Trees of texts on a device: reference/scoring.py over the cache of decode.py.

A row of the cache is a text from its first position on, so every branch has a row of its own, into which the keys and
values of the tokens before it are copied: they are not computed again. Branches that begin in others wait for them:

    level 1    a b c d                  side by side, as prompts are
    level 2    a b c e f   a g          copied: a b c, a; computed: e f, g
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from neox.gpu.decode import CHUNK, WHOLE, Cache, Ways, new_cache
from neox.gpu.device import Array
from neox.gpu.model import Model, new_workspace, placed, unembed
from neox.gpu.ops import embedding
from neox.reference.config import Config
from neox.reference.scoring import Asked, Batch, Judgement, Limits, Path, judged

SHARE = 0.4  # of the free memory, for a cache: for a moment there are two


@dataclass(frozen=True)
class Piece:
    """Positions of a text that lie in a row of the cache."""

    row: int
    first: int
    last: int


@dataclass(frozen=True)
class Rows:
    """Where the memory of a batch lies in the cache: row 0 holds what is kept, row 1 + i the text of branch i."""

    bounds: tuple[int, ...]  # where in memory each row's own tokens begin; and where the last ones end

    def pieces(self, path: Path) -> list[Piece]:
        """A text's, in their order."""
        found, position = [], 0
        for part in path:
            for row, (start, stop) in enumerate(zip(self.bounds, self.bounds[1:], strict=False)):
                length = min(stop, part.stop) - max(start, part.start)
                if length > 0:
                    found.append(Piece(row, position, position + length))
                    position += length
        return found


def rows_of(batch: Batch) -> Rows:
    kept = batch.kept_length
    return Rows((0, *(kept + branch.tokens.start for branch in batch.branches), kept + len(batch.ids)))


def levels(before: Sequence[Sequence[Piece]]) -> list[list[int]]:
    """Branches by how many others each has to wait for, one after the other."""
    level = [0]  # of every row
    found: list[list[int]] = []
    for index, pieces in enumerate(before):
        level.append(1 + max((level[piece.row] for piece in pieces), default=0))
        found += [[]] * (level[-1] - len(found))
        found[level[-1] - 1] = [*found[level[-1] - 1], index]
    return found


def copy_piece(source: Cache, target: Cache, piece: Piece, row: int) -> None:
    """Into the same positions of a row."""
    device = target.keys.device
    for layer in range(target.keys.shape[0]):
        for old, new in zip(source.of_layer(layer)[:2], target.of_layer(layer)[:2], strict=True):
            device.copy_positions(old[piece.row], new[row], piece.first, piece.last)


def asked_among(asked: Asked, tokens: NDArray) -> tuple[Asked, NDArray[np.bool_]]:
    """What is asked of some tokens, ascending, each counted by its place among them; and which targets these are."""
    here = np.isin(asked.rows, tokens)
    own = here[asked.row]
    return Asked(
        np.searchsorted(tokens, asked.rows[here]), (np.cumsum(here) - 1)[asked.row[own]], asked.targets[own]
    ), own


class DeviceReader:
    """A model on a device, as a Reader of reference/scoring.py."""

    def __init__(
        self, model: Model, ways: Ways = WHOLE, gather: Callable[[NDArray], NDArray] = lambda own: own
    ) -> None:
        """gather: of the logits that this device has, all (M,V)."""
        self._model, self._ways, self._gather = model, ways, gather
        self._cache: Cache | None = None
        self._rows = Rows((0,))
        config = model.config
        position = 2 * config.num_hidden_layers * model.heads * config.head_dim * model.dtype.itemsize  # bytes of one
        self.limits = Limits(CHUNK, SHARE * model.device.free_memory() / position)

    @property
    def config(self) -> Config:
        return self._model.config

    def read(self, batch: Batch) -> Judgement:
        """As of Reader. InputError if the device has not enough memory for the texts of the batch."""
        rows, kept = rows_of(batch), self._rows.pieces(batch.kept)
        longest = max(branch.start + branch.tokens.stop - branch.tokens.start for branch in batch.branches)
        cache = new_cache(self._model, 1 + len(batch.branches), max(longest, batch.kept_length))
        for piece in kept:
            assert self._cache is not None
            copy_piece(self._cache, cache, piece, 0)
        self._cache, self._rows = cache, rows
        before = [rows.pieces(branch.before) for branch in batch.branches]
        logprobs, greedy = np.empty(len(batch.asked.targets)), np.empty(len(batch.asked.targets), bool)
        for level in levels(before):
            for index in level:
                for piece in before[index]:
                    copy_piece(cache, cache, piece, 1 + index)
            for own, judgement in self._level(batch, level):
                logprobs[own], greedy[own] = judgement
        return logprobs, greedy

    def _level(self, batch: Batch, level: Sequence[int]) -> Iterator[tuple[NDArray[np.bool_], Judgement]]:
        """Read branches side by side, in chunks; of each, which targets are predicted in it, and their judgement."""
        spans = [batch.branches[index].tokens for index in level]
        tokens = np.concatenate([np.arange(span.start, span.stop) for span in spans])
        texts = np.repeat(1 + np.array(level), [span.stop - span.start for span in spans])
        for start in range(0, len(tokens), CHUNK):
            chunk = slice(start, start + CHUNK)
            asked, own = asked_among(batch.asked, tokens[chunk])
            yield own, judged(self._logits(batch, tokens[chunk], texts[chunk], asked.rows), asked)

    def _logits(self, batch: Batch, tokens: NDArray, texts: NDArray, rows: NDArray) -> NDArray:  # (N), (N) -> (M,V)
        """Of some rows, after all tokens have gone through the layers."""
        model, device = self._model, self._model.device
        assert self._cache is not None
        place, mix = placed(model, texts.astype(np.int32), batch.positions[tokens].astype(np.int32))
        work = new_workspace(model, len(tokens))
        self._ways.prompts(model, self._cache, device.array(batch.ids[tokens].astype(np.int32)), place, work, mix)
        if not len(rows):
            return np.empty((0, self.config.vocab_size), np.float32)
        x: Array = device.empty((len(rows), self.config.hidden_size), np.float32)
        embedding(device.array(rows.astype(np.int32)), work.x, x)  # rows of x are picked as rows of an embedding are
        logits = device.empty((len(rows), model.rows_of_head), np.float32)
        unembed(model, x, work.normed[: len(rows)], logits)
        return self._gather(np.array(logits.get()))
