"""Writes data/hooks.npz: what TransformerLens sees inside a small model, under its names.

pip install "transformer_lens>=4"
python tests/golden/make_hooks.py
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))

from strategies import TINY, draw_ids, random_model  # noqa: E402

from neox.reference.config import Config  # noqa: E402


def seen_by_transformer_lens(config: Config, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Every array of a pass over the model of seed 0, as the bridge of TransformerLens names it."""
    import torch
    from oracle import oracle
    from tokenizers import Tokenizer as Fast
    from tokenizers.models import WordLevel
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(config.vocab_size)}
    with tempfile.TemporaryDirectory() as folder:
        oracle(random_model(config, 0)).save_pretrained(folder)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Fast(WordLevel(words, unk_token="w0")), eos_token="w0")
        tokenizer.save_pretrained(folder)
        bridge = TransformerBridge.boot_transformers(folder, dtype=torch.float32)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(torch.tensor(ids))
    return {name: cache[name].numpy() for name in cache if isinstance(cache[name], torch.Tensor)}


if __name__ == "__main__":
    from neox.reference.trace import hook_names

    config = replace(TINY, num_hidden_layers=2, hidden_act="gelu")
    found = seen_by_transformer_lens(config, draw_ids(config, 2, 9, 0))
    named: dict[str, Any] = {name: found[name] for name in hook_names(config) if name in found}
    np.savez_compressed(HERE.parent / "data" / "hooks.npz", **named)
