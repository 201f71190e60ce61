"""One model in every layout, written by torch and transformers as the programs do that people have checkpoints of.

Needs torch and transformers.
"""

from __future__ import annotations

import io
import json
import random
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from oracle import oracle_config
from transformers import GPTNeoXForCausalLM

from neox.reference.checkpoint.layouts import part
from neox.reference.checkpoint.neox import RENAMED
from neox.reference.checkpoint.tensors import pipeline, tensor_table
from neox.reference.config import Config, config_to_neox

Tensors = Mapping[str, NDArray]  # by name of tensor_table, in half precision
Held = dict[int, dict[str, torch.Tensor]]  # by one rank: by layer of the pipeline


def state_dict(tensors: Tensors) -> OrderedDict[str, torch.Tensor]:
    return OrderedDict((name, torch.from_numpy(array.copy())) for name, array in tensors.items())


# Hugging Face.


def safetensors(folder: Path, config: Config, tensors: Tensors, shard: str = "1GB") -> None:
    model = GPTNeoXForCausalLM(oracle_config(config)).half()
    model.load_state_dict({name.replace("embed_out", "lm_head"): t for name, t in state_dict(tensors).items()})
    model.save_pretrained(folder, max_shard_size=shard)


def with_buffers(config: Config, tensors: Tensors) -> OrderedDict[str, torch.Tensor]:
    """And what releases before 4.30 saved beside the weights."""
    state = state_dict(tensors)
    for i in range(config.num_hidden_layers):
        state[f"gpt_neox.layers.{i}.attention.bias"] = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
        state[f"gpt_neox.layers.{i}.attention.masked_bias"] = torch.tensor(-1e9)
        state[f"gpt_neox.layers.{i}.attention.rotary_emb.inv_freq"] = torch.ones(config.rotary_ndims // 2)
    return state


def single_bin(folder: Path, config: Config, tensors: Tensors) -> None:
    oracle_config(config).save_pretrained(folder)
    torch.save(with_buffers(config, tensors), folder / "pytorch_model.bin")


def sharded_bin(folder: Path, config: Config, tensors: Tensors) -> None:
    oracle_config(config).save_pretrained(folder)
    state = with_buffers(config, tensors)
    names = list(state)
    shards = {f"pytorch_model-0000{i + 1}-of-00003.bin": names[i::3] for i in range(3)}
    for file, own in shards.items():
        torch.save({name: state[name] for name in own}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, own in shards.items() for name in own}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


# gpt-neox.


def held_by(rank: int, ranks: int, config: Config, tensors: Tensors) -> Held:
    table = tensor_table(config)
    held = {
        layer: {own: torch.from_numpy(part(table[n], tensors[n], rank, ranks).copy()) for own, n in names.items()}
        for layer, names in pipeline(config).items()
    }
    for layer in range(2, 2 + config.num_hidden_layers):
        held[layer]["attention.rotary_emb.inv_freq"] = torch.ones(config.rotary_ndims // 2).half()
    return held


def new_step(folder: Path, config: Config, ranks: int) -> Path:
    step = folder / "global_step5"
    (step / "configs").mkdir(parents=True)
    (folder / "latest").write_text("global_step5\n")
    settings = {name.replace("_", "-"): value for name, value in config_to_neox(config, ranks).items()}
    (step / "configs" / "model.yml").write_text(json.dumps(settings))
    return step


def new_names(family: str, held: Held) -> Held:
    """As newer releases of gpt-neox call them."""
    names = {old: new for new, old in RENAMED.items() if ("linear" in new) == (family == "linear1")}
    return {layer: {names.get(name, name): t for name, t in own.items()} for layer, own in held.items()}


def layer_files(folder: Path, config: Config, tensors: Tensors, ranks: int, family: str = "") -> None:
    """family: of names, "linear1" or "transformer engine"; legacy ones without."""
    step = new_step(folder, config, ranks)
    for rank in range(ranks):
        held = held_by(rank, ranks, config, tensors)
        for layer, own in (new_names(family, held) if family else held).items():
            extra = {"mlp._extra_state": io.BytesIO(b"of eight bits")} if family == "transformer engine" else {}
            torch.save({**own, **extra}, step / f"layer_{layer:02}-model_{rank:02}-model_states.pt")
    # Of the training, and not read: not even a file of torch.
    (step / "mp_rank_00_model_states.pt").write_bytes(b"state of the training")


def training_state() -> dict:
    """What DeepSpeed and gpt-neox put beside the weights."""
    shapes = OrderedDict([("sequential.0.word_embeddings.weight", torch.Size([3, 4]))])
    return {
        "param_shapes": [shapes],
        "optimizer": {"loss_scale": torch.tensor(4096.0), "state": {0: {"exp_avg": torch.zeros(3)}}},
        "lr_scheduler": {"start_lr": 1e-4, "num_iters": 5},
        "iteration": 5,
        "args": {"num_layers": 1, "tokenizer_type": "HFTokenizer"},
        "random_rng_state": random.Random(0).getstate(),
        "np_rng_state": np.random.RandomState(0).get_state(),
        "torch_rng_state": torch.ByteTensor(range(64)),
    }


def sequential(folder: Path, config: Config, tensors: Tensors, ranks: int) -> None:
    step = new_step(folder, config, ranks)
    for rank in range(ranks):
        held = held_by(rank, ranks, config, tensors)
        module = OrderedDict((f"sequential.{layer}.{own}", t) for layer, ts in held.items() for own, t in ts.items())
        torch.save({"module": module, **training_state()}, step / f"mp_rank_{rank:02}_model_states.pt")


LAYOUTS: dict[str, Callable[[Path, Config, Tensors], None]] = {
    "safetensors": safetensors,
    "safetensors in shards": partial(safetensors, shard="4KB"),
    "bin": single_bin,
    "bin in shards": sharded_bin,
    **{f"layer files of {ranks}": partial(layer_files, ranks=ranks) for ranks in (1, 2, 4)},
    **{f"sequential of {ranks}": partial(sequential, ranks=ranks) for ranks in (1, 2, 4)},
    "linear1": partial(layer_files, ranks=2, family="linear1"),
    "transformer engine": partial(layer_files, ranks=2, family="transformer engine"),
}
