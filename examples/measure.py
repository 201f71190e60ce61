"""What the shipped model has learned, over the checkpoints of its training.

    python examples/measure.py run --held-out text/held-out --picture learning.png
    python examples/measure.py first:9000 second --held-out text/held-out

For each step{N} of the folder, a line of (in the second form, the second run went on after step 9000 of the first):
    arithmetic   the part of held-out questions (recipe.py) about two-digit numbers that greedy decoding answers exactly
    induction    the part of a second copy of random tokens that is predicted exactly; chance is one in a vocabulary
    stories      with --held-out: nats per byte of each held-out text, which does not depend on the tokenizer
Nothing of it was trained on: of every pair of numbers asked about, neither order nor operation was.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from recipe import answer, held_out_questions, question
from tqdm import tqdm
from train import smooth

from neox.reference import CachedDecoder, Model, Request, Tokenizer, complete, forward, load, load_tokenizer
from neox.reference.checkpoint.save import write_file
from neox.reference.corpus import documents, pack
from neox.reference.errors import InputError, Parser, run
from neox.reference.train import held_out_loss, saved_steps

QUESTIONS_AT_ONCE = 256
HELD_OUT_ROWS = 100  # of each text
RANDOM_ROWS, RANDOM_LENGTH = 16, 40


@dataclass(frozen=True)
class Measured:
    """Of one checkpoint; parts of 1, and nats per byte."""

    step: int
    addition: float
    subtraction: float
    negative: float  # differences below zero
    induction: float
    stories: dict[str, float]  # by the name of the text


@dataclass(frozen=True)
class Run:
    """A folder of checkpoints, or those up to a step from which another run goes on."""

    folder: Path
    last: int | None
    offset: int  # steps that were made before it

    def has(self, step: int) -> bool:
        return self.last is None or step <= self.last

    def steps(self) -> list[int]:
        return [step for step in saved_steps(self.folder) if self.has(step)]


def runs_of(texts: Sequence[str]) -> list[Run]:
    """FOLDER, or FOLDER:N before another. InputError if one holds no checkpoint."""
    runs: list[Run] = []
    for text in texts:
        name, colon, last = text.rpartition(":") if re.search(r":\d+$", text) else (text, "", "")
        offset = runs[-1].offset + (runs[-1].last or 0) if runs else 0
        runs.append(Run(Path(name), int(last) if colon else None, offset))
        if not runs[-1].steps():
            raise InputError(f"{name} holds no step{{N}} folder")
        if len(runs) > 1 and runs[-2].last is None:
            raise InputError(f"name the step of {runs[-2].folder} from which {name} goes on: {runs[-2].folder}:N")
    return runs


# Arithmetic.


def kind_of(a: int, operation: str, b: int) -> str:
    if operation == "plus":
        return "addition"
    return "subtraction" if a >= b else "negative"


def two_digit_questions() -> list[tuple[int, str, int]]:
    return [(a, operation, b) for a, operation, b in held_out_questions() if min(a, b) >= 10]


def answers(model: Model, tokenizer: Tokenizer, questions: Sequence[tuple[int, str, int]]) -> list[str]:
    """Greedy continuations, up to the end of the line."""
    found: list[str] = []
    for start in range(0, len(questions), QUESTIONS_AT_ONCE):
        asked = [question(*q) for q in questions[start : start + QUESTIONS_AT_ONCE]]
        requests = [Request(tokenizer.encode(text), max_tokens=6, stop=("\n",)) for text in asked]
        found += [completion.text for completion in complete(CachedDecoder(model), requests, tokenizer)]
    return found


def arithmetic(model: Model, tokenizer: Tokenizer) -> dict[str, float]:
    """The part that is answered exactly, by kind."""
    right: dict[str, list[bool]] = {"addition": [], "subtraction": [], "negative": []}
    questions = two_digit_questions()
    for q, text in zip(questions, answers(model, tokenizer, questions), strict=True):
        right[kind_of(*q)].append(text == f" {answer(*q)}")
    return {kind: float(np.mean(values)) for kind, values in right.items()}


# Induction, and stories.


def induction(model: Model, tokenizer: Tokenizer) -> float:
    """Random ids, twice: how much of the second copy, from its second id on, is what the model finds likeliest."""
    rng = np.random.default_rng(0)
    once = rng.integers(1, tokenizer.size, (RANDOM_ROWS, RANDOM_LENGTH))
    ids = np.concatenate([once, once], axis=1)
    predicted = forward(model, ids[:, :-1]).argmax(axis=-1)
    second = slice(RANDOM_LENGTH, None)
    return float(np.mean(predicted[:, second] == ids[:, 1:][:, second]))


def nats_per_byte(model: Model, tokenizer: Tokenizer, path: Path) -> float:
    """Of the beginning of a text that was not trained on."""
    data = pack(documents(path), tokenizer, model.config.max_position_embeddings).first(HELD_OUT_ROWS)
    size = sum(len(tokenizer.token_bytes(int(i))) for i in data.ids[1:])
    return held_out_loss(model, data) * data.rows * data.length / size


def measure(folder: Path, step: int, held_out: Sequence[Path]) -> Measured:
    """A checkpoint, which stands after so many steps in all."""
    model, tokenizer = load(folder, weights="upcast"), load_tokenizer(folder)
    stories = {path.name.partition(".")[0]: nats_per_byte(model, tokenizer, path) for path in held_out}
    return Measured(step, **arithmetic(model, tokenizer), induction=induction(model, tokenizer), stories=stories)


# What is shown.


def table(series: Sequence[Measured]) -> str:
    names = list(series[0].stories)
    head = ["step", "addition", "subtraction", "below zero", "induction", *(f"{name}, nats/byte" for name in names)]
    lines = [head, ["---:"] * len(head)]
    for m in series:
        parts = [f"{part:.1%}" for part in (m.addition, m.subtraction, m.negative, m.induction)]
        lines.append([str(m.step), *parts, *(f"{m.stories[name]:.3f}" for name in names)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def losses(runs: Sequence[Run]) -> list[tuple[int, float]]:
    """The loss of every step, where the runs' files of them are."""
    found = []
    for part in runs:
        file = part.folder / "losses.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        entries = [entry for entry in map(json.loads, lines) if "loss" in entry and part.has(entry["step"])]
        found += [(part.offset + entry["step"], entry["loss"]) for entry in entries]
    return found


def draw(series: Sequence[Measured], curve: Sequence[tuple[int, float]], path: Path) -> None:
    """Losses above, abilities below, over the steps."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise InputError('--picture needs one more package: pip install "neox20b[plot]"') from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(7, 6), sharex=True, layout="constrained")
    if curve:
        at, values = zip(*curve, strict=True)
        above.plot(at, smooth(values), color="0.6", linewidth=0.8, label="training, nats per token")
    steps = [m.step for m in series]
    for name in series[0].stories:
        above.plot(
            steps, [m.stories[name] for m in series], "o-", markersize=3, label=f"held-out {name}, nats per byte"
        )
    above.set(ylabel="loss", ylim=(0, None))
    above.legend()
    for name in ("addition", "subtraction", "induction"):
        below.plot(steps, [getattr(m, name) for m in series], "o-", markersize=3, label=name)
    below.set(xlabel="step", ylabel="exact answers", ylim=(-0.02, 1.02), xscale="symlog", xlim=(0, None))
    below.legend()
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, dpi=150)
    partial.replace(path)


def flags() -> argparse.Namespace:
    parser = Parser(description="Measure what a series of checkpoints has learned.", allow_abbrev=False)
    parser.add_argument("run", nargs="+", metavar="RUN[:N]", help="a folder of step{N} folders; up to N, then the next")
    parser.add_argument("--held-out", type=Path, metavar="FOLDER", help="of texts that were not trained on")
    parser.add_argument("--steps", type=int, nargs="+", metavar="N", help="only these; default: all")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="draw it too; needs matplotlib")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    return parser.parse_args()


def main() -> None:
    args = flags()
    runs = runs_of(args.run)
    texts = sorted(args.held_out.glob("*.jsonl")) if args.held_out else []
    # Where a run goes on from another, its step 0 is the other's last.
    chosen = {r.offset + step: r.folder / f"step{step}" for r in runs for step in r.steps()}
    unknown = set(args.steps or ()) - set(chosen)
    if unknown:
        raise InputError(f"no checkpoint of step {min(unknown)}; there are {', '.join(map(str, chosen))}")
    series = []
    for step in tqdm(args.steps or chosen, "measuring", unit="checkpoints", disable=None, leave=False):
        series.append(measure(chosen[step], step, texts))
    print(table(series))
    if args.json:
        write_file(args.json, (json.dumps([asdict(m) for m in series], indent=1) + "\n").encode())
    if args.picture:
        draw(series, losses(runs), args.picture)
        print(f"drawn: {args.picture}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
