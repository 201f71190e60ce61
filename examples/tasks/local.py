"""Where the tasks of this folder have their documents from: files that a user points at, or a seed. No network.

The harness calls these functions for the YAML files beside them, with what --metadata says among the arguments:

    --metadata data=FOLDER     a folder with piqa_val.jsonl, or any *.jsonl whose name begins with that of the task
    --metadata form=short      arithmetic as "Q: ... A:", as GPT-3's authors printed it and the shipped model read it
    --metadata count=100       of arithmetic: questions of each kind
    --metadata questions=7     of arithmetic: their seed

Arithmetic is that of Brown et al. 2020 (arXiv 2005.14165), section 3.9.1, on which the 20B was measured: 2000 questions
of each of ten kinds, drawn here anew. `python examples/tasks/local.py 2da` prints them.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from neox.reference.errors import InputError

Doc = dict[str, Any]

# Files.

HARNESS_FORM = {"query", "choices", "gold"}  # documents that the harness has prepared already


def file_of(data: str | None, task: str) -> Path:
    """The file of a task: of several, that of the test split, or else of the validation split, as the harness prefers.

    InputError if there is none, or more than one.
    """
    if data is None:
        raise InputError(f"{task} reads a file: say where it is by --data FOLDER or --metadata data=FOLDER")
    found = sorted(Path(data).glob(f"{task}*.jsonl"))
    for split in ("test", "val"):
        found = [path for path in found if split in path.stem.removeprefix(task)] or found
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise InputError(f"{task} reads one file {task}*.jsonl in {data}; there is {names}")
    return found[0]


def read(path: Path, prepare: Callable[[Doc], Doc]) -> list[Doc]:
    """The documents of a file, one JSON object a line. InputError names the line that is none, or lacks a field."""
    docs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            docs.append(prepare(json.loads(line)))
        except (ValueError, LookupError, TypeError) as error:
            raise InputError(f"{path}, line {number}: {type(error).__name__}: {error}") from error
    return docs


def lambada(doc: Doc) -> Doc:
    """The last word is to be predicted."""
    context, _, word = str(doc["text"]).rpartition(" ")
    return {"query": context, "answer": f" {word}"}


def piqa(doc: Doc) -> Doc:
    return {
        "query": f"Question: {doc['goal']}\nAnswer:",
        "choices": [doc["sol1"], doc["sol2"]],
        "gold": int(doc["label"]),
    }


def arc(doc: Doc) -> Doc:
    choices = doc["choices"]
    return {
        "query": f"Question: {doc['question']}\nAnswer:",
        "choices": choices["text"],
        "gold": choices["label"].index(doc["answerKey"]),
    }


def without_markup(text: str) -> str:
    """HellaSwag's WikiHow part has marks like [title], [step] and [substeps]."""
    text = text.strip().replace(" [title]", ". ")
    while "[" in text and "]" in text[text.index("[") :]:
        start = text.index("[")
        text = text[:start] + text[text.index("]", start) + 1 :]
    return text.replace("  ", " ")


def hellaswag(doc: Doc) -> Doc:
    return {
        "query": without_markup(f"{doc['activity_label']}: {doc['ctx_a']} {doc['ctx_b'].capitalize()}"),
        "choices": [without_markup(ending) for ending in doc["endings"]],
        "gold": int(doc["label"]),
    }


def winogrande(doc: Doc) -> Doc:
    """The same ending after either name: what differs is the context, as Trinh and Le 2018 score it."""
    before, _, after = doc["sentence"].partition("_")
    contexts = [before + doc[option] for option in ("option1", "option2")]
    return {"contexts": contexts, "ending": after.strip(), "gold": int(doc["answer"]) - 1}


PREPARE = {
    "lambada": lambada,
    "piqa": piqa,
    "arc_easy": arc,
    "arc_challenge": arc,
    "hellaswag": hellaswag,
    "winogrande": winogrande,
}


def prepared(task: str) -> Callable[[Doc], Doc]:
    return lambda doc: doc if set(doc) >= HARNESS_FORM else PREPARE[task](doc)


def from_file(task: str, data: str | None = None, **_: Any) -> Any:
    """The dataset of a task of PREPARE. InputError as file_of and read."""
    from datasets import Dataset, DatasetDict

    return DatasetDict({"validation": Dataset.from_list(read(file_of(data, task), prepared(task)))})


# What the YAML of WinoGrande names: the harness scores one continuation after several contexts so.


def gold(doc: Doc) -> int:
    return int(doc["gold"])


def contexts(doc: Doc) -> list[str]:
    return list(doc["contexts"])


def ending(doc: Doc) -> str:
    return str(doc["ending"])


# Arithmetic.

FORMS = {"long": "Question: {}\nAnswer:", "short": "Q: {}\nA:"}
WORDS = {"+": "plus", "-": "minus", "*": "times"}
RESULTS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
}
COUNT = 2000
SEED = 2005


def two_numbers(digits: int, operation: str, rng: random.Random) -> tuple[str, int]:
    a, b = rng.randrange(10**digits), rng.randrange(10**digits)
    return f"What is {a} {WORDS[operation]} {b}?", RESULTS[operation](a, b)


def three_digits(rng: random.Random) -> tuple[str, int]:
    """Two operations on numbers of one digit, the second in parentheses."""
    a, b, c = (rng.randrange(10) for _ in range(3))
    first, second = rng.choice("+-*"), rng.choice("+-*")
    return f"What is {a} {first} ({b} {second} {c})?", RESULTS[first](a, RESULTS[second](b, c))


def question(kind: str, rng: random.Random) -> tuple[str, int]:
    """kind: 2da is addition of numbers of up to two digits, 5ds subtraction of five, 2dm a product, 1dc two at once."""
    if kind == "1dc":
        return three_digits(rng)
    return two_numbers(int(kind[0]), {"a": "+", "s": "-", "m": "*"}[kind[2]], rng)


def arithmetic_docs(kind: str, count: int = COUNT, seed: int = SEED, form: str = "long") -> list[Doc]:
    """The questions of a kind; those of another seed are others."""
    if form not in FORMS:
        raise InputError(f"form must be {' or '.join(FORMS)}, not {form!r}")
    rng = random.Random(f"{kind} {seed}")
    drawn = (question(kind, rng) for _ in range(count))
    return [{"query": FORMS[form].format(text), "answer": f" {result}"} for text, result in drawn]


def arithmetic(kind: str, count: int = COUNT, questions: int = SEED, form: str = "long", **_: Any) -> Any:
    """Arguments as arithmetic_docs."""
    from datasets import Dataset, DatasetDict

    return DatasetDict({"validation": Dataset.from_list(arithmetic_docs(kind, count, questions, form))})


if __name__ == "__main__":
    for line in arithmetic_docs(*sys.argv[1:2]):
        print(json.dumps(line))
