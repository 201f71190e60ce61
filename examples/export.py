"""Write a model in half precision, to share: half the size, and what most programs load.

    python examples/export.py run/step2000 my-model
    python examples/export.py run series --steps 0 16 128 1000 2000

The second form writes series/step0, series/step16, ..., a model of each, which generate.py and every other program of
this project reads as --model series --revision step16. What only training needs is left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from tqdm import tqdm

from neox.reference import load
from neox.reference.checkpoint.load import is_finite
from neox.reference.checkpoint.save import model_files, write_folder
from neox.reference.checkpoint.tensors import named_tensors
from neox.reference.errors import InputError, Parser, run


def export(source: Path, target: Path, dtype: str) -> int:
    """Write one model; returns its bytes. InputError if a weight is too large for the dtype."""
    model = load(source, weights="stored")
    for name, array in named_tensors(model.config, model.params).items():
        with np.errstate(over="ignore"):
            if not is_finite(array.astype(dtype)):
                raise InputError(f"{source}: {name} holds values that are too large for {dtype}")
    tokenizer = source / "tokenizer.json"
    if not tokenizer.is_file():
        raise InputError(f"{source} has no tokenizer.json, without which its model reads no text")
    files = model_files(model, dtype, tokenizer.read_bytes())
    write_folder(target, files)
    return sum(map(len, files.values()))


def flags() -> argparse.Namespace:
    parser = Parser(description="Write a model in half precision.", allow_abbrev=False)
    parser.add_argument("source", type=Path, help="a model's folder, or with --steps one of step{N} folders")
    parser.add_argument("target", type=Path, help="folder to write; it must not exist")
    parser.add_argument("--steps", type=int, nargs="+", metavar="N")
    parser.add_argument("--dtype", choices=["float16", "float32"], default="float16")
    return parser.parse_args()


def main() -> None:
    args = flags()
    if args.target.exists():
        raise InputError(f"{args.target} exists: name another folder, or move it away")
    names = [f"step{step}" for step in args.steps] if args.steps else [""]
    for name in tqdm(names, "exporting", disable=None, leave=False):
        size = export(args.source / name, args.target / name, args.dtype)
        print(f"{args.target / name}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    run(main)
