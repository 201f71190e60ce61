"""The model over several ranks, each with a device: model.py over gpu/model.py. All collectives of a pass are here.

What differs from model.py:
  - A sum is written over the part: `Sums` are arrays of the device, float32, and what travels never leaves it where the
    devices can reach each other (sums.py).
  - Biases that are added after a sum are float32, and those of one sum are one array.
  - A bias of a product is added by the kernel that reads the product next, so there is none to add before a sum.

Dimensions as in gpu/model.py; H, F and V are a rank's own heads, neurons and ids.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from neox.distributed.comm import Communicator
from neox.distributed.sharding import check_ranks, share, slices
from neox.distributed.sums import Sums
from neox.gpu import model as whole
from neox.gpu import ops
from neox.gpu.decode import Cache, CachedDecoder, Step, Ways, fused_branches, fuses
from neox.gpu.device import Array, Device
from neox.gpu.fused import fused_output
from neox.gpu.load import source_of_array, upload
from neox.gpu.model import Keys, Layer, Linear, Mix, Model, Place, Workspace, attention, mlp, unembed
from neox.reference import model as reference
from neox.reference.checkpoint.tensors import named_tensors, tensor_table
from neox.reference.config import Config
from neox.reference.errors import InputError
from neox.reference.model import checked

PIECE = 8  # numbers in the 16 bytes that kernels read at a time
DOWN = "gpt_neox.layers.0.mlp.dense_4h_to_h.weight"


@dataclass(frozen=True)
class DeviceShard:
    """What one rank holds on its device, and the others that it computes with."""

    model: Model  # config of the whole; of every tensor this rank's slice; no row biases
    biases: tuple[tuple[Array, ...], ...]  # of all layers, what is added after each sum: float32 (C,)
    comm: Communicator
    sums: Sums

    @property
    def config(self) -> Config:
        return self.model.config

    @property
    def ids(self) -> slice:
        """Of the vocabulary, those whose embeddings and logits are this rank's."""
        return share(self.config.vocab_size, self.comm.rank, self.comm.ranks)


# Making one.


def _without_bias(p: Linear) -> tuple[Linear, NDArray[np.float32]]:
    bias = np.zeros(p.weight.shape[0], np.float32) if p.bias is None else p.bias.get().astype(np.float32)
    return Linear(p.weight, None), bias


def _separate(p: Layer, parallel: bool) -> tuple[Layer, tuple[NDArray[np.float32], ...]]:
    dense, attention_bias = _without_bias(p.attention.dense)
    down, mlp_bias = _without_bias(p.mlp.dense_4h_to_h)
    part = replace(p, attention=replace(p.attention, dense=dense), mlp=replace(p.mlp, dense_4h_to_h=down))
    return part, (mlp_bias + attention_bias,) if parallel else (attention_bias, mlp_bias)


def check_pieces(config: Config, comm: Communicator) -> None:
    """InputError unless the kernels can read what this rank gets of the MLPs."""
    _, own = slices(tensor_table(config)[DOWN], comm.rank, comm.ranks)
    neurons = own.stop - own.start
    if neurons % PIECE:
        raise InputError(
            f"rank {comm.rank} of {comm.ranks} would compute {neurons} neurons of each MLP, and the kernels read them "
            f"by {PIECE}: take another number of ranks"
        )


def new_device_shard(model: Model, comm: Communicator, sums: Sums) -> DeviceShard:
    """From this rank's slices, which the kernels must be able to read (check_pieces)."""
    pairs = [_separate(p, model.config.use_parallel_residual) for p in model.params.layers]
    part = replace(model, params=replace(model.params, layers=tuple(p for p, _ in pairs)))
    biases = tuple(tuple(map(model.device.array, biases)) for _, biases in pairs)
    return DeviceShard(part, biases, comm, sums)


# The forward pass.


def embed(shard: DeviceShard, ids: Array, work: Workspace) -> None:  # int32 (N) -> work.x
    """Each row comes from the one rank that holds it; the others add zeros."""
    ops.embedding_share(ids, shard.model.params.embed_in, shard.ids.start, work.x)
    shard.sums.add_up(work.x)


def _add_up(shard: DeviceShard, part: Array, bias: Array, work: Workspace) -> None:
    """work.x += the sum of all ranks' parts, and what is added once. part is overwritten."""
    shard.sums.add_up(part)
    ops.residual(part, bias, bias.dtype, work.x)


def layer(shard: DeviceShard, index: int, work: Workspace, place: Place, cache: Keys, mix: Mix) -> None:
    """work.x -> work.x, the same on every rank."""
    if shard.config.use_parallel_residual:
        _parallel_layer(shard, index, work, place, cache, mix)
    else:
        _sequential_layer(shard, index, work, place, cache, mix)


def _parallel_layer(shard: DeviceShard, index: int, work: Workspace, place: Place, cache: Keys, mix: Mix) -> None:
    model, config, p = shard.model, shard.config, shard.model.params.layers[index]
    first, second, (bias,) = p.input_layernorm, p.post_attention_layernorm, shard.biases[index]
    norms = first.weight, first.bias, second.weight, second.bias
    ops.layer_norm_pair(work.x, *norms, config.layer_norm_eps, work.normed, work.normed_mlp)
    attention(p.attention, work, place, (model.cos, model.sin), cache, mix)  # what this rank's heads add
    mlp(p.mlp, config.hidden_act, work)  # what this rank's neurons add
    ops.residual(work.attention, None, model.dtype, work.mlp)
    _add_up(shard, work.mlp, bias, work)


def _sequential_layer(shard: DeviceShard, index: int, work: Workspace, place: Place, cache: Keys, mix: Mix) -> None:
    model, config, p = shard.model, shard.config, shard.model.params.layers[index]
    attention_bias, mlp_bias = shard.biases[index]
    whole.layer_norm(work.x, p.input_layernorm, config.layer_norm_eps, work.normed)
    attention(p.attention, work, place, (model.cos, model.sin), cache, mix)
    _add_up(shard, work.attention, attention_bias, work)
    whole.layer_norm(work.x, p.post_attention_layernorm, config.layer_norm_eps, work.normed_mlp)
    mlp(p.mlp, config.hidden_act, work)
    _add_up(shard, work.mlp, mlp_bias, work)


def through_layers(shard: DeviceShard, cache: Cache, ids: Array, place: Place, work: Workspace, mix: Mix) -> None:
    """What the last layer makes of ids, in work.x; keys and values of this rank's heads are appended to the cache."""
    embed(shard, ids, work)
    for index in range(shard.config.num_hidden_layers):
        layer(shard, index, work, place, cache.of_layer(index), mix)


def fetched(shard: DeviceShard, array: Array) -> NDArray:
    """In host memory. RuntimeError if a sum on the way to it failed: what is there is NaN then."""
    values = shard.comm.meet(array.get)
    shard.sums.check()
    return values


def forward(shard: DeviceShard, ids: ArrayLike) -> NDArray[np.float32]:  # (B,T) -> (B,T,V)
    """Logits of the next token after every position, on every rank; called on all with the same ids.

    InputError if an id or the length is out of range.
    """
    ids = checked(shard.config, ids)
    model, device, (B, T) = shard.model, shard.model.device, ids.shape
    keys = (B, model.heads, T, shard.config.head_dim)
    # Each layer overwrites the last one's.
    cache = device.empty(keys, model.dtype), device.empty(keys, model.dtype), whole.one_page_each(device, B)
    place, mix = whole.placed(model, *(a.ravel().astype(np.int32) for a in np.indices((B, T))))
    work = whole.new_workspace(model, B * T)
    embed(shard, device.array(ids.ravel().astype(np.int32)), work)
    for index in range(shard.config.num_hidden_layers):
        layer(shard, index, work, place, cache, mix)
    logits = device.empty((B * T, model.rows_of_head), np.float32)
    unembed(model, work.x, work.normed, logits)
    return np.concatenate(shard.comm.gather(fetched(shard, logits)), axis=-1).reshape(B, T, -1)


# Decoding.


def fused_layer(shard: DeviceShard, index: int, cache: Keys, step: Step) -> None:
    """What `layer` computes of a parallel block, in three launches and the sum, for a few texts (gpu/fused.py)."""
    work, p, (bias,) = step.work, shard.model.params.layers[index], shard.biases[index]
    fused_branches(p, shard.model, cache, step)
    factors = work.z, p.attention.dense.weight, None, work.activated, p.mlp.dense_4h_to_h.weight, None
    fused_output(*factors, None, work.mlp, step.taken[:1])
    _add_up(shard, work.mlp, bias, work)


def step_through_layers(shard: DeviceShard, cache: Cache, step: Step) -> None:
    """step.ids -> step.work.x, as through_layers."""
    if not fuses(shard.model, step.ids.shape[0]):
        mix = whole.mix_each(step.place, step.partial)
        through_layers(shard, cache, step.ids, step.place, step.work, mix)
        return
    embed(shard, step.ids, step.work)
    for index in range(shard.config.num_hidden_layers):
        fused_layer(shard, index, cache.of_layer(index), step)


def ways_of(shard: DeviceShard) -> Ways:
    """How positions go through the layers on a rank, for gpu/decode.py."""

    def prompts(_: Model, cache: Cache, ids: Array, place: Place, work: Workspace, mix: Mix) -> None:
        through_layers(shard, cache, ids, place, work, mix)

    def step(_: Model, cache: Cache, step: Step) -> None:
        step_through_layers(shard, cache, step)

    return Ways(prompts, step, shard.sums.captured, alone=False, fetch=lambda array: fetched(shard, array))


def device_decoder(shard: DeviceShard, progress: Callable[[int], object] = lambda positions: None) -> CachedDecoder:
    """A RankDecoder of decode.py: keys and values of the rank's own heads stay on its device."""
    return CachedDecoder(shard.model, progress, ways=ways_of(shard))


def device_shard(model: reference.Model, comm: Communicator, sums: Sums, device: Device, dtype: str) -> DeviceShard:
    """A rank's shard of a whole model in memory, as dtype on a device. InputError if its numbers do not fit dtype."""
    check_ranks(model.config, comm.ranks)
    check_pieces(model.config, comm)
    table, tensors = tensor_table(model.config), named_tensors(model.config, model.params)
    sources = {
        name: source_of_array(array[slices(table[name], comm.rank, comm.ranks)], name)
        for name, array in tensors.items()
    }
    return new_device_shard(upload(model.config, sources, device, dtype, hidden=True), comm, sums)
