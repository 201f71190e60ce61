"""What the programs that look inside a model share: the model, names for its tokens, tables, and pictures.

Text goes to the terminal in any case. Pictures need matplotlib: pip install "neox20b[plot]".
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neox.reference import Model, Tokenizer, load, load_tokenizer, shipped
from neox.reference.checkpoint.hub import find
from neox.reference.errors import InputError, Parser
from neox.reference.model import Array

FORMATS = (".png", ".svg", ".pdf")
SHADES = " .:-=+*#%@"


# The model and its tokens.


@dataclass(frozen=True)
class Subject:
    """name: for titles."""

    name: str
    model: Model
    tokenizer: Tokenizer

    def encode(self, text: str, what: str = "the prompt") -> list[int]:
        """InputError if there is nothing to look at, or more than the context holds."""
        ids, most = self.tokenizer.encode(text), self.model.config.max_position_embeddings
        if not ids:
            raise InputError(f"{what} is empty")
        if len(ids) > most:
            raise InputError(f"{what} has {len(ids)} tokens, the model's context {most}: shorten it")
        return ids

    def label(self, index: int, longest: int = 12) -> str:
        """A token in one short word: a dot for each space, escapes for parts of letters and what is not printable."""
        text = self.tokenizer.decode([index])
        if "\N{REPLACEMENT CHARACTER}" in text:
            text = self.tokenizer.token_bytes(index).decode("utf-8", "backslashreplace")
        text = text.replace(" ", "\N{MIDDLE DOT}")
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text) or f"#{index}"
        return text if len(text) <= longest else f"{text[: longest - 1]}\N{HORIZONTAL ELLIPSIS}"

    def labels(self, ids: Sequence[int], longest: int = 12) -> list[str]:
        return [self.label(int(index), longest) for index in ids]


def subject(name: str | None, revision: str | None) -> Subject:
    """A folder, a name on the Hub, or the model that comes with the package."""
    if name is None and revision is not None:
        raise InputError("--revision needs a --model")
    folder = shipped.path() if name is None else find(name, revision)
    shown = "the model that comes with the package" if name is None else Path(name).name
    return Subject(shown, load(folder), load_tokenizer(folder))


def parser(description: str) -> Parser:
    """With the flags that all of them have."""
    made = Parser(description=description, allow_abbrev=False)
    made.add_argument("--model", metavar="PATH|NAME", help="a folder, or a name such as pythia-70m")
    made.add_argument("--revision", help="of a named model, such as step1000")
    made.add_argument("--picture", type=Path, metavar="FILE", help="draw it: .png, .svg or .pdf; needs matplotlib")
    return made


def parsed(flags: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags; what would fail at the end, after all has been computed, fails now."""
    args = flags.parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    if args.picture:
        check_picture(args.picture)
    return args


# In the terminal.


def columns() -> int:
    return shutil.get_terminal_size((100, 24)).columns


def blocks(widths: Sequence[int], first: int, width: int) -> Iterator[slice]:
    """Columns in groups that fit beside a first one, each of at least one column."""
    start, used = 0, first
    for i, w in enumerate(widths):
        if i > start and used + w + 1 > width:
            yield slice(start, i)
            start, used = i, first
        used += w + 1
    yield slice(start, len(widths))


def table(cells: Sequence[Sequence[str]], rows: Sequence[str], heads: Sequence[str]) -> str:
    """Right-aligned columns under heads, and as many tables below each other as the terminal needs."""
    first = max(map(len, rows), default=0)
    widths = [max(len(head), *(len(row[i]) for row in cells)) for i, head in enumerate(heads)]
    parts = []
    for block in blocks(widths, first, columns()):
        lines = [[" " * first, *(f"{h:>{w}}" for h, w in zip(heads[block], widths[block], strict=True))]]
        for name, row in zip(rows, cells, strict=True):
            lines.append([f"{name:<{first}}", *(f"{c:>{w}}" for c, w in zip(row[block], widths[block], strict=True))])
        parts.append("\n".join(" ".join(line).rstrip() for line in lines))
    return "\n\n".join(parts)


def shade(part: float) -> str:
    """A character for a part of 1: the denser, the more."""
    return SHADES[min(int(part * len(SHADES)), len(SHADES) - 1)]


# Pictures.


def pyplot() -> Any:
    """matplotlib's, which draws into files only."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise InputError('a picture needs one more package: pip install "neox20b[plot]"') from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as made

    return made


def check_picture(path: Path) -> None:
    """InputError for a picture that cannot be drawn there."""
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"--picture {path}: its name must end with one of {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise InputError(f"--picture {path}: there is no folder {path.parent}")
    pyplot()


def save(figure: Any, path: Path) -> None:
    """The whole picture, or none."""
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    figure.savefig(partial, dpi=150)
    partial.replace(path)
    pyplot().close(figure)
    print(f"drawn: {path}", file=sys.stderr)


def heat_map(axes: Any, values: Array, rows: Sequence[str], heads: Sequence[str], **how: Any) -> Any:
    """A cell for each value, named at its sides. Dollars in tokens are dollars, not the marks of a formula."""
    image = axes.imshow(values, aspect="auto", interpolation="nearest", **how)
    axes.set_yticks(range(len(rows)), rows, parse_math=False)
    turned = {"rotation": 90} if sum(map(len, heads)) > 80 or len(heads) > 30 else {}
    axes.set_xticks(range(len(heads)), heads, parse_math=False, **turned)
    axes.tick_params(length=0)
    return image


def readable_on(image: Any, value: float) -> str:
    """Black or white, whichever stands out from the colour of a value."""
    red, green, blue, _ = image.cmap(image.norm(value))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
