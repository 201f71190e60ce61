"""Trees of texts over several ranks: the scores of one process."""

from __future__ import annotations

import numpy as np
import pytest
from closeness import assert_close
from scoring_checks import TOLERANCE, Drawn
from strategies import TINY, random_model

from neox.distributed import Communicator, shard, virtual
from neox.distributed.scoring import LeadingReader, ShardReader
from neox.reference.model import Model
from neox.reference.scoring import Pair, Score, log_likelihoods, scores


def scores_of_ranks(model: Model, pairs: list[Pair], ranks: int) -> list[Score]:
    def program(comm: Communicator) -> dict[int, Score]:
        reader = ShardReader(shard(model, comm))
        if comm.rank == 0:
            found = dict(scores(LeadingReader(reader, comm), pairs))
            comm.broadcast(None)
            return found
        while (batch := comm.broadcast(None)) is not None:
            reader.logits(batch)
        return {}

    found = virtual(ranks, program)[0]
    return [found[index] for index in range(len(pairs))]


@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_scores_are_those_of_one_process(ranks: int, dtype: str):
    model = random_model(TINY, seed=6, dtype=dtype)
    pairs: list[Pair] = list(Drawn(90, seed=4).pairs(TINY))  # three batches: what is kept is each rank's heads
    alone = log_likelihoods(model, pairs)
    for score, expected in zip(scores_of_ranks(model, pairs, ranks), alone, strict=True):
        assert_close(np.array(score.logprobs), np.array(expected.logprobs), TOLERANCE[dtype])
        assert score.greedy == expected.greedy
