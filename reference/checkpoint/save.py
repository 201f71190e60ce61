"""Writing a checkpoint: a folder in Hugging Face's layout that is there whole, or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.numpy import save

from neox.reference.checkpoint.huggingface import SINGLE
from neox.reference.checkpoint.tensors import named_tensors
from neox.reference.config import config_to_dict
from neox.reference.errors import InputError
from neox.reference.model import Array, Model


def tensor_bytes(tensors: Mapping[str, Array]) -> bytes:
    """A safetensors file, as transformers expects it."""
    return save(dict(tensors), {"format": "pt"})


def json_bytes(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode("utf-8")


END_OF_TEXT = "<|endoftext|>"


def _tokenizer_config(length: int) -> dict[str, Any]:
    """What transformers needs to know beside tokenizer.json; without it, it pads with an id that the model may lack."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT),
        "clean_up_tokenization_spaces": False,
        "model_max_length": length,
    }


def model_files(model: Model, dtype: str, tokenizer: bytes) -> dict[str, bytes]:
    """The files that another program needs to run the model, by name. tokenizer: the contents of a tokenizer.json."""
    tensors = {name: array.astype(dtype) for name, array in named_tensors(model.config, model.params).items()}
    config = {**config_to_dict(model.config), "dtype": dtype}
    files = {SINGLE: tensor_bytes(tensors), "config.json": json_bytes(config), "tokenizer.json": tokenizer}
    if END_OF_TEXT.encode() in tokenizer:
        files["tokenizer_config.json"] = json_bytes(_tokenizer_config(model.config.max_position_embeddings))
    return files


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_file(path: Path, content: bytes) -> None:
    """Replace a file, or make it and its folder, in one moment.

    InputError if it cannot be written, as when the disk is full; then an old one is still there.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_durably(partial, content)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Make a folder with these files, in one moment; one of that name gives way.

    InputError if it cannot be written, as when the disk is full; then nothing of it is left.
    """
    partial = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed while it wrote
        partial.mkdir(parents=True)
        for name, content in files.items():
            _write_durably(partial / name, content)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise InputError(f"cannot write {folder}: {error.strerror}") from error
