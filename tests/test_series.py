"""Series of partially trained checkpoints: which steps there are, and each as it is loaded by itself."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from strategies import TINY, random_model

from neox.reference import load_tokenizer, shipped
from neox.reference.checkpoint.layouts import Source, huggingface_files, neox_files
from neox.reference.checkpoint.output import write_output
from neox.reference.checkpoint.series import open_series
from neox.reference.checkpoint.tensors import named_tensors
from neox.reference.errors import InputError

STEPS = (0, 1, 512, 2000, 10000)


def source_of(seed: int) -> Source:
    tensors = named_tensors(TINY, random_model(TINY, seed).params)
    return Source("drawn", TINY, lambda spec: tensors[spec.name].dtype, lambda spec: tensors[spec.name])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    for step in STEPS:
        write_output(folder / f"step{step}", huggingface_files(source_of(step), 1 << 30), {})
    (folder / "notes").mkdir()
    (folder / "step7.txt").write_text("not a checkpoint")
    return folder


def test_steps_are_in_their_order_and_loaded_when_asked_for(run: Path) -> None:
    series = open_series(run, dtype="float64")
    assert series.steps == tuple(series) == STEPS
    assert len(series) == len(STEPS)
    model = series[512]
    assert model.dtype == np.float64
    assert np.array_equal(model.params.embed_in, random_model(TINY, 512).params.embed_in)
    assert series.folder(512) == run / "step512"


def test_the_nearest_step(run: Path) -> None:
    series = open_series(run)
    assert [series.nearest(n) for n in (0, 255, 257, 1256, 1257, 10**9)] == [0, 1, 512, 512, 2000, 10000]
    with pytest.raises(InputError, match="has no step 600; the nearest is 512"):
        series[600]


def test_folders_of_gpt_neox(tmp_path: Path) -> None:
    for step in (1000, 2000):
        write_output(tmp_path / f"run{step}", neox_files(source_of(step), 1, step), {})
    shutil.move(tmp_path / "run2000" / "global_step2000", tmp_path / "run1000")
    series = open_series(tmp_path / "run1000")
    assert series.steps == (1000, 2000)
    assert np.array_equal(series[2000].params.embed_in, random_model(TINY, 2000).params.embed_in)


def test_a_folder_without_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no steps"):
        open_series(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        open_series(tmp_path / "absent")


def test_branches_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    branches = [SimpleNamespace(name=name) for name in ("main", "step1000", "step0", "step512", "other")]
    asked = []

    def refs(self, repository: str) -> SimpleNamespace:
        asked.append(repository)
        return SimpleNamespace(branches=branches)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_refs", refs)
    assert open_series("pythia-70m").steps == (0, 512, 1000)
    assert asked == ["EleutherAI/pythia-70m"]


def test_steps_may_share_a_tokenizer(run: Path) -> None:
    shutil.copy(shipped.path() / "tokenizer.json", run / "tokenizer.json")
    assert load_tokenizer(run, "step512").encode("a") == load_tokenizer(shipped.path()).encode("a")
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        load_tokenizer(run / "notes")
