"""Tensor parallelism over virtual ranks: any number of them computes what one does, and all of them the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from closeness import relative_error
from distributed_checks import CHECKS, completions, finished, forward, generated, rank_counts, requests_of
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import TINY, configs, draw_ids, map_matrices, random_model, seeds

from neox.distributed import Alone, Communicator, Leader, ShardDecoder, follow, generate, shard, virtual
from neox.distributed import forward as forward_on_rank
from neox.reference import shipped
from neox.reference.checkpoint.load import load
from neox.reference.config import Config
from neox.reference.errors import InputError
from neox.reference.generate import CachedDecoder, Request, complete
from neox.reference.model import Model
from neox.reference.model import forward as forward_alone
from neox.reference.sampling import GREEDY, Sampling
from neox.reference.tokenizer import load_tokenizer

# Rounding of float32: the ranks' sums add the same terms in another order, so their error against float64 is of the
# size of a single rank's. Twice it, and a floor of eight roundings where one rank happens to be lucky.
FLOOR = 8 * 2.0**-24


@pytest.mark.parametrize("check", CHECKS)
def test_the_right_program_passes(check: str):
    CHECKS[check]()


@st.composite
def models_and_ranks(draw: st.DrawFn) -> tuple[Config, int, int]:
    config = draw(configs())
    return config, draw(st.integers(1, config.num_attention_heads)), draw(seeds)


@given(drawn=models_and_ranks())
def test_in_float32_ranks_are_as_exact_as_one(drawn: tuple[Config, int, int]):
    config, ranks, seed = drawn
    exact = random_model(config, seed, dtype="float64")
    m = random_model(config, seed)
    ids = draw_ids(config, 2, 11, seed)
    expected = forward_alone(exact, ids)
    error = relative_error(forward(m, ranks, ids), expected)
    assert error <= 2 * relative_error(forward_alone(m, ids), expected) + FLOOR


def same_until_a_tie(ours: tuple[int, ...], m: Model, prompt: list[int], margin: float) -> bool:
    """Whether ids are the greedy ones of one rank, up to the first where the best two logits are within the margin."""
    text = list(prompt)
    for index in ours:
        row = forward_alone(m, [text])[0, -1]
        second, first = np.sort(row)[-2:]
        if first - second <= margin * np.abs(row).max():
            return True
        if index != int(row.argmax()):
            return False
        text.append(index)
    return True


@settings(max_examples=12)
@given(drawn=models_and_ranks())
def test_greedy_texts_are_those_of_one_rank_in_float32(drawn: tuple[Config, int, int]):
    """Outside a margin of 1e-5 of the largest logit, twenty times what the order of the sums is seen to move one."""
    config, ranks, seed = drawn
    m = random_model(config, seed)
    requests = requests_of(config, [5, 2], [GREEDY, GREEDY])
    for request, ended in zip(requests, completions(m, ranks, requests), strict=True):
        assert same_until_a_tie(ended.ids, m, list(request.prompt), margin=1e-5)


def test_matrices_stored_in_half_precision_are_widened_as_on_one_rank():
    m = random_model(TINY, 1)
    halves = replace(m, params=map_matrices(m.params, lambda matrix: matrix.astype(np.float16)))
    ids = draw_ids(TINY, 1, 9, 2)
    for ranks in rank_counts(TINY):
        assert relative_error(forward(halves, ranks, ids), forward_alone(halves, ids)) <= FLOOR * 4


def test_a_rank_alone_needs_no_other():
    m = random_model(TINY, 1, dtype="float64")
    ids = draw_ids(TINY, 2, 5, 2)
    assert np.array_equal(forward_on_rank(shard(m, Alone()), ids), forward(m, 1, ids))
    ours = list(generate(shard(m, Alone()), ids[:1], max_tokens=4, ignore_eos=True))
    (alone,) = complete(CachedDecoder(m), [Request(ids[0].tolist(), 4, ignore_eos=True)])
    assert ours == list(alone.ids)


def test_a_long_prompt_is_read_in_chunks_and_its_positions_are_reported():
    """Over 1000 positions, and heads of the 20B's width: 96, of which 24 rotate."""
    config = replace(TINY, hidden_size=192, num_attention_heads=2, num_hidden_layers=1, max_position_embeddings=2048)
    m = random_model(config, 3, dtype="float64")
    (request,) = requests_of(config, [1200], [GREEDY])
    (expected,) = complete(CachedDecoder(m), [request])
    read: list[int] = []

    def program(group: Communicator) -> tuple[int, ...]:
        decoder = ShardDecoder(shard(m, group), read.append if group.rank == 0 else lambda positions: None)
        if group.rank:
            return tuple(index for (index,) in follow(decoder, group))
        with Leader(decoder, group, [request]) as leader:
            (ended,) = complete(leader, [request])
            return ended.ids

    assert virtual(2, program)[0] == expected.ids
    assert len(read) > 1
    assert sum(read) == 1200


# Ends.


def test_when_rank_0_stops_early_all_do():
    m = random_model(TINY, 1)

    def first_two(group: Communicator) -> Iterator[int]:
        ids = generate(shard(m, group), [1, 2, 3], max_tokens=20, ignore_eos=True)
        yield from ids if group.rank else islice(ids, 2)

    texts = finished(first_two, 3)
    assert len(texts[0]) == 2
    assert texts[0] == texts[1] == texts[2]


def test_a_bad_request_ends_every_rank():
    m = random_model(TINY, 1)
    with pytest.raises(InputError, match="max_tokens"):
        generated(m, 3, [1, 2], max_tokens=0)
    with pytest.raises(InputError, match="outside the vocabulary"):
        generated(m, 3, [1, TINY.vocab_size], max_tokens=2)
    with pytest.raises(InputError, match="context"):
        generated(m, 3, [1] * 70, max_tokens=2)
    with pytest.raises(InputError, match="integers"):
        forward(m, 3, np.zeros((1, 2)))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0, top_p=0.5), Sampling(1.0)])
def test_logits_that_are_not_finite_are_reported_from_whatever_rank(sampling: Sampling):
    m = random_model(TINY, 1)
    head = m.params.embed_out.copy()
    head[-1] = np.inf  # an id of the last rank
    m = replace(m, params=replace(m.params, embed_out=head))
    (request,) = requests_of(TINY, [4], [sampling])
    with pytest.raises(InputError, match="not finite"):
        completions(m, 3, [request])


def test_what_goes_wrong_on_one_virtual_rank_ends_all_and_is_raised():
    def program(group: Communicator) -> None:
        if group.rank == 1:
            raise ZeroDivisionError("on rank 1")
        group.sum(np.ones(1))

    with pytest.raises(ZeroDivisionError, match="on rank 1"):
        virtual(3, program)


def test_log_probabilities_are_those_of_one_rank():
    m = random_model(TINY, 1, dtype="float64")
    (request,) = requests_of(TINY, [4], [Sampling(0.7, top_k=3, seed=1)], logprobs=4)
    (expected,) = complete(CachedDecoder(m), [request])
    (ours,) = completions(m, 3, [request])
    for piece, other in zip(ours.pieces, expected.pieces, strict=True):
        assert piece.id == other.id
        assert piece.logprob == pytest.approx(other.logprob, abs=1e-10)
        assert [index for index, _ in piece.top] == [index for index, _ in other.top]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_model_of_the_package_writes_the_same_text(ranks: int):
    """With its tokenizer, which rules out the ids of the vocabulary's padding, and a stop string."""
    m, tokenizer = load(shipped.path(), dtype="float64"), load_tokenizer(shipped.path())
    prompt = tokenizer.encode("Once upon a time")
    requests = [
        Request(prompt, 12),
        Request(prompt, 20, Sampling(0.8, top_p=0.9, seed=7), stop=(".",)),
        Request(prompt[:2], 12, Sampling(0.8, top_k=5, seed=7)),
    ]
    expected = complete(CachedDecoder(m), requests, tokenizer)

    def program(group: Communicator) -> list:
        decoder = ShardDecoder(shard(m, group))
        if group.rank:
            return list(follow(decoder, group))
        with Leader(decoder, group, requests, tokenizer) as leader:
            return complete(leader, requests, tokenizer)

    assert [each.text for each in virtual(ranks, program)[0]] == [each.text for each in expected]
