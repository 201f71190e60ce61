"""Checks of tensor parallelism that its tests and the table of its mutants share: each raises AssertionError.

They reach every function through its module, so that they see what a mutant has put there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import loops
import numpy as np
import pytest
from closeness import assert_close
from numpy.typing import NDArray
from strategies import TINY, draw_ids, random_model

from neox.distributed import candidates, comm, decode, leader, model, sharding
from neox.reference import model as whole
from neox.reference.checkpoint.tensors import named_tensors, tensor_table
from neox.reference.config import Config
from neox.reference.generate import CachedDecoder, Request, complete
from neox.reference.model import Array, LayerNorm, Linear, Model
from neox.reference.sampling import GREEDY, Sampling
from neox.reference.sampling import candidates as drawable

# As in checks.py: two orders of the same float64 sums differ by a few 1e-16 of the largest term.
FLOAT64 = 1e-12

CONFIGS = {
    "parallel": TINY,  # 5 heads, 37 neurons, 101 ids: nothing is even for 2, 3 or 4 ranks
    "sequential": replace(TINY, use_parallel_residual=False, hidden_act="gelu"),
    "no-attention-bias": replace(TINY, attention_bias=False),
    "tied": replace(TINY, tie_word_embeddings=True, num_hidden_layers=2),
    "head-96": replace(TINY, hidden_size=192, num_attention_heads=2, num_hidden_layers=2),
}


def rank_counts(config: Config) -> list[int]:
    return [ranks for ranks in (1, 2, 3, 5) if ranks <= config.num_attention_heads]


# A communicator that counts.


@dataclass
class Counted:
    """A communicator, and how often it was asked for what."""

    inner: comm.Communicator
    counts: dict[str, int]

    @property
    def rank(self) -> int:
        return self.inner.rank

    @property
    def ranks(self) -> int:
        return self.inner.ranks

    def sum(self, part: Array) -> Array:
        self.counts["sum"] = self.counts.get("sum", 0) + 1
        return self.inner.sum(part)

    def gather(self, part: Array) -> list[Array]:
        self.counts["gather"] = self.counts.get("gather", 0) + 1
        return self.inner.gather(part)

    def gather_into(self, part: Any, parts: Any) -> None:
        self.counts["gather"] = self.counts.get("gather", 0) + 1
        self.inner.gather_into(part, parts)

    def broadcast(self, value: Any) -> Any:
        self.counts["broadcast"] = self.counts.get("broadcast", 0) + 1
        return self.inner.broadcast(value)

    def meet(self, action: Callable[[], Any]) -> Any:
        return self.inner.meet(action)

    def alive(self) -> None:
        self.inner.alive()


# The model.


def forward(m: Model, ranks: int, ids: NDArray) -> NDArray:
    """The logits over virtual ranks, which must be the same bits on each."""
    results = comm.virtual(ranks, lambda group: model.forward(model.shard(m, group), ids))
    assert all(np.array_equal(result, results[0], equal_nan=True) for result in results), "ranks differ"
    return results[0]


def ranks_equal_one() -> None:
    """In float64 any number of ranks computes what one does."""
    for config in CONFIGS.values():
        m = random_model(config, seed=3, dtype="float64")
        ids = draw_ids(config, batch=2, length=7, seed=5)
        expected = whole.forward(m, ids)
        for ranks in rank_counts(config):
            assert_close(forward(m, ranks, ids), expected, FLOAT64)


def sums_are_in_rank_order() -> None:
    """(1e8 - 1e8) + 1 is 1 in float32, and from every other beginning 0; who comes first must not matter."""
    parts = np.array([[1e8], [-1e8], [1]], np.float32)

    def program(group: comm.Communicator) -> Array:
        time.sleep(0.02 * ((group.rank + 1) % 3))  # rank 2 arrives first, then rank 0
        return group.sum(parts[group.rank])

    for result in comm.virtual(3, program):
        assert result == np.float32(1), result
    assert comm.virtual(3, lambda group: group.sum(np.ones(2, np.float16)))[0].dtype == np.float32


# Decoding.


def finished(program: Callable[[comm.Communicator], Iterator[Any]], ranks: int) -> list[list[Any]]:
    return comm.virtual(ranks, lambda group: list(program(group)))


def generated(m: Model, ranks: int, prompt: Sequence[int], **arguments: Any) -> list[int]:
    """The ids over virtual ranks, which must be the same on each."""
    results = finished(lambda group: leader.generate(model.shard(m, group), prompt, **arguments), ranks)
    assert all(result == results[0] for result in results), "ranks were told of different ids"
    return results[0]


def completions(m: Model, ranks: int, requests: Sequence[Request]) -> list[Any]:
    """What the loop makes of the requests, on rank 0."""

    def program(group: comm.Communicator) -> Any:
        decoder = decode.ShardDecoder(model.shard(m, group))
        if group.rank:
            return list(leader.follow(decoder, group))
        with leader.Leader(decoder, group, requests) as leading:
            return complete(leading, requests)

    return comm.virtual(ranks, program)[0]


def requests_of(config: Config, lengths: Sequence[int], samplings: Sequence[Sampling], **others: Any) -> list[Request]:
    """Prompts of these lengths, which end at different times."""
    prompts = [draw_ids(config, 1, length, seed=length)[0].tolist() for length in lengths]
    return [
        Request(prompt, 4 + 3 * i, sampling, ignore_eos=True, **others)
        for i, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True))
    ]


SAMPLINGS = (
    GREEDY,
    Sampling(0.8, top_k=7, seed=1),
    Sampling(0.05, top_p=0.9, seed=2),  # so sharp that a few ids decide
    Sampling(1.5, min_p=0.2, seed=3),
    Sampling(1.0, top_k=30, top_p=0.8, min_p=0.01, seed=4),
    Sampling(1.0, seed=5),
    Sampling(0.7, repetition_penalty=1.3, seed=6),
)


def texts_equal_those_of_one_rank() -> None:
    """In float64, whatever the sampler: texts of one batch that end one after the other, and each alone.

    Alone also where ranks send so few ids that these often turn out not to be enough.
    """
    for config in (CONFIGS["parallel"], CONFIGS["sequential"]):
        m = random_model(config, seed=3, dtype="float64")
        requests = requests_of(config, [3, 9, 1], SAMPLINGS[:3])
        expected = [each.ids for each in complete(CachedDecoder(m), requests)]
        for ranks in (1, 2, 5):
            assert [each.ids for each in completions(m, ranks, requests)] == expected
    for sampling in SAMPLINGS:
        (request,) = requests_of(m.config, [6], [sampling])
        (expected_text,) = complete(CachedDecoder(m), [request])
        arguments = {field.name: getattr(sampling, field.name) for field in fields(sampling)}
        for nucleus in (candidates.NUCLEUS, 2):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(candidates, "NUCLEUS", nucleus)
                ids = generated(m, 3, request.prompt, max_tokens=request.max_tokens, ignore_eos=True, **arguments)
            assert tuple(ids) == expected_text.ids, sampling


def collectives_of_a_token(use_parallel_residual: bool = True) -> dict[str, int]:
    """How often each was called for one token, on a rank that leads and on one that follows."""
    m = random_model(replace(TINY, use_parallel_residual=use_parallel_residual), seed=1)
    (short,), (long,) = (requests_of(m.config, [3], [GREEDY], **{}) for _ in range(2))
    long = replace(long, max_tokens=short.max_tokens + 1)
    counts = []
    for request in (short, long):

        def program(group: comm.Communicator, request: Request = request) -> dict[str, int]:
            counted = Counted(group, {})
            shard = model.shard(m, counted)
            list(leader.generate(shard, request.prompt, max_tokens=request.max_tokens, ignore_eos=True))
            return counted.counts

        counts.append(comm.virtual(2, program))
    tokens = [{name: b[name] - a[name] for name in b} for a, b in zip(*counts, strict=True)]
    assert tokens[0] == tokens[1], "ranks call different collectives"
    return tokens[0]


def a_token_takes_l_and_two_collectives() -> None:
    """L+1 sums, and one exchange: a gather to rank 0 and rank 0's answer."""
    layers = TINY.num_hidden_layers
    assert collectives_of_a_token() == {"sum": layers + 1, "gather": 1, "broadcast": 1}
    assert collectives_of_a_token(use_parallel_residual=False) == {"sum": 2 * layers + 1, "gather": 1, "broadcast": 1}


# Norms that differ by rank.


def with_norms_of_their_own(m: Model, rank: int) -> Model:
    """The same model with other norms on every rank, as a checkpoint holds them that was trained in parallel."""
    generator = np.random.default_rng(rank)

    def norm(p: LayerNorm) -> LayerNorm:
        noise = generator.standard_normal((2, *p.weight.shape)).astype(p.weight.dtype)
        return LayerNorm(p.weight + 0.1 * noise[0], p.bias + 0.1 * noise[1])

    layers = tuple(
        replace(p, input_layernorm=norm(p.input_layernorm), post_attention_layernorm=norm(p.post_attention_layernorm))
        for p in m.params.layers
    )
    return replace(m, params=replace(m.params, layers=layers, final_layer_norm=norm(m.params.final_layer_norm)))


def sliced(m: Model, rank: int, ranks: int) -> Callable[[str], Array]:
    table, tensors = tensor_table(m.config), named_tensors(m.config, m.params)
    return lambda name: tensors[name][sharding.slices(table[name], rank, ranks)]


def unmerged(models: Sequence[Model], text: Sequence[int]) -> NDArray:  # (T,) -> (T,V)
    """Each rank's part by the loops of loops.py, with that rank's norms; then the sum, the biases, the residual."""
    ranks, eps = len(models), models[0].config.layer_norm_eps
    xs = [models[0].params.embed_in[token] for token in text]
    for i, p in enumerate(models[0].params.layers):
        sums = [x + p.attention.dense.bias + p.mlp.dense_4h_to_h.bias for x in xs]
        for rank, m in enumerate(models):
            sums = [s + part for s, part in zip(sums, part_of_rank(m, i, rank, ranks, xs), strict=True)]
        xs = sums
    rows = []
    for rank, m in enumerate(models):
        head = Linear(sliced(m, rank, ranks)("embed_out.weight"), None)
        rows.append([loops.affine(head, loops.normalized(m.params.final_layer_norm, eps, x)) for x in xs])
    return np.concatenate(rows, axis=-1)


def part_of_rank(m: Model, index: int, rank: int, ranks: int, xs: list[NDArray]) -> list[NDArray]:
    """What one rank's heads and neurons add at every position of the text."""
    get, p, eps = sliced(m, rank, ranks), m.params.layers[index], m.config.layer_norm_eps
    prefix = f"gpt_neox.layers.{index}"

    def column(name: str) -> Linear:
        return Linear(get(f"{prefix}.{name}.weight"), get(f"{prefix}.{name}.bias"))

    def row(name: str) -> Linear:
        return Linear(get(f"{prefix}.{name}.weight"), None)

    dense = row("attention.dense")
    heads = dense.weight.shape[1] // m.config.head_dim
    mlp = whole.MLP(column("mlp.dense_h_to_4h"), row("mlp.dense_4h_to_h"))
    part = replace(p, attention=whole.Attention(column("attention.query_key_value"), dense), mlp=mlp)
    few = replace(m.config, num_attention_heads=heads, hidden_size=heads * m.config.head_dim)
    attended = loops.attention(part, few, [loops.normalized(p.input_layernorm, eps, x) for x in xs])
    thought = [loops.mlp(part, m.config, loops.normalized(p.post_attention_layernorm, eps, x)) for x in xs]
    return [a + b for a, b in zip(attended, thought, strict=True)]


def norms_of_each_rank_are_kept() -> None:
    """A model whose norms differ by rank computes what its ranks do together, which no merged model does."""
    m = random_model(replace(TINY, num_hidden_layers=2), seed=3, dtype="float64")
    text = draw_ids(m.config, 1, 5, seed=5)
    for ranks in (2, 5):
        models = [with_norms_of_their_own(m, rank) for rank in range(ranks)]

        def program(group: comm.Communicator, models: list[Model] = models) -> Array:
            return model.forward(model.shard(models[group.rank], group), text)

        for result in comm.virtual(ranks, program):
            assert_close(result[0], unmerged(models, text[0]), FLOAT64)


# What travels of the logits.


def cut_rows(rows: NDArray, ranks: int) -> list[tuple[NDArray, slice]]:
    held = [sharding.share(rows.shape[1], rank, ranks) for rank in range(ranks)]
    return [(rows[:, part], part) for part in held]


def stand_in_samples_as_the_whole(
    rows: NDArray, ranks: int, sampling: Sampling, allowed: NDArray | None, count: int
) -> bool:
    """Where what was sent is said to be enough, the ids that can be drawn and their probabilities are the same."""
    selection = candidates.Selection(count, (sampling,) * len(rows), allowed)
    messages = [candidates.select(part, selection, held) for part, held in cut_rows(rows, ranks)]
    stand_in = candidates.spread(messages, rows.shape[1])
    enough = candidates.decided(messages, stand_in, selection)
    for row, whole_row in zip(stand_in, rows, strict=True) if enough else []:
        ids, p = drawable(row, sampling, (), allowed)
        expected_ids, expected_p = drawable(whole_row, sampling, (), allowed)
        assert np.array_equal(ids, expected_ids)
        assert_close(p, expected_p, FLOAT64)
    return enough


def few_candidates_decide() -> None:
    """Logits with many ties, and as a model has them: by a margin that is often narrow and often is not."""
    generator = np.random.default_rng(0)
    decisions = set()
    for trial in range(200):
        rows = generator.normal(0, generator.choice([0.5, 3, 8]), (2, 90))
        if trial % 2:
            rows = np.round(rows)
        allowed = None if trial % 3 else generator.random(90) < generator.choice([0.03, 0.7])
        if allowed is not None:
            allowed[generator.integers(90)] = True
        k, ranks = int(generator.integers(1, 9)), int(generator.integers(1, 8))
        t = float(generator.choice([0.1, 0.7, 1.3]))
        assert stand_in_samples_as_the_whole(rows, ranks, GREEDY, allowed, 1)
        assert stand_in_samples_as_the_whole(rows, ranks, Sampling(t, top_k=k), allowed, k)
        assert stand_in_samples_as_the_whole(rows, ranks, Sampling(t, top_k=k, top_p=0.7, min_p=0.1), allowed, k)
        nuclei = [
            Sampling(t, top_p=float(generator.choice([0.3, 0.9, 0.99]))),
            Sampling(t, min_p=float(generator.choice([0.5, 0.01]))),
            Sampling(t, top_p=0.9, min_p=0.1),
        ]
        decisions |= {stand_in_samples_as_the_whole(rows, ranks, nucleus, allowed, k) for nucleus in nuclei}
    assert decisions == {True, False}


CHECKS: dict[str, Callable[[], None]] = {
    check.__name__: check
    for check in (
        ranks_equal_one,
        sums_are_in_rank_order,
        texts_equal_those_of_one_rank,
        a_token_takes_l_and_two_collectives,
        norms_of_each_rank_are_kept,
        few_candidates_decide,
    )
}
