"""Write a checkpoint of a known shape with drawn weights: to try what a model costs before it is downloaded.

    python examples/random_checkpoint.py gpt-neox-20b out
    python examples/random_checkpoint.py gpt-neox-20b out --layers 4 --to neox --ranks 2

One tensor at a time is in memory. The same shape and seed give the same numbers in every layout.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from convert import DTYPES, LAYOUTS, numpy_dtype, parse_size
from tqdm import tqdm

from neox.reference.checkpoint.layouts import Source, huggingface_files, neox_files
from neox.reference.checkpoint.output import OutputFile, write_output
from neox.reference.checkpoint.tensors import TensorSpec
from neox.reference.config import GPT_NEOX_20B, PYTHIA, Config
from neox.reference.errors import InputError, Parser, run
from neox.reference.model import Array
from neox.reference.random_weights import random_tensor

SHAPES = {f"pythia-{size}": config for size, config in PYTHIA.items()} | {"gpt-neox-20b": GPT_NEOX_20B}


def parser() -> Parser:
    flags = Parser(description="Write a checkpoint of a known shape with drawn weights.", allow_abbrev=False)
    flags.add_argument("shape", choices=list(SHAPES))
    flags.add_argument("folder", type=Path, help="where to write; must not exist")
    flags.add_argument("--layers", type=int, help="fewer than the shape has")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--to", choices=LAYOUTS, default=LAYOUTS[0], help="the layout to write")
    flags.add_argument("--dtype", choices=DTYPES, default="float16")
    flags.add_argument("--shard-size", default="5GB", metavar="SIZE", help="of --to huggingface: largest file")
    flags.add_argument("--ranks", type=int, default=1, metavar="M", help="of --to neox: model-parallel ranks")
    return flags


def config_of(args: argparse.Namespace) -> Config:
    whole = SHAPES[args.shape]
    layers = whole.num_hidden_layers if args.layers is None else args.layers
    if not 1 <= layers <= whole.num_hidden_layers:
        raise InputError(f"--layers must be from 1 to {whole.num_hidden_layers}, not {layers}")
    return replace(whole, num_hidden_layers=layers)


def files_of(args: argparse.Namespace) -> list[OutputFile]:
    if args.seed < 0:
        raise InputError(f"--seed must not be negative, not {args.seed}")
    dtype = numpy_dtype(args.dtype)

    def get(spec: TensorSpec) -> Array:
        return random_tensor(spec, args.seed).astype(dtype)

    drawn = Source("drawn", config_of(args), lambda spec: dtype, get)
    if args.to == "neox":
        return neox_files(drawn, args.ranks, 0)
    return huggingface_files(drawn, parse_size(args.shard_size))


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    files = files_of(args)
    total = sum(file.nbytes for file in files)
    options = {name: value for name, value in vars(args).items() if name != "folder"}
    with tqdm(total=total, unit="B", unit_scale=True, desc="drawing", disable=None) as bar:
        write_output(args.folder, files, options, bar.update)
    print(f"{args.folder}: {len(files)} files, {total / 1e9:.3g} GB of tensors", file=sys.stderr)


if __name__ == "__main__":
    run(main)
