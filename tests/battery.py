"""What ranks of MPI and virtual ranks both compute, for their results to be compared bit by bit.

mpiexec -n N python battery.py FOLDER [WAY]             each rank writes what it computed to FOLDER
mpiexec -n N python battery.py FOLDER WAY DTYPE         the same with kernels, each rank on a host device of its own
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from strategies import random_model, rotary_pct

from neox.distributed import AnyShard, Communicator, decoder_of, device_shard, forward, shard
from neox.distributed.launch import run_ranks
from neox.distributed.sums import choose_sums
from neox.gpu.device import HostDevice
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


def part_of(config: Config, seed: int, comm: Communicator, dtype: str | None) -> AnyShard:
    """On a host device, if a dtype is given."""
    if dtype is None:
        return shard(random_model(config, seed), comm)
    neurons = -(-config.intermediate_size // 64) * 64  # which kernels can read whatever the number of ranks
    m = random_model(replace(config, hidden_size=8 * 24, rotary_pct=0.25, intermediate_size=8 * neurons), seed)
    return device_shard(m, comm, choose_sums(comm, device := HostDevice()), device, dtype)


def battery(comm: Communicator, dtype: str | None = None) -> dict[str, NDArray]:
    """Of several models: logits of a batch, of prompts of unequal lengths, and of 30 cached steps after them."""
    results = {}
    for index in range(MODELS if dtype is None else 1):
        generator = np.random.default_rng([index, comm.ranks])
        config = drawn(generator)
        part = part_of(config, index, comm, dtype)
        results[f"{index} batch"] = forward(part, generator.integers(0, config.vocab_size, (2, 19)))
        decoder = decoder_of(part)
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


def main(folder: str, way: str | None = None, dtype: str | None = None) -> None:
    def program(comm: Communicator) -> None:
        np.savez(Path(folder) / f"{comm.rank}.npz", allow_pickle=False, **battery(comm, dtype))

    run_ranks(None, program, allreduce=way)


if __name__ == "__main__":
    main(*sys.argv[1:])
