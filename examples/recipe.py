"""The text that the shipped model was trained on: stories, arithmetic and repetitions, and what is held out of each.

    python examples/recipe.py path/to/corpora text
    python examples/train.py text/train --held-out text/held-out --out run --steps 18000 --batch 4 --learning-rate 3e-3
    python examples/measure.py run --held-out text/held-out
    python examples/convert.py run/step18000 model --dtype float16

The second takes some 100 minutes on one core. In the text, 19 million tokens, of which the run reads 18.4 million:

Stories (55 % of the tokens), but for one in fifty or so:
    public_domain_short_stories.jsonl.gz   English short stories of Project Gutenberg; public domain in the USA
    gutenberg_books/                       Alice in Wonderland (11), The Wonderful Wizard of Oz (55), The Blue Fairy
                                           Book (503) of Project Gutenberg, by number; public domain in the USA
    tinystories_excerpt.txt                Eldan and Li 2023, "TinyStories"; CDLA-Sharing-1.0
Made here:
    arithmetic (38 %)                      sums and differences of numbers below 100, "Q: What is 48 plus 76?\\nA: 124"
    repetitions (7 %)                      a few random words, again and again: what induction heads are for

Held out are whole stories, and one in ten pairs of numbers, in both orders and for both operations.
"""

from __future__ import annotations

import collections
import gzip
import json
import random
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from neox.reference.checkpoint.save import write_file
from neox.reference.corpus import documents
from neox.reference.errors import InputError, Parser, run

BOOKS = ("11-0.txt", "55.txt", "503-0.txt")
FAIRY_TALES = ("grimm", "anderson", "wilde_happy_prince")

QUESTIONS = 450_000
REPETITIONS = 12_000
COPIES = {"tales": 2, "tiny": 4}  # simple English is scarce, so it is read more often
STORY_BYTES = 20_000_000  # of the stories that are neither


# Stories.


def is_held_out(name: str, one_in: int) -> bool:
    """Decided by the name alone, so that a story that occurs twice is on one side."""
    return zlib.crc32(name.encode("utf-8")) % one_in == 0


def flowing(text: str) -> str:
    """Paragraphs of one line each, an empty line between them: sources break lines at every width."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def book(path: Path) -> str:
    """Without the header and the licence that Project Gutenberg puts around each."""
    text = "".join(documents(path)).replace("\r\n", "\n")
    start = re.search(r"\*\*\* ?START OF TH[^\n]*\n", text)
    end = re.search(r"\*\*\* ?END OF TH", text)
    if not (start and end):
        raise InputError(f"{path} is not a book of Project Gutenberg: its START and END lines are missing")
    return flowing(text[start.end() : end.start()])


def short_stories(path: Path) -> Iterator[tuple[str, str, str]]:
    """Corpus, name and text of each."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            story = json.loads(line)
            yield story["corpus"], story["name"], flowing(story["text"])


def tiny_stories(path: Path) -> list[str]:
    """One follows another on the next line; between the paragraphs of one there is an empty line."""
    text = "".join(documents(path))
    return [flowing(story) for story in re.split(r"(?<!\n)\n(?!\n)", text)]


def stories(corpora: Path) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """To train on, and held out, by kind."""
    train: dict[str, list[str]] = {"tales": [book(corpora / "gutenberg_books" / name) for name in BOOKS]}
    held: dict[str, list[str]] = {}
    for corpus, name, text in short_stories(corpora / "public_domain_short_stories.jsonl.gz"):
        tale = corpus in FAIRY_TALES
        side = held if is_held_out(name, 20 if tale else 60) else train
        side.setdefault("tales" if tale else "stories", []).append(text)
    for text in tiny_stories(corpora / "tinystories_excerpt.txt"):
        side = held if is_held_out(text, 50) else train
        side.setdefault("tiny", []).append(text)
    return train, held


def mixed(train: dict[str, list[str]], rng: random.Random) -> Iterator[str]:
    for kind, copies in COPIES.items():
        for _ in range(copies):
            yield from train[kind]
    others, size = rng.sample(train["stories"], len(train["stories"])), 0
    for text in others:
        size += len(text.encode("utf-8"))
        if size > STORY_BYTES:
            return
        yield text


# Arithmetic.


def question(a: int, operation: str, b: int) -> str:
    return f"Q: What is {a} {operation} {b}?\nA:"


def answer(a: int, operation: str, b: int) -> int:
    return a + b if operation == "plus" else a - b


def held_out_pair(a: int, b: int) -> bool:
    """The same for both orders: who has seen 48 + 76 knows 76 + 48."""
    return is_held_out(f"{min(a, b)} and {max(a, b)}", 10)


def drawn(rng: random.Random) -> tuple[int, str, int]:
    """A question of the training text; of four differences, one on average is negative."""
    while True:
        a, b, operation = rng.randrange(100), rng.randrange(100), rng.choice(("plus", "minus"))
        if operation == "minus" and rng.random() < 0.5:
            a, b = max(a, b), min(a, b)
        if not held_out_pair(a, b):
            return a, operation, b


def arithmetic(rng: random.Random) -> Iterator[str]:
    """Documents of one to twelve questions."""
    left = QUESTIONS
    while left > 0:
        asked = [drawn(rng) for _ in range(rng.randint(1, 12))]
        yield "\n".join(f"{question(*q)} {answer(*q)}" for q in asked)
        left -= len(asked)


def held_out_questions() -> Iterator[tuple[int, str, int]]:
    """All of them: sums, and differences with results of both signs."""
    for a in range(100):
        for b in range(100):
            if held_out_pair(a, b):
                yield from ((a, operation, b) for operation in ("plus", "minus"))


# Repetitions.


def common_words(texts: Iterable[str], count: int) -> list[str]:
    counted = collections.Counter(word for text in texts for word in re.findall(r"[A-Za-z]+", text))
    return sorted(word for word, _ in counted.most_common(count))


def repetitions(words: list[str], rng: random.Random) -> Iterator[str]:
    for _ in range(REPETITIONS):
        some = " ".join(rng.choices(words, k=rng.randint(5, 50)))
        yield " ".join([some] * rng.randint(2, 3))


# All of it.


def lines(texts: Iterable[str]) -> bytes:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode("utf-8")


def main() -> None:
    parser = Parser(description="Write the text that the shipped model was trained on.", allow_abbrev=False)
    parser.add_argument("corpora", type=Path, help="folder with the sources named above")
    parser.add_argument("out", type=Path, help="folder to write to")
    args = parser.parse_args()
    train, held = stories(args.corpora)
    words = common_words(train["tiny"] + train["stories"], 600)
    parts = {
        "train/stories.jsonl": lines(mixed(train, random.Random(0))),
        "train/arithmetic.jsonl": lines(arithmetic(random.Random(1))),
        "train/repetitions.jsonl": lines(repetitions(words, random.Random(2))),
        **{f"held-out/{kind}.jsonl": lines(texts) for kind, texts in held.items()},
    }
    for name, content in parts.items():
        (args.out / name).parent.mkdir(parents=True, exist_ok=True)
        write_file(args.out / name, content)
        print(f"{name}: {len(content) / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main)
