"""A model that is larger than memory: layers are read when they are used, ahead of time, and forgotten again."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from strategies import TINY, random_model

from neox.reference.checkpoint.layouts import Source, huggingface_files, neox_files
from neox.reference.checkpoint.load import load
from neox.reference.checkpoint.output import write_output
from neox.reference.checkpoint.streaming import KEPT, StreamedLayers
from neox.reference.checkpoint.tensors import named_tensors
from neox.reference.config import Config
from neox.reference.errors import InputError
from neox.reference.generate import generate
from neox.reference.model import forward

SMALL = Config(104, 96, 3, 4, 136, rotary_pct=0.25, max_position_embeddings=256)
IDS = np.arange(90).reshape(1, 90) % 100


def written(folder: Path, config: Config = SMALL, ranks: int | None = None) -> Path:
    tensors = named_tensors(config, random_model(config, 0).params)
    half = {name: array.astype(np.float16) for name, array in tensors.items()}
    source = Source("drawn", config, lambda spec: half[spec.name].dtype, lambda spec: half[spec.name])
    write_output(folder, neox_files(source, ranks, 3) if ranks else huggingface_files(source, 30_000), {})
    return folder


@pytest.mark.parametrize("ranks", [None, 2])
def test_a_streamed_model_is_the_model(tmp_path: Path, ranks: int | None) -> None:
    folder = written(tmp_path / "model", ranks=ranks)
    stored, streamed = load(folder, weights="stored"), load(folder, weights="streamed")
    assert np.array_equal(forward(streamed, IDS), forward(stored, IDS))
    # Prompts are shared among threads, each of which passes over the layers.
    assert [*generate(streamed, IDS[0], 5)] == [*generate(stored, IDS[0], 5)]
    found, expected = (named_tensors(SMALL, model.params) for model in (streamed, stored))
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_a_tied_head_stays_tied(tmp_path: Path) -> None:
    tied = Config(104, 96, 1, 4, 136, max_position_embeddings=64, tie_word_embeddings=True)
    params = load(written(tmp_path / "model", tied), weights="streamed").params
    assert params.embed_out is params.embed_in


def test_what_is_not_finite_is_found_when_it_is_read(tmp_path: Path) -> None:
    folder = written(tmp_path / "model")
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        name = "gpt_neox.layers.2.mlp.dense_h_to_4h.weight"
        if name in tensors:
            tensors[name] = tensors[name].copy()
            tensors[name][3, 5] = np.inf
            save_file(tensors, path)
    model = load(folder, weights="streamed")
    with pytest.raises(InputError, match=r"layers\.2\.mlp\.dense_h_to_4h\.weight holds values that are not finite"):
        forward(model, IDS)


class Reads:
    """Layers that are numbers, and who read which."""

    def __init__(self) -> None:
        self.order: list[int] = []
        self.threads: set[str] = set()

    def __call__(self, index: int) -> Any:
        self.order.append(index)
        self.threads.add(threading.current_thread().name)
        return index


def test_the_next_layer_is_read_while_one_is_used() -> None:
    reads = Reads()
    layers: Any = StreamedLayers(4, reads)  # numbers stand for layers
    seen = []
    for layer in layers:
        layers._asked((layer + 1) % 4).result()
        assert reads.order[-1] == (layer + 1) % 4
        seen.append(layer)
    assert seen == [0, 1, 2, 3]
    assert reads.order == [0, 1, 2, 3, 0]  # the first again: of the next token
    assert threading.current_thread().name not in reads.threads


def test_no_more_than_two_layers_are_kept() -> None:
    layers: Any = StreamedLayers(9, Reads())
    for _ in layers:
        assert len(layers._kept) <= KEPT
    assert list(layers) == list(layers[0:9]) == list(range(9))
    assert layers[-1] == 8
    with pytest.raises(IndexError):
        layers[9]


def test_threads_that_go_together_read_each_layer_once() -> None:
    reads = Reads()
    layers, barrier = StreamedLayers(6, reads), threading.Barrier(2)

    def walk(_: int) -> list[Any]:
        found = []
        for layer in layers:
            found.append(layer)
            barrier.wait(10)
        return found

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(walk, range(2))) == [[0, 1, 2, 3, 4, 5]] * 2
    assert reads.order[:6] == [0, 1, 2, 3, 4, 5]
    assert len(reads.order) <= 8


def test_an_unknown_way_to_keep_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="weights must be one of auto, upcast, stored, streamed"):
        load(written(tmp_path / "model", TINY), weights="lazily")
