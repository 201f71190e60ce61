"""Prompts that begin alike, read once: a Decoder of generate.py whose prompts are a tree, as the texts of scoring.py.

An evaluation puts the same worked examples before every question. What prompts share goes through the model once, and
its keys and values are copied into the cache of each; also between prompts of one start and the next, if they come in
sorted order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from neox.reference.decode import new_cache
from neox.reference.generate import CachedDecoder, padded
from neox.reference.model import Array, Model, checked
from neox.reference.scoring import NO_TEXT, Part, Path, TreeReader, leaves, parts_of, shared_length, wanted_of


class SharingDecoder(CachedDecoder):
    """The reference model. One decoder for many starts, each of which ends the texts before it."""

    def __init__(self, model: Model, progress: Callable[[int], object] = lambda positions: None) -> None:
        """progress is called while prompts are read, with the number of positions that were."""
        super().__init__(model, progress)
        self._reader = TreeReader(model)
        self._last: Array = NO_TEXT
        self._path: Path = ()

    def start(self, prompts: Sequence[Sequence[int]], capacity: int) -> Array:
        """As of Decoder. InputError if an id is out of range or a prompt longer than the model's context."""
        texts = [checked(self.config, [prompt])[0] for prompt in prompts]
        lengths = [len(text) for text in texts]
        ids, padding = padded(prompts)
        self._cache = new_cache(self._model, len(prompts), capacity, padding)
        self._cache.length = ids.shape[1]
        tree = list(leaves(texts, self._shared_with(texts)))
        wanted = wanted_of(tree, [[0]] * len(prompts), lengths)  # of no id: the row after the last token is
        logits = np.empty((len(prompts), self.config.vocab_size), self._model.dtype)
        for part in parts_of(tree, wanted, self._reader.limits, self._path):
            logits[part.places] = self._reader.logits(part.batch)[part.batch.asked.row]
            self._copy(part, lengths)
            self._last, self._path = part.leaves[-1].ids, part.path
            self._progress(len(part.batch.ids))
        return logits

    def _shared_with(self, texts: Sequence[Array]) -> Array:
        """The text read last, cut so that every prompt goes on after it: its logits there are not kept."""
        within = [len(text) - 1 for text in texts if shared_length(self._last, text) == len(text)]
        return self._last[: min(within, default=len(self._last))]

    def _copy(self, part: Part, lengths: Sequence[int]) -> None:
        """What was read, into the cache of every prompt that is one of these texts, or begins one."""
        for leaf, (keys, values) in zip(part.leaves, self._reader.texts(part.batch), strict=True):
            for text in leaf.texts:
                length = lengths[text]
                place = slice(self._cache.length - length, self._cache.length)
                for memory, read in ((self._cache.keys, keys), (self._cache.values, values)):
                    memory[:, text, :, : place.start] = 0  # padding is attended to by a weight of 0, so must be finite
                    memory[:, text, :, place] = read[:, :, :length]
