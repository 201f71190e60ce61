"""The Hugging Face layout: one file of tensors, or an index and the shards it names; safetensors, or older .bin files.

Names have drifted over the years and some files hold more than weights. What is known is translated or left out;
everything else must match the table exactly, since a model with a tensor missing still runs, and is wrong.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import replace
from pathlib import Path

import numpy as np

from neox.reference.checkpoint.safetensors_file import read_header
from neox.reference.checkpoint.stored import WEIGHT_DTYPES, Stored
from neox.reference.checkpoint.tensors import EMBED_IN, EMBED_OUT, TensorSpec, tensor_table
from neox.reference.checkpoint.torch_file import torch_tensors
from neox.reference.config import Config, read_json
from neox.reference.errors import InputError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SINGLE_BIN = "pytorch_model.bin"
INDEX_BIN = "pytorch_model.bin.index.json"

# Not weights: the causal mask, what it masks with, and tables of the rotary embedding, which in files of float16 are
# rounded. They are computed here. `attention.bias` is the mask; the biases that were learned have longer names.
BUFFERS = re.compile(r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$|\.rotary_emb\.(cos|sin)_cached$")

LISTED = 20  # names of each kind in an error, before the rest is counted


# Which tensors there are, and in which file.

ReadFile = Callable[[Path], Mapping[str, Stored]]


def enumerated(names: Iterable[str]) -> str:
    """With commas; of many, the first and how many more."""
    every = list(names)
    more = f" and {len(every) - LISTED} more" if len(every) > LISTED else ""
    return ", ".join(every[:LISTED]) + more


def _weight_map(path: Path) -> dict[str, str]:
    """The index: which file of its folder holds which tensor."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise InputError(f"{path} has no weight_map from tensor names to file names")
    for file in weight_map.values():
        # Also on this system's disk a shard is a plain name: an index must not reach out of its folder.
        if file in ("", ".", "..") or "/" in file or "\\" in file:
            raise InputError(f"{path} names the file {file!r}, which is not in its folder")
    return weight_map


def _read_shards(index: Path, read: ReadFile) -> dict[str, Stored]:
    weight_map = _weight_map(index)
    files = sorted(set(weight_map.values()))
    absent = [file for file in files if not (index.parent / file).exists()]
    if absent:
        raise InputError(f"{index} names files that are not there: {enumerated(absent)}")
    headers = {file: read(index.parent / file) for file in files}
    lost = [f"{name} in {file}" for name, file in weight_map.items() if name not in headers[file]]
    if lost:
        raise InputError(f"{index} names tensors that are not there: {enumerated(lost)}")
    return {name: headers[file][name] for name, file in weight_map.items()}


FORMS: tuple[tuple[str, str, str, ReadFile], ...] = (
    ("safetensors", SINGLE, INDEX, read_header),
    ("pytorch_model.bin", SINGLE_BIN, INDEX_BIN, torch_tensors),
)


def is_huggingface(folder: Path) -> bool:
    return any((folder / file).exists() for _, single, index, _ in FORMS for file in (single, index))


def _read_headers(folder: Path) -> tuple[str, dict[str, Stored]]:
    """In which form, and the tensors. Where there are both, safetensors."""
    for form, single, index, read in FORMS:
        if (folder / single).exists():
            return form, dict(read(folder / single))
        if (folder / index).exists():
            return form, _read_shards(folder / index, read)
    wanted = ", or ".join(f"{index} with its shards" for _, _, index, _ in FORMS)
    raise InputError(f"{folder} holds no weights: no {SINGLE}, no {SINGLE_BIN}, and no {wanted}")


# Under which names.


def canonical(name: str) -> str:
    """The name in tensor_table of a tensor that some release of transformers called `name`."""
    if name == "lm_head.weight":  # since 5.0, when a model is saved as it is in memory
        return EMBED_OUT
    bare = name.startswith(("embed_in.", "layers.", "final_layer_norm."))  # saved without its head
    return f"gpt_neox.{name}" if bare else name


def _renamed(tensors: Mapping[str, Stored], folder: Path) -> dict[str, Stored]:
    renamed: dict[str, Stored] = {}
    for name, stored in tensors.items():
        if BUFFERS.search(name):
            continue
        if canonical(name) in renamed:
            raise InputError(f"{folder} holds {canonical(name)} twice, under two names")
        renamed[canonical(name)] = stored
    return renamed


# Held against the table.


def _same_numbers(a: Stored, b: Stored, rows: int = 1024) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape) or a.dtype not in WEIGHT_DTYPES:
        return False
    x, y = a.read(), b.read()
    return all(np.array_equal(x[i : i + rows], y[i : i + rows]) for i in range(0, len(x), rows))


def _untied(config: Config, tensors: dict[str, Stored], folder: Path) -> Config:
    """A config that ties the head although the file holds another one: the file wins, as in transformers.

    A head that merely repeats the embedding is dropped from tensors.
    """
    if not config.tie_word_embeddings or EMBED_OUT not in tensors or EMBED_IN not in tensors:
        return config
    if _same_numbers(tensors[EMBED_OUT], tensors[EMBED_IN]):
        del tensors[EMBED_OUT]
        return config
    line = f"{folder}: config.json ties {EMBED_OUT} to the embedding, but the file holds a different one, which is used"
    print(line, file=sys.stderr)
    return replace(config, tie_word_embeddings=False)


def _differences(tensors: Mapping[str, Stored], table: Mapping[str, TensorSpec]) -> list[str]:
    """One part of a sentence for each kind of deviation, naming all tensors that show it."""
    both = [(name, tensors[name], spec) for name, spec in table.items() if name in tensors]
    kinds = {
        "missing": [name for name in table if name not in tensors],
        "unexpected": [name for name in tensors if name not in table],
        "misshapen": [f"{n} {list(t.shape)} instead of {list(s.shape)}" for n, t, s in both if t.shape != s.shape],
        "not floating point": [f"{n} ({t.dtype})" for n, t, _ in both if t.dtype not in WEIGHT_DTYPES],
    }
    return [f"{kind}: {enumerated(names)}" for kind, names in kinds.items() if names]


def open_huggingface(folder: Path, config: Config) -> tuple[str, Config, dict[str, Stored]]:
    """In which form a folder holds a model, the config, and where every tensor of its table lies.

    The config comes back as it is, except that a tied one is untied where the file says otherwise. InputError lists all
    tensors that are missing, unexpected, misshapen or not floating point.
    """
    form, found = _read_headers(folder)
    tensors = _renamed(found, folder)
    config = _untied(config, tensors, folder)
    check_table(folder, config, tensors)
    return f"Hugging Face, {form}", config, tensors


def check_layers(folder: Path, config: Config, tensors: Sized) -> None:
    """InputError if there are more layers than tensors: a table of a billion layers would not end."""
    if config.num_hidden_layers > len(tensors):
        layers = config.num_hidden_layers
        raise InputError(
            f"{folder} does not fit its config, which has {layers} layers; it holds {len(tensors)} tensors"
        )


def check_table(folder: Path, config: Config, tensors: Mapping[str, Stored]) -> None:
    """InputError, which lists all of them, if tensors are missing, unexpected, misshapen or not floating point."""
    check_layers(folder, config, tensors)
    differences = _differences(tensors, tensor_table(config))
    if differences:
        raise InputError(f"{folder} does not fit its config; {'; '.join(differences)}")
