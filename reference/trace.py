"""Looking inside a forward pass: keep what is computed on the way, or put something else in its place.

    logits, cache = run_with_cache(model, ids, "blocks.*.hook_resid_post")
    logits = run_with_hooks(model, ids, {"blocks.3.attn.hook_z": lambda z: z * 0})

Everything that can be seen has a name, those of TransformerLens: `hook_names` lists them with their shapes. In patterns
a * stands for anything.

    hook_embed                                 (B,T,C)    rows of embed_in
    blocks.i.hook_resid_pre, hook_resid_post   (B,T,C)    the residual stream before and after layer i
    blocks.i.hook_resid_mid                    (B,T,C)    between attention and MLP; not in the parallel form
    blocks.i.ln1.hook_scale, ln2., ln_final.   (B,T,1)    what a norm divides by
    blocks.i.ln1.hook_normalized, ...          (B,T,C)    before the norm's weight and bias
    blocks.i.attn.hook_q, hook_k, hook_v       (B,T,H,D)  before rotation
    blocks.i.attn.hook_rot_q, hook_rot_k       (B,T,H,D)  after it
    blocks.i.attn.hook_attn_scores             (B,H,T,S)  scaled, minus infinity in the future
    blocks.i.attn.hook_pattern                 (B,H,T,S)
    blocks.i.attn.hook_z                       (B,T,H,D)  what each head has gathered, before `dense`
    blocks.i.attn.hook_result                  (B,T,H,C)  what each head adds to the stream; see below
    blocks.i.mlp.hook_pre, hook_post           (B,T,F)    before and after GELU
    blocks.i.hook_attn_out, hook_mlp_out       (B,T,C)    what the branches add to the stream, biases included

hook_result takes as much memory as H residual streams, and the model never holds it: it is computed only if it is asked
for by more than a bare *. Changed, it moves hook_attn_out by what it was moved by.

Two traps for who comes from TransformerLens: nothing is folded into the weights here, and no token is put in front.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import ArrayLike

from neox.reference.config import Config
from neox.reference.errors import InputError
from neox.reference.model import (
    Array,
    Linear,
    Model,
    Tap,
    checked,
    embed,
    layer,
    rotary_tables,
    unembed,
    untapped,
    within,
)
from neox.reference.project import project

Names = str | Sequence[str] | Callable[[str], bool]  # a pattern, several, or whether a name is wanted
Hook = Callable[[Array], Array | None]  # may look at an array, or return what takes its place
Cache = dict[str, Array]

NORM = ("hook_scale", "hook_normalized")
ATTENTION = ("hook_q", "hook_k", "hook_v", "hook_rot_q", "hook_rot_k", "hook_attn_scores", "hook_pattern", "hook_z")
RESULT = "attn.hook_result"
EVERYTHING = "*"  # that a tap sees


# Names.


def _layer_names(config: Config) -> Iterator[str]:
    """In the order in which they are computed."""
    yield "hook_resid_pre"
    yield from (f"ln1.{name}" for name in NORM)
    yield from (f"attn.{name}" for name in ATTENTION)
    yield "hook_attn_out"
    if not config.use_parallel_residual:
        yield "hook_resid_mid"
    yield from (f"ln2.{name}" for name in NORM)
    yield from ("mlp.hook_pre", "mlp.hook_post", "hook_mlp_out", "hook_resid_post")


def hook_names(config: Config) -> list[str]:
    """Of everything that a tap sees, in the order in which it does."""
    layers = [f"blocks.{i}.{name}" for i in range(config.num_hidden_layers) for name in _layer_names(config)]
    return ["hook_embed", *layers, *(f"ln_final.{name}" for name in NORM)]


def matching(config: Config, names: Names) -> set[str]:
    """The names that are meant, hook_result among them unless by a bare *. InputError if a pattern fits none."""
    results = {f"blocks.{i}.{RESULT}" for i in range(config.num_hidden_layers)}
    known = [*hook_names(config), *results]
    if callable(names):
        return {name for name in known if names(name)}
    found: set[str] = set()
    for pattern in [names] if isinstance(names, str) else names:
        fitting = {name for name in known if fnmatchcase(name, pattern)}
        if not fitting:
            raise InputError(f"nothing in the model is called {pattern!r}: names are such as {', '.join(known[:3])}")
        found |= fitting - results if pattern == EVERYTHING else fitting
    return found


# Parts of a forward pass.


def begin(model: Model, ids: ArrayLike, tap: Tap = untapped) -> Array:  # (B,T) -> (B,T,C)
    """The residual stream before the first layer. InputError as forward."""
    return tap("hook_embed", embed(model, checked(model.config, ids)))


def through_layers(model: Model, x: Array, layers: range, tap: Tap = untapped) -> Array:  # (B,T,C) -> (B,T,C)
    """The residual stream after some layers that follow each other, of what it was before them."""
    rotary = rotary_tables(model.config, np.arange(x.shape[1])[None])
    for i in layers:
        x = layer(model.params.layers[i], model.config, x, rotary, tap=within(tap, f"blocks.{i}."))
    return x


# The outputs of single heads, which the model does not hold: it multiplies all of them by one matrix.


def head_results(p: Linear, z: Array) -> Array:  # (B,T,H,D) -> (B,T,H,C)
    """What each head adds to the residual stream; their sum and the bias of `dense` are hook_attn_out."""
    heads, width = z.shape[-2:]
    weight = p.weight.reshape(-1, heads, width)  # (C,H,D)
    return np.stack([project(z[..., h, :], np.ascontiguousarray(weight[:, h])) for h in range(heads)], axis=-2)


def with_results(model: Model, tap: Tap, wanted: set[str]) -> Tap:
    """A tap that is also shown hook_result, where that is wanted. Left as it is, it adds zero: no bit changes."""
    moved: dict[str, Array] = {}

    def shown(name: str, array: Array) -> Array:
        part = re.fullmatch(r"blocks\.(\d+)\.(?:attn\.hook_z|hook_attn_out)", name)
        result = f"blocks.{part[1]}.{RESULT}" if part else ""
        if part is None or result not in wanted:
            return tap(name, array)
        if name.endswith("hook_attn_out"):
            return tap(name, array + moved.pop(result))
        z = tap(name, array)
        before = head_results(model.params.layers[int(part[1])].attention.dense, z)
        moved[result] = (tap(result, before.copy()) - before).sum(axis=-2)
        return z

    return shown if any(name.endswith(RESULT) for name in wanted) else tap


# Keeping.


def keeping(wanted: set[str], cache: Cache) -> Tap:
    """A tap that puts copies of what is wanted into the cache."""

    def tap(name: str, array: Array) -> Array:
        if name in wanted:
            cache[name] = array.copy()  # the model may overwrite what it has shown
        return array

    return tap


def run_with_cache(
    model: Model, ids: ArrayLike, names: Names = EVERYTHING, stop_at_layer: int | None = None
) -> tuple[Array, Cache]:
    """Logits (B,T,V), and all that was computed under these names.

    Without names it is everything: of 2,048 tokens and the 20B, over 70 GB. With stop_at_layer nothing from that layer
    on is computed, and the residual stream before it (B,T,C) takes the place of the logits. InputError as forward, for
    a pattern that fits no name, and for a layer that is not there.
    """
    count = model.config.num_hidden_layers
    if stop_at_layer is not None and not 0 <= stop_at_layer <= count:
        raise InputError(f"stop_at_layer must be from 0 to {count}, not {stop_at_layer}")
    cache: Cache = {}
    wanted = matching(model.config, names)
    tap = with_results(model, keeping(wanted, cache), wanted)
    stop = count if stop_at_layer is None else stop_at_layer
    x = through_layers(model, begin(model, ids, tap), range(stop), tap)
    return (unembed(model, x, tap) if stop_at_layer is None else x), cache


# Changing.


def hooked(config: Config, hooks: Mapping[str, Hook]) -> Tap:
    """A tap that lets each hook see, and replace, what its name or pattern stands for, in their order.

    InputError for a pattern that fits no name, or if a hook returns another shape.
    """
    by_name: dict[str, list[Hook]] = {}
    for pattern, hook in hooks.items():
        for name in matching(config, pattern):
            by_name.setdefault(name, []).append(hook)

    def tap(name: str, array: Array) -> Array:
        for hook in by_name.get(name, []):
            changed = hook(array)
            if changed is None:
                continue
            if np.shape(changed) != array.shape:
                raise InputError(f"a hook made {np.shape(changed)} of {name}, which is {array.shape}")
            array = np.asarray(changed, array.dtype)
        return array

    return tap


def instead(array: Array) -> Hook:
    """The hook that puts this array in the place of any."""
    return lambda _: array


def run_with_hooks(model: Model, ids: ArrayLike, hooks: Mapping[str, Hook]) -> Array:  # (B,T) -> (B,T,V)
    """Logits of a pass in which hooks look on or step in. InputError as forward and hooked."""
    tap = with_results(model, hooked(model.config, hooks), matching(model.config, list(hooks)))
    x = through_layers(model, begin(model, ids, tap), range(model.config.num_hidden_layers), tap)
    return unembed(model, x, tap)


# Patching: what of one run, put into another, changes its outcome?

Metric = Callable[[Array], Array]  # logits after the last position (B,V) -> (B,)


def logit_difference(right: int, wrong: int) -> Metric:
    """By how much one id is likelier to follow than another, in logits."""
    return lambda logits: logits[:, right] - logits[:, wrong]


def _two_runs(model: Model, clean: Sequence[int], corrupt: Sequence[int], name: str) -> tuple[Cache, Cache]:
    """What both texts give under a name of every layer. InputError unless they are equally long."""
    if len(clean) != len(corrupt):
        raise InputError(f"texts to patch must be equally long, not {len(clean)} and {len(corrupt)} tokens")
    last = model.config.num_hidden_layers
    clean_cache, corrupt_cache = (
        run_with_cache(model, [ids], ["blocks.*.hook_resid_pre", f"blocks.*.{name}"], last)[1]
        for ids in (clean, corrupt)
    )
    return clean_cache, corrupt_cache


def _outcome(model: Model, x: Array, first: int, metric: Metric, tap: Tap = untapped) -> Array:  # (B,T,C) -> (B,)
    """The metric of what comes of a residual stream before layer `first`."""
    x = through_layers(model, x, range(first, model.config.num_hidden_layers), tap)
    return metric(unembed(model, x[:, -1:])[:, 0])


def patch_residual(model: Model, clean: Sequence[int], corrupt: Sequence[int], metric: Metric) -> Array:  # (L,T)
    """The metric of the corrupt text with the clean one's residual stream put in, before one layer at one position.

    Only layers from the patched one on are computed, all positions of a layer at once.
    """
    ours, theirs = _two_runs(model, clean, corrupt, "hook_resid_pre")
    positions = np.arange(len(corrupt))
    rows = []
    for i in range(model.config.num_hidden_layers):
        name = f"blocks.{i}.hook_resid_pre"
        x = np.repeat(theirs[name], len(positions), axis=0)  # a run for each position: (T,T,C)
        x[positions, positions] = ours[name][0]
        rows.append(_outcome(model, x, i, metric))
    return np.stack(rows)


def patch_heads(model: Model, clean: Sequence[int], corrupt: Sequence[int], metric: Metric) -> Array:  # (L,H)
    """The metric of the corrupt text with what one head of the clean one has gathered put in, at all positions."""
    ours, theirs = _two_runs(model, clean, corrupt, "attn.hook_z")
    heads = np.arange(model.config.num_attention_heads)
    rows = []
    for i in range(model.config.num_hidden_layers):
        z = np.repeat(theirs[f"blocks.{i}.attn.hook_z"], len(heads), axis=0)  # a run for each head: (H,T,H,D)
        z[heads, :, heads] = ours[f"blocks.{i}.attn.hook_z"][0].swapaxes(0, 1)
        tap = hooked(model.config, {f"blocks.{i}.attn.hook_z": instead(z)})
        x = np.repeat(theirs[f"blocks.{i}.hook_resid_pre"], len(heads), axis=0)
        rows.append(_outcome(model, x, i, metric, tap))
    return np.stack(rows)
