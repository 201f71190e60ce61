"""Write what transformers answers for a dozen small models, so that parity can be shown where it is not installed.

    python tests/golden/make_golden.py

Each .npz holds a config, a seed and ids, from which the test draws the same weights (a checksum says whether it did),
and the logits at some positions, of transformers in float64 and in float32, with the versions that made them.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from tqdm import tqdm

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))

from oracle import oracle, oracle_logits  # noqa: E402  (the helpers of the tests lie one folder up)
from strategies import TINY, checksum, draw_ids, random_model, rotary_pct  # noqa: E402

from neox.reference.config import Config  # noqa: E402

EVERY = tuple(range(11))


@dataclass(frozen=True)
class Case:
    config: Config
    padding: tuple[int, ...] = (0, 0)  # of each row, on the left
    positions: tuple[int, ...] = EVERY  # whose logits are kept


SEQUENTIAL = replace(TINY, use_parallel_residual=False)
HEAD_96 = replace(TINY, hidden_size=192, num_attention_heads=2, num_hidden_layers=2)
LONG = Config(61, 96, 2, 4, 37, rotary_pct=0.25)  # R = 6 of D = 24

CASES = {
    "20b": Case(TINY),
    "gelu": Case(replace(TINY, hidden_act="gelu")),
    "sequential": Case(SEQUENTIAL),
    "sequential-gelu": Case(replace(SEQUENTIAL, hidden_act="gelu", num_hidden_layers=2)),
    "tied": Case(replace(TINY, tie_word_embeddings=True)),
    "no-attention-bias": Case(replace(TINY, attention_bias=False, layer_norm_eps=1e-3)),
    "head-96": Case(replace(HEAD_96, rotary_pct=rotary_pct(96, 24))),
    "every-dim-rotates": Case(replace(TINY, rotary_pct=1.0)),
    "another-base": Case(replace(TINY, rotary_pct=0.5, rotary_emb_base=500)),
    "padded": Case(TINY, padding=(8, 0, 4)),
    "positions-to-1300": Case(LONG, padding=(0,), positions=(0, 1, 511, 512, 1023, 1024, 1298, 1299)),
    "positions-to-1300-gelu": Case(replace(LONG, hidden_act="gelu"), padding=(0,), positions=(1023, 1298, 1299)),
}


def logits(case: Case, dtype: str, ids: NDArray) -> NDArray:  # (B,T) -> (B,kept,V)
    padding, length = np.array(case.padding)[:, None], ids.shape[1]
    places = np.arange(length) - padding  # of each token in its own text
    answers = oracle_logits(
        oracle(random_model(case.config, seed=0, dtype=dtype)),
        ids,
        attention_mask=torch.from_numpy((places >= 0).astype(np.int64)),
        position_ids=torch.from_numpy(np.maximum(places, 0)),
    )
    return answers[:, list(case.positions)]


def write(name: str, case: Case) -> None:
    ids = draw_ids(case.config, len(case.padding), max(case.positions) + 1, seed=1)
    path = FOLDER / f"{name}.npz"
    temporary = path.with_suffix(".part.npz")
    np.savez_compressed(
        temporary,
        made_with=f"transformers {transformers.__version__}, torch {torch.__version__}, sdpa",
        config=json.dumps(asdict(case.config)),
        seed=0,
        checksum=checksum(random_model(case.config, seed=0)),
        ids=ids,
        padding=np.array(case.padding),
        positions=np.array(case.positions),
        float64=logits(case, "float64", ids),
        float32=logits(case, "float32", ids),
    )
    os.replace(temporary, path)


if __name__ == "__main__":
    for name, case in tqdm(CASES.items(), disable=None):
        write(name, case)
