"""Which slice of a tensor a rank holds: together they are the whole, once, and no head is cut."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import TINY, configs

from neox.distributed.sharding import TILE, check_ranks, grain, merge, share, slices
from neox.reference.checkpoint.tensors import TensorSpec, tensor_table
from neox.reference.config import GPT_NEOX_20B, Config
from neox.reference.errors import InputError

CUT = ("vocabulary", "column", "row")


@st.composite
def configs_and_ranks(draw: st.DrawFn) -> tuple[Config, int]:
    config = draw(configs())
    return config, draw(st.integers(1, config.num_attention_heads))


def numbered(spec: TensorSpec) -> np.ndarray:
    """A tensor in which every entry is different."""
    return np.arange(spec.size, dtype=np.float64).reshape(spec.shape)


@given(count=st.integers(1, 500), ranks=st.integers(1, 40))
def test_shares_are_contiguous_and_differ_by_one_at_most(count: int, ranks: int):
    parts = [share(count, rank, ranks) for rank in range(ranks)]
    sizes = [part.stop - part.start for part in parts]
    assert parts[0].start == 0
    assert parts[-1].stop == count
    assert all(before.stop == after.start for before, after in pairwise(parts))
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@given(drawn=configs_and_ranks())
def test_the_slices_of_all_ranks_are_the_whole(drawn: tuple[Config, int]):
    config, ranks = drawn
    for spec in tensor_table(config).values():
        whole = numbered(spec)
        parts = [whole[slices(spec, rank, ranks)] for rank in range(ranks)]
        assert np.array_equal(merge(spec, parts), whole), spec.name
        assert all(part.size for part in parts)
        assert spec.sharding not in CUT or sum(part.size for part in parts) == whole.size


@given(drawn=configs_and_ranks())
def test_a_row_reads_what_the_column_before_it_computes(drawn: tuple[Config, int]):
    """Heads whole: the three rows of a dim of q, k and v stand for one column of the matrix after the attention."""
    config, ranks = drawn
    table = tensor_table(config)
    prefix, d = "gpt_neox.layers.0", config.head_dim
    for rank in range(ranks):
        qkv = slices(table[f"{prefix}.attention.query_key_value.weight"], rank, ranks)[0]
        dense = slices(table[f"{prefix}.attention.dense.weight"], rank, ranks)[1]
        up = slices(table[f"{prefix}.mlp.dense_h_to_4h.weight"], rank, ranks)[0]
        down = slices(table[f"{prefix}.mlp.dense_4h_to_h.weight"], rank, ranks)[1]
        assert (qkv.start, qkv.stop) == (3 * dense.start, 3 * dense.stop)
        assert dense.start % d == 0 == dense.stop % d
        assert up == down
        assert slices(table[f"{prefix}.mlp.dense_h_to_4h.bias"], rank, ranks) == (up,)
        if config.attention_bias:
            assert slices(table[f"{prefix}.attention.query_key_value.bias"], rank, ranks) == (qkv,)


@given(drawn=configs_and_ranks())
def test_embedding_and_head_are_cut_alike(drawn: tuple[Config, int]):
    config, ranks = drawn
    table = tensor_table(replace(config, tie_word_embeddings=False))
    for rank in range(ranks):
        assert slices(table["gpt_neox.embed_in.weight"], rank, ranks) == slices(table["embed_out.weight"], rank, ranks)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8, 16])
def test_of_the_20b_every_rank_gets_whole_tiles_and_nearly_the_same(ranks: int):
    spec = tensor_table(GPT_NEOX_20B)["gpt_neox.layers.0.mlp.dense_h_to_4h.weight"]
    sizes = [slices(spec, rank, ranks)[0].stop - slices(spec, rank, ranks)[0].start for rank in range(ranks)]
    assert all(size % TILE == 0 for size in sizes)
    assert max(sizes) - min(sizes) in (0, TILE)


@given(drawn=configs_and_ranks(), times=st.integers(1, 90))
def test_shares_that_can_be_equal_are(drawn: tuple[Config, int], times: int):
    """As gpt-neox cuts, whose ranks each have norms of their own for just these heads and neurons."""
    config, ranks = drawn
    config = replace(config, intermediate_size=times * ranks, vocab_size=times * ranks)
    for spec in tensor_table(config).values():
        sizes = {np.empty(spec.shape)[slices(spec, rank, ranks)].shape for rank in range(ranks)}
        assert len(sizes) == 1 or (spec.grain > 1 and config.num_attention_heads % ranks)


def test_tiles_are_given_up_where_a_rank_would_get_none():
    spec = TensorSpec("mlp", (2 * TILE, 5), "column")
    assert (grain(spec, 2), grain(spec, 3), grain(spec, 4)) == (TILE, 1, TILE // 2)
    assert [slices(spec, rank, 3)[0] for rank in range(3)] == [slice(0, 43), slice(43, 86), slice(86, 128)]


def test_copies_that_differ_are_not_one_tensor():
    spec = TensorSpec("norm", (3,), "replicated")
    with pytest.raises(ValueError, match="different norm"):
        merge(spec, [np.zeros(3), np.ones(3)])


@pytest.mark.parametrize(
    ("config", "ranks", "message"),
    [
        (TINY, 6, "5 attention heads, too few for 6 ranks"),
        (replace(TINY, intermediate_size=2), 3, "2 neurons"),
        (replace(TINY, vocab_size=4), 5, "4 ids"),
        (TINY, 0, "at least one rank"),
    ],
)
def test_too_many_ranks_are_refused(config: Config, ranks: int, message: str):
    with pytest.raises(InputError, match=message):
        check_ranks(config, ranks)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5])
def test_any_number_up_to_that_of_the_heads_is_accepted(ranks: int):
    check_ranks(TINY, ranks)
