"""Tensor parallelism on devices: any number of ranks computes what one device does, and all of them the same bits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from device_checks import CHECKS, CONFIG, forward, own_device, part, ranks_are_as_exact_as_one_device
from devices import DTYPES, stopped_by_the_host
from gpu_models import assert_right, device_configs, drawn
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants import Mutant
from strategies import seeds

from neox.distributed import Alone, device, virtual
from neox.distributed.sums import HostSums
from neox.reference.config import Config
from neox.reference.errors import InputError


@pytest.mark.parametrize("check", CHECKS)
def test_the_right_program_passes(check: str):
    CHECKS[check]()


@settings(max_examples=12)
@given(config=device_configs(), dtype=st.sampled_from(DTYPES), seed=seeds, ranks=st.integers(1, 5))
def test_drawn_models_are_as_exact_on_any_number_of_ranks(config: Config, dtype: str, seed: int, ranks: int):
    ranks = min(ranks, config.num_attention_heads)
    config = replace(config, intermediate_size=16 * ranks)
    ranks_are_as_exact_as_one_device([config], dtype, seed % 3, [ranks])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_in_half_precision_too(dtype: str):
    ranks_are_as_exact_as_one_device([CONFIG], dtype)


def test_over_a_thousand_positions_and_heads_of_the_20b():
    config = replace(CONFIG, hidden_size=192, num_attention_heads=2, num_hidden_layers=1, vocab_size=61)
    config = replace(config, max_position_embeddings=1100, intermediate_size=32)
    m = drawn(config, 2, "float16")
    ids = np.random.default_rng(0).integers(0, 61, (1, 1030))
    assert_right(forward(m, 2, ids, "float16"), m, ids, "float16")


def test_a_rank_alone_needs_no_other():
    m, ids = drawn(CONFIG, 1, "float32"), np.array([[3, 1, 4, 1, 5]])
    alone = Alone()
    ours = device.forward(device.device_shard(m, alone, HostSums(alone), own_device(0), "float32"), ids)
    assert np.array_equal(ours, forward(m, 1, ids, "float32"))


def test_shares_that_kernels_cannot_read_are_refused():
    m = drawn(replace(CONFIG, intermediate_size=40), 1, "float32")
    with pytest.raises(InputError, match=r"rank 0 of 2 would compute 20 neurons of each MLP"):
        virtual(2, lambda group: part(m, group, "float32"))


# Wrong programs.


def mutant(name: str, check: str, function: str, *edits: tuple[str, str]) -> Mutant:
    return Mutant(name, check, device, function, edits)


RIGHT, TEXTS, COUNT = (
    "ranks_are_as_exact_as_one_device",
    "texts_are_those_of_one_device",
    "a_token_takes_l_and_two_collectives",
)
MUTANTS = (
    mutant("biases on every rank", RIGHT, "_parallel_layer", ("work.attention, None", "work.attention, bias")),
    mutant("biases left out", RIGHT, "_add_up", ("part, bias, bias.dtype", "part, None, bias.dtype")),
    mutant("bias of the MLP only", RIGHT, "_separate", ("mlp_bias + attention_bias", "mlp_bias")),
    mutant(
        "biases of the sequential residual swapped",
        RIGHT,
        "_separate",
        ("else (attention_bias, mlp_bias)", "else (mlp_bias, attention_bias)"),
    ),
    mutant(
        "the residual before the sum",
        RIGHT,
        "_add_up",
        (
            "shard.sums.add_up(part)\n    ops.residual(part, bias, bias.dtype, work.x)",
            "ops.residual(part, bias, bias.dtype, work.x)\n    shard.sums.add_up(work.x)",
        ),
    ),
    mutant("nothing summed", RIGHT, "_add_up", ("shard.sums.add_up(part)", "None")),
    mutant(
        "attention left out",
        RIGHT,
        "_parallel_layer",
        ("work.attention, None, model.dtype", "work.mlp, None, model.dtype"),
    ),
    mutant("embedding not summed", RIGHT, "embed", ("shard.sums.add_up(work.x)", "None")),
    mutant("ids counted from the first of all", RIGHT, "embed", ("shard.ids.start", "0")),
    mutant(
        "one norm for both branches",
        RIGHT,
        "_parallel_layer",
        ("second.weight, second.bias", "first.weight, first.bias"),
    ),
    mutant(
        "logits in the wrong order",
        RIGHT,
        "forward",
        ("shard.comm.gather(fetched(shard, logits))", "shard.comm.gather(fetched(shard, logits))[::-1]"),
    ),
    mutant(
        "two sums a layer",
        COUNT,
        "_parallel_layer",
        ("ops.residual(work.attention", "shard.sums.add_up(work.attention)\n    ops.residual(work.attention"),
    ),
    mutant(
        "every layer in the cache of the first",
        TEXTS,
        "through_layers",
        ("cache.of_layer(index)", "cache.of_layer(0)"),
    ),
    mutant(
        "norms of rank 0 on all",
        "norms_of_each_rank_are_kept",
        "device_shard",
        ("array[slices", "comm.broadcast(array)[slices"),
    ),
)


@stopped_by_the_host
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("wrong", MUTANTS, ids=lambda wrong: wrong.name)
def test_the_wrong_program_fails(wrong: Mutant, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(device, wrong.function, wrong.build())
    with pytest.raises((AssertionError, ValueError)):
        CHECKS[wrong.check]()


def test_every_check_has_a_mutant():
    assert {wrong.check for wrong in MUTANTS} == set(CHECKS)
