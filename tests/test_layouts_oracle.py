"""Files that torch and transformers themselves wrote, in every layout: the same parameters and logits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from closeness import assert_close
from strategies import random_model

from neox.reference.checkpoint.layouts import part
from neox.reference.checkpoint.load import load
from neox.reference.checkpoint.tensors import build_params, named_tensors, pipeline, tensor_table
from neox.reference.config import Config, config_to_neox
from neox.reference.model import forward

pytestmark = pytest.mark.oracle

SMALL = Config(104, 96, 2, 4, 136, rotary_pct=0.25, max_position_embeddings=64)
IDS = np.array([[5, 17, 3, 99, 60, 2, 8], [1, 1, 2, 3, 5, 8, 13]])


def rounded_model():
    """In transformers, its weights rounded to half precision; those by name; and its logits."""
    from oracle import oracle, oracle_logits

    model = random_model(SMALL, 0)
    half = {name: array.astype(np.float16) for name, array in named_tensors(SMALL, model.params).items()}
    params = build_params(SMALL, lambda spec: half[spec.name].astype(np.float32))
    theirs = oracle(replace(model, params=params))
    return theirs, half, oracle_logits(theirs, IDS)


def assert_is_the_model(folder: Path, half, logits) -> None:
    model = load(folder, weights="stored")
    found = named_tensors(model.config, model.params)
    assert sorted(found) == sorted(half)
    for name, array in half.items():
        assert np.array_equal(found[name].astype(np.float32), array.astype(np.float32)), name
    # The bound of every comparison with transformers in float32 (test_transformers.py).
    assert_close(forward(model, IDS), logits, rtol=1e-5)


@pytest.mark.parametrize("shard", [None, 40])
def test_pytorch_model_bin(tmp_path: Path, shard: int | None) -> None:
    """Single, and in shards with an index, with the buffers that older releases saved beside the weights."""
    import torch

    theirs, half, logits = rounded_model()
    theirs.config.save_pretrained(tmp_path)
    state = {name: torch.from_numpy(array) for name, array in half.items()}
    for i in range(SMALL.num_hidden_layers):
        state[f"gpt_neox.layers.{i}.attention.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
        state[f"gpt_neox.layers.{i}.attention.masked_bias"] = torch.tensor(-1e9)
    if shard is None:
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        names = list(state)
        groups = [names[:7], names[7:]]
        files = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
        for file, group in zip(files, groups, strict=True):
            torch.save({name: state[name] for name in group}, tmp_path / file)
        where = {name: file for file, group in zip(files, groups, strict=True) for name in group}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    assert_is_the_model(tmp_path, half, logits)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("form", ["layers", "sequential"])
def test_files_of_gpt_neox(tmp_path: Path, ranks: int, form: str) -> None:
    import torch

    _, half, logits = rounded_model()
    table = tensor_table(SMALL)
    step = tmp_path / "global_step5"
    (tmp_path / "configs").mkdir()
    step.mkdir()
    (tmp_path / "latest").write_text("global_step5\n")
    (tmp_path / "configs" / "small.yml").write_text(json.dumps(config_to_neox(SMALL, ranks)))
    for rank in range(ranks):
        held = {
            layer: {own: torch.from_numpy(part(table[n], half[n], rank, ranks).copy()) for own, n in names.items()}
            for layer, names in pipeline(SMALL).items()
        }
        for layer in range(2, 2 + SMALL.num_hidden_layers):
            held[layer]["attention.rotary_emb.inv_freq"] = torch.ones(SMALL.rotary_ndims // 2).half()
        if form == "layers":
            for layer, tensors in held.items():
                torch.save(tensors, step / f"layer_{layer:02}-model_{rank:02}-model_states.pt")
        else:
            module = {f"sequential.{layer}.{own}": t for layer, tensors in held.items() for own, t in tensors.items()}
            state = {"module": module, "iteration": 5, "optimizer": None, "args": {"lr": 1e-4}}
            torch.save(state, step / f"mp_rank_{rank:02}_model_states.pt")
    assert_is_the_model(tmp_path, half, logits)
