"""Checks of tensor parallelism on devices that its tests and its mutants share: each raises AssertionError.

They reach every function through its module, so that they see what a mutant has put there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from devices import card, on_a_card
from distributed_checks import Counted, unmerged, with_norms_of_their_own
from gpu_models import SMALL, assert_right, drawn
from numpy.typing import NDArray

from neox import gpu
from neox.distributed import comm, device, leader, sums
from neox.gpu.device import Device, HostDevice
from neox.reference.config import Config
from neox.reference.generate import Completion, Request, complete
from neox.reference.model import Model
from neox.reference.random_weights import random_model
from neox.reference.sampling import GREEDY

# Three heads of 24 dims, 48 neurons and 101 ids: shares that differ where they can.
CONFIG = replace(SMALL, hidden_size=72, num_attention_heads=3, intermediate_size=48, num_hidden_layers=2)
SEQUENTIAL = replace(CONFIG, use_parallel_residual=False, hidden_act="gelu", tie_word_embeddings=True)
NO_BIAS = replace(CONFIG, attention_bias=False)
HEAD_96 = replace(CONFIG, hidden_size=192, num_attention_heads=2, intermediate_size=64)


def own_device(rank: int) -> Device:
    """Ranks of one process share a card; on the host each has a schedule of its own."""
    return card() if on_a_card() else HostDevice(order=("forward", "reverse", "seeded")[rank % 3], seed=rank)


def part(m: Model, group: comm.Communicator, dtype: str) -> device.DeviceShard:
    return device.device_shard(m, group, sums.HostSums(group), own_device(group.rank), dtype)


def forward(m: Model, ranks: int, ids: NDArray, dtype: str) -> NDArray:
    """The logits over virtual ranks, which must be the same bits on each."""
    results = comm.virtual(ranks, lambda group: device.forward(part(m, group, dtype), ids))
    assert all(np.array_equal(result, results[0]) for result in results), "ranks differ"
    return results[0]


def ranks_are_as_exact_as_one_device(
    configs: Sequence[Config] = (CONFIG, SEQUENTIAL, NO_BIAS, HEAD_96),
    dtype: str = "float32",
    seed: int = 3,
    counts: Sequence[int] = (),
) -> None:
    """Any number of ranks errs no more than a plain computation in the same precision."""
    for config in configs:
        m = drawn(config, seed, dtype)
        ids = np.random.default_rng(seed).integers(0, config.vocab_size, (2, 7))
        for ranks in counts or range(1, config.num_attention_heads + 1):
            assert_right(forward(m, ranks, ids, dtype), m, ids, dtype)


def completions(m: Model, ranks: int, requests: Sequence[Request], dtype: str) -> list[Completion]:
    """What the loop makes of the requests, on rank 0; every rank is told of the same ids."""

    def program(group: comm.Communicator) -> list:
        decoder = device.device_decoder(part(m, group, dtype))
        if group.rank:
            return list(leader.follow(decoder, group))
        with leader.Leader(decoder, group, requests) as leading:
            return complete(leading, requests)

    return comm.virtual(ranks, program)[0]


def texts_are_those_of_one_device() -> None:
    """Greedy ones of several lengths in a batch, which end one after the other, and go on for twenty steps."""
    for config, dtype in ((CONFIG, "float32"), (SEQUENTIAL, "float32"), (CONFIG, "float16")):
        m = drawn(config, 5, dtype)
        generator = np.random.default_rng(2)
        requests = [
            Request(generator.integers(0, config.vocab_size, length).tolist(), count, GREEDY, ignore_eos=True)
            for length, count in ((5, 6), (13, 21), (1, 12))
        ]
        one = complete(gpu.CachedDecoder(gpu.to_device(m, own_device(0), dtype)), requests)
        for ranks in (2, 3):
            assert [each.ids for each in completions(m, ranks, requests, dtype)] == [each.ids for each in one]


@dataclass
class CountedSums:
    """A way to add up that counts."""

    inner: sums.Sums
    counts: dict[str, int]
    captured: bool = False

    def add_up(self, array: gpu.device.Array) -> None:
        self.counts["sum"] = self.counts.get("sum", 0) + 1
        self.inner.add_up(array)

    def check(self) -> None:
        self.inner.check()


def collectives_of_a_token(config: Config) -> dict[str, int]:
    m, counts = drawn(config, 1, "float32"), []
    for tokens in (4, 5):

        def program(group: comm.Communicator, tokens: int = tokens) -> dict[str, int]:
            counted = Counted(group, {})
            own = part(m, counted, "float32")
            own = replace(own, sums=CountedSums(sums.HostSums(group), counted.counts))
            list(leader.generate(own, [1, 2, 3], max_tokens=tokens, ignore_eos=True))
            return counted.counts

        counts.append(comm.virtual(2, program)[0])
    return {name: counts[1][name] - counts[0][name] for name in counts[1]}


def a_token_takes_l_and_two_collectives() -> None:
    layers = CONFIG.num_hidden_layers
    assert collectives_of_a_token(CONFIG) == {"sum": layers + 1, "gather": 1, "broadcast": 1}
    assert collectives_of_a_token(SEQUENTIAL) == {"sum": 2 * layers + 1, "gather": 1, "broadcast": 1}


def norms_of_each_rank_are_kept() -> None:
    """A model whose norms differ by rank computes what its ranks do together; float64 loops say what that is."""
    m = random_model(CONFIG, seed=3)
    text = np.random.default_rng(5).integers(0, CONFIG.vocab_size, (1, 5))
    for ranks in (2, 3):
        models = [with_norms_of_their_own(m, rank) for rank in range(ranks)]

        def program(group: comm.Communicator, models: list[Model] = models) -> NDArray:
            return device.forward(part(models[group.rank], group, "float32"), text)

        results = comm.virtual(ranks, program)
        expected = unmerged(models, text[0])
        # Some twenty roundings of float32 follow one another.
        assert np.abs(results[0][0] - expected).max() <= 20 * 2.0**-24 * np.abs(expected).max()


CHECKS: dict[str, Callable[[], None]] = {
    check.__name__: check
    for check in (
        ranks_are_as_exact_as_one_device,
        texts_are_those_of_one_device,
        a_token_takes_l_and_two_collectives,
        norms_of_each_rank_are_kept,
    )
}
