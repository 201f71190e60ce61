"""reference/costs.py: against the table of tensors, and published sums for the 20B."""

from __future__ import annotations

import pytest

from neox.reference.checkpoint.tensors import tensor_table
from neox.reference.config import GPT_NEOX_20B, PYTHIA, Config
from neox.reference.costs import cached_numbers, flops, step_numbers, training_flops


def matrix_weights(config: Config) -> int:
    """Counted in the table of tensors: all matrices but the embedding, of which a position reads one row."""
    matrices = [spec for spec in tensor_table(config).values() if len(spec.shape) == 2]
    return sum(spec.size for spec in matrices) - config.vocab_size * config.hidden_size


@pytest.mark.parametrize("config", [GPT_NEOX_20B, PYTHIA["160m"]], ids=["20b", "160m"])
def test_a_prompt_costs_two_flops_for_each_weight_and_each_product_of_attention(config: Config) -> None:
    length = 37
    output = 2 * config.vocab_size * config.hidden_size
    pairs = sum(position + 1 for position in range(length))  # (query, key) of each head
    attention = 2 * 2 * config.head_dim * config.num_attention_heads * config.num_hidden_layers * pairs
    weights = 2 * (matrix_weights(config) - config.vocab_size * config.hidden_size) * length
    assert flops(config, 0, length) == weights + attention + output
    assert flops(config, 0, 1) == pytest.approx(2 * matrix_weights(config), rel=1e-3)
    # Token by token it costs the same, but for the logits after each.
    steps_of_one = sum(flops(config, position, position + 1) for position in range(length))
    assert steps_of_one - flops(config, 0, length) == (length - 1) * output


def test_the_cache_of_the_20b_takes_its_keys_and_values() -> None:
    assert cached_numbers(GPT_NEOX_20B, 2048) == 44 * 2 * 64 * 96 * 2048
    assert 2 * cached_numbers(GPT_NEOX_20B, 1) == 1_081_344  # bytes in float16


@pytest.mark.parametrize("config", [GPT_NEOX_20B, PYTHIA["160m"]], ids=["20b", "160m"])
def test_a_step_reads_every_matrix_but_the_embedding_and_the_cache(config: Config) -> None:
    assert step_numbers(config, 0) == matrix_weights(config)
    assert step_numbers(config, 7) - step_numbers(config, 0) == cached_numbers(config, 7)


def test_sums_that_others_published_for_the_20b() -> None:
    """40.49 GB of half-precision weights a token, 5.11 TFLOP for a prompt of 128 positions, 83.9 for one of 2,048."""
    assert 2 * step_numbers(GPT_NEOX_20B, 0) == pytest.approx(40.49e9, rel=1e-3)
    assert flops(GPT_NEOX_20B, 0, 128) == pytest.approx(5.11e12, rel=2e-3)
    assert flops(GPT_NEOX_20B, 0, 2048) == pytest.approx(83.91e12, rel=2e-3)


@pytest.mark.parametrize("config", [GPT_NEOX_20B, PYTHIA["160m"]], ids=["20b", "160m"])
def test_training_costs_three_times_reading_with_logits_everywhere(config: Config) -> None:
    every_logit = sum(flops(config, position, position + 1) for position in range(37))
    assert training_flops(config, 37) == 3 * every_logit
    assert training_flops(config, 1) == pytest.approx(6 * matrix_weights(config), rel=1e-3)
