"""Files that torch and transformers wrote, in every layout, read without them: golden/make_torch_files.py."""

from __future__ import annotations

import json
import tarfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from strategies import checksum
from torch_files import ARCHIVE, SMALL, assert_is, rounded_model

RANKS = [f"{form} of {ranks}" for form in ("layer files", "sequential") for ranks in (1, 2, 4)]
OTHERS = ["safetensors", "safetensors in shards", "bin", "bin in shards", "linear1", "transformer engine"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torch")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize("layout", RANKS + OTHERS)
def test_every_layout_is_the_model(files: Path, layout: str) -> None:
    with np.load(files / "answers.npz") as kept:
        model = rounded_model(SMALL, int(kept["seed"]))
        assert json.loads(str(kept["config"])) == asdict(SMALL)
        assert checksum(model) == int(kept["checksum"]), "the drawn weights have changed: make the golden files again"
        assert_is(files / layout, model, kept["ids"], kept["logits"])


def test_no_layout_is_left_out(files: Path) -> None:
    assert {path.name for path in files.iterdir()} == {*RANKS, *OTHERS, "answers.npz"}
