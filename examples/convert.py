"""Convert a checkpoint from one layout to another.

    python examples/convert.py pythia-160m out                            Hugging Face's layout, in shards of 5 GB
    python examples/convert.py path/to/model out --dtype float16
    python examples/convert.py path/to/model out --to neox --ranks 2      gpt-neox's layer files, for two ranks

One tensor at a time is in memory. The new folder appears when it is whole; an interrupted run goes on where it ended
when the same command is given again.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from neox.reference.checkpoint.hub import find
from neox.reference.checkpoint.layouts import Source, as_dtype, huggingface_files, neox_files, source_in
from neox.reference.checkpoint.output import OutputFile, copied_file, write_output
from neox.reference.errors import InputError, Parser, run
from neox.reference.tokenizer import tokenizer_file

MERGES = ("mean", "fold")
LAYOUTS = ("huggingface", "neox")
DTYPES = ("float16", "bfloat16", "float32")
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parser() -> Parser:
    flags = Parser(description="Convert a checkpoint from one layout to another.", allow_abbrev=False)
    flags.add_argument("source", help="a folder, or a name on huggingface.co such as pythia-70m")
    flags.add_argument("folder", type=Path, help="where to write; must not exist")
    flags.add_argument("--revision", help="of a named model, such as step1000; of a folder, a folder inside it")
    flags.add_argument("--layer-norms", choices=MERGES, default=MERGES[0], help="of several ranks: how they are merged")
    flags.add_argument("--to", choices=LAYOUTS, default=LAYOUTS[0], help="the layout to write")
    flags.add_argument("--dtype", choices=DTYPES, help="of the tensors; without it, as they are stored")
    flags.add_argument(
        "--shard-size", default="5GB", metavar="SIZE", help="of --to huggingface: largest file, as 500MB"
    )
    flags.add_argument("--ranks", type=int, default=1, metavar="M", help="of --to neox: model-parallel ranks")
    flags.add_argument("--step", type=int, default=0, metavar="N", help="of --to neox: the number in global_step{N}")
    return flags


def parse_size(text: str) -> int:
    """Bytes: 5GB, 500MB, 12345. InputError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]B)?", text.upper())
    size = float(match[1]) * UNITS[match[2] or ""] if match else 0
    if size < 1:
        raise InputError(f"--shard-size must be a size such as 5GB or 500MB, not {text!r}")
    return int(size)


def numpy_dtype(name: str) -> np.dtype:
    if name == "bfloat16":
        try:
            import ml_dtypes  # noqa: F401 - teaches NumPy the name
        except ModuleNotFoundError as error:
            raise InputError('bfloat16 needs one more package: pip install "neox20b[bf16]"') from error
    return np.dtype(name)


def files_of(args: argparse.Namespace, source: Source, folder: Path) -> list[OutputFile]:
    tokenizer = tokenizer_file(folder)
    named = {"huggingface": "tokenizer.json", "neox": "20B_tokenizer.json"}[args.to]
    copied = [copied_file(named, tokenizer)] if tokenizer.is_file() else []
    if args.to == "neox":
        return [*neox_files(source, args.ranks, args.step), *copied]
    return [*huggingface_files(source, parse_size(args.shard_size)), *copied]


def plan(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What the new files follow from: the source's files as they are now, and the options."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    seen = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    options = {name: getattr(args, name) for name in ("to", "dtype", "shard_size", "ranks", "step", "layer_norms")}
    return {"source": seen, "options": options}


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    folder = find(args.source, args.revision)
    source = source_in(folder, args.layer_norms)
    if args.dtype is not None:
        source = as_dtype(source, numpy_dtype(args.dtype))
    if args.to == "neox" and args.ranks & (args.ranks - 1):
        print(f"biases divided by {args.ranks} are rounded: only powers of two come back exactly", file=sys.stderr)
    files = files_of(args, source, folder)
    total = sum(file.nbytes for file in files)
    with tqdm(total=total, unit="B", unit_scale=True, desc="converting", disable=None) as bar:
        write_output(args.folder, files, plan(args, folder), bar.update)
    print(f"{args.folder}: {len(files)} files, {total / 1e9:.3g} GB of tensors", file=sys.stderr)


if __name__ == "__main__":
    run(main)
