"""The gradient written by hand, against torch's autograd through transformers and against differences of the loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from closeness import assert_close
from hypothesis import given, settings
from strategies import configs, draw_ids, random_model, seeds

from neox.reference.backward import loss_and_gradient
from neox.reference.checkpoint.tensors import named_tensors
from neox.reference.config import Config
from neox.reference.model import Model, rotary_tables

# Both take float64 sums of the same terms in other orders, through some sixty operations there and back; 1e-12 of the
# largest entry is what is measured. LayerNorm's gradient at a small input, a difference of large terms, is the worst.
FLOAT64 = 1e-10


def same_tables(m: Model) -> Any:
    """transformers' model with our parameters and our cosines: theirs, taken in float32, are off by its rounding."""
    import torch
    from oracle import oracle

    def tables(x: Any, position_ids: Any) -> tuple[Any, Any]:
        ours = rotary_tables(m.config, position_ids.numpy())
        cos, sin = (torch.from_numpy(np.concatenate([t, t], -1)[:, 0].astype(np.float64)) for t in ours)
        return cos, sin

    theirs = oracle(m)
    theirs.gpt_neox.rotary_emb.forward = tables
    return theirs


@pytest.mark.oracle
@settings(max_examples=20)
@given(configs(), seeds)
def test_every_gradient_is_that_of_autograd(config: Config, seed: int) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    m = random_model(config, seed, dtype="float64")
    ids = draw_ids(config, 2, 8, seed)
    theirs = same_tables(m)
    logits = theirs(torch.from_numpy(ids[:, :-1]), use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(ids[:, 1:]).flatten())
    loss.backward()
    ours, gradient = loss_and_gradient(m, ids)
    assert_close(np.array(ours), loss.detach().numpy(), 1e-12)
    expected = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    for name, actual in named_tensors(config, gradient).items():
        assert_close(actual, expected.pop(name.replace("embed_out", "lm_head")), FLOAT64)
    assert not expected
