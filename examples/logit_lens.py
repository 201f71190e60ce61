"""What a model would say if it ended after each of its layers: the token found likeliest, and how likely.

    python examples/logit_lens.py
    python examples/logit_lens.py --prompt "The capital of France is" --model pythia-70m --picture lens.png
    python examples/logit_lens.py --model gpt-neox-20b --tuned-lens lens/gpt-neox-20b

Columns are the tokens of the prompt, rows the residual stream before the first layer and after each. The last norm and
the output matrix turn each state into probabilities of the next token. A tuned lens (Belrose et al. 2023) first brings
a state to where the last layer would have left it; it is read from the published params.pt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pictures import Subject, heat_map, parsed, parser, pyplot, readable_on, save, subject, table
from tqdm import tqdm

from neox.reference.errors import run
from neox.reference.lens import load_tuned_lens, logit_lens
from neox.reference.model import Array, Linear, softmax

PROMPT = "Once upon a time there was a little girl who lived in a house in the"
MOST = 24  # positions of a picture


@dataclass(frozen=True)
class Reading:
    """For each state, of the first layer's beginning and each layer's end, and each position."""

    ids: list[int]
    top: Array  # integers (L+1,T): the likeliest token
    probability: Array  # (L+1,T): its

    def last(self, count: int) -> Reading:
        return Reading(self.ids[-count:], self.top[:, -count:], self.probability[:, -count:])


def read(of: Subject, ids: list[int], tuned: Sequence[Linear] | None = None) -> Reading:
    top, probability = [], []
    states = of.model.config.num_hidden_layers + 1
    for logits in tqdm(logit_lens(of.model, [ids], tuned), "reading", states, disable=None, leave=False):
        p = softmax(logits[0].astype(np.float64))
        top.append(p.argmax(axis=-1))
        probability.append(p.max(axis=-1))
    return Reading(ids, np.stack(top), np.stack(probability))


def depth(top: Array) -> Array:  # (L+1,T) -> (T,)
    """After how many layers the likeliest token is the one it stays, as a part of all layers."""
    settled = np.logical_and.accumulate((top == top[-1])[::-1], axis=0)[::-1]  # from here on
    return settled.argmax(axis=0) / (len(top) - 1)


def row_names(count: int) -> list[str]:
    return ["embedding", *(f"layer {i}" for i in range(count - 1))]


def text(of: Subject, reading: Reading) -> str:
    cells = [
        [f"{of.label(int(i))} {p:3.0%}" for i, p in zip(top, row, strict=True)]
        for top, row in zip(reading.top, reading.probability, strict=True)
    ]
    return table(cells, row_names(len(cells)), of.labels(reading.ids))


def draw(of: Subject, reading: Reading, title: str, path: Path) -> None:
    rows, positions = reading.top.shape
    size = (max(6.0, 1.6 + 0.66 * positions), 1.4 + 0.36 * rows)
    figure, axes = pyplot().subplots(figsize=size, layout="constrained")
    heads = of.labels(reading.ids, 9)
    image = heat_map(axes, reading.probability, row_names(rows), heads, cmap="Blues", vmin=0, vmax=1)
    axes.invert_yaxis()  # the first layer at the bottom, as the stream flows
    for i, j in np.ndindex(rows, positions):
        colour = readable_on(image, float(reading.probability[i, j]))
        word = of.label(int(reading.top[i, j]), 9)
        axes.text(j, i, word, ha="center", va="center", fontsize=8, color=colour, parse_math=False)
    axes.set(xlabel="token read", title=title)
    figure.colorbar(image, ax=axes, label="probability", pad=0.01)
    save(figure, path)


def main(argv: Sequence[str] | None = None) -> None:
    flags = parser("Read the residual stream of every layer as a prediction of the next token.")
    flags.add_argument("--prompt", default=PROMPT, metavar="TEXT")
    flags.add_argument("--tuned-lens", type=Path, metavar="PATH", help="a params.pt, its folder, or safetensors")
    args = parsed(flags, argv)
    of = subject(args.model, args.revision)
    ids = of.encode(args.prompt)
    tuned = None if args.tuned_lens is None else load_tuned_lens(args.tuned_lens, of.model.config)
    reading = read(of, ids, tuned)
    kind = "Logit lens" if tuned is None else "Tuned lens"
    print(f"{kind} on {of.name}: the likeliest next token and its probability\n")
    print(text(of, reading))
    print(f"\nsettled after {depth(reading.top).mean():.0%} of the layers, in the mean over positions")
    if args.picture:
        draw(of, reading.last(MOST), f"{kind} on {of.name}", args.picture)


if __name__ == "__main__":
    run(main)
