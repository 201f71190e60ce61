"""The model over several ranks: reference/model.py on shards of its weights. All collectives of a pass are here.

    x = sum over ranks of (embed_in[ids] where the rank holds the id, else 0)                    collective 1
    for each layer:
        attention = this rank's heads, through this rank's columns of `dense`: a part of the sum
        mlp       = this rank's neurons, through this rank's columns of `dense_4h_to_h`: likewise
        x         = sum over ranks of (mlp + attention)  + biases of both + x                    collectives 2 ... L+1
    logits = gather of (embed_out(LN(x)) for the ids of each rank)                               collective L+2

One sum a layer suffices because both branches read the same x (the parallel residual); a model with the sequential
residual needs two. A bias that belongs to a sum of parts, and the residual, are added once, after it, by every rank
alike. So x is the same on all ranks, to the bit, and nothing but sums of parts ever travels.

Dimensions as in reference/model.py; those cut among the ranks are fewer here: heads, neurons, ids.

Sources: Shoeybi et al. 2019 (arXiv 1909.08053); for one sum a layer, `ParallelTransformerLayer.forward` of
EleutherAI/gpt-neox, megatron/model/transformer.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from neox.distributed.comm import Communicator
from neox.distributed.sharding import check_ranks, share, slices
from neox.reference.checkpoint.tensors import Get, TensorSpec, build_params, named_tensors
from neox.reference.config import Config
from neox.reference.model import (
    Array,
    Layer,
    Linear,
    Mix,
    Model,
    Rotary,
    attention,
    causal_attend,
    checked,
    layer_norm,
    mlp,
    rotary_tables,
    unembed,
)


@dataclass(frozen=True)
class RowBiases:
    """Of the two matrices of a layer whose results are sums over the ranks; zeros where the model has none."""

    attention: Array  # (C,)
    mlp: Array  # (C,)


@dataclass(frozen=True)
class Shard:
    """What one rank holds, and the others that it computes with."""

    model: Model  # config of the whole; of every tensor this rank's slice; no row biases
    biases: tuple[RowBiases, ...]  # of all layers
    comm: Communicator

    @property
    def config(self) -> Config:
        return self.model.config

    @property
    def ids(self) -> slice:
        """Of the vocabulary, those whose embeddings and logits are this rank's."""
        return share(self.config.vocab_size, self.comm.rank, self.comm.ranks)


# Making one.


def _without_bias(p: Linear) -> tuple[Linear, Array]:
    zeros = np.zeros(p.weight.shape[0], p.weight.dtype)
    return Linear(p.weight, None), zeros if p.bias is None else p.bias


def _separate(p: Layer) -> tuple[Layer, RowBiases]:
    dense, attention_bias = _without_bias(p.attention.dense)
    down, mlp_bias = _without_bias(p.mlp.dense_4h_to_h)
    part = replace(p, attention=replace(p.attention, dense=dense), mlp=replace(p.mlp, dense_4h_to_h=down))
    return part, RowBiases(attention_bias, mlp_bias)


def new_shard(config: Config, get: Get, dtype: np.dtype, comm: Communicator) -> Shard:
    """The shard of comm.rank; get returns its slice of a tensor. InputError if the model has too few heads.

    What is replicated may differ from rank to rank, as the norms of a checkpoint that was trained in parallel do.
    """
    check_ranks(config, comm.ranks)
    params = build_params(config, get)
    pairs = [_separate(p) for p in params.layers]
    model = Model(config, replace(params, layers=tuple(part for part, _ in pairs)), dtype)
    return Shard(model, tuple(biases for _, biases in pairs), comm)


def shard(model: Model, comm: Communicator) -> Shard:
    """A rank's shard of a whole model in memory, of which it copies nothing."""
    tensors = named_tensors(model.config, model.params)

    def get(spec: TensorSpec) -> Array:
        return tensors[spec.name][slices(spec, comm.rank, comm.ranks)]

    return new_shard(model.config, get, model.dtype, comm)


# The forward pass.


def embed(shard: Shard, ids: Array) -> Array:  # (B,T) -> (B,T,C)
    """Each row comes from the one rank that holds it; the others add zeros."""
    held, table = shard.ids, shard.model.params.embed_in
    mine = (held.start <= ids) & (ids < held.stop)
    x = np.zeros((*ids.shape, shard.config.hidden_size), shard.model.dtype)
    x[mine] = table[ids[mine] - held.start]
    return shard.comm.sum(x)


def layer(shard: Shard, index: int, x: Array, rotary: Rotary, mix: Mix = causal_attend) -> Array:
    """(B,T,C) -> (B,T,C), the same on every rank."""
    config, comm = shard.config, shard.comm
    p, biases = shard.model.params.layers[index], shard.biases[index]
    normed = layer_norm(x, p.input_layernorm, config.layer_norm_eps)
    a = attention(p.attention, config.head_dim, normed, rotary, mix)  # what this rank's heads add
    if not config.use_parallel_residual:
        x = comm.sum(a) + biases.attention + x
    normed = layer_norm(x, p.post_attention_layernorm, config.layer_norm_eps)
    m = mlp(p.mlp, config.hidden_act, normed)  # what this rank's neurons add
    if not config.use_parallel_residual:
        return comm.sum(m) + biases.mlp + x
    return comm.sum(m + a) + (biases.mlp + biases.attention) + x


def forward(shard: Shard, ids: ArrayLike) -> Array:  # (B,T) -> (B,T,V)
    """Logits of the next token after every position, on every rank; called on all with the same ids.

    InputError if an id or the length is out of range.
    """
    ids = checked(shard.config, ids)
    x = embed(shard, ids)
    rotary = rotary_tables(shard.config, np.arange(ids.shape[1])[None])
    for index in range(shard.config.num_hidden_layers):
        x = layer(shard, index, x, rotary)
    return np.concatenate(shard.comm.gather(unembed(shard.model, x)), axis=-1)
