"""The text that the shipped model was trained on: stories, arithmetic and repetitions, and what is held out of each.

    python examples/recipe.py path/to/corpora text
    python examples/train.py text/first --held-out text/held-out --out first --steps 18000 --batch 4 \\
        --learning-rate 3e-3
    python examples/train.py text/second --held-out text/held-out --out second --steps 9500 --batch 4 \\
        --learning-rate 2e-3 --from first/step9000
    python examples/train.py text/third --held-out text/held-out --out third --steps 6500 --batch 4 \\
        --learning-rate 1.5e-3 --from second/step9500
    python examples/measure.py first:9000 second:9500 third --held-out text/held-out
    python examples/convert.py third/step6500 model --dtype float16

The first run can be stopped after 9,000 steps: from there, the second goes on with more repetitions, and the third with
more stories. Together they read 25.6 million tokens, in some two hours and a half on one core:

    first   second  third
    55 %    19 %    72 %    stories
                    public_domain_short_stories.jsonl.gz   of Project Gutenberg; public domain in the USA
                    gutenberg_books/                       Alice in Wonderland (11), The Wonderful Wizard of Oz (55) and
                                                           The Blue Fairy Book (503) of Project Gutenberg, likewise
                    tinystories_excerpt.txt                Eldan and Li 2023, "TinyStories"; CDLA-Sharing-1.0
    38 %    33 %    22 %    arithmetic of numbers below 100, made here: "Q: What is 48 plus 76?\\nA: 124"
     7 %    48 %     5 %    repetitions of a few random words or characters, made here: what induction heads are for

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
from dataclasses import dataclass
from pathlib import Path

from neox.reference.checkpoint.save import write_file
from neox.reference.corpus import documents
from neox.reference.errors import InputError, Parser, run

BOOKS = ("11-0.txt", "55.txt", "503-0.txt")
FAIRY_TALES = ("grimm", "anderson", "wilde_happy_prince")


@dataclass(frozen=True)
class Part:
    """How much of what the text of one run holds."""

    copies: dict[str, int]  # of tales and tiny stories: simple English is scarce, so it is read more often
    story_bytes: int  # of the other stories
    questions: int
    phrases: int  # repeated twice or three times
    chants: int  # repeated more often
    seed: int


FIRST = Part({"tales": 2, "tiny": 4}, 20_000_000, 450_000, phrases=12_000, chants=0, seed=0)
SECOND = Part({"tales": 1, "tiny": 2}, 1_500_000, 215_000, phrases=3_000, chants=45_000, seed=10)
THIRD = Part({"tales": 2, "tiny": 4}, 5_500_000, 95_000, phrases=1_500, chants=2_000, seed=20)


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


def mixed(train: dict[str, list[str]], part: Part, rng: random.Random) -> Iterator[str]:
    for kind, copies in part.copies.items():
        for _ in range(copies):
            yield from train[kind]
    others, size = rng.sample(train["stories"], len(train["stories"])), 0
    for text in others:
        size += len(text.encode("utf-8"))
        if size > part.story_bytes:
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


def arithmetic(count: int, rng: random.Random) -> Iterator[str]:
    """Documents of one to twelve questions."""
    left = count
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


def phrases(count: int, words: list[str], rng: random.Random) -> Iterator[str]:
    """Five to fifty words, twice or three times."""
    for _ in range(count):
        some = " ".join(rng.choices(words, k=rng.randint(5, 50)))
        yield " ".join([some] * rng.randint(2, 3))


def chants(count: int, words: list[str], rng: random.Random) -> Iterator[str]:
    """A few words, or characters, until there are a hundred or so."""
    characters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    for i in range(count):
        length = rng.randint(2, rng.choice((8, 25)))
        some = (
            "".join(f" {word}" for word in rng.choices(words, k=length)) if i % 2 else rng.choices(characters, k=length)
        )
        yield "".join(some) * max(2, rng.randint(40, 120) // length)


# All of it.


def lines(texts: Iterable[str]) -> bytes:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode("utf-8")


def written(train: dict[str, list[str]], part: Part) -> dict[str, Iterable[str]]:
    """The texts of a part, by the names of its files."""
    words = common_words(train["tiny"] + train["stories"], 600)
    stories, questions, repetitions = (random.Random(part.seed + i) for i in range(3))
    repeated = [*phrases(part.phrases, words, repetitions), *chants(part.chants, words, repetitions)]
    return {
        "stories": mixed(train, part, stories),
        "arithmetic": arithmetic(part.questions, questions),
        "repetitions": repeated,
    }


def main() -> None:
    parser = Parser(description="Write the text that the shipped model was trained on.", allow_abbrev=False)
    parser.add_argument("corpora", type=Path, help="folder with the sources named above")
    parser.add_argument("out", type=Path, help="folder to write to")
    args = parser.parse_args()
    train, held = stories(args.corpora)
    files: dict[str, Iterable[str]] = {f"held-out/{kind}": texts for kind, texts in held.items()}
    for name, part in (("first", FIRST), ("second", SECOND), ("third", THIRD)):
        files |= {f"{name}/{kind}": texts for kind, texts in written(train, part).items()}
    for name, texts in files.items():
        content = lines(texts)
        write_file(args.out / f"{name}.jsonl", content)
        print(f"{name}: {len(content) / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main)
