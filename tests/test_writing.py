"""Files that are written: torch reads ours, a folder is whole or not there, nothing is written twice."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import TINY, random_model, seeds

from neox.reference.checkpoint.layouts import (
    Source,
    as_dtype,
    check_ranks,
    converted,
    huggingface_files,
    neox_files,
    part,
)
from neox.reference.checkpoint.load import load
from neox.reference.checkpoint.output import OutputFile, json_file, write_output
from neox.reference.checkpoint.tensors import Sharding, TensorSpec, pipeline, tensor_table
from neox.reference.checkpoint.torch_writer import ALIGNMENT, write_torch
from neox.reference.config import GPT_NEOX_20B, PYTHIA, Config, config_from_neox, config_to_neox
from neox.reference.errors import InputError
from neox.reference.model import forward

# Files of torch.

SHAPES = st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=4)


def drawn_tensors(shapes: list[tuple[int, ...]], dtype: str, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {f"part.{i}": rng.normal(size=shape).astype(dtype) for i, shape in enumerate(shapes)}


@given(SHAPES, st.sampled_from(["float16", "float32"]), seeds)
def test_tensors_lie_aligned_in_the_archive(tmp_path_factory, shapes, dtype, seed) -> None:
    path = tmp_path_factory.mktemp("torch") / "x.pt"
    tensors = drawn_tensors(shapes, dtype, seed)
    write_torch(path, tensors)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        for key, array in enumerate(tensors.values()):
            info = archive.getinfo(f"archive/data/{key}")
            header = info.header_offset
            start = (
                header + 30 + sum(int.from_bytes(content[header + at : header + at + 2], "little") for at in (26, 28))
            )
            assert start % ALIGNMENT == 0
            assert info.compress_type == zipfile.ZIP_STORED
            assert content[start : start + array.nbytes] == array.tobytes()


@pytest.mark.oracle
@given(SHAPES, st.sampled_from(["float16", "bfloat16", "float32"]), seeds)
def test_torch_reads_what_is_written(tmp_path_factory, shapes, dtype, seed) -> None:
    import ml_dtypes  # noqa: F401 - teaches NumPy bfloat16
    import torch

    path = tmp_path_factory.mktemp("torch") / "x.pt"
    tensors = drawn_tensors(shapes, dtype, seed)
    write_torch(path, tensors)
    for mmap in (False, True):
        loaded = torch.load(path, weights_only=True, mmap=mmap)
        assert list(loaded) == list(tensors)
        for name, array in tensors.items():
            assert loaded[name].dtype == getattr(torch, dtype)
            assert loaded[name].is_contiguous()
            assert tuple(loaded[name].shape) == array.shape
            assert np.array_equal(loaded[name].float().numpy(), array.astype(np.float32))


def test_a_dtype_that_weights_do_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="int64 cannot be written"):
        write_torch(tmp_path / "x.pt", {"ids": np.arange(3)})


# Folders.


def file_of(name: str, written: list[str], text: str = "x") -> OutputFile:
    def write(path: Path, progress) -> None:
        written.append(name)
        path.write_text(text)
        progress(3)

    return OutputFile(name, 3, write)


def test_a_folder_is_there_when_it_is_whole(tmp_path: Path) -> None:
    folder = tmp_path / "out"

    def look(path: Path, progress) -> None:
        assert not folder.exists()
        path.write_text("last")

    moved: list[int] = []
    write_output(folder, [file_of("sub/a", []), OutputFile("b", 0, look)], {}, moved.append)
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == {"sub/a", "b"}
    assert moved == [3]
    assert list(tmp_path.iterdir()) == [folder]


class Stop(Exception):
    pass


def stopping(path: Path, progress) -> None:
    path.write_text("half")
    raise Stop


def test_what_was_written_is_kept_for_the_same_plan_and_only_for_it(tmp_path: Path) -> None:
    written: list[str] = []
    folder = tmp_path / "out"
    a, b = file_of("a", written), file_of("b", written)
    with pytest.raises(Stop):
        write_output(folder, [a, OutputFile("b", 3, stopping)], {"source": 1})
    assert not folder.exists()
    write_output(folder, [a, b], {"source": 1})
    assert written == ["a", "b"]
    with pytest.raises(Stop):
        write_output(tmp_path / "other", [a, OutputFile("b", 3, stopping)], {"source": 1})
    write_output(tmp_path / "other", [a, b], {"source": 2})
    assert written == ["a", "b", "a", "a", "b"]
    assert (folder / "b").read_text() == "x"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_a_full_disk_leaves_no_folder_and_says_what_to_do(tmp_path: Path) -> None:
    def full(path: Path, progress) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="No space left on device; run it again to go on"):
        write_output(tmp_path / "out", [OutputFile("a", 1, full)], {})
    assert not (tmp_path / "out").exists()


def test_a_folder_that_exists_is_never_touched(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exists already"):
        write_output(tmp_path, [json_file("config.json", {})], {})
    assert list(tmp_path.iterdir()) == []


# Layouts.


def source_of(config: Config, seed: int = 0, dtype: str = "float32") -> Source:
    from neox.reference.checkpoint.tensors import named_tensors

    model = random_model(config, seed)
    tensors = {name: array.astype(dtype) for name, array in named_tensors(config, model.params).items()}
    return Source("drawn", config, lambda spec: tensors[spec.name].dtype, lambda spec: tensors[spec.name])


@pytest.mark.parametrize("shard_bytes", [1 << 30, 40_000])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_hugging_face_folder_is_read_as_it_was_written(tmp_path: Path, shard_bytes: int, dtype: str) -> None:
    source = source_of(TINY, dtype=dtype)
    write_output(tmp_path / "out", huggingface_files(source, shard_bytes), {})
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert (len(shards) == 1) == (shard_bytes == 1 << 30)
    largest = max(spec.size * source.dtype_of(spec).itemsize for spec in tensor_table(TINY).values())
    assert all(path.stat().st_size < max(shard_bytes, largest) + 10_000 for path in shards)
    model = load(tmp_path / "out", weights="stored")
    assert model.config == TINY
    for name, spec in tensor_table(TINY).items():
        read = source_of(TINY, dtype=dtype).get(spec)
        assert np.array_equal(read.astype(np.float32), stored(model, name).astype(np.float32))
    assert np.isfinite(forward(model, [[1, 2, 3]])).all()


def stored(model, name: str) -> np.ndarray:
    from neox.reference.checkpoint.tensors import named_tensors

    return named_tensors(model.config, model.params)[name]


def test_numbers_are_converted_or_refused() -> None:
    x = np.array([1.0, 65504.0, 1e-8], np.float32)
    assert converted(x, np.dtype("float16"), "x").tolist() == [1.0, 65504.0, 0.0]
    with pytest.raises(InputError, match="x holds numbers that float16 cannot"):
        converted(np.array([70000.0], np.float32), np.dtype("float16"), "x")
    assert (
        as_dtype(source_of(TINY), np.dtype("float16")).dtype_of(next(iter(tensor_table(TINY).values()))) == np.float16
    )


def test_the_pipeline_holds_every_tensor_once_under_the_names_of_gpt_neox() -> None:
    for config in (TINY, GPT_NEOX_20B, PYTHIA["70m"]):
        names = [name for layer in pipeline(config).values() for name in layer.values()]
        assert sorted(names) == sorted(tensor_table(config))
    layers = pipeline(GPT_NEOX_20B)
    assert list(layers) == [0, *range(2, 46), 47, 48]  # the 94 files of the release are of these, for two ranks
    assert layers[45]["attention.query_key_value.weight"] == "gpt_neox.layers.43.attention.query_key_value.weight"


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_parts_of_a_tensor_make_the_whole(ranks: int) -> None:
    rng = np.random.default_rng(ranks)
    kinds: list[tuple[Sharding, int]] = [("vocabulary", 0), ("column", 0), ("row", 1)]
    for sharding, axis in kinds:
        whole = rng.normal(size=(8, 12)).astype(np.float16)
        spec = TensorSpec("x", whole.shape, sharding)
        assert np.array_equal(np.concatenate([part(spec, whole, r, ranks) for r in range(ranks)], axis), whole)
    bias = rng.normal(size=12).astype(np.float16)
    parts = [part(TensorSpec("b", (12,), "summed"), bias, r, ranks) for r in range(ranks)]
    assert np.array_equal(sum(parts), bias)
    assert np.array_equal(part(TensorSpec("n", (12,), "replicated"), bias, ranks - 1, ranks), bias)


def test_ranks_that_cannot_share_equally_are_refused() -> None:
    check_ranks(GPT_NEOX_20B, 8)
    with pytest.raises(InputError, match="64 attention heads, which 3 ranks cannot share equally"):
        check_ranks(GPT_NEOX_20B, 3)
    with pytest.raises(InputError, match="0 ranks"):
        neox_files(source_of(TINY), 0, 0)


def test_the_config_of_gpt_neox_is_read_as_it_was_written() -> None:
    for config in (TINY, GPT_NEOX_20B, PYTHIA["12b"]):
        assert config_from_neox(json.loads(json.dumps(config_to_neox(config, 2)))) == config
