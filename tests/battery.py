"""What ranks of MPI and virtual ranks both compute, for their results to be compared bit by bit.

mpiexec -n N python battery.py FOLDER [WAY]      each rank writes what it computed to FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from strategies import random_model, rotary_pct

from neox.distributed import Communicator, ShardDecoder, forward, shard
from neox.distributed.launch import run_ranks
from neox.reference.config import Config

STEPS = 30
MODELS = 2


def drawn(generator: np.random.Generator) -> Config:
    """A small model of eight heads, so that there can be eight ranks; nothing in it needs to be divisible."""
    head_dim, rotary_ndims = [(24, 6), (14, 4), (12, 12), (10, 2)][generator.integers(4)]
    return Config(
        vocab_size=int(generator.integers(40, 120)),
        hidden_size=8 * head_dim,
        num_hidden_layers=int(generator.integers(1, 4)),
        num_attention_heads=8,
        intermediate_size=int(generator.integers(8, 400)),
        hidden_act=str(generator.choice(["gelu", "gelu_fast"])),
        rotary_pct=rotary_pct(head_dim, rotary_ndims),
        max_position_embeddings=128,
        use_parallel_residual=bool(generator.random() < 0.7),
        tie_word_embeddings=bool(generator.random() < 0.3),
        attention_bias=bool(generator.random() < 0.7),
    )


def battery(comm: Communicator) -> dict[str, NDArray]:
    """Of several models: logits of a batch, of prompts of unequal lengths, and of 30 cached steps after them."""
    results = {}
    for index in range(MODELS):
        generator = np.random.default_rng([index, comm.ranks])
        config = drawn(generator)
        part = shard(random_model(config, seed=index), comm)
        results[f"{index} batch"] = forward(part, generator.integers(0, config.vocab_size, (2, 19)))
        decoder = ShardDecoder(part)
        prompts = [generator.integers(0, config.vocab_size, length).tolist() for length in (7, 40, 1)]
        results[f"{index} prompts"] = decoder.start(prompts, 40 + STEPS)
        rows = 3
        for step in range(STEPS):
            if step == STEPS // 2:
                decoder.keep([0, 2])
                rows = 2
            ids = generator.integers(0, config.vocab_size, rows).tolist()
            results[f"{index} step {step}"] = decoder.step(ids)
    return results


def main(folder: str, way: str | None = None) -> None:
    def program(comm: Communicator) -> None:
        np.savez(Path(folder) / f"{comm.rank}.npz", allow_pickle=False, **battery(comm))

    run_ranks(None, program, allreduce=way)


if __name__ == "__main__":
    main(*sys.argv[1:])
