"""What a model costs at least: numbers to hold in memory, and operations to compute."""

from __future__ import annotations

from neox.reference.config import Config


def layer_weights(config: Config) -> int:
    """Weights in matrices that every position is multiplied with; those of the output matrix are apart."""
    c, f = config.hidden_size, config.intermediate_size
    return config.num_hidden_layers * (4 * c * c + 2 * c * f)


def output_weights(config: Config) -> int:
    """Weights of the matrix that makes the logits."""
    return config.vocab_size * config.hidden_size


def cached_numbers(config: Config, positions: int) -> int:
    """Keys and values of all layers."""
    return 2 * config.num_hidden_layers * config.hidden_size * positions


def attention_flops(config: Config, start: int, stop: int) -> int:
    """Of q k^T and of the average of v, for the positions start..stop, each over itself and those before it."""
    pairs = (stop * (stop + 1) - start * (start + 1)) // 2
    return 4 * config.num_hidden_layers * config.hidden_size * pairs


def flops(config: Config, start: int, stop: int) -> int:
    """Of appending positions start..stop to a text, up to the logits after the last one: two for each weight."""
    layers = 2 * layer_weights(config) * (stop - start) + attention_flops(config, start, stop)
    return layers + 2 * output_weights(config)


def training_flops(config: Config, positions: int) -> int:
    """Of a row's loss and its gradient: each product forward has two of its size backward, for its two factors."""
    products = 2 * (layer_weights(config) + output_weights(config)) * positions
    return 3 * (products + attention_flops(config, 0, positions))


def step_numbers(config: Config, position: int) -> int:
    """Read to append one position to that many: every matrix but the embedding, and all keys and values."""
    return layer_weights(config) + output_weights(config) + cached_numbers(config, position)
