"""Reading what a model computes on the way: lenses on the residual stream, and what each part adds to a logit.

    for depth, logits in enumerate(logit_lens(model, ids)): ...     what would follow if the model ended there
    parts = attribute(model, ids, targets)                          which part of the model argues for a token

The residual stream is a sum, so the last norm, given what it divides by, and the output matrix are linear in each of
its terms: a logit is the sum of what every head, every MLP and the embedding contribute to it.

Sources: nostalgebraist 2020, "interpreting GPT: the logit lens"; Belrose et al. 2023, "Eliciting Latent Predictions
from Transformers with the Tuned Lens" (arXiv 2303.08112); Elhage et al. 2021, "A Mathematical Framework for Transformer
Circuits"; Olsson et al. 2022, "In-context Learning and Induction Heads" (2209.11895).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from safetensors import SafetensorError
from safetensors.numpy import load_file

from neox.reference.checkpoint.torch_file import torch_tensors
from neox.reference.config import Config
from neox.reference.errors import InputError
from neox.reference.model import Array, Linear, Model, linear, unembed
from neox.reference.trace import begin, head_results, run_with_cache, through_layers

# Lenses.


def logit_lens(model: Model, ids: ArrayLike, tuned: Sequence[Linear] | None = None) -> Iterator[Array]:
    """Logits (B,T,V) that the residual stream would give before each layer and after the last, L + 1 in all.

    tuned: of load_tuned_lens; each state is first brought to where the last layer would leave it. One state is in
    memory at a time. InputError as forward.
    """
    x = begin(model, ids)
    for i in range(model.config.num_hidden_layers):
        yield unembed(model, x if tuned is None else x + linear(x, tuned[i]))
        x = through_layers(model, x, range(i, i + 1))
    yield unembed(model, x)


def _lens_tensors(file: Path) -> Mapping[str, Array]:
    if file.suffix != ".safetensors":
        return {name: stored.read() for name, stored in torch_tensors(file).items()}
    try:
        return load_file(file)
    except SafetensorError as error:
        raise InputError(f"{file} is no safetensors file: {error}") from error


def load_tuned_lens(path: Path, config: Config) -> tuple[Linear, ...]:
    """A translator (C,C) for the state before each layer, from the published params.pt or safetensors.

    path: the file, or a folder with a params.pt. InputError if it is not a lens of this model.
    """
    file = path / "params.pt" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{file} is not there: a tuned lens is a folder with a params.pt, or a safetensors file")
    tensors = _lens_tensors(file)
    C = config.hidden_size
    for i in range(config.num_hidden_layers):
        for name, shape in ((f"{i}.weight", (C, C)), (f"{i}.bias", (C,))):
            if name not in tensors or tensors[name].shape != shape:
                raise InputError(f"{file} is no tuned lens of this model: it has no {name} of shape {shape}")
    return tuple(
        Linear(*(tensors[f"{i}.{part}"].astype(np.float32) for part in ("weight", "bias")))
        for i in range(config.num_hidden_layers)
    )


# Direct logit attribution.


@dataclass(frozen=True)
class Attribution:
    """What each part of a model contributes to some logits: values[..., n] is that of names[n]."""

    names: tuple[str, ...]
    values: Array  # (B,T,N); their sum over the last axis is the logit

    def of_heads(self, config: Config) -> Array:  # (B,T,L,H)
        """The contributions of heads, without the bias of the layer they stand in."""
        names = [head_name(i, h) for i in range(config.num_hidden_layers) for h in range(config.num_attention_heads)]
        places = [self.names.index(name) for name in names]
        shape = (config.num_hidden_layers, config.num_attention_heads)
        return self.values[..., places].reshape(*self.values.shape[:2], *shape)


def head_name(layer: int, head: int) -> str:
    return f"blocks.{layer}.attn.{head}"


def _terms(model: Model, cache: Mapping[str, Array]) -> Iterator[tuple[str, Array]]:
    """The terms (B,T,C) whose sum is the residual stream after the last layer."""
    embedding = cache["hook_embed"]
    yield "embed", embedding
    for i, p in enumerate(model.params.layers):
        results = head_results(p.attention.dense, cache[f"blocks.{i}.attn.hook_z"])
        for h in range(results.shape[-2]):
            yield head_name(i, h), results[..., h, :]
        if p.attention.dense.bias is not None:
            yield f"blocks.{i}.attn.bias", np.broadcast_to(p.attention.dense.bias, embedding.shape)
        yield f"blocks.{i}.mlp", cache[f"blocks.{i}.hook_mlp_out"]


def attribute(model: Model, ids: ArrayLike, targets: ArrayLike) -> Attribution:
    """Which part of the model contributes how much to the logits of `targets`, one id (B,T) for each position.

    The last norm's mean is taken from every term by itself, and all are divided by what it divides by, which is thus
    treated as a constant; its bias is a part of its own. InputError as forward.
    """
    names = ["hook_embed", "blocks.*.attn.hook_z", "blocks.*.hook_mlp_out", "ln_final.hook_scale"]
    _, cache = run_with_cache(model, ids, names)
    norm = model.params.final_layer_norm
    rows = model.params.embed_out[np.asarray(targets)].astype(model.dtype)  # (B,T,C)
    direction = rows * norm.weight
    direction -= direction.mean(-1, keepdims=True)  # takes the mean from each term
    direction /= cache["ln_final.hook_scale"]
    found = {name: (term * direction).sum(-1) for name, term in _terms(model, cache)}  # (B,T) each
    found["ln_final.bias"] = (rows * norm.bias).sum(-1)
    return Attribution(tuple(found), np.stack(list(found.values()), axis=-1))


# Induction: to look for what followed the last time.


def repeated_tokens(config: Config, rows: int, length: int, seed: int = 0) -> Array:  # (B,2T)
    """Random ids, twice: nothing but their first occurrence tells what follows in the second."""
    once = np.random.default_rng(seed).integers(config.vocab_size, size=(rows, length))
    return np.concatenate([once, once], axis=1)


def induction_scores(model: Model, rows: int = 4, length: int = 50, seed: int = 0) -> Array:  # (L,H)
    """How much each head attends, from tokens that have been there before, to what followed them.

    The mean over the second half of repeated random tokens; a head that attends evenly has 1 / (3/2 length) or so.
    """
    ids = repeated_tokens(model.config, rows, length, seed)
    _, cache = run_with_cache(model, ids, "blocks.*.attn.hook_pattern", model.config.num_hidden_layers)
    queries = np.arange(length, 2 * length)
    scores = [
        cache[f"blocks.{i}.attn.hook_pattern"][:, :, queries, queries - length + 1].mean((0, 2))
        for i in range(model.config.num_hidden_layers)
    ]
    return np.stack(scores)
