"""Decoding on a device: a cache of fixed size, prompts of any lengths, and a step that can be captured.

    texts     each a row of the cache, from its beginning on: a text's position is its place in the row
    prefill   all positions of all prompts, end to end, in chunks: nothing is computed for padding, there is none
    step      one position of each text. It allocates nothing, and what changes from step to step (the ids, and where
              they stand) lies in device memory, so one captured graph serves every step

A text that has ended leaves the step; its row of the cache stays unused.

Dimensions as in model.py; of a step N is the number of texts that go on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from neox.gpu import fused, ops
from neox.gpu.device import Array
from neox.gpu.launches import Launches, Trial
from neox.gpu.model import (
    MANY,
    Keys,
    Layer,
    Mix,
    Model,
    Place,
    Workspace,
    embed,
    layer,
    mix_each,
    new_workspace,
    one_page_each,
    placed,
    unembed,
)
from neox.gpu.sampling import Samplings, draw, on_device
from neox.reference.config import Config
from neox.reference.errors import InputError
from neox.reference.sampling import Sampling

CHUNK = 2048  # positions that go through the model at a time: bounds the memory that long prompts take
BLOCKS = 512  # among which the keys of a step are shared out, so that a card has something to do everywhere
SMALLEST_SHARE = 128  # keys


@dataclass(frozen=True)
class Cache:
    """Keys (after rotation) and values of all layers."""

    keys: Array  # (L,pages,H,S,D)
    values: Array  # (L,pages,H,S,D)
    pages: Array  # int32 (B,P): in which a text's positions lie, S in each

    def of_layer(self, index: int) -> Keys:
        return self.keys[index], self.values[index], self.pages


def new_pages(model: Model, count: int, size: int, what: str) -> tuple[Array, Array]:
    """Keys and values of all layers, 2 x (L,pages,H,S,D). InputError if the device has not enough memory.

    what: they are for, in words.
    """
    config, device = model.config, model.device
    shape = (config.num_hidden_layers, count, model.heads, size, config.head_dim)
    position = 2 * config.num_hidden_layers * model.heads * config.head_dim * model.dtype.itemsize  # bytes of one
    needed, free = count * size * position, device.free_memory()
    if needed > free:
        raise InputError(
            f"the keys and values of {what} take {needed / 1e9:.3g} GB, and the device has {free / 1e9:.3g} GB free, "
            f"enough for {free // position} positions"
        )
    return device.empty(shape, model.dtype), device.empty(shape, model.dtype)


def new_cache(model: Model, batch: int, capacity: int) -> Cache:
    """One page for each text, of `capacity` positions. InputError if the device has not enough memory."""
    pages = new_pages(model, batch, capacity, f"{batch} text(s) of {capacity} tokens")
    return Cache(*pages, one_page_each(model.device, batch))


@dataclass(frozen=True)
class Step:
    """What a step of N texts reads and writes."""

    ids: Array  # int32 (N): the tokens to append; afterwards those that are chosen to follow them
    place: Place
    work: Workspace
    partial: Array  # float32 (N,H,splits,D+2): of the attention
    arrived: Array  # uint32 (N,H): splits that are done; 0 between launches, as is the next
    taken: Array  # uint32 (2): by the blocks of a fused kernel
    logits: Array  # float32 (N,V)
    numbers: Array  # uint64 (N): by which the ids are drawn

    def first(self, count: int) -> Step:
        """The same memory for fewer texts."""
        place = Place(self.place.texts[:count], self.place.positions[:count])
        work, partial, logits = self.work.first(count), self.partial[:count], self.logits[:count]
        ids, arrived, numbers = self.ids[:count], self.arrived[:count], self.numbers[:count]
        return Step(ids, place, work, partial, arrived, self.taken, logits, numbers)


def new_partial(model: Model, batch: int, capacity: int) -> Array:  # float32 (N,H,splits,D+2)
    """What attention of `batch` texts of up to `capacity` positions leaves; as many splits as are worth their while."""
    splits = max(1, min(BLOCKS // (batch * model.heads), capacity // SMALLEST_SHARE))
    return model.device.empty((batch, model.heads, splits, model.config.head_dim + 2), np.float32)


def new_step(model: Model, batch: int, capacity: int) -> Step:
    empty = model.device.empty
    return Step(
        ids=empty(batch, np.int32),
        place=Place(empty(batch, np.int32), empty(batch, np.int32)),
        work=new_workspace(model, batch),
        partial=new_partial(model, batch, capacity),
        arrived=model.device.zeros((batch, model.heads), np.uint32),
        taken=model.device.zeros(2, np.uint32),
        logits=empty((batch, model.rows_of_head), np.float32),
        numbers=empty(batch, np.uint64),
    )


def through_layers(model: Model, cache: Cache, ids: Array, place: Place, work: Workspace, mix: Mix) -> None:
    """What the last layer makes of ids, in work.x; their keys and values are appended to the cache."""
    embed(model, ids, work)
    for i, p in enumerate(model.params.layers):
        layer(p, model, work, place, cache.of_layer(i), mix)


def fuses(model: Model, rows: int) -> bool:
    """Whether a step of so many texts goes through the layers in three launches each."""
    config = model.config
    fits = fused.can_fuse(model.device, model.dtype, rows, config.hidden_size, config.head_dim)
    return config.use_parallel_residual and fits


def fused_branches(p: Layer, model: Model, cache: Keys, step: Step) -> None:
    """step.work.x -> step.work.z and activated: of both branches of a parallel block all but the way back."""
    work, eps = step.work, model.config.layer_norm_eps
    first, second, into, up = (
        *(p.input_layernorm, p.post_attention_layernorm),
        *(p.attention.query_key_value, p.mlp.dense_h_to_4h),
    )
    assert up.bias is not None
    stand = step.place.texts, step.place.positions
    fused.fused_qkv(
        *(work.x, first.weight, first.bias, eps, into.weight, into.bias),
        *(model.cos, model.sin, *stand, work.q, *cache, step.taken[:1]),
    )
    fused.fused_mlp(
        *(work.x, second.weight, second.bias, eps, up.weight, up.bias, model.config.hidden_act, work.activated),
        *(work.q, *cache, *stand, step.partial, work.z, step.arrived, step.taken),
    )


def fused_layer(p: Layer, model: Model, cache: Keys, step: Step) -> None:
    """step.work.x -> step.work.x: what `layer` of model.py computes of a parallel block, in three launches."""
    work, dense, down = step.work, p.attention.dense, p.mlp.dense_4h_to_h
    fused_branches(p, model, cache, step)
    factors = work.z, dense.weight, dense.bias, work.activated, down.weight, down.bias
    fused.fused_output(*factors, work.x, work.x, step.taken[:1])


def step_through_layers(model: Model, cache: Cache, step: Step) -> None:
    """step.ids -> step.work.x; keys and values are appended to the cache."""
    if not fuses(model, step.ids.shape[0]):
        through_layers(model, cache, step.ids, step.place, step.work, mix_each(step.place, step.partial))
        return
    embed(model, step.ids, step.work)
    for i, p in enumerate(model.params.layers):
        fused_layer(p, model, cache.of_layer(i), step)


def trial_of(model: Model, step: Step) -> Trial:
    """How launches of a step may be tried: its ids and positions go on."""
    kind = "fused layers" if fuses(model, step.ids.shape[0]) else "layers"
    return Trial(kind, (step.ids, step.place.positions))


@dataclass(frozen=True)
class Ways:
    """How positions go through the layers; a rank's are those of distributed/device.py."""

    prompts: Callable[[Model, Cache, Array, Place, Workspace, Mix], None] = through_layers
    step: Callable[[Model, Cache, Step], None] = step_through_layers
    captured: bool = True  # whether a graph can hold a step
    alone: bool = True  # whether no other device waits for it
    fetch: Callable[[Array], NDArray] = Array.get  # what a step has computed


WHOLE = Ways()


def choose(step: Step, allowed: Array | None, samplings: Samplings | None) -> None:
    """step.logits -> step.ids: the likeliest, or drawn as each text of the cache is sampled."""
    if samplings is None:
        ops.argmax(step.logits, allowed, step.ids)
    else:
        place = step.place
        draw(step.logits, allowed, samplings, place.texts, place.positions, step.numbers, step.ids)


def run_step(
    model: Model,
    cache: Cache,
    step: Step,
    allowed: Array | None,
    ways: Ways = WHOLE,
    samplings: Samplings | None = None,
) -> None:
    """Append one id to each text: its logits, the id chosen to follow in place of the id, the next position."""
    ways.step(model, cache, step)
    unembed(model, step.work.x, step.work.normed, step.logits)
    choose(step, allowed, samplings)
    ops.advance(step.place.positions)


def prefill(
    model: Model,
    cache: Cache,
    prompts: Sequence[Sequence[int]],
    progress: Callable[[int], object] = lambda _: None,
    ways: Ways = WHOLE,
) -> Array:
    """Read whole prompts into the texts 0, 1, ... of the cache; what the last layer makes of their last tokens.

    Returns float32 (B,C). progress is called after each chunk with the number of positions it had.
    """
    device, lengths = model.device, [len(prompt) for prompt in prompts]
    ids = np.concatenate([np.asarray(prompt, np.int32) for prompt in prompts])
    texts = np.repeat(np.arange(len(prompts), dtype=np.int32), lengths)
    positions = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
    ends = np.cumsum(lengths) - 1  # of each text, among all positions
    work = new_workspace(model, min(CHUNK, len(ids)))
    last = device.empty((len(prompts), model.config.hidden_size), np.float32)
    for start in range(0, len(ids), CHUNK):
        chunk = slice(start, start + CHUNK)
        place, mix = placed(model, texts[chunk], positions[chunk])
        part = work.first(len(ids[chunk]))
        ways.prompts(model, cache, device.array(ids[chunk]), place, part, mix)
        ending = np.flatnonzero((start <= ends) & (ends < start + CHUNK))
        if ending.size:  # rows of x are picked as rows of an embedding are
            rows = device.array((ends[ending] - start).astype(np.int32))
            ops.embedding(rows, part.x, last[int(ending[0]) : int(ending[-1]) + 1])
        progress(len(ids[chunk]))
    return last


class CachedDecoder:
    """A model on a device and the texts that it is in the middle of: a Decoder of reference/generate.py."""

    def __init__(
        self,
        model: Model,
        progress: Callable[[int], object] = lambda _: None,
        allowed: NDArray | None = None,
        ways: Ways = WHOLE,
    ) -> None:
        """progress is called while prompts are read, with the number of positions that were.

        allowed: (V,), false for ids that must not be chosen.
        """
        self._model = model
        self._samplings: Samplings | None = None
        self._ways = ways
        self._progress = progress
        self._allowed = None if allowed is None else model.device.array(allowed.astype(np.uint8))
        self._lengths: NDArray = np.zeros(0, np.int32)
        self._cache: Cache
        self._step: Step
        self._launches: Launches

    @property
    def config(self) -> Config:
        return self._model.config

    def start(self, prompts: Sequence[Sequence[int]], capacity: int) -> NDArray:
        model, batch = self._model, len(prompts)
        self._cache = new_cache(model, batch, capacity)
        self._step = new_step(model, batch, capacity)
        self._launches = self._new_launches()
        last = prefill(model, self._cache, prompts, self._progress, self._ways)
        unembed(model, last, self._step.work.normed, self._step.logits)
        texts, lengths = np.arange(batch, dtype=np.int32), np.array([len(prompt) for prompt in prompts], np.int32)
        self._place(texts, lengths - 1)  # of the last tokens, as in a step
        choose(self._step, self._allowed, self._samplings)
        self._place(texts, lengths)
        return self._outcome()

    def step(self, ids: Sequence[int]) -> NDArray:
        self._step.ids.set(np.array(ids, np.int32))
        self.go_on()
        return self._outcome()

    def keep(self, rows: Sequence[int]) -> None:
        kept = np.asarray(rows)
        texts = self._step.place.texts.get()[kept]
        self._step = self._step.first(len(kept))
        self._place(texts, self._lengths[kept])
        self._launches = self._new_launches()  # for fewer texts products may be other kernels

    def go_on(self) -> None:
        """A step with the ids that the last one chose. Nothing is copied and nothing waited for."""
        if self._lengths.max() >= self._cache.keys.shape[3]:
            raise InputError(f"{self._lengths.max() + 1} tokens, but this cache holds {self._cache.keys.shape[3]}")
        self._lengths = self._lengths + 1
        # Of more texts, the products are no kernels of ours, and cannot be captured.
        captured = self._ways.captured and len(self._lengths) <= MANY
        (self._launches.run if captured else self._run_step)()

    def chosen(self) -> NDArray:  # (N,)
        """The id chosen to follow each text; -1 where its logits are not finite."""
        return self._step.ids.get()

    def _new_launches(self) -> Launches:
        trial = trial_of(self._model, self._step) if self._ways.alone else None
        return Launches(self._model.device, self._run_step, trial)

    def _run_step(self) -> None:
        run_step(self._model, self._cache, self._step, self._allowed, self._ways, self._samplings)

    def _place(self, texts: NDArray, lengths: NDArray) -> None:
        self._step.place.texts.set(texts)
        self._step.place.positions.set(lengths)
        self._lengths = lengths

    def _outcome(self) -> NDArray:
        return self._ways.fetch(self._step.logits)


class SamplingDecoder(CachedDecoder):
    """Ids are chosen on the device, and only they are copied.

    A text's numbers are of its seed alone, whatever the other texts are. A seed gives other ids than in the reference,
    from the same distribution. In place of logits, `start` and `step` return the ids that follow, int32 (N).
    """

    def __init__(
        self,
        model: Model,
        samplings: Sequence[Sampling],
        progress: Callable[[int], object] = lambda _: None,
        allowed: NDArray | None = None,
    ) -> None:
        """samplings: of each text. ValueError if one has a repetition penalty."""
        super().__init__(model, progress, allowed)
        self._texts = len(samplings)
        on_the_device = on_device(samplings, model.device)
        self._samplings = on_the_device if any(s.temperature for s in samplings) else None

    def start(self, prompts: Sequence[Sequence[int]], capacity: int) -> NDArray:
        if len(prompts) != self._texts:
            raise ValueError(f"{len(prompts)} prompts for {self._texts} samplings")
        return super().start(prompts, capacity)

    def _outcome(self) -> NDArray:
        return self.chosen()
