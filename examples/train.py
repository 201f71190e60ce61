"""Train a GPT-NeoX model on a folder of text, from nothing or from a model that is there.

    python examples/train.py path/to/texts --out run --steps 2000
    python examples/train.py path/to/texts --out run --steps 2000 --resume
    python examples/train.py path/to/texts --out more --from run/step2000 --learning-rate 3e-4

The text: .txt files, each one document, and .jsonl or .jsonl.gz with a "text" in each line. Its tokenizer is trained on
it too, unless --tokenizer names one. Checkpoints go to run/step{N}, in Hugging Face's layout, so that every program
that reads GPT-NeoX models can read them; run/losses.jsonl has the loss of every step, and run/losses.png is its picture
where matplotlib is installed. With --resume, the run goes on after its last checkpoint, and ends as if it had never
been interrupted: to the last bit, on the same machine and versions.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from neox.reference.checkpoint.load import load
from neox.reference.checkpoint.save import write_file
from neox.reference.config import Config, parameter_count
from neox.reference.corpus import Packed, documents, pack, train_tokenizer
from neox.reference.errors import InputError, Parser, run
from neox.reference.model import Model
from neox.reference.optimizer import AdamW, initial_model
from neox.reference.tokenizer import Tokenizer, load_tokenizer
from neox.reference.train import (
    Progress,
    Settings,
    State,
    begin,
    held_out_loss,
    own_copy,
    restore,
    save_step,
    saved_steps,
    updates,
)

LOSSES = "losses.jsonl"
HELD_OUT_ROWS = 64  # measured at every checkpoint; the whole of a large held-out text would take longer than training


# Flags.


def parser() -> Parser:
    flags = Parser(description="Train a GPT-NeoX model on a folder of text.", allow_abbrev=False)
    flags.add_argument("text", type=Path, help="a folder of .txt, .jsonl and .jsonl.gz files, or one of them")
    flags.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where checkpoints go")
    flags.add_argument("--resume", action="store_true", help="go on after the last checkpoint in --out")
    flags.add_argument("--from", dest="start", metavar="PATH|NAME", help="a model to begin with, not drawn weights")
    flags.add_argument("--held-out", type=Path, metavar="PATH", help="text to measure on; else the last hundredth")
    flags.add_argument("--tokenizer", metavar="PATH|NAME", help="a tokenizer.json or a model's; without it, trained")
    flags.add_argument("--vocab-size", type=int, default=1024, metavar="V", help="of the tokenizer that is trained")
    shape = flags.add_argument_group("model")
    shape.add_argument("--layers", type=int, default=5, metavar="L")
    shape.add_argument("--hidden", type=int, default=160, metavar="C")
    shape.add_argument("--heads", type=int, default=5, metavar="H")
    _add_settings(flags.add_argument_group("training"))
    return flags


def _add_settings(flags: argparse._ArgumentGroup) -> None:
    default = {field.name: field.default for field in fields(Settings)}
    flags.add_argument("--steps", type=int, default=2000, metavar="N", help="updates")
    flags.add_argument("--batch", type=int, default=default["batch"], metavar="ROWS", help="of an update")
    flags.add_argument("--micro-batch", type=int, default=default["micro_batch"], metavar="ROWS", help="at once")
    flags.add_argument("--length", type=int, default=default["length"], metavar="T", help="tokens of a row")
    flags.add_argument("--learning-rate", type=float, default=default["learning_rate"], help="at its peak")
    flags.add_argument("--warmup", type=float, default=default["warmup"], metavar="PART", help="of the steps")
    flags.add_argument("--weight-decay", type=float, default=AdamW().weight_decay)
    flags.add_argument(
        "--save-every", type=int, default=default["save_every"], metavar="N", help="steps; at first more"
    )
    flags.add_argument("--seed", type=int, default=0)


def settings_of(args: argparse.Namespace) -> Settings:
    given = {field.name: getattr(args, field.name) for field in fields(Settings) if hasattr(args, field.name)}
    return Settings(**given, adam=AdamW(weight_decay=args.weight_decay))


def first_model(args: argparse.Namespace, vocab_size: int) -> Model:
    """What the run begins with; --from has precedence over the flags of the model's shape."""
    if args.start is not None:
        model = own_copy(load(args.start, weights="stored"))
        if vocab_size > model.config.vocab_size:
            known = model.config.vocab_size
            raise InputError(f"the tokenizer has {vocab_size} tokens, but the model of --from knows {known}")
        context = model.config.max_position_embeddings
        if args.length > context:
            raise InputError(f"rows of {args.length} tokens, but the context of the model of --from is {context}")
        return model
    config = Config(
        vocab_size=vocab_size,
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        intermediate_size=4 * args.hidden,
        max_position_embeddings=args.length,
    )
    return initial_model(config, args.seed)


# Data.


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def tokenizer_file(args: argparse.Namespace) -> Path:
    """The tokenizer.json of the run: kept from its beginning, or the one that is named, or one that is trained."""
    kept: Path = args.out / "tokenizer.json"
    if args.resume and kept.is_file():
        return kept
    if (given := args.tokenizer or args.start) is not None:
        content = load_tokenizer(given).to_json()
    else:
        note(f"training a tokenizer of {args.vocab_size} tokens")
        content = train_tokenizer(documents(args.text), args.vocab_size).to_str(pretty=True)
    write_file(kept, content.encode("utf-8"))
    return kept


def read_data(args: argparse.Namespace, tokenizer: Tokenizer) -> tuple[Packed, Packed]:
    """To train on, and held out."""
    data = pack(documents(args.text), tokenizer, args.length)
    if args.held_out is not None:
        held = pack(documents(args.held_out), tokenizer, args.length)
    else:
        data, held = data.split(max(1, data.rows // 100))
    if held.rows == 0:
        raise InputError(f"{args.held_out} has {len(held.ids)} tokens: too few for a row of {args.length}")
    return data, held.first(HELD_OUT_ROWS)


# The run.


def same(what: str, saved: Any, given: Any) -> None:
    if saved != given:
        raise InputError(f"{what} of the run in --out is {saved}, but now it is {given}: resume it as it was begun")


def start(args: argparse.Namespace, first: Model, data: Packed) -> State:
    """The first state, or with --resume the last one that was saved."""
    settings = settings_of(args)
    if not saved_steps(args.out):
        return begin(first)
    state, saved, checksum = restore(args.out)
    for field in fields(Settings):
        same(field.name, getattr(saved, field.name), getattr(settings, field.name))
    same("the model", state.model.config, first.config)
    same("the checksum of the text", checksum, data.checksum())
    return state


def read_losses(path: Path, last: int) -> list[dict[str, Any]]:
    """The lines up to a step; those after it, which a run that was killed may have left, are written again."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    entries = [json.loads(line) for line in lines if line.endswith("\n")]
    return [entry for entry in entries if entry["step"] <= last]


def smooth(values: Sequence[float]) -> list[float]:
    """Each the mean of the last twentieth of the values up to it: batches differ more than a loss falls."""
    sums = np.cumsum([0.0, *values])
    return [float(sums[i] - sums[i - max(1, i // 20)]) / max(1, i // 20) for i in range(1, len(sums))]


def picture(entries: Sequence[dict[str, Any]]) -> bytes:
    """The loss of every step, and of the held-out text: a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    trained, held = ([entry for entry in entries if name in entry] for name in ("loss", "held_out"))
    axes.plot([e["step"] for e in trained], smooth([e["loss"] for e in trained]), linewidth=0.8, label="trained on")
    axes.plot([e["step"] for e in held], [e["held_out"] for e in held], "o-", markersize=4, label="held out")
    axes.set(xlabel="step", ylabel="loss (nats per token)", xscale="symlog", xlim=(0, None))
    axes.legend()
    png = io.BytesIO()
    figure.savefig(png, dpi=150)
    pyplot.close(figure)
    return png.getvalue()


class Losses:
    """The file with a line for each step, which is complete up to the last checkpoint whenever the run is stopped."""

    def __init__(self, path: Path, last: int) -> None:
        """Go on after the step `last`; what a run that was killed had written after it is written again."""
        self.entries = read_losses(path, last) if last else []
        write_file(path, "".join(json.dumps(entry) + "\n" for entry in self.entries).encode())
        self.path = path
        self.file = path.open("ab", buffering=0)  # a buffer would be written once more on closing a full disk

    def add(self, entry: dict[str, Any]) -> None:
        self.entries.append(entry)
        line = (json.dumps(entry) + "\n").encode()
        try:
            whole = self.file.write(line) == len(line)
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror}") from error
        if not whole:
            raise InputError(f"cannot write {self.path}: the disk is full")

    def close(self) -> None:
        self.file.close()
        if find_spec("matplotlib") and len(self.entries) > 1:
            write_file(self.path.with_suffix(".png"), picture(self.entries))


@dataclass(frozen=True)
class Recorder:
    """What is kept of a run: a line for each step, and checkpoints."""

    args: argparse.Namespace
    settings: Settings
    tokenizer: bytes
    held_out: Packed
    checksum: int
    losses: Losses

    def add(self, state: State, entry: dict[str, Any], speed: float) -> None:
        """The line comes before its checkpoint: one too many is dropped on resuming, one too few would be a gap."""
        if not self.settings.saves(state.step):
            return self.losses.add(entry)
        entry["held_out"] = held_out_loss(state.model, self.held_out)
        self.losses.add(entry)
        save_step(self.args.out, state, self.settings, self.tokenizer, self.checksum)
        shown = ", ".join(f"{name} {entry[name]:.3f}" for name in ("loss", "held_out") if name in entry)
        tqdm.write(f"step {state.step}: {shown}, {speed:.0f} tokens/s", sys.stderr)


def train(state: State, rest: Iterable[tuple[State, Progress]], recorder: Recorder) -> None:
    settings = recorder.settings
    with (
        contextlib.closing(recorder.losses),
        tqdm(total=settings.steps, initial=state.step, unit="step", disable=None) as bar,
    ):
        if state.step == 0:
            recorder.add(state, {"step": 0}, 0.0)
        began, first = time.perf_counter(), state.step
        for reached, progress in rest:
            tokens = (reached.step - first) * settings.batch * settings.length
            speed = tokens / (time.perf_counter() - began)
            recorder.add(reached, asdict(progress), speed)
            bar.set_postfix_str(f"loss {progress.loss:.3f}, {speed:.0f} tokens/s", refresh=False)
            bar.update()


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    warnings.simplefilter("ignore", RuntimeWarning)  # a loss that overflows is reported once, by an error of our own
    settings = settings_of(args)
    if not args.resume and saved_steps(args.out):
        raise InputError(f"{args.out} holds a run already: add --resume to go on with it, or name another folder")
    file = tokenizer_file(args)
    tokenizer = load_tokenizer(file)
    first = first_model(args, tokenizer.size)
    data, held_out = read_data(args, tokenizer)
    state = start(args, first, data)
    size = f"{parameter_count(first.config):,} parameters, {len(data.ids):,} tokens of text"
    note(f"{size}, steps {state.step} to {settings.steps}")
    rest = updates(state, settings, data)
    losses = Losses(args.out / LOSSES, state.step)
    train(state, rest, Recorder(args, settings, file.read_bytes(), held_out, data.checksum(), losses))
    if not find_spec("matplotlib"):
        note('no picture of the losses: matplotlib is not installed (pip install "neox20b[plot]")')


if __name__ == "__main__":
    run(main)
