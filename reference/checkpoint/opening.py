"""A folder is opened: which layout it has, the config, and where each tensor lies. Nothing but headers is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from neox.reference.checkpoint.huggingface import is_huggingface, open_huggingface
from neox.reference.checkpoint.neox import NORMS, is_neox, open_neox
from neox.reference.checkpoint.stored import Stored
from neox.reference.config import Config, read_config
from neox.reference.errors import InputError


@dataclass(frozen=True)
class Checkpoint:
    """layout: in words. tensors: under the names of tensor_table(config), all of them."""

    layout: str
    config: Config
    tensors: Mapping[str, Stored]


def _check_overrides(overrides: Mapping[str, Any]) -> None:
    known = [field.name for field in fields(Config)]
    unknown = [name for name in overrides if name not in known]
    if unknown:
        raise InputError(f"a config has no {', '.join(unknown)}; it has {', '.join(known)}")


def open_checkpoint(
    folder: Path,
    overrides: Mapping[str, Any] | None = None,
    layer_norms: str = "mean",
    rank: int = 0,
    ranks: int = 1,
) -> Checkpoint:
    """The checkpoint in a folder, of any layout. overrides replace fields of its config.

    layer_norms: how norms are merged that each rank of a training has kept for itself, one of neox.NORMS; per_rank
    needs to know for which rank of how many. InputError for everything that can be wrong with the files; it lists all
    tensors that are missing, unexpected, misshapen or not floating point.
    """
    fields_given = dict(overrides or {})
    _check_overrides(fields_given)
    if layer_norms not in NORMS:
        raise InputError(f"layer_norms must be one of {', '.join(NORMS)}, not {layer_norms!r}")
    if is_huggingface(folder) or not is_neox(folder):
        return Checkpoint(*open_huggingface(folder, replace(read_config(folder), **fields_given)))
    return Checkpoint(*open_neox(folder, fields_given, layer_norms, rank, ranks))
