"""Trees of texts on a device: the scores of the reference, and nothing computed twice."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from closeness import assert_close
from devices import all_devices, stopped_by_the_host
from gpu_models import SMALL, drawn
from hypothesis import given
from hypothesis import strategies as st
from mutants import Mutant
from numpy.typing import NDArray
from scoring_checks import TOLERANCE, Drawn, Remembering, alone
from strategies import seeds

import neox.gpu as gpu
from neox.gpu import scoring as device_scoring
from neox.gpu.device import Device
from neox.gpu.model import forward
from neox.gpu.scoring import DeviceReader, Piece, levels
from neox.reference.scoring import Batch, Judgement, Limits, Pair, Path, Score, scores

CONFIG = replace(SMALL, num_hidden_layers=2)


def scored(reader: DeviceReader, pairs: list[Pair]) -> list[Score]:
    found = dict(scores(reader, pairs))
    return [found[index] for index in range(len(pairs))]


def by_forward(model: gpu.Model, pair: Pair) -> NDArray:
    """Log-probabilities by the device's plain forward pass."""
    context, continuation = pair
    read = [*context, *continuation][:-1][-model.config.max_position_embeddings :]
    rows = forward(model, [read])[0, -len(continuation) :].astype(np.float64)
    shifted = rows - rows.max(-1, keepdims=True)
    return (shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))[np.arange(len(continuation)), list(continuation)]


@pytest.mark.parametrize("device", all_devices()[:2])
def test_scores_are_those_of_the_reference(device: Device, monkeypatch: pytest.MonkeyPatch):
    """In float32, in batches and chunks of few tokens, so that much is kept and some branches are cut."""
    monkeypatch.setattr(device_scoring, "CHUNK", 7)
    reader = DeviceReader(gpu.to_device(drawn(CONFIG, 1, "float32"), device, "float32"))
    reader.limits = Limits(30, 500)
    pairs: list[Pair] = list(Drawn(12, seed=3).pairs(CONFIG))
    for score, pair in zip(scored(reader, pairs), pairs, strict=True):
        logprobs, greedy = alone(drawn(CONFIG, 1, "float32"), pair)
        assert_close(np.array(score.logprobs), logprobs, TOLERANCE["float32"])
        assert score.greedy == greedy


@pytest.mark.parametrize("device", all_devices()[:2])
def test_half_precision_is_as_far_off_as_plain_forward_passes(device: Device):
    """Both round the same intermediates to float16, and only sums are taken in another order."""
    model = gpu.to_device(drawn(CONFIG, 2, "float16"), device, "float16")
    pairs: list[Pair] = list(Drawn(9, seed=5).pairs(CONFIG)[:9])
    exact = [alone(drawn(CONFIG, 2, "float16"), pair)[0] for pair in pairs]
    found = [np.array(score.logprobs) for score in scored(DeviceReader(model), pairs)]
    plain = [by_forward(model, pair) for pair in pairs]
    errors = [max(np.abs(a - e).max() for a, e in zip(some, exact, strict=True)) for some in (found, plain)]
    assert 0 < errors[0] <= 2 * errors[1]


# Rows and levels, without a device.


class RowsRemembering(Remembering):
    """A reader that keeps texts as DeviceReader does, in rows into which pieces are copied."""

    def __init__(self) -> None:
        super().__init__(CONFIG)
        self.rows_of_batch: list[list[tuple[int, ...]]] = [[]]
        self.map = device_scoring.Rows((0,))

    def read(self, batch: Batch) -> Judgement:
        old, rows = self.rows_of_batch, device_scoring.rows_of(batch)
        new: list[list[tuple[int, ...]]] = [[] for _ in range(1 + len(batch.branches))]
        for piece in self.map.pieces(batch.kept):
            new[0] += old[piece.row][piece.first : piece.last]
        self.rows_of_batch, self.map = new, rows
        before = [rows.pieces(branch.before) for branch in batch.branches]
        order = device_scoring.levels(before)
        assert sorted(index for level in order for index in level) == list(range(len(before)))
        for level in order:
            for index in level:  # copies come first, for all of a level
                for piece in before[index]:
                    new[1 + index] += new[piece.row][piece.first : piece.last]
            for index in level:
                self._read_branch(batch, index)
        judgement = super().read(batch)
        kept = batch.kept_length
        for index, branch in enumerate(batch.branches):
            own = self.memory[kept + branch.tokens.start : kept + branch.tokens.stop]
            assert new[1 + index][branch.start :] == own
        return judgement

    def _read_branch(self, batch: Batch, index: int) -> None:
        row, branch = self.rows_of_batch[1 + index], batch.branches[index]
        assert len(row) == branch.start
        text = row[-1] if row else ()
        for token in batch.ids[branch.tokens]:
            text = (*text, int(token))
            row.append(text)


def rows_hold_the_texts(requests: Drawn, tokens: int) -> None:
    reader = RowsRemembering()
    reader.limits = Limits(tokens)
    list(scores(reader, requests.pairs(CONFIG)))


@given(st.builds(Drawn, st.integers(0, 30), st.sampled_from([1, 2, 9]), st.integers(1, 9), seeds), st.integers(1, 200))
def test_rows_hold_the_texts(requests: Drawn, tokens: int):
    rows_hold_the_texts(requests, tokens)


def rows_of_many_requests() -> None:
    for seed in range(20):
        rows_hold_the_texts(Drawn(60, 2, 9, seed), 40)


MUTANTS = (
    Mutant("kept rows not counted", "rows", device_scoring, "rows_of", (("kept + branch", "0 * kept + branch"),)),
    Mutant("nobody waits", "rows", device_scoring, "levels", (("level[piece.row] for", "0 for"),)),
    Mutant("waits for the first", "rows", device_scoring, "levels", (("in pieces)", "in pieces[:1])"),)),
)


@stopped_by_the_host
@pytest.mark.parametrize("wrong", MUTANTS, ids=lambda wrong: wrong.name)
def test_wrong_rows_fail(wrong: Mutant, monkeypatch: pytest.MonkeyPatch):
    wrong.install(monkeypatch)
    # A wrong piece can also lead out of a text.
    with pytest.raises((AssertionError, IndexError)):
        rows_of_many_requests()


def test_pieces_and_levels():
    kept: Path = (slice(0, 2), slice(4, 9))
    rows = device_scoring.Rows((0, 3, 5, 9))
    assert rows.pieces(kept) == [Piece(0, 0, 2), Piece(1, 2, 3), Piece(2, 3, 7)]
    assert levels([[], [Piece(1, 0, 2)], [], [Piece(2, 0, 1), Piece(1, 1, 2)]]) == [[0, 2], [1], [3]]


@pytest.mark.parametrize("device", all_devices()[:2])
def test_copied_positions(device: Device):
    """Of texts of two capacities, nothing but the positions asked for."""
    keys = np.arange(2 * 5 * 4, dtype=np.float32).reshape(2, 5, 4)
    source, target = device.array(keys), device.array(np.full((2, 7, 4), -1, np.float32))
    device.copy_positions(source, target, 1, 4)
    expected = np.full((2, 7, 4), -1, np.float32)
    expected[:, 1:4] = keys[:, 1:4]
    np.testing.assert_array_equal(target.get(), expected)
    device.copy_positions(target, source, 2, 2)
    np.testing.assert_array_equal(source.get(), keys)
    for first, last in ((3, 6), (-1, 2), (3, 2)):
        with pytest.raises(ValueError, match="positions"):
            device.copy_positions(source, target, first, last)
    with pytest.raises(ValueError, match="source"):
        device.copy_positions(device.zeros((2, 5, 3), np.float32), target, 0, 1)
