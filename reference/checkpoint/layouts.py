"""A model as files of either layout: what convert.py writes.

Both take the tensors one at a time from wherever they are, each in the dtype it is to have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from neox.reference.checkpoint.huggingface import INDEX, SINGLE
from neox.reference.checkpoint.load import is_finite
from neox.reference.checkpoint.opening import open_checkpoint
from neox.reference.checkpoint.output import OutputFile, Progress, json_file, text_file
from neox.reference.checkpoint.safetensors_file import Entry, write_safetensors
from neox.reference.checkpoint.stored import numpy_dtype
from neox.reference.checkpoint.tensors import AXES, Get, TensorSpec, pipeline, tensor_table
from neox.reference.checkpoint.torch_writer import write_torch
from neox.reference.config import Config, config_to_dict, config_to_neox
from neox.reference.errors import InputError
from neox.reference.model import Array
from neox.reference.project import widen


@dataclass(frozen=True)
class Source:
    """A model's tensors, wherever they are."""

    layout: str  # in words
    config: Config
    dtype_of: Callable[[TensorSpec], np.dtype]  # as get returns it, known without reading
    get: Get


def source_in(folder: Path, layer_norms: str = "mean") -> Source:
    """The checkpoint in a folder. InputError for everything that can be wrong with it."""
    checkpoint = open_checkpoint(folder, layer_norms=layer_norms)
    tensors = checkpoint.tensors
    return Source(
        checkpoint.layout,
        checkpoint.config,
        lambda spec: numpy_dtype(tensors[spec.name]),
        lambda spec: tensors[spec.name].read(),
    )


# Converting numbers.


def converted(array: Array, dtype: np.dtype, name: str) -> Array:
    """Rounded to dtype, or widened; InputError if a number is too large for it."""
    if array.dtype == dtype:
        return array
    result = np.empty(array.shape, dtype)
    with np.errstate(over="ignore"):
        widen(array, out=result)
    if not is_finite(result):
        raise InputError(f"{name} holds numbers that {dtype} cannot: convert to bfloat16 or float32")
    return result


def as_dtype(source: Source, dtype: np.dtype) -> Source:
    """The same tensors, in another dtype."""
    return replace(source, dtype_of=lambda spec: dtype, get=lambda spec: converted(source.get(spec), dtype, spec.name))


# Hugging Face.


def _shards(specs: Sequence[TensorSpec], source: Source, shard_bytes: int) -> list[list[TensorSpec]]:
    """In their order, as many tensors to a file as it may hold; one that is larger has a file of its own."""
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        size = spec.size * source.dtype_of(spec).itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += size
    return shards


def _safetensors(name: str, source: Source, specs: Sequence[TensorSpec]) -> OutputFile:
    entries = [Entry(spec.name, source.dtype_of(spec), spec.shape, partial(source.get, spec)) for spec in specs]

    def write(path: Path, progress: Progress) -> None:
        write_safetensors(path, entries, progress)

    return OutputFile(name, sum(entry.nbytes for entry in entries), write)


def huggingface_files(source: Source, shard_bytes: int) -> list[OutputFile]:
    """config.json and safetensors, in one file or in shards of at most so many bytes with an index."""
    shards = _shards(list(tensor_table(source.config).values()), source, shard_bytes)
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    files = [_safetensors(name, source, specs) for name, specs in zip(names, shards, strict=True)]
    if len(shards) > 1:
        where = {spec.name: name for name, specs in zip(names, shards, strict=True) for spec in specs}
        total = sum(file.nbytes for file in files)
        files.append(json_file(INDEX, {"metadata": {"total_size": total}, "weight_map": where}))
    dtypes = {source.dtype_of(spec).name for spec in tensor_table(source.config).values()}
    kept = {"dtype": dtypes.pop()} if len(dtypes) == 1 else {}
    return [*files, json_file("config.json", {**config_to_dict(source.config), **kept})]


# gpt-neox: a file for each layer of its pipeline and each rank.


def check_ranks(config: Config, ranks: int) -> None:
    """InputError unless every rank gets the same number of heads, neurons and ids, as gpt-neox wants it."""
    counts = {
        "attention heads": config.num_attention_heads,
        "neurons in its MLP": config.intermediate_size,
        "ids in its vocabulary": config.vocab_size,
    }
    for name, count in counts.items():
        if ranks < 1 or count % ranks:
            raise InputError(f"the model has {count} {name}, which {ranks} ranks cannot share equally")


def part(spec: TensorSpec, whole: Array, rank: int, ranks: int) -> Array:
    """What one rank holds of a tensor. A bias that the ranks add up is divided: exact for powers of two."""
    if spec.sharding in AXES:
        axis = AXES[spec.sharding]
        size = whole.shape[axis] // ranks
        index = [slice(None)] * whole.ndim
        index[axis] = slice(rank * size, (rank + 1) * size)
        return whole[tuple(index)]
    if spec.sharding == "summed":
        return (whole.astype(np.float64) / ranks).astype(whole.dtype)
    return whole


def _layer_file(name: str, source: Source, names: Mapping[str, str], rank: int, ranks: int) -> OutputFile:
    specs = tensor_table(source.config)
    chosen = {own: specs[ours] for own, ours in names.items()}

    def size(spec: TensorSpec) -> int:
        whole = spec.size * source.dtype_of(spec).itemsize
        return whole // ranks if spec.sharding in AXES else whole

    nbytes = sum(map(size, chosen.values()))

    def write(path: Path, progress: Progress) -> None:
        write_torch(path, {own: part(spec, source.get(spec), rank, ranks) for own, spec in chosen.items()})
        progress(nbytes)

    return OutputFile(name, nbytes, write)


def neox_files(source: Source, ranks: int, step: int) -> list[OutputFile]:
    """Layer files of `ranks` model-parallel ranks under global_step{step}, the config, and `latest`, which names it.

    What only training needs (mp_rank files with the optimizer's state) is not there. InputError if the ranks cannot
    share the model equally.
    """
    check_ranks(source.config, ranks)
    folder = f"global_step{step}"
    files = [
        _layer_file(f"{folder}/layer_{index:02}-model_{rank:02}-model_states.pt", source, names, rank, ranks)
        for index, names in pipeline(source.config).items()
        for rank in range(ranks)
    ]
    # JSON is yaml too.
    config = json_file("configs/model.yml", config_to_neox(source.config, ranks))
    return [*files, config, text_file("latest", folder)]
