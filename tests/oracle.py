"""The same model in transformers: our parameters put into its GPTNeoXForCausalLM. Needs torch and transformers."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.utils import logging

from neox.reference.config import Config
from neox.reference.model import Model, rotary_tables

logging.set_verbosity_error()


SAME_NAME = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "max_position_embeddings",
    "layer_norm_eps",
    "use_parallel_residual",
    "tie_word_embeddings",
    "attention_bias",
    "bos_token_id",
    "eos_token_id",
)


def oracle_config(config: Config, **changed: object) -> GPTNeoXConfig:
    """Our config under transformers' names; `changed` are fields of theirs."""
    rope = {"rope_theta": config.rotary_emb_base, "partial_rotary_factor": config.rotary_pct, "rope_type": "default"}
    ours = {name: getattr(config, name) for name in SAME_NAME}
    return GPTNeoXConfig(**{**ours, "rope_parameters": rope, "attn_implementation": "sdpa", **changed})


def tensors(model: Model) -> dict[str, torch.Tensor]:
    """Our parameters under transformers' names, which are our fields' names but for the head."""
    named: dict[str, NDArray] = {"gpt_neox.embed_in.weight": model.params.embed_in}

    def add(name: str, part: object) -> None:
        for kind in ("weight", "bias"):
            if (value := getattr(part, kind)) is not None:
                named[f"gpt_neox.{name}.{kind}"] = value

    for i, p in enumerate(model.params.layers):
        add(f"layers.{i}.input_layernorm", p.input_layernorm)
        add(f"layers.{i}.post_attention_layernorm", p.post_attention_layernorm)
        add(f"layers.{i}.attention.query_key_value", p.attention.query_key_value)
        add(f"layers.{i}.attention.dense", p.attention.dense)
        add(f"layers.{i}.mlp.dense_h_to_4h", p.mlp.dense_h_to_4h)
        add(f"layers.{i}.mlp.dense_4h_to_h", p.mlp.dense_4h_to_h)
    add("final_layer_norm", model.params.final_layer_norm)
    named["lm_head.weight"] = model.params.embed_out
    return {name: torch.from_numpy(np.array(value)) for name, value in named.items()}


def our_frequencies(config: Config) -> NDArray[np.float32]:
    """What rotary_tables turns each pair by in one position, read off its angles: sine and cosine of a small one."""
    exponent = np.arange(0, config.rotary_ndims, 2, dtype=np.float32) / np.float32(config.rotary_ndims)
    frequency = np.float32(1) / np.power(config.rotary_emb_base, exponent.astype(np.float64)).astype(np.float32)
    cos, sin = rotary_tables(config, np.array([[1]]))
    assert np.array_equal(cos[0, 0, 0], np.cos(frequency.astype(np.float64)).astype(np.float32))
    assert np.array_equal(sin[0, 0, 0], np.sin(frequency.astype(np.float64)).astype(np.float32))
    return frequency


def their_frequencies(theirs: GPTNeoXForCausalLM) -> NDArray[np.float32]:
    return theirs.gpt_neox.rotary_emb.inv_freq.numpy()


def oracle(model: Model, **changed: object) -> GPTNeoXForCausalLM:
    """transformers' model with our parameters, in our dtype, and our rotary frequencies.

    Theirs are ours to within one step of float32, which is asserted: torch's power is not always rounded to nearest, so
    for some R and base a frequency is a step off, and times position 1300 such a step is 1e-4 radians.
    """
    config = oracle_config(model.config, **changed)
    theirs = GPTNeoXForCausalLM(config).eval()  # made in float32, so that the frequencies are
    ours = our_frequencies(model.config)
    np.testing.assert_array_max_ulp(their_frequencies(theirs), ours, maxulp=1)
    theirs.to(torch.float64 if model.dtype == np.float64 else torch.float32)
    theirs.load_state_dict(tensors(model), strict=True)
    theirs.gpt_neox.rotary_emb.inv_freq = torch.from_numpy(ours)
    return theirs


def oracle_logits(theirs: GPTNeoXForCausalLM, ids: NDArray, **arguments: object) -> NDArray:
    with torch.inference_mode():
        return theirs(torch.from_numpy(np.asarray(ids, np.int64)), use_cache=False, **arguments).logits.numpy()
