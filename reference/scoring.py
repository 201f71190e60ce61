"""How likely texts are: the log-probabilities of continuations, of many requests at once.

    log p(continuation | context) = sum over its tokens t of  log_softmax(logits after all before t)[t]

The requests of an evaluation share much: the answers of one question its text, all questions their worked examples. The
token sequences that the model reads are therefore sorted, which makes them a tree, and every token of the tree goes
through the model once:

    texts, sorted      the branches of a batch       in memory
    a b c d            a b c d                       positions 0 1 2 3
    a b c e f                e f                     4 5, attend to 0 1 2 and themselves
    a g                  g                           6, attends to 0 and itself

All branches of a batch go through the layers side by side, as one row without padding; only attention, which looks at
the tokens before, treats each by itself. Between batches stay the keys and values of the text read last, as far as the
next one shares it: in sorted order, no later text shares more with any earlier one.

Dimensions as in model.py; N is the number of tokens of a batch, M that of rows whose logits are wanted, K that of
targets, of which one row may have several.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Barrier
from typing import Protocol, TypeVar

import numpy as np

from neox.reference.config import Config
from neox.reference.cores import cores, one_blas_thread
from neox.reference.decode import BLOCK, Cache, nothing
from neox.reference.errors import InputError
from neox.reference.model import Array, Mix, Model, Tap, attend, checked, embed, layer, rotary_tables, unembed

SMALLEST_SHARE = 64  # tokens; with fewer, a product is too thin to keep a core busy

T = TypeVar("T")
Ids = Sequence[int]
Pair = tuple[Ids, Ids]  # context, continuation


@dataclass(frozen=True)
class Score:
    """What the model thinks of a continuation."""

    logprobs: tuple[float, ...]  # of each of its tokens, given all before it
    greedy: bool  # whether each is the likeliest there

    @property
    def total(self) -> float:
        return math.fsum(self.logprobs)


@dataclass(frozen=True)
class Limits:
    """Of a batch, which ends with the text that reaches one of them."""

    tokens: int = 512  # that are read
    positions: float = math.inf  # of all texts with branches of their own, each counted at the length of the longest


# What the model reads for a request.


def begun(context: Ids, continuation: Ids, end_of_text: int) -> Pair:
    """The pair with a context that is not empty: a text from nothing begins with the end-of-text token."""
    if context:
        return context, continuation
    if continuation and continuation[0] == end_of_text:
        return continuation[:1], continuation[1:]
    return [end_of_text], continuation


def text_of(config: Config, pair: Pair) -> Array:  # (T+1,)
    """Context and continuation, cut on the left to what the model can read; the last token is only predicted.

    InputError if the continuation alone is too long, the context empty, or an id out of the vocabulary.
    """
    context, continuation = pair
    limit = config.max_position_embeddings
    if len(continuation) > limit:
        raise InputError(f"a continuation has {len(continuation)} tokens, but the model's context is {limit}")
    if not len(context):
        raise InputError("a context is empty; a text from nothing begins with the end-of-text token")
    whole = np.array([*context, *continuation])[-(limit + 1) :]
    # As texts of one token: it may be one longer than the context. In 4 bytes each, for there may be millions.
    return checked(config, whole[:, None])[:, 0].astype(np.int32)


def rolling_windows(ids: Ids, begin: int, length: int) -> list[Pair]:
    """Pairs of at most `length` tokens to read whose continuations are, one after the other, the whole text.

    `begin` stands before the first token. Every window but the first predicts as many tokens as it can; the last one
    has fewer and is filled up with context: so each token is predicted once, from at least one token before it.
    """
    windows: list[Pair] = [([begin], ids[:length])] if ids else []
    for start in range(length, len(ids), length):
        stop = min(start + length, len(ids))
        windows.append((ids[stop - length - 1 : start], ids[start:stop]))
    return windows


# The tree.


@dataclass(frozen=True)
class Leaf:
    """A text that no other begins with, how much of it the leaf before has as well, and all texts it begins with."""

    ids: Array  # (T,)
    shared: int
    texts: tuple[int, ...]  # their indices, its own included

    @property
    def new(self) -> int:
        return len(self.ids) - self.shared


def shared_length(a: Array, b: Array) -> int:
    """How many tokens two texts have in common before they part."""
    length = min(len(a), len(b))
    parted = np.flatnonzero(a[:length] != b[:length])
    return int(parted[0]) if parted.size else length


NO_TEXT = np.empty(0, np.int64)


def leaves(texts: Sequence[Array], before: Array = NO_TEXT) -> Iterator[Leaf]:
    """The leaves of the tree of these texts, from left to right. `before`: a text that was read last."""
    order = sorted(range(len(texts)), key=lambda i: texts[i].astype(">u4").tobytes())  # bytes compare fast
    waiting = []
    for place, index in enumerate(order):
        ids = texts[index]
        waiting.append(index)
        if place + 1 < len(order) and shared_length(ids, texts[order[place + 1]]) == len(ids):
            continue
        yield Leaf(ids, shared_length(before, ids), tuple(waiting))
        before, waiting = ids, []


Path = tuple[slice, ...]  # where the tokens of a text lie, in their order


def cut(path: Path, length: int) -> Path:
    """The first `length` tokens."""
    parts = []
    for part in path:
        taken = min(length, part.stop - part.start)
        if taken:
            parts.append(slice(part.start, part.start + taken))
        length -= taken
    return tuple(parts)


def extended(path: Path, part: slice) -> Path:
    """The path and one more part, joined to the last where that ends at its start."""
    if path and path[-1].stop == part.start:
        return (*path[:-1], slice(path[-1].start, part.stop))
    return (*path, part)


@dataclass(frozen=True)
class Branch:
    """The tokens of a leaf that no leaf before it has."""

    tokens: slice  # of the batch
    start: int  # position of the first in its text
    before: Path  # in memory, of the `start` tokens before it


@dataclass(frozen=True)
class Asked:
    """What is to be known of a batch."""

    rows: Array  # (M,) tokens of the batch after which something is predicted, ascending
    row: Array  # (K,) of these rows, the one of each target; ascending
    targets: Array  # (K,) ids

    def between(self, first: int, last: int) -> Asked:
        """Of the tokens first..last, counted from the first."""
        low, high = np.searchsorted(self.rows, [first, last])
        start, stop = np.searchsorted(self.row, [low, high])
        return Asked(self.rows[low:high] - first, self.row[start:stop] - low, self.targets[start:stop])


@dataclass(frozen=True)
class Batch:
    """Branches that go through the model together. Their keys lie in memory behind those that are kept."""

    ids: Array  # (N,)
    positions: Array  # (N,)
    branches: tuple[Branch, ...]
    kept: Path  # in the memory of the batch before
    asked: Asked

    @property
    def kept_length(self) -> int:
        return sum(part.stop - part.start for part in self.kept)


def groups(tree: Iterable[Leaf], limits: Limits) -> Iterator[list[Leaf]]:
    """Leaves that follow each other, in groups that reach a limit."""
    group: list[Leaf] = []
    tokens = longest = 0
    for leaf in tree:
        group.append(leaf)
        tokens += leaf.new
        longest = max(longest, len(leaf.ids))
        if tokens >= limits.tokens or len(group) * longest >= limits.positions:
            yield group
            group, tokens, longest = [], 0, 0
    if group:
        yield group


def batch_of(group: Sequence[Leaf], path: Path, asked: Asked) -> tuple[Batch, Path]:
    """The batch of a group, and the path of its last text. `path` is that of the last text before it."""
    kept = group[0].shared
    within = cut((slice(0, kept),), kept)
    branches, first = [], 0
    for leaf in group:
        last = first + leaf.new
        before = cut(within, leaf.shared)
        branches.append(Branch(slice(first, last), leaf.shared, before))
        within, first = extended(before, slice(kept + first, kept + last)), last
    ids = np.concatenate([leaf.ids[leaf.shared :] for leaf in group])
    positions = np.concatenate([np.arange(leaf.shared, len(leaf.ids)) for leaf in group])
    return Batch(ids, positions, tuple(branches), cut(path, kept), asked), within


# What is asked of the tree, before it is read: of a token that several texts share, each may want something.


@dataclass(frozen=True)
class Wanted:
    """All targets, in the order in which the tree's tokens are read."""

    tokens: Array  # (K,) the token of the tree after which each is predicted, by its number; ascending
    targets: Array  # (K,)
    places: Array  # (K,) where its log-probability belongs, among those of all requests

    def between(self, first: int, last: int) -> tuple[Asked, Array]:
        """Those of the tokens first..last, counted from the first; and their places."""
        start, stop = np.searchsorted(self.tokens, [first, last])
        rows, row = np.unique(self.tokens[start:stop] - first, return_inverse=True)
        return Asked(rows, row, self.targets[start:stop]), self.places[start:stop]


def starts_of(targets: Sequence[Ids]) -> Array:
    """Where the targets of each text begin, if all are laid end to end; and where the last ones end."""
    return np.cumsum([0, *map(len, targets)])


def wanted_of(tree: Sequence[Leaf], targets: Sequence[Ids], lengths: Sequence[int]) -> Wanted:
    """targets[i] are predicted after the last tokens of text i, which has lengths[i]."""
    starts = starts_of(targets)
    tokens = np.zeros(starts[-1], np.int64)
    # The numbers of the tokens of a text; -1 of those of a text before the tree, after which nothing may be wanted.
    path, count = np.full(tree[0].shared if tree else 0, -1), 0
    for leaf in tree:
        path = np.concatenate([path[: leaf.shared], np.arange(count, count + leaf.new)])
        count += leaf.new
        for text in leaf.texts:
            tokens[starts[text] : starts[text + 1]] = path[lengths[text] - len(targets[text]) : lengths[text]]
    order = np.argsort(tokens, kind="stable")
    flat = np.array([target for some in targets for target in some], np.int64)
    return Wanted(tokens[order], flat[order], order)


@dataclass(frozen=True)
class Part:
    """A batch of the tree, and what belongs to it."""

    leaves: Sequence[Leaf]
    batch: Batch
    places: Array  # (K,) of its targets, as of Wanted
    path: Path  # of its last text


def parts_of(tree: Iterable[Leaf], wanted: Wanted, limits: Limits, path: Path = ()) -> Iterator[Part]:
    """The whole tree, in batches. `path` is that of the text that was read last."""
    done = 0
    for group in groups(tree, limits):
        tokens = sum(leaf.new for leaf in group)
        asked, places = wanted.between(done, done + tokens)
        batch, path = batch_of(group, path, asked)
        yield Part(group, batch, places, path)
        done += tokens


# What reads it.

Judgement = tuple[Array, Array]  # (K,) log-probabilities of the targets, (K,) whether each is the likeliest


class Reader(Protocol):
    """A model that reads the batches of a tree, one after the other, and keeps what the next one needs."""

    @property
    def config(self) -> Config: ...

    @property
    def limits(self) -> Limits: ...

    def read(self, batch: Batch) -> Judgement:
        """What is asked of the batch; InputError if the model's numbers overflow."""
        ...


def judged(logits: Array, asked: Asked) -> Judgement:  # (M,V)
    """Log-probabilities over the whole vocabulary, and whether each target is the likeliest. Overwrites logits.

    Of equally likely ids the first counts as the likeliest. InputError if a logit is not finite.
    """
    largest = logits.max(-1, keepdims=True)
    if not np.isfinite(largest - logits.min(-1, keepdims=True)).all():
        raise InputError("the model's logits are not finite: its weights are damaged, or of another architecture")
    greedy = logits.argmax(-1)[asked.row] == asked.targets
    np.subtract(logits, largest, out=logits)
    chosen = logits[asked.row, asked.targets].astype(np.float64)
    np.exp(logits, out=logits)
    return chosen - np.log(logits.sum(-1, dtype=np.float64))[asked.row], greedy


# Attention within a tree.


@dataclass(frozen=True)
class Reach:
    """Queries, and the keys that they may see."""

    queries: slice  # of the share
    keys: Path  # in memory
    mask: Array  # (T,S)


def reaches(batch: Batch, first: int, last: int, dtype: np.dtype) -> list[Reach]:
    """The tokens first..last of a batch, each branch in blocks, so that little is computed of a block's future."""
    found, kept = [], batch.kept_length
    for branch in batch.branches:
        begin, end = max(first, branch.tokens.start), min(last, branch.tokens.stop)
        for start in range(begin, end, BLOCK):
            stop = min(start + BLOCK, end)
            keys = extended(branch.before, slice(kept + branch.tokens.start, kept + stop))
            seen = branch.start + stop - branch.tokens.start
            mask = np.triu(np.full((stop - start, seen), -np.inf, dtype), seen - (stop - start) + 1)
            found.append(Reach(slice(start - first, stop - first), keys, mask))
    return found


def gathered(memory: Array, path: Path) -> Array:  # (1,H,*,D) -> (1,H,S,D)
    parts = [memory[:, :, part] for part in path]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)


def mix_tree(cache: Cache, index: int, share: slice, reach: list[Reach], appended: Callable[[], object]) -> Mix:
    """Attention of layer `index` within a tree; `share` is where its tokens lie in the cache. As decode.mix_over."""

    def mix(q: Array, k: Array, v: Array, tap: Tap) -> Array:  # (1,H,T,D) x 3 -> (1,H,T,D)
        keys, values = cache.keys[index], cache.values[index]
        keys[:, :, share], values[:, :, share] = k, v
        appended()
        z = np.empty_like(q)
        for part in reach:
            seen = gathered(keys, part.keys), gathered(values, part.keys)
            z[:, :, part.queries] = attend(q[:, :, part.queries], *seen, part.mask, tap)
        return z

    return mix


def cache_after(cache: Cache | None, batch: Batch, shape: tuple[int, int, int], dtype: np.dtype) -> Cache:
    """Memory for a batch, the kept part filled in. shape: L, H, D."""
    layers, heads, width = shape
    kept = batch.kept_length
    size = (layers, 1, heads, kept + len(batch.ids), width)
    after = Cache(np.empty(size, dtype), np.empty(size, dtype), np.zeros(1, np.int64))
    if cache is not None and kept:
        for index in range(layers):
            after.keys[index, :, :, :kept] = gathered(cache.keys[index], batch.kept)
            after.values[index, :, :, :kept] = gathered(cache.values[index], batch.kept)
    return after


class TreeReader:
    """The reference model, on every core: each takes a share of a batch's tokens through all layers, as in prefill."""

    def __init__(self, model: Model, limits: Limits = Limits()) -> None:
        self._model = model
        self._cache: Cache | None = None
        self.limits = limits

    @property
    def config(self) -> Config:
        return self._model.config

    def read(self, batch: Batch) -> Judgement:
        """As of Reader; the share of each core is a run of tokens, which may begin within a branch."""
        logprobs, greedy = zip(*self._shares(batch, judged), strict=True)
        return np.concatenate(logprobs), np.concatenate(greedy)

    def logits(self, batch: Batch) -> Array:  # (M,V)
        """Of the rows that are asked for, where they are wanted themselves."""
        return np.concatenate(self._shares(batch, lambda logits, asked: logits))

    def texts(self, batch: Batch) -> Iterator[tuple[Array, Array]]:  # 2 x (L,H,S,D)
        """Keys and values of the whole text of every branch of the batch that was read last."""
        cache, kept = self._cache, batch.kept_length
        assert cache is not None
        for branch in batch.branches:
            path = extended(branch.before, slice(kept + branch.tokens.start, kept + branch.tokens.stop))
            yield gathered(cache.keys[:, 0], path), gathered(cache.values[:, 0], path)

    def _shares(self, batch: Batch, take: Callable[[Array, Asked], T]) -> list[T]:
        """What is taken of the logits of each share."""
        config, size = self.config, len(batch.ids)
        shape = (config.num_hidden_layers, config.num_attention_heads, config.head_dim)
        self._cache = cache_after(self._cache, batch, shape, self._model.dtype)
        count = max(1, min(cores(), size // SMALLEST_SHARE))
        if count == 1:
            return [take(*self._share(batch, 0, size, nothing))]
        bounds = np.linspace(0, size, count + 1).astype(int)
        barrier = Barrier(count)

        def share(first: int, last: int) -> T:
            try:
                return take(*self._share(batch, first, last, barrier.wait))
            except BaseException:
                barrier.abort()  # or the others would wait for this share for ever
                raise

        with one_blas_thread(), ThreadPoolExecutor(count) as pool:
            return list(pool.map(share, bounds[:-1], bounds[1:]))

    def _share(self, batch: Batch, first: int, last: int, appended: Callable[[], object]) -> tuple[Array, Asked]:
        model, kept, cache = self._model, batch.kept_length, self._cache
        assert cache is not None
        reach = reaches(batch, first, last, model.dtype)
        rotary = rotary_tables(model.config, batch.positions[None, first:last])
        x = embed(model, batch.ids[None, first:last])
        for i, p in enumerate(model.params.layers):
            mix = mix_tree(cache, i, slice(kept + first, kept + last), reach, appended)
            x = layer(p, model.config, x, rotary, mix)
        asked = batch.asked.between(first, last)
        return unembed(model, x[:, asked.rows])[0], asked


# All of it.


def scores(
    reader: Reader,
    pairs: Sequence[Pair],
    progress: Callable[[int, int], object] = lambda read, total: None,
) -> Iterator[tuple[int, Score]]:
    """The score of every pair with its index, as soon as it is known; in the order of the tree.

    progress is called after each batch with the number of tokens read so far, and of all. InputError, before the first
    batch, as text_of.
    """
    texts = [text_of(reader.config, pair)[:-1] for pair in pairs]
    targets = [continuation for _, continuation in pairs]
    tree = list(leaves(texts))
    wanted = wanted_of(tree, targets, [len(text) for text in texts])
    starts = starts_of(targets)
    logprobs, greedy = np.empty(starts[-1]), np.empty(starts[-1], bool)
    done, total = 0, sum(leaf.new for leaf in tree)
    for part in parts_of(tree, wanted, reader.limits):
        logprobs[part.places], greedy[part.places] = reader.read(part.batch)
        done += len(part.batch.ids)
        progress(done, total)
        for text in (text for leaf in part.leaves for text in leaf.texts):
            own = slice(starts[text], starts[text + 1])
            yield text, Score(tuple(logprobs[own].tolist()), bool(greedy[own].all()))


def log_likelihoods(model: Model, pairs: Sequence[Pair]) -> list[Score]:
    """The score of every pair, in their order.

    A text longer than the model's context is cut on the left. InputError if a continuation alone is too long, a context
    empty, or an id out of the vocabulary.
    """
    found = dict(scores(TreeReader(model), pairs))
    return [found[index] for index in range(len(pairs))]
