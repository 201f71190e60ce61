"""How a model learns: metrics over the checkpoints of a training.

    python examples/training_dynamics.py path/to/series --picture dynamics.png
    python examples/training_dynamics.py pythia-70m --steps 0 512 1000 10000 143000 --metrics loss induction

A series is a folder of step{N} folders, or a name on the Hub whose revisions are steps; by default, that of the
shipped model. Steps that were not kept are taken from the nearest one that was. Metrics:
    loss         nats per byte of a text, which does not depend on the tokenizer: --text, or a few lines of our own
    arithmetic   the part of two-digit sums and differences (recipe.py) that greedy decoding answers exactly
    copying      the part of a second copy of random tokens that is predicted exactly
    induction    how much the best head attends to what followed a token the last time, on random tokens repeated
    depth        after which part of the layers the logit lens says what the model says, in the mean over the text
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from logit_lens import depth, read
from measure import arithmetic, induction
from pictures import Subject, parsed, pyplot, save, table
from tqdm import tqdm

from neox.reference import Series, forward, load_tokenizer, open_series
from neox.reference.checkpoint.save import write_file
from neox.reference.errors import InputError, Parser, run
from neox.reference.lens import induction_scores
from neox.reference.model import Array

SERIES = Path(__file__).with_name("series")  # of the shipped model
TEXT = """Mary took her basket and walked down to the river, where the boats lay waiting for the wind. "Will you carry
me over?" she asked the old ferryman. He looked at the sky, and then at the water, and shook his head. "Not today," he
said, "the river is too high. But come again tomorrow, and I will carry you over, and your basket too."
"""


@dataclass(frozen=True)
class Text:
    """The beginning of a text, as much as a context holds."""

    ids: list[int]
    size: int  # in bytes, without the first token, which nothing predicts


def beginning(of: Subject, text: str) -> Text:
    ids = of.tokenizer.encode(text)[: of.model.config.max_position_embeddings]
    if len(ids) < 2:
        raise InputError("the text has fewer than two tokens")
    return Text(ids, sum(len(of.tokenizer.token_bytes(i)) for i in ids[1:]))


# Metrics.


def log_probabilities(logits: Array) -> Array:  # (...,V), in float64
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def loss(of: Subject, text: Text) -> float:
    found = log_probabilities(forward(of.model, [text.ids])[0, :-1])
    return float(-found[np.arange(len(text.ids) - 1), text.ids[1:]].sum() / text.size)


def best_head(of: Subject, _: Text) -> float:
    length = min(50, of.model.config.max_position_embeddings // 2)
    return float(induction_scores(of.model, length=length).max())


METRICS: Mapping[str, Callable[[Subject, Text], float]] = {
    "loss": loss,
    "arithmetic": lambda of, _: float(np.mean(list(arithmetic(of.model, of.tokenizer).values()))),
    "copying": lambda of, _: induction(of.model, of.tokenizer),
    "induction": best_head,
    "depth": lambda of, text: float(depth(read(of, text.ids).top).mean()),
}
WORDS = {
    "loss": "nats per byte of text",
    "arithmetic": "exact answers of sums",
    "copying": "exact copies of random tokens",
    "induction": "attention of the best induction head",
    "depth": "part of the layers until the answer is settled",
}


@dataclass(frozen=True)
class Point:
    step: int
    values: dict[str, float]


def measured(series: Series, step: int, metrics: Sequence[str], text: str) -> Point:
    of = Subject(f"step {step}", series[step], load_tokenizer(series.folder(step)))
    read_text = beginning(of, text)
    return Point(step, {name: METRICS[name](of, read_text) for name in metrics})


def chosen(series: Series, steps: Sequence[int] | None) -> list[int]:
    return sorted({series.nearest(step) for step in steps}) if steps else list(series)


# What is shown.


def cell(name: str, value: float) -> str:
    return f"{value:.3f}" if name == "loss" else f"{value:.1%}"


def text_table(points: Sequence[Point]) -> str:
    metrics = list(points[0].values)
    rows = [[cell(name, value) for name, value in point.values.items()] for point in points]
    return table(rows, [f"step {point.step}" for point in points], metrics)


def draw(points: Sequence[Point], title: str, path: Path) -> None:
    """A panel for each metric, over steps on a scale that shows the first ones too."""
    metrics = list(points[0].values)
    figure, panels = pyplot().subplots(
        len(metrics), 1, figsize=(7, 1.2 + 1.7 * len(metrics)), sharex=True, layout="constrained", squeeze=False
    )
    steps = [point.step for point in points]
    for axes, name, colour in zip(panels[:, 0], metrics, ("C0", "C1", "C2", "C3", "C4"), strict=False):
        values = [point.values[name] for point in points]
        axes.plot(steps, values, "o-", markersize=4, color=colour, clip_on=False)
        axes.set_title(f"{name}: {WORDS[name]}", fontsize=9, loc="left")
        axes.set_ylim(*((0, 1.1 * max(values)) if name == "loss" else (-0.04, 1.04)))
        axes.grid(alpha=0.3)
    last = panels[-1, 0]
    last.set_xscale("symlog", linthresh=1)
    last.set_xlim(0, max(steps) * 1.15 + 1)
    last.set_xlabel("step")
    figure.suptitle(title, fontsize=11, parse_math=False)
    save(figure, path)


# The program.


def flags(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description="Measure the checkpoints of a training.", allow_abbrev=False)
    parser.add_argument("series", nargs="?", metavar="PATH|NAME", help="a folder of step{N} folders, or pythia-70m")
    parser.add_argument("--metrics", nargs="+", choices=list(METRICS), default=list(METRICS), metavar="NAME")
    parser.add_argument("--steps", type=int, nargs="+", metavar="N", help="only these; default: all")
    parser.add_argument("--text", type=Path, metavar="FILE", help="its beginning, for loss and depth")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw it: .png, .svg or .pdf; needs matplotlib")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    return parsed(parser, argv)


def read_text(path: Path | None) -> str:
    if path is None:
        return TEXT
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--text {path} cannot be read as UTF-8: {error}") from error


def series_of(place: str | None) -> Series:
    if place is not None:
        return open_series(place)
    if not SERIES.is_dir():
        raise InputError(f"{SERIES} is not there: name a folder of step{{N}} folders, or pythia-70m")
    return open_series(SERIES)


def main(argv: Sequence[str] | None = None) -> None:
    args = flags(argv)
    text, series = read_text(args.text), series_of(args.series)
    metrics = list(dict.fromkeys(args.metrics))
    steps = tqdm(chosen(series, args.steps), "measuring", unit="checkpoints", disable=None, leave=False)
    points = [measured(series, step, metrics, text) for step in steps]
    print(text_table(points))
    if args.json:
        content = [{"step": point.step, **point.values} for point in points]
        write_file(args.json, (json.dumps(content, indent=1) + "\n").encode())
    if args.picture:
        draw(points, f"Training of {Path(series.place).name}", args.picture)


if __name__ == "__main__":
    run(main)
