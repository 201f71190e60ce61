"""What the model that ships is good for, on text and questions that it was not trained on."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

from neox.reference import Model, Tokenizer, load, load_tokenizer, shipped
from neox.reference.checkpoint.save import model_files
from neox.reference.train import saved_steps

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SERIES = EXAMPLES / "series"
LIMIT = 5_000_000  # bytes of a model with its tokenizer


def measure() -> ModuleType:
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module("measure")
    finally:
        sys.path.remove(str(EXAMPLES))


def read(folder: Path) -> tuple[Model, Tokenizer]:
    return load(folder, weights="upcast"), load_tokenizer(folder)


def test_it_adds_and_subtracts_two_digit_numbers() -> None:
    found = measure().arithmetic(*read(shipped.path()))
    assert found["addition"] >= 0.95
    assert found["subtraction"] >= 0.95


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in shipped.path().glob("*.[js]*")) <= LIMIT


series = pytest.mark.skipif(not SERIES.is_dir(), reason="the series of checkpoints is not beside tests/")


@series
def test_its_series_is_small_and_ends_with_it() -> None:
    steps = saved_steps(SERIES)
    assert len(steps) >= 8
    assert steps[0] == 0
    files = [file for folder in (SERIES, shipped.path()) for file in folder.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 40_000_000
    last = SERIES / f"step{steps[-1]}" / "model.safetensors"
    assert last.read_bytes() == (shipped.path() / "model.safetensors").read_bytes()


@series
def test_induction_rises_over_the_series() -> None:
    """Chance is one in 1,024. The last part of the training had few repetitions, and lost a third of it again."""
    found = [measure().induction(*read(SERIES / f"step{step}")) for step in saved_steps(SERIES)]
    assert max(found[:6]) < 0.02
    assert min(found[6:]) > 0.15


def test_what_transformers_is_told_of_the_tokenizer_is_what_training_writes() -> None:
    m = load(shipped.path())
    files = model_files(m, "float16", (shipped.path() / "tokenizer.json").read_bytes())
    assert files["tokenizer_config.json"] == (shipped.path() / "tokenizer_config.json").read_bytes()
    assert "tokenizer_config.json" not in model_files(m, "float16", b"{}")
