"""Write a small model in every layout by torch, so that what reads them is tested where torch is not installed.

    python tests/golden/make_torch_files.py

torch_files.tar.xz holds a folder for each layout, with the same numbers in all, and answers.npz: the config, the seed
from which the test draws the same weights (a checksum says whether it did), ids, and the logits of transformers.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import transformers

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))

from layouts_by_torch import LAYOUTS  # noqa: E402  (the helpers of the tests lie one folder up)
from oracle import oracle, oracle_logits  # noqa: E402
from strategies import checksum, draw_ids  # noqa: E402
from torch_files import ARCHIVE, SEED, SMALL, in_half, rounded_model  # noqa: E402


def answers() -> bytes:
    model = rounded_model(SMALL, SEED)
    ids = draw_ids(SMALL, 2, 9, seed=1)
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        made_with=f"transformers {transformers.__version__}, torch {torch.__version__}",
        config=json.dumps(asdict(SMALL)),
        seed=SEED,
        checksum=checksum(model),
        ids=ids,
        logits=oracle_logits(oracle(replace(model, dtype=np.dtype("float32"))), ids),
    )
    return buffer.getvalue()


def nobodys(info: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without who made it and when, so that the same files are the same archive."""
    info.mtime, info.uid, info.gid, info.uname, info.gname = 0, 0, 0, "", ""
    return info


def write(path: Path) -> None:
    tensors = in_half(rounded_model(SMALL, SEED))
    with tempfile.TemporaryDirectory() as root:
        Path(root, "answers.npz").write_bytes(answers())
        for name, layout in LAYOUTS.items():
            folder = Path(root, name)
            folder.mkdir()
            layout(folder, SMALL, tensors)
        with tarfile.open(path, "w:xz", preset=9) as archive:  # not .zip: that would keep the numbers once a layout
            for entry in sorted(Path(root).iterdir()):
                archive.add(entry, entry.name, filter=nobodys)


if __name__ == "__main__":
    temporary = ARCHIVE.with_suffix(".part")
    write(temporary)
    os.replace(temporary, ARCHIVE)
