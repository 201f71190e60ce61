"""Where each head of a model looks: its attention patterns, as a table, a picture, or a page to explore.

    python examples/attention.py
    python examples/attention.py --layer 2 --head 1
    python examples/attention.py --prompt "one two three one two" --html attention.html --picture attention.png

The table has a line for each head: how much of its attention goes, in the mean over positions, to the first token, to
the token itself, to the one before, and to what followed earlier occurrences of the token (induction). --layer and
--head show one pattern in the terminal. The page is one file that loads nothing: choose a head, point at a token.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pictures import Subject, heat_map, parsed, parser, pyplot, save, shade, subject, table

from neox.reference.checkpoint.save import write_file
from neox.reference.errors import InputError, run
from neox.reference.lens import induction_scores
from neox.reference.model import Array
from neox.reference.trace import run_with_cache

PROMPT = "The old man went to the sea, and the old man went to the"
MOST = 256  # tokens of a page: a pattern has the square of it, for each head
DRAWN = 144  # heads of a picture


def patterns(of: Subject, ids: Sequence[int]) -> Array:  # (L,H,T,T)
    count = of.model.config.num_hidden_layers
    _, cache = run_with_cache(of.model, [ids], "blocks.*.attn.hook_pattern", stop_at_layer=count)
    return np.stack([cache[f"blocks.{i}.attn.hook_pattern"][0] for i in range(count)])


# In the terminal.


def summary(found: Array) -> dict[str, Array]:  # (L,H,T,T) -> names and (L,H) each
    """The part of a head's attention, in the mean over the queries that have a token before them."""
    queries = np.arange(1, found.shape[-1])
    return {
        "first": found[..., 1:, 0].mean(-1),
        "itself": found[..., queries, queries].mean(-1),
        "before": found[..., queries, queries - 1].mean(-1),
    }


def summary_table(of: Subject, found: Array) -> str:
    values = {**summary(found), "induction": induction_scores(of.model, length=induction_length(of))}
    names = [f"layer {i} head {h}" for i, h in np.ndindex(found.shape[:2])]
    cells = [[f"{values[kind][i, h]:.0%}" for kind in values] for i, h in np.ndindex(found.shape[:2])]
    return table(cells, names, list(values))


def induction_length(of: Subject) -> int:
    return min(50, of.model.config.max_position_embeddings // 2)


def shaded(of: Subject, ids: Sequence[int], pattern: Array) -> str:  # (T,T)
    """A line for each query; the denser the character, the more it looks at that key."""
    names = of.labels(ids)
    width = max(map(len, names))
    return "\n".join(
        f"{name:>{width}} |" + "".join(shade(float(p)) for p in row[: t + 1])
        for t, (name, row) in enumerate(zip(names, pattern, strict=True))
    )


# A picture.


def draw(of: Subject, ids: Sequence[int], found: Array, named: Sequence[int], path: Path) -> None:
    """named: the numbers of the layers in `found`."""
    layers, heads = found.shape[:2]
    if layers * heads > DRAWN:
        raise InputError(f"{layers * heads} heads do not fit a picture; --layer draws those of one, --html has all")
    figure, grid = pyplot().subplots(
        layers, heads, figsize=(1.9 * heads + 1.2, 1.9 * layers + 1.2), layout="constrained", squeeze=False
    )
    names = of.labels(ids, 8)
    for (i, h), axes in np.ndenumerate(grid):
        show = names if len(ids) <= 24 else [""] * len(ids)
        left, below = show if h == 0 else [""] * len(ids), show if i == layers - 1 else [""] * len(ids)
        image = heat_map(axes, found[i, h], left, below, cmap="Blues", vmin=0, vmax=1)
        axes.tick_params(labelsize=6, axis="y")
        axes.tick_params(labelsize=6, axis="x", labelrotation=90)
        axes.set_title(f"layer {named[i]} head {h}", fontsize=8, pad=3)
    figure.suptitle(f"Attention of {of.name}: rows look at columns", fontsize=10)
    figure.colorbar(image, ax=grid, label="attention", shrink=0.6, pad=0.01)
    save(figure, path)


# A page.

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Attention of {title}</title>
<style>
body {{ font: 14px system-ui, sans-serif; margin: 1.5em; color: #222; background: #fff; }}
h1 {{ font-size: 1.2em; }}
#heads {{ display: grid; grid-template-columns: repeat({heads}, max-content); gap: 6px; margin-bottom: 1em; }}
#heads button {{ padding: 2px; border: 2px solid #ddd; background: none; cursor: pointer; font: 10px sans-serif; }}
#heads button.chosen {{ border-color: #d62; }}
#heads canvas {{ display: block; width: 64px; height: 64px; image-rendering: pixelated; }}
#text span {{ display: inline-block; padding: 2px 3px; margin: 1px; border-radius: 3px; cursor: default; }}
#text span.query {{ outline: 2px solid #d62; }}
#large {{ width: min(90vw, 560px); image-rendering: pixelated; border: 1px solid #ddd; margin-top: 1em; }}
</style></head><body>
<h1>Attention of {title}</h1>
<p>Choose a head. Rows are tokens that look, columns what they look at. Point at a token, or at a row of the large
pattern, to see where it looks.</p>
<div id="heads"></div><div id="text"></div><p id="said">&nbsp;</p><canvas id="large"></canvas>
<script>
const data = {data};
const T = data.tokens.length, text = document.getElementById("text"), large = document.getElementById("large");
let chosen = 0, query = T - 1;
// Patterns are the lower triangles, row by row, in 255ths.
const at = (head, q, k) => k > q ? 0 : data.patterns[head][q * (q + 1) / 2 + k] / 255;
function paint(canvas, head) {{
  canvas.width = canvas.height = T;
  const context = canvas.getContext("2d"), image = context.createImageData(T, T);
  for (let q = 0; q < T; q++) for (let k = 0; k < T; k++) {{
    const a = at(head, q, k), place = 4 * (q * T + k);
    image.data.set([255 - 247 * a, 255 - 207 * a, 255 - 148 * a, 255], place);
  }}
  context.putImageData(image, 0, 0);
}}
function show() {{
  [...text.children].forEach((span, k) => {{
    const a = at(chosen, query, k);
    span.style.background = `rgba(33, 113, 181, ${{a}})`;
    span.style.color = k > query ? "#bbb" : a > 0.5 ? "#fff" : "#222";
    span.className = k === query ? "query" : "";
    span.title = k > query ? "" : `${{(100 * a).toFixed(1)}}%`;
  }});
  [...document.getElementById("heads").children].forEach((b, i) => b.className = i === chosen ? "chosen" : "");
  const percent = k => (100 * at(chosen, query, k)).toFixed(0) + "%";
  const best = [...Array(query + 1).keys()].sort((a, b) => at(chosen, query, b) - at(chosen, query, a)).slice(0, 4);
  document.getElementById("said").textContent = data.heads[chosen] + ": " + data.tokens[query] + " (" + query +
    ") looks at " + best.map(k => `${{data.tokens[k]}} (${{k}}) ${{percent(k)}}`).join(", ");
  paint(large, chosen);
}}
data.tokens.forEach((token, t) => {{
  const span = document.createElement("span");
  span.textContent = token;
  span.onmouseenter = () => {{ query = t; show(); }};
  text.append(span);
}});
data.heads.forEach((name, i) => {{
  const button = document.createElement("button"), canvas = document.createElement("canvas");
  paint(canvas, i);
  button.append(canvas, name);
  button.onclick = () => {{ chosen = i; show(); }};
  document.getElementById("heads").append(button);
}});
large.onmousemove = event => {{
  query = Math.max(0, Math.min(T - 1, Math.floor(T * event.offsetY / large.clientHeight)));
  show();
}};
show();
</script></body></html>
"""


def page(of: Subject, ids: Sequence[int], found: Array, layers: Sequence[int]) -> str:
    """One file. What tokens hold cannot end the script: every < of the data is written as an escape."""
    lower = np.tril_indices(len(ids))
    data = {
        "tokens": of.labels(ids, 20),
        "heads": [f"layer {i} head {h}" for i in layers for h in range(found.shape[1])],
        "patterns": [np.rint(255 * pattern[lower]).astype(int).tolist() for rows in found for pattern in rows],
    }
    return PAGE.format(
        title=html.escape(of.name), heads=min(found.shape[1], 16), data=json.dumps(data).replace("<", "\\u003c")
    )


# The program.


def check(of: Subject, layer: int | None, head: int | None) -> None:
    config = of.model.config
    if layer is not None and not 0 <= layer < config.num_hidden_layers:
        raise InputError(f"--layer {layer}: this model's are 0 to {config.num_hidden_layers - 1}")
    if head is not None and layer is None:
        raise InputError("--head needs a --layer")
    if head is not None and not 0 <= head < config.num_attention_heads:
        raise InputError(f"--head {head}: this model's are 0 to {config.num_attention_heads - 1}")


def main(argv: Sequence[str] | None = None) -> None:
    flags = parser("Show where each head of a model looks.")
    flags.add_argument("--prompt", default=PROMPT, metavar="TEXT")
    flags.add_argument("--layer", type=int, metavar="N", help="the pictures and patterns of this layer only")
    flags.add_argument("--head", type=int, metavar="N", help="the pattern of this head only")
    flags.add_argument("--html", type=Path, metavar="FILE", help="write a page to explore, which loads nothing")
    args = parsed(flags, argv)
    of = subject(args.model, args.revision)
    check(of, args.layer, args.head)
    ids = of.encode(args.prompt)
    if len(ids) < 2:
        raise InputError("the prompt has one token, which can look at nothing but itself")
    if args.html and len(ids) > MOST:
        raise InputError(f"the prompt has {len(ids)} tokens; a page shows {MOST} at most")
    found = patterns(of, ids)
    if args.layer is None:
        print(f"Attention of {of.name}: of {len(ids)} tokens, and of random ones repeated (induction)\n")
        print(summary_table(of, found))
    else:
        for h in range(found.shape[1]) if args.head is None else [args.head]:
            print(f"layer {args.layer} head {h}\n{shaded(of, ids, found[args.layer, h])}\n")
    layers = range(len(found)) if args.layer is None else [args.layer]
    if args.html:
        write_file(args.html, page(of, ids, found[list(layers)], layers).encode("utf-8"))
    if args.picture:
        draw(of, ids, found[list(layers)], layers, args.picture)


if __name__ == "__main__":
    run(main)
