"""Every intermediate against TransformerLens 4, which wraps transformers' model and names its intermediates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from strategies import TINY, draw_ids, random_model

from neox.reference.config import Config
from neox.reference.model import Model
from neox.reference.trace import hook_names, run_with_cache, run_with_hooks

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

# Both compute in float32, the sums in other orders: 2.4e-6 is measured, of values up to 8.
BOUND = 1e-5

# TransformerLens 4 shows queries and keys before the rotation only.
NOT_THEIRS = ("hook_rot_q", "hook_rot_k")

KINDS = {
    "fast": TINY,
    "gelu": replace(TINY, hidden_act="gelu", rotary_pct=1.0),
    "head-96": replace(TINY, hidden_size=192, num_attention_heads=2, num_hidden_layers=2),
}


def bridge(model: Model, folder: str) -> Any:
    """TransformerLens's view of transformers' model with our parameters."""
    pytest.importorskip("torch", reason="torch is not installed")
    bridges = pytest.importorskip("transformer_lens.model_bridge", reason="transformer_lens is not installed")
    from oracle import oracle
    from transformers import PreTrainedTokenizerFast

    from neox.reference import shipped

    theirs = oracle(model, attn_implementation="eager")
    theirs.config.architectures = ["GPTNeoXForCausalLM"]
    theirs.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(shipped.path() / "tokenizer.json"))
    wrapped = bridges.TransformerBridge.boot_transformers(folder, hf_model=theirs, tokenizer=tokenizer)
    wrapped.set_use_attn_result(True)
    return wrapped


def assert_near(ours: NDArray, theirs: NDArray, name: str) -> None:
    """Where we say -inf, they say the lowest number there is."""
    assert ours.shape == theirs.shape, name
    seen = np.isfinite(ours)
    assert np.all(theirs[~seen] < -1e30), name
    assert np.all(np.isfinite(theirs[seen])), name
    assert np.abs(ours[seen] - theirs[seen]).max() <= BOUND, name


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_all_shared_intermediates(kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    config: Config = KINDS[kind]
    model = random_model(config, 3)
    ids = draw_ids(config, 2, 23, 1)
    wrapped = bridge(model, str(tmp_path_factory.mktemp("theirs")))
    import torch

    results = [f"blocks.{i}.attn.hook_result" for i in range(config.num_hidden_layers)]
    names = [*hook_names(config), *results]
    logits, ours = run_with_cache(model, ids, names)
    with torch.inference_mode():
        their_logits, cache = wrapped.run_with_cache(torch.from_numpy(ids.astype(np.int64)))
    theirs = {name: array.numpy() for name, array in cache.items() if name in names}
    assert [name for name in names if name not in theirs and not name.endswith(NOT_THEIRS)] == []
    for name, array in theirs.items():
        assert_near(ours[name], array, name)
    assert_near(logits, their_logits.numpy(), "logits")


def test_a_replaced_pattern_has_the_same_effect(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Each query looks at itself and nothing else, in one layer."""
    model = random_model(TINY, 3)
    ids = draw_ids(TINY, 1, 11, 1)
    wrapped = bridge(model, str(tmp_path_factory.mktemp("theirs")))
    import torch

    ours = run_with_hooks(model, ids, {"blocks.1.attn.hook_pattern": lambda array: 0 * array + np.eye(11)})
    hook = ("blocks.1.attn.hook_pattern", lambda array, hook: torch.eye(11).expand_as(array).clone())
    with torch.inference_mode():
        theirs = wrapped.run_with_hooks(torch.from_numpy(ids.astype(np.int64)), fwd_hooks=[hook])
    assert_near(ours, theirs.numpy(), "logits")
