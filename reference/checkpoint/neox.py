"""The layout of EleutherAI/gpt-neox: what each model-parallel rank of a training run saved, put together again.

    latest                                      the name of the folder of the last step
    configs/*.yml                               what the model was trained with
    global_step150000/
        layer_02-model_00-model_states.pt       a layer of the pipeline as rank 0 holds it; model_01 is rank 1, ...
        mp_rank_00_model_states.pt              the state of the training; not opened
or, of runs without a pipeline,
        mp_rank_00_model_states.pt              all that rank 0 holds, its weights under module / sequential.{layer}.

Merging follows the kinds of tensors.py: columns, rows and the vocabulary are put end to end, and the biases of rows are
added up, as the ranks did it (a loader that takes one of them runs, and is wrong). What every rank should hold alike,
the norms, has drifted apart in training, because nothing synchronized it. So there is no one right whole, and a choice:

    mean      their average: what the released Hugging Face weights are. An approximation
    fold      exact: each rank's gain and bias go into its own rows of the matrices that read the norm
    per_rank  kept apart, for tensor parallelism of the same degree

Sources: tools/ckpts/convert_neox_to_hf.py, megatron/model/gpt2_model.py of EleutherAI/gpt-neox; issue 615 there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from neox.reference.checkpoint.huggingface import check_layers, check_table, enumerated
from neox.reference.checkpoint.stored import NAMES, Index, Stored, dtype_named, numpy_dtype, whole
from neox.reference.checkpoint.tensors import (
    AXES,
    EMBED_IN,
    EMBED_OUT,
    FINAL_LAYER_NORM,
    TensorSpec,
    layer_prefix,
    pipeline,
    tensor_table,
)
from neox.reference.checkpoint.torch_file import TRAINING_STATE, TorchTensor, read_torch, tensors_in, torch_tensors
from neox.reference.config import Config, config_from_neox
from neox.reference.errors import InputError
from neox.reference.model import Array

NORMS = ("mean", "fold", "per_rank")
LATEST = "latest"
STEP = re.compile(r"global_step(\d+)")
LAYER_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
RANK_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
SEQUENTIAL = re.compile(r"sequential\.(\d+)\.(.+)")

# Names that newer releases of gpt-neox give to what older ones called otherwise: their own, and TransformerEngine's.
RENAMED = {
    "mlp.linear1.weight": "mlp.dense_h_to_4h.weight",
    "mlp.linear1.bias": "mlp.dense_h_to_4h.bias",
    "mlp.linear2.weight": "mlp.dense_4h_to_h.weight",
    "mlp.linear2.bias": "mlp.dense_4h_to_h.bias",
    "attention.qkv.weight": "attention.query_key_value.weight",
    "attention.qkv.bias": "attention.query_key_value.bias",
    "attention.proj.weight": "attention.dense.weight",
    "attention.proj.bias": "attention.dense.bias",
    "mlp.fc1_weight": "mlp.dense_h_to_4h.weight",
    "mlp.fc1_bias": "mlp.dense_h_to_4h.bias",
    "mlp.fc2_weight": "mlp.dense_4h_to_h.weight",
    "mlp.fc2_bias": "mlp.dense_4h_to_h.bias",
    "mlp.layer_norm_weight": "post_attention_layernorm.weight",
    "mlp.layer_norm_bias": "post_attention_layernorm.bias",
}
EXTRA = "._extra_state"  # TransformerEngine's, for training in eight bits
FREQUENCIES = "attention.rotary_emb.inv_freq"  # computed here, but its length tells how much of a head is rotated

Layers = dict[int, dict[str, TorchTensor]]  # what one rank holds: by layer of the pipeline, under legacy names


# Which files.


def step_folder(folder: Path) -> Path:
    """The folder of the step to read: the one that `latest` names, or the only one, or `folder` itself."""
    if (folder / LATEST).is_file():
        name = (folder / LATEST).read_text(encoding="utf-8", errors="replace").strip()
        if not STEP.fullmatch(name):
            raise InputError(f"{folder / LATEST} must name a folder such as global_step1000, not {name[:40]!r}")
        if not (folder / name).is_dir():
            raise InputError(f"{folder / LATEST} names {name}, which is not there")
        return folder / name
    steps = sorted(path.name for path in folder.glob("global_step*") if STEP.fullmatch(path.name))
    if len(steps) > 1:
        raise InputError(f"{folder} holds {enumerated(steps)} and no {LATEST}: choose one by --revision")
    return folder / steps[0] if steps else folder


def _rank_files(folder: Path, pattern: re.Pattern[str]) -> list[tuple[Path, re.Match[str]]]:
    matches = [(path, pattern.fullmatch(path.name)) for path in sorted(folder.iterdir())]
    return [(path, match) for path, match in matches if match]


def is_neox(folder: Path) -> bool:
    named = (folder / LATEST).is_file() or any(STEP.fullmatch(path.name) for path in folder.glob("global_step*"))
    return named or bool(_rank_files(folder, LAYER_FILE) or _rank_files(folder, RANK_FILE))


def _legacy_names(tensors: Mapping[str, TorchTensor]) -> dict[str, TorchTensor]:
    return {RENAMED.get(name, name): tensor for name, tensor in tensors.items() if not name.endswith(EXTRA)}


def _layer(path: Path) -> dict[str, TorchTensor]:
    return _legacy_names(torch_tensors(path, TRAINING_STATE))


def _pipeline_ranks(folder: Path) -> list[Layers]:
    """From a file for each layer and rank. InputError lists those that are missing in between."""
    files = {(int(match[1]), int(match[2])): path for path, match in _rank_files(folder, LAYER_FILE)}
    ranks = max(rank for _, rank in files) + 1
    layers = sorted({layer for layer, _ in files})
    wanted = [(layer, rank) for layer in layers for rank in range(ranks)]
    missing = [
        f"layer_{layer:02}-model_{rank:02}-model_states.pt" for layer, rank in wanted if (layer, rank) not in files
    ]
    if missing:
        raise InputError(f"{folder} lacks {enumerated(missing)}")
    return [{layer: _layer(files[layer, rank]) for layer in layers} for rank in range(ranks)]


def _sequential_rank(path: Path) -> Layers:
    saved = read_torch(path, TRAINING_STATE)
    module = saved.content.get("module") if isinstance(saved.content, dict) else None
    layers: Layers = {}
    for name, tensor in tensors_in(module, saved.file).items():
        match = SEQUENTIAL.fullmatch(name)
        if not match:
            raise InputError(f"{path} holds {name}, which is in no layer: only sequential.{{layer}}.{{name}} is known")
        layers.setdefault(int(match[1]), {})[match[2]] = tensor
    if not layers:
        raise InputError(f"{path} holds no weights: it is the state of a training with a pipeline")
    return {layer: _legacy_names(tensors) for layer, tensors in sorted(layers.items())}


def _sequential_ranks(folder: Path) -> list[Layers]:
    files = {int(match[1]): path for path, match in _rank_files(folder, RANK_FILE)}
    missing = [f"mp_rank_{rank:02}_model_states.pt" for rank in range(max(files)) if rank not in files]
    if missing:
        raise InputError(f"{folder} lacks {enumerated(missing)}")
    return [_sequential_rank(files[rank]) for rank in sorted(files)]


def read_ranks(folder: Path) -> tuple[str, list[Layers]]:
    """In which form, and what each rank holds."""
    if _rank_files(folder, LAYER_FILE):
        return "layer files", _pipeline_ranks(folder)
    if _rank_files(folder, RANK_FILE):
        return "sequential", _sequential_ranks(folder)
    raise InputError(f"{folder} holds no weights of gpt-neox: no layer_00-model_00-model_states.pt")


# The config.


YAML_LENGTH = 1 << 18  # characters: some seconds for the library, and a hundred times what a config has


class Loader(yaml.SafeLoader):
    """Of plain values only, and to which 1e-5 is a number, as in JSON: to yaml of before 2009 it is text.

    Nothing may stand for something else in the file: twenty lines that do, one for two of the last, are a million.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """As the library does, but for an alias."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias, such as *a, which is not read here")
        return super().compose_node(parent, index)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(path: Path) -> Mapping[str, Any]:
    """The plain values of a mapping, and of others the type. InputError if the file holds no such thing."""
    try:
        text = path.read_text(encoding="utf-8")
        if len(text) > YAML_LENGTH:
            raise ValueError(f"{len(text)} characters are no config")
        content = yaml.load(text, Loader)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError, LookupError, AttributeError) as error:
        # The last two are what the library comes to of !!bool x and !!timestamp x.
        raise InputError(f"{path} is not valid yaml: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a mapping, not {type(content).__name__}")
    return {key: value if _is_plain(value) else type(value) for key, value in content.items() if isinstance(key, str)}


def _is_plain(value: Any) -> bool:
    """All that matters here is. Of integers, those that may have a million digits are not."""
    return value.bit_length() <= 64 if isinstance(value, int) else isinstance(value, (str, float, type(None)))


def _settings(folder: Path) -> tuple[list[Path], dict[str, Any]]:
    """All files of configs/, of the model or of the folder above a step, as gpt-neox itself puts them together."""
    homes = [home for home in (folder / "configs", folder.parent / "configs") if home.is_dir()]
    files = sorted(path for home in homes[:1] for path in home.iterdir() if path.suffix in (".yml", ".yaml"))
    merged: dict[str, Any] = {}
    for path in files:
        for key, value in read_yaml(path).items():
            name = key.replace("-", "_")
            if merged.setdefault(name, value) != value:
                raise InputError(f"{path}: {key} is {value!r}, but another file of {path.parent} says {merged[name]!r}")
    return files, merged


def _rows(ranks: Sequence[Layers], layer: int, name: str) -> int:
    """Of all ranks together; 0 where there is no such tensor."""
    held = [rank[layer][name].shape for rank in ranks if name in rank.get(layer, {})]
    return sum(shape[0] for shape in held if shape)


def inferred(folder: Path, ranks: Sequence[Layers], heads: int | None = None) -> Config:
    """From shapes. Heads are not in them, but in all known models a quarter of a head is rotated."""
    first = ranks[0].get(2, {})
    hidden = first["input_layernorm.weight"].shape[0] if "input_layernorm.weight" in first else 0
    frequencies = first[FREQUENCIES].shape[0] if FREQUENCIES in first else 0
    if heads is None and frequencies:
        heads = hidden // (8 * frequencies)  # a head has 4 * 2 * frequencies dims
    if not (hidden and heads):
        raise InputError(f"{folder} has no configs/*.yml to say how many heads there are: --set num_attention_heads=N")
    layers = sum("attention.dense.weight" in tensors for tensors in ranks[0].values())
    return Config(
        vocab_size=_rows(ranks, 0, "word_embeddings.weight"),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=_rows(ranks, 2, "mlp.dense_h_to_4h.weight"),
        tie_word_embeddings=_rows(ranks, layers + 4, "final_linear.weight") == 0,
        attention_bias="attention.dense.bias" in first,
    )


def _config(folder: Path, ranks: Sequence[Layers], overrides: Mapping[str, Any]) -> Config:
    files, settings = _settings(folder)
    if not files:
        return inferred(folder, ranks, overrides.get("num_attention_heads"))
    settings.setdefault("padded_vocab_size", _rows(ranks, 0, "word_embeddings.weight"))
    try:
        return config_from_neox(settings)
    except InputError as error:
        raise InputError(f"{files[0]}: {error}") from error


# Merging.


@dataclass(frozen=True)
class Merged:
    """A tensor from what every rank holds of it (a Stored of stored.py)."""

    sharding: str
    parts: tuple[Stored, ...]

    @property
    def path(self) -> Path:
        return self.parts[0].path

    @property
    def dtype(self) -> str:
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        shape = list(self.parts[0].shape)
        if self.sharding in AXES and len(shape) > AXES[self.sharding]:
            shape[AXES[self.sharding]] = sum(part.shape[AXES[self.sharding]] for part in self.parts)
        return tuple(shape)

    def read(self) -> Array:
        return self.part(whole(self.shape))

    def part(self, index: Index) -> Array:
        """By the rule of its kind, from no more than the index asks for."""
        if self.sharding in AXES:
            return self._joined(index)
        arrays = [part.part(index) for part in self.parts]
        if len(arrays) == 1 or (self.sharding == "replicated" and all(np.array_equal(a, arrays[0]) for a in arrays)):
            return arrays[0]
        total = np.sum([array.astype(np.float64) for array in arrays], axis=0)
        with np.errstate(over="ignore"):  # who reads it finds out that it is not finite
            return (total if self.sharding == "summed" else total / len(arrays)).astype(arrays[0].dtype)

    def _joined(self, index: Index) -> Array:
        """Reads no more than the ranks' parts that reach into the index."""
        axis = AXES[self.sharding]
        wanted, offset, found = index[axis], 0, []
        for part in self.parts:
            length = part.shape[axis]
            start, stop = max(wanted.start - offset, 0), min(wanted.stop - offset, length)
            if start < stop:
                found.append(part.part((*index[:axis], slice(start, stop), *index[axis + 1 :])))
            offset += length
        return found[0] if len(found) == 1 else np.concatenate(found, axis)


def _merged(ranks: Sequence[Layers], config: Config, folder: Path) -> dict[str, Stored]:
    """Every tensor that the ranks hold, under the names of tensor_table, or its own where that has none."""
    table = tensor_table(config)
    tensors: dict[str, Stored] = {}
    for layer, names in _held_names(ranks, config).items():
        for own, name in names.items():
            parts = [rank[layer][own] for rank in ranks if own in rank.get(layer, {})]
            _check_alike(name, parts, len(ranks))
            tensors[name] = Merged(table[name].sharding if name in table else "replicated", tuple(parts))
    return tensors


def _held_names(ranks: Sequence[Layers], config: Config) -> dict[int, dict[str, str]]:
    known = pipeline(config)
    return {
        layer: {
            own: known.get(layer, {}).get(own, f"layer {layer}'s {own}")
            for own in dict.fromkeys(name for rank in ranks for name in rank.get(layer, {}))
            if own != FREQUENCIES
        }
        for layer in sorted({layer for rank in ranks for layer in rank})
    }


def _check_alike(name: str, parts: Sequence[TorchTensor], ranks: int) -> None:
    """InputError if the parts cannot be those of one model."""
    if len(parts) != ranks:
        raise InputError(f"{parts[0].path} holds {name}, which {ranks - len(parts)} of the {ranks} ranks lack")
    first = parts[0]
    for part in parts[1:]:
        if (part.shape, part.dtype) != (first.shape, first.dtype):
            what = f"{list(part.shape)} in {part.dtype}, in {first.path.name} {list(first.shape)} in {first.dtype}"
            raise InputError(f"{part.path} is of another model: {name} is {what}")


# Norms.

DRIFT = 0.25  # of their length: those of one model differ by less than a hundredth, those of two by far more


def _readers(config: Config) -> dict[str, str]:
    """By norm: the matrix that reads it."""
    found = {FINAL_LAYER_NORM: EMBED_OUT.removesuffix(".weight")}
    for i in range(config.num_hidden_layers):
        prefix = layer_prefix(i)
        found[f"{prefix}.input_layernorm"] = f"{prefix}.attention.query_key_value"
        found[f"{prefix}.post_attention_layernorm"] = f"{prefix}.mlp.dense_h_to_4h"
    return found


def _parts(tensors: Mapping[str, Stored], name: str) -> tuple[Stored, ...]:
    """What each rank holds of a tensor; nothing of one that the model does not have."""
    tensor = tensors.get(name)
    return tensor.parts if isinstance(tensor, Merged) else ()


def check_drift(config: Config, tensors: Mapping[str, Stored]) -> None:
    """InputError if the norms of two ranks are so far apart that they cannot be of one model."""
    for norm in _readers(config):
        pairs = zip(_parts(tensors, f"{norm}.weight"), _parts(tensors, f"{norm}.bias"), strict=True)
        ranks = [(gain, np.concatenate([gain.read(), shift.read()]).astype(np.float64)) for gain, shift in pairs]
        first, length = ranks[0][1], np.linalg.norm(ranks[0][1])
        for gain, numbers in ranks[1:]:
            if not np.linalg.norm(numbers - first) <= DRIFT * length:
                raise InputError(f"{gain.path} is of another model: {norm} is far from that of {ranks[0][0].path.name}")


# Norms, exactly.

ROWS = 2048  # of a matrix in float64 at a time: 100 MB of the 20B's


@dataclass(frozen=True)
class Computed:
    """A tensor that is computed from others, any part of it (a Stored of stored.py)."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    compute: Callable[[Index], Array]

    def read(self) -> Array:
        return self.part(whole(self.shape))

    def part(self, index: Index) -> Array:
        return self.compute(index).astype(numpy_dtype(self), copy=False)


@dataclass(frozen=True)
class Fold:
    """What a rank holds of a matrix that reads a norm, of its bias if it has one, and of the norm.

        W (g n + b) + c  =  (W diag(g)) n + (W b + c)

    n, the normalized input, sums to zero. Where there is no bias to take W b up, the norm keeps a bias of ones and the
    matrix gets a number more in all of a row, which n does not see and the ones do:

        W' = W diag(g) + u 1^T,   u = (W b - W g) / C,   W' (n + 1) = W g n + W g + C u = W g n + W b
    """

    weight: Stored
    bias: Stored | None
    gain: Stored
    shift: Stored

    def _rows(self, index: Index) -> Iterator[tuple[slice, Array]]:
        """All of each row, in float64."""
        for start in range(index[0].start, index[0].stop, ROWS):
            rows = slice(start, min(start + ROWS, index[0].stop))
            yield rows, self.weight.part((rows, slice(0, self.weight.shape[1]))).astype(np.float64)

    def matrix(self, dtype: np.dtype, index: Index) -> Array:
        """W', or a part of it."""
        gain, shift = self.gain.read().astype(np.float64), self.shift.read().astype(np.float64)
        made = []
        for _, weight in self._rows(index):
            folded = weight * gain
            if self.bias is None:
                folded += (weight @ (shift - gain) / gain.size)[:, None]
            made.append(folded[:, index[1]].astype(dtype))
        return np.concatenate(made)

    def vector(self, index: Index) -> Array:
        """W b + c, or a part of it."""
        assert self.bias is not None
        shift = self.shift.read().astype(np.float64)
        return np.concatenate([weight @ shift + self.bias.part((rows,)) for rows, weight in self._rows(index)])


def _folded_reader(folds: Sequence[Fold]) -> tuple[Stored, Stored | None]:
    """The matrix that reads a norm, and its bias: of each rank, end to end.

    In float32 from half precision, whose products it holds exactly, and else in float64.
    """
    weights: list[Stored] = []
    biases: list[Stored] = []
    for fold in folds:
        path, shape = fold.weight.path, fold.weight.shape
        dtype = "F32" if fold.weight.dtype in ("F16", "BF16") else "F64"
        weights.append(Computed(path, dtype, shape, partial(fold.matrix, dtype_named(NAMES[dtype], path))))
        if fold.bias is not None:
            biases.append(Computed(path, dtype, shape[:1], fold.vector))
    return Merged("column", tuple(weights)), Merged("column", tuple(biases)) if biases else None


def _constant(like: Stored, value: float) -> Computed:
    return Computed(like.path, like.dtype, like.shape, lambda index: np.full(index[0].stop - index[0].start, value))


def folded(config: Config, tensors: Mapping[str, Stored]) -> tuple[Config, dict[str, Stored]]:
    """The same model with norms that only normalize, exactly. A tied head is untied, for it changes."""
    result: dict[str, Stored] = dict(tensors)
    if config.tie_word_embeddings:
        result[EMBED_OUT] = tensors[EMBED_IN]
    for norm, reader in _readers(config).items():
        weights, biases, gains, shifts = (
            _parts(result, f"{name}.{kind}") for name in (reader, norm) for kind in ("weight", "bias")
        )
        each = zip(weights, biases or [None] * len(weights), gains, shifts, strict=True)
        weight, bias = _folded_reader([Fold(*rank) for rank in each])
        result[f"{reader}.weight"] = weight
        if bias is not None:
            result[f"{reader}.bias"] = bias
        result[f"{norm}.weight"] = _constant(gains[0], 1)
        result[f"{norm}.bias"] = _constant(shifts[0], 1 if bias is None else 0)
    return replace(config, tie_word_embeddings=False), result


def of_rank(tensors: Mapping[str, Stored], table: Mapping[str, TensorSpec], rank: int) -> dict[str, Stored]:
    """The same tensors, the norms as one rank has them."""
    result = dict(tensors)
    for name, spec in table.items():
        stored = result[name]
        if spec.sharding == "replicated" and isinstance(stored, Merged):
            result[name] = stored.parts[rank]
    return result


def open_neox(
    folder: Path, overrides: Mapping[str, Any], norms: str, rank: int, ranks: int
) -> tuple[str, Config, dict[str, Stored]]:
    """In which form, the config, and where every tensor of its table lies. norms: one of NORMS; rank of ranks for
    per_rank. InputError for everything that can be wrong with the files.
    """
    step = step_folder(folder)
    form, held = read_ranks(step)
    config = replace(_config(step, held, overrides), **overrides)
    check_layers(step, config, [name for layer in held[0].values() for name in layer])
    tensors = _merged(held, config, step)
    check_table(step, config, tensors)
    check_drift(config, tensors)
    if norms == "fold":
        config, tensors = folded(config, tensors)
    if norms == "per_rank":
        if ranks != len(held):
            raise InputError(f"{step} was trained on {len(held)} ranks: their norms cannot be kept apart on {ranks}")
        tensors = of_rank(tensors, tensor_table(config), rank)
    return f"gpt-neox, {form} of {len(held)} rank(s)", config, tensors
