"""Say what is in a checkpoint: its layout and shape, every tensor, what it needs; or how it differs from another.

    python examples/inspect_checkpoint.py pythia-70m
    python examples/inspect_checkpoint.py path/to/a --compare path/to/b
    python examples/inspect_checkpoint.py path/to/ranks --merges

The checksum at the end is that of the numbers: it is the same for the same weights in every layout and dtype.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from neox.reference.checkpoint.hub import find
from neox.reference.checkpoint.layouts import Source, source_in
from neox.reference.checkpoint.load import load
from neox.reference.checkpoint.summary import Progress, Summary, checksum, difference, summarize
from neox.reference.checkpoint.tensors import TensorSpec, tensor_table
from neox.reference.config import Config, parameter_count
from neox.reference.cores import cores
from neox.reference.costs import cached_numbers
from neox.reference.errors import Parser, run
from neox.reference.model import Array, Model, forward

MERGES = ("mean", "fold")
T = TypeVar("T")
PROMPT = 64  # tokens on which merges are compared
LONGEST = 10  # tensors named in a list before the rest is counted


def parser() -> Parser:
    flags = Parser(description="Say what is in a checkpoint.", allow_abbrev=False)
    flags.add_argument("model", help="a folder, or a name on huggingface.co such as pythia-70m")
    flags.add_argument("--revision", help="of a named model, such as step1000; of a folder, a folder inside it")
    flags.add_argument("--layer-norms", choices=MERGES, default=MERGES[0], help="of several ranks: how they are merged")
    flags.add_argument("--compare", metavar="OTHER", help="another one: which tensors differ, and by how much")
    flags.add_argument("--merges", action="store_true", help="what merging the ranks' norms does to logits")
    flags.add_argument("--json", action="store_true", help="print one JSON object")
    return flags


# What is read.


def each(source: Source, work: Callable[[TensorSpec, Progress], T]) -> dict[str, T]:
    """Something for every tensor, on every core, with progress."""
    specs = list(tensor_table(source.config).values())
    with (
        tqdm(total=sum(spec.size for spec in specs), unit="weights", unit_scale=True, disable=None, leave=False) as bar,
        ThreadPoolExecutor(cores()) as pool,
    ):
        results = pool.map(lambda spec: work(spec, bar.update), specs)
        return {spec.name: result for spec, result in zip(specs, results, strict=True)}


def summaries_of(source: Source) -> dict[str, Summary]:
    return each(source, lambda spec, progress: summarize(source.get(spec), progress))


def memory_needed(config: Config, half: bool) -> dict[str, dict[str, int]]:
    """Bytes for each way to run the model: of the weights, and of the cache for its whole context.

    half: the weights are stored in half precision, so that they can be widened as they are used.
    """
    weights, cached = parameter_count(config), cached_numbers(config, config.max_position_embeddings)
    ways = {"reference, float64": (8, 8), "reference, float32": (4, 4)}
    if half:
        ways["reference, float32, weights on disk"] = (0, 4)
    ways |= {"gpu, float32": (4, 4), "gpu, float16 or bfloat16": (2, 2)}
    return {name: {"weights": w * weights, "cache": c * cached} for name, (w, c) in ways.items()}


def inspect(source: Source) -> dict[str, Any]:
    summaries = summaries_of(source)
    half = all(summary.dtype in ("float16", "bfloat16") for summary in summaries.values())
    tensors = {}
    for name, summary in summaries.items():
        tensors[name] = {key: value for key, value in asdict(summary).items() if key != "digest"}
    return {
        "layout": source.layout,
        "config": asdict(source.config),
        "parameters": parameter_count(source.config),
        "tensors": tensors,
        "memory": memory_needed(source.config, half),
        "checksum": checksum(summaries),
    }


def compare(a: Source, b: Source) -> dict[str, Any]:
    """Fields and tensors that differ, and tensors that only one of the two has, or in another shape."""
    ours, theirs = asdict(a.config), asdict(b.config)
    fields = {name: [ours[name], theirs[name]] for name in ours if ours[name] != theirs[name]}
    table, other = tensor_table(a.config), tensor_table(b.config)
    alone = sorted(name for name in {*table, *other} if table.get(name) != other.get(name))
    differences = {} if alone else each(a, lambda spec, progress: difference(spec, a, b, progress))
    different = {name: asdict(found) for name, found in differences.items() if found.count}
    return {"config": fields, "not_comparable": alone, "tensors": different, "same": not (fields or alone or different)}


def log_probabilities(model: Model, ids: Array) -> Array:  # (B,T) -> (B,T,V)
    logits = forward(model, ids).astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def effect_of_merging(folder: Path) -> dict[str, float]:
    """How far the logits of norms that were averaged lie from those of folded ones, which are exact."""
    models = {merge: load(folder, weights="streamed", layer_norms=merge) for merge in MERGES}
    config = models["fold"].config
    ids = np.random.default_rng(0).integers(config.vocab_size, size=(1, min(PROMPT, config.max_position_embeddings)))
    mean, exact = (log_probabilities(models[merge], ids) for merge in MERGES)
    return {
        "largest difference of a log-probability": float(abs(mean - exact).max()),
        "mean Kullback-Leibler divergence, nats": float((np.exp(exact) * (exact - mean)).sum(axis=-1).mean()),
        "positions with another best token": float((mean.argmax(axis=-1) != exact.argmax(axis=-1)).mean()),
    }


# What is printed.


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


def tensor_line(name: str, t: Mapping[str, Any]) -> str:
    wrong = "".join(f"  {t[key]} {key.replace('_', ' ')}" for key in ("not_a_number", "infinite") if t[key])
    shape = "x".join(map(str, t["shape"]))
    return f"{name:58} {shape:>12} {t['dtype']:8} {t['smallest']:11.4g} {t['largest']:11.4g} {t['norm']:11.4g}{wrong}"


def as_text(report: Mapping[str, Any]) -> str:
    config = ", ".join(f"{name} {value}" for name, value in report["config"].items())
    title = f"{'':58} {'shape':>12} {'dtype':8} {'smallest':>11} {'largest':>11} {'norm':>11}"
    memory = [
        f"  {way:36} {gigabytes(need['weights']):>8} + {gigabytes(need['cache']):>8}"
        for way, need in report["memory"].items()
    ]
    return "\n".join(
        [
            f"layout      {report['layout']}",
            f"parameters  {report['parameters']:,}",
            f"config      {config}",
            "",
            title,
            *(tensor_line(name, tensor) for name, tensor in report["tensors"].items()),
            "",
            "memory      weights + cache of the whole context",
            *memory,
            "",
            f"checksum    {report['checksum']}",
        ]
    )


def difference_line(name: str, d: Mapping[str, Any]) -> str:
    share = f"{d['count']:,} of {d['size']:,} numbers"
    return f"  {name:58} {share}, by {d['largest']:.3g} at most ({d['relative']:.2g} of the largest)"


def comparison_text(found: Mapping[str, Any]) -> str:
    if found["same"]:
        return "the same config and the same numbers"
    fields = [f"  {name}: {ours!r} and {theirs!r}" for name, (ours, theirs) in found["config"].items()]
    tensors = [difference_line(name, d) for name, d in found["tensors"].items()]
    parts = (
        ("config differs", fields),
        ("not comparable, of another shape or in one only", [f"  {name}" for name in found["not_comparable"]]),
        (f"{len(tensors)} tensors differ", tensors),
    )
    lines = [f"{title}:\n" + "\n".join(shortened(lines)) for title, lines in parts if lines]
    return "\n".join(lines)


def shortened(lines: Sequence[str]) -> list[str]:
    more = [f"  and {len(lines) - LONGEST} more"] if len(lines) > LONGEST else []
    return [*lines[:LONGEST], *more]


def merging_text(effect: Mapping[str, float]) -> str:
    lines = [f"  {name:42} {value:.3g}" for name, value in effect.items()]
    return "\n".join([f"norms merged by their mean, on {PROMPT} drawn tokens, against the exact fold:", *lines])


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    folder = find(args.model, args.revision)
    if args.merges:
        effect = effect_of_merging(folder)
        print(json.dumps(effect) if args.json else merging_text(effect))
        return
    source = source_in(folder, args.layer_norms)
    if args.compare is not None:
        found = compare(source, source_in(find(args.compare), args.layer_norms))
        print(json.dumps(found) if args.json else comparison_text(found))
        sys.exit(0 if found["same"] else 1)
    report = inspect(source)
    print(json.dumps(report) if args.json else as_text(report))


if __name__ == "__main__":
    run(main)
