"""Which state of a model carries the answer: activation patching, over layers x positions and over heads.

    python examples/patching.py
    python examples/patching.py --clean "A: 12, B: 34, A:" --corrupt "A: 56, B: 34, A:" --picture patching.png

Two texts of as many tokens end in different answers. The model runs on the corrupt one, with a single state of the
clean run put in its place: the residual stream before one layer at one position, or what one head has gathered. Shown
is how much of the difference of the two answers' logits that brings back: 0 none of it, 1 all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pictures import Subject, heat_map, parsed, parser, pyplot, readable_on, save, subject, table

from neox.reference import forward
from neox.reference.errors import InputError, run
from neox.reference.model import Array
from neox.reference.trace import logit_difference, patch_heads, patch_residual

# The shipped model has learned to add: recipe.py.
CLEAN, CORRUPT = "Q: What is 31 plus 25?\nA:", "Q: What is 31 plus 45?\nA:"
RIGHT, WRONG = " 56", " 76"
LOOK_AHEAD = 8  # tokens within which what the model says must differ


@dataclass(frozen=True)
class Pair:
    """Two texts, and the id that follows each."""

    clean: list[int]
    corrupt: list[int]
    right: int
    wrong: int


@dataclass(frozen=True)
class Outcome:
    """Parts of the difference that are brought back; from and to: what the differences of logits are."""

    residual: Array  # (L,T)
    heads: Array  # (L,H)
    corrupt: float
    clean: float


# What is asked.


def answer_ids(of: Subject, prompt: str, ids: list[int], answer: str | None) -> Iterator[int]:
    """The tokens of the answer, or without one, of what the model says."""
    if answer is None:
        for _ in range(min(LOOK_AHEAD, of.model.config.max_position_embeddings - len(ids))):
            ids = [*ids, int(forward(of.model, [ids])[0, -1].argmax())]
            yield ids[-1]
        return
    whole = of.tokenizer.encode(prompt + answer)
    if whole[: len(ids)] != ids:
        raise InputError(f"the answer {answer!r} does not begin with a token of its own after {prompt!r}")
    yield from whole[len(ids) :]


def pair(of: Subject, clean: str, corrupt: str, right: str | None, wrong: str | None) -> Pair:
    """What both answers begin with counts as text. InputError unless the texts are equally long and the answers differ.

    Where a space, or the first digit of a number, is a token of its own, answers differ only after it.
    """
    a, b = of.encode(clean, "--clean"), of.encode(corrupt, "--corrupt")
    if len(a) != len(b):
        raise InputError(f"--clean has {len(a)} tokens, --corrupt {len(b)}: position by position they must match")
    if a == b:
        raise InputError("--clean and --corrupt are the same tokens")
    shared: list[int] = []
    for one, other in zip(answer_ids(of, clean, a, right), answer_ids(of, corrupt, b, wrong), strict=False):
        if one != other:
            return Pair(a + shared, b + shared, one, other)
        shared.append(one)
    raise InputError("both texts go on alike: name answers that differ by --right and --wrong")


def patched(of: Subject, texts: Pair) -> Outcome:
    """InputError if the model answers both alike: there is nothing to bring back."""
    metric = logit_difference(texts.right, texts.wrong)
    clean, corrupt = (float(metric(forward(of.model, [ids])[:, -1])[0]) for ids in (texts.clean, texts.corrupt))
    if clean == corrupt:
        raise InputError("the model tells the two texts apart by nothing: choose others")
    maps = (patch(of.model, texts.clean, texts.corrupt, metric) for patch in (patch_residual, patch_heads))
    residual, heads = ((values - corrupt) / (clean - corrupt) for values in maps)
    return Outcome(residual, heads, corrupt, clean)


# What is shown.


def position_names(of: Subject, texts: Pair) -> list[str]:
    """Tokens, both where they differ."""
    both = zip(of.labels(texts.clean, 9), of.labels(texts.corrupt, 9), strict=True)
    return [a if a == b else f"{a}|{b}" for a, b in both]


def numbers(values: Array) -> list[list[str]]:
    return [[f"{round(value, 2) + 0.0:.2f}" for value in row] for row in values]  # no -0.00


def layer_names(count: int) -> list[str]:
    return [f"layer {i}" for i in range(count)]


def text(of: Subject, texts: Pair, found: Outcome) -> str:
    right, wrong = of.label(texts.right), of.label(texts.wrong)
    rows, heads = layer_names(len(found.heads)), [f"head {h}" for h in range(found.heads.shape[1])]
    return "\n\n".join(
        (
            f"Patching {of.name}: logit of {right} less that of {wrong},",
            f"after the clean text {found.clean:.2f}, after the corrupt one {found.corrupt:.2f}; parts brought back by",
            "the residual stream before a layer, at one position (clean|corrupt)",
            table(numbers(found.residual), rows, position_names(of, texts)),
            "one head, at all positions",
            table(numbers(found.heads), rows, heads),
        )
    )


def numbered(axes: Any, image: Any, values: Array) -> None:
    if values.size > 500:
        return
    for (i, j), value in np.ndenumerate(values):
        if abs(value) >= 0.005:
            colour = readable_on(image, value)
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)


def draw(of: Subject, texts: Pair, found: Outcome, path: Path) -> None:
    (layers, length), heads = found.residual.shape, found.heads.shape[1]
    width = max(5.0, 0.5 * length) + max(2.0, 0.5 * heads)
    figure, (left, right) = pyplot().subplots(
        1,
        2,
        figsize=(width + 1.5, 2.2 + 0.4 * layers),
        layout="constrained",
        width_ratios=(max(5.0, 0.5 * length), max(2.0, 0.5 * heads)),
        sharey=True,
    )
    how = {"cmap": "RdBu", "vmin": -1, "vmax": 1}
    image = heat_map(left, found.residual, layer_names(layers), position_names(of, texts), **how)
    numbered(left, image, found.residual)
    heat_map(right, found.heads, layer_names(layers), [str(h) for h in range(heads)], **how)
    numbered(right, image, found.heads)
    left.invert_yaxis()  # shared: the first layer at the bottom
    left.set(title="residual stream before a layer", xlabel="position (clean|corrupt)")
    right.set(title="output of a head", xlabel="head")
    right.tick_params(labelleft=False)
    figure.suptitle(
        f"Patching: {of.label(texts.right)} or {of.label(texts.wrong)}? Part of the difference brought back",
        fontsize=11,
        parse_math=False,
    )
    figure.colorbar(image, ax=(left, right), label="part brought back", pad=0.01)
    save(figure, path)


def main(argv: Sequence[str] | None = None) -> None:
    flags = parser("Patch one state of a clean run into a corrupt one, and see what it brings back.")
    flags.add_argument("--clean", metavar="TEXT", help=f"default {CLEAN!r}")
    flags.add_argument("--corrupt", metavar="TEXT", help=f"as many tokens; default {CORRUPT!r}")
    flags.add_argument("--right", metavar="TEXT", help="what follows the clean text; default: what the model says")
    flags.add_argument("--wrong", metavar="TEXT", help="what follows the corrupt one; default: what the model says")
    args = parsed(flags, argv)
    if (args.clean is None) != (args.corrupt is None):
        raise InputError("--clean and --corrupt go together")
    if args.clean is None:
        args.clean, args.corrupt = CLEAN, CORRUPT
        args.right, args.wrong = args.right or RIGHT, args.wrong or WRONG
    of = subject(args.model, args.revision)
    texts = pair(of, args.clean, args.corrupt, args.right, args.wrong)
    found = patched(of, texts)
    print(text(of, texts, found))
    if args.picture:
        draw(of, texts, found, args.picture)


if __name__ == "__main__":
    run(main)
