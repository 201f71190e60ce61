"""Looking inside on a device: reference/trace.py at the points where states lie in memory between two kernels.

    hook_embed                                 (B,T,C)    the residual stream at its beginning
    blocks.i.hook_resid_pre, hook_resid_post   (B,T,C)    before and after layer i
    blocks.i.attn.hook_z                       (B,T,H,D)  what each head has gathered, before `dense`

Other points exist in registers only, or without their bias. A state that is asked for is copied to host memory and,
when it has been seen, back; all others stay where they are, and model.py does not know that it is looked at. Hooks get
float32, in which every float16 and bfloat16 has its own value: one that changes nothing changes no bit.

All positions of all texts go through the model together: it is for prompts that fit, not for corpora.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from neox.gpu.device import Array
from neox.gpu.model import Keys, Mix, Model, embed, layer, new_workspace, one_page_each, placed, unembed
from neox.reference.config import Config
from neox.reference.errors import InputError
from neox.reference.model import Tap, checked
from neox.reference.trace import Cache, Hook, Names, hooked, keeping, matching

POINTS = ("hook_embed", "hook_resid_pre", "hook_resid_post", "attn.hook_z")


def shown(config: Config, names: Names) -> set[str]:
    """The names that are meant, of those a device shows. InputError if a pattern fits none of them."""
    if callable(names):
        return {name for name in matching(config, names) if name.endswith(POINTS)}
    found: set[str] = set()
    for pattern in [names] if isinstance(names, str) else names:
        fitting = {name for name in matching(config, pattern) if name.endswith(POINTS)}
        if not fitting:
            raise InputError(f"a device shows {', '.join(POINTS)} only, not {pattern!r}; the reference shows all")
        found |= fitting
    return found


Look = Callable[[str, Array], None]


def _looking(config: Config, batch: int, wanted: set[str], tap: Tap) -> Look:
    """What is called with the memory of each point: it lets the tap see, and change, those that are wanted."""
    heads = (batch, -1, config.num_attention_heads, config.head_dim)
    stream = (batch, -1, config.hidden_size)

    def look(name: str, array: Array) -> None:
        if name in wanted:
            seen = array.get().astype(np.float32).reshape(heads if name.endswith("hook_z") else stream)
            array.set(tap(name, seen).reshape(array.shape).astype(array.dtype))

    return look


def _looked_at(mix: Mix, look: Look, name: str) -> Mix:
    """The same attention, whose result is looked at before anything reads it."""

    def looked_at(q: Array, cache: Keys, z: Array) -> None:
        mix(q, cache, z)
        look(name, z)

    return looked_at


def _run(model: Model, ids: ArrayLike, wanted: set[str], tap: Tap, stop: int | None) -> NDArray[np.float32]:
    """As model.forward, or up to a layer, the residual stream that it would find."""
    config, device, ids = model.config, model.device, checked(model.config, ids)
    (B, T), look = ids.shape, _looking(config, len(ids), wanted, tap)
    shape = (B, config.num_attention_heads, T, config.head_dim)
    cache = device.empty(shape, model.dtype), device.empty(shape, model.dtype), one_page_each(device, B)
    place, mix = placed(model, *(a.ravel().astype(np.int32) for a in np.indices((B, T))))
    work = new_workspace(model, B * T)
    embed(model, device.array(ids.ravel().astype(np.int32)), work)
    look("hook_embed", work.x)
    for i, p in enumerate(model.params.layers[:stop]):
        look(f"blocks.{i}.hook_resid_pre", work.x)
        layer(p, model, work, place, cache, _looked_at(mix, look, f"blocks.{i}.attn.hook_z"))
        look(f"blocks.{i}.hook_resid_post", work.x)
    if stop is not None:
        return work.x.get().reshape(B, T, -1)
    logits = device.empty((B * T, config.vocab_size), np.float32)
    unembed(model, work.x, work.normed, logits)
    return logits.get().reshape(B, T, -1)


def run_with_cache(
    model: Model, ids: ArrayLike, names: Names = "*", stop_at_layer: int | None = None
) -> tuple[NDArray[np.float32], Cache]:
    """Logits (B,T,V), and the states under these names; as reference/trace.py, in float32 and in host memory.

    InputError as there, and for a pattern that fits nothing a device shows.
    """
    count = model.config.num_hidden_layers
    if stop_at_layer is not None and not 0 <= stop_at_layer <= count:
        raise InputError(f"stop_at_layer must be from 0 to {count}, not {stop_at_layer}")
    cache: Cache = {}
    wanted = shown(model.config, names)
    return _run(model, ids, wanted, keeping(wanted, cache), stop_at_layer), cache


def run_with_hooks(model: Model, ids: ArrayLike, hooks: Mapping[str, Hook]) -> NDArray[np.float32]:  # (B,T) -> (B,T,V)
    """Logits of a pass in which hooks look on or step in; each gets float32 in host memory. InputError as above."""
    wanted = shown(model.config, list(hooks))
    return _run(model, ids, wanted, hooked(model.config, hooks), None)
