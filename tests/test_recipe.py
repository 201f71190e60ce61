"""The recipe of the shipped model and the programs around it: held-out text stays out, figures mean what they say."""

from __future__ import annotations

import gzip
import importlib
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from strategies import TINY, random_model

from neox.reference import load, load_tokenizer
from neox.reference.checkpoint.save import model_files, write_folder
from neox.reference.corpus import documents, train_tokenizer
from neox.reference.errors import InputError, run
from neox.reference.model import Model
from neox.reference.tokenizer import Tokenizer

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def example(name: str) -> ModuleType:
    """One of the programs, which import each other as scripts do."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(EXAMPLES))


recipe, measure = map(example, ("recipe", "measure"))


def outcome(module: ModuleType, argv: Sequence[object], monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    """The status with which a program ends; None if it comes to its end."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, argv)])
    try:
        run(module.main)
    except SystemExit as end:
        return end.code
    return None


# The questions.

LINE = re.compile(r"Q: What is (\d+) (plus|minus) (\d+)\?\nA: (-?\d+)")


def test_no_held_out_pair_is_asked_about_in_either_order_by_either_operation() -> None:
    asked = LINE.findall("\n".join(recipe.arithmetic(20_000, random.Random(0))))
    assert len(asked) >= 20_000
    trained = {frozenset((int(a), int(b))) for a, _, b, _ in asked}
    held = {frozenset((a, b)) for a, _, b in recipe.held_out_questions()}
    assert not trained & held
    # All others are asked about: of 4,545 pairs 20,000 draws miss hardly any.
    assert len(trained) + len(held) > 0.95 * 5050
    assert 0.08 < len(held) / 5050 < 0.12


def test_every_answer_is_right() -> None:
    texts = list(recipe.arithmetic(5_000, random.Random(1)))
    signs: Counter[tuple[str, bool]] = Counter()
    for a, operation, b, result in LINE.findall("\n".join(texts)):
        assert int(result) == (int(a) + int(b) if operation == "plus" else int(a) - int(b))
        signs[operation, int(result) < 0] += 1
    assert set(signs) == {("plus", False), ("minus", False), ("minus", True)}
    assert 0.2 < signs["minus", True] / (signs["minus", True] + signs["minus", False]) < 0.3
    assert {len(text.split("\nQ")) for text in texts} == set(range(1, 13))
    assert "".join(texts).count("Q") == sum(signs.values())  # nothing else is in them


def test_repetitions_repeat() -> None:
    words = [f"w{i}" for i in range(600)]
    for text in recipe.phrases(50, words, random.Random(0)):
        parts = text.split(" ")
        copies = [n for n in (2, 3) if parts == parts[: len(parts) // n] * n]
        assert copies
        assert 5 <= len(parts) // copies[0] <= 75
    for text in recipe.chants(50, words, random.Random(0)):
        periods = [n for n in range(2, len(text) // 2 + 1) if text == text[:n] * (len(text) // n)]
        assert periods
        assert 21 <= len(text.split()) <= 120 or 21 <= len(text) <= 120


# The stories.

BOOK = "The Project Gutenberg EBook\n\n*** START OF THIS PROJECT ***\n\n{}\n\n*** END OF THIS PROJECT ***\nLicence"


@pytest.fixture
def corpora(tmp_path: Path) -> Path:
    """Sources in the layout of the real ones."""
    folder = tmp_path / "corpora"
    (folder / "gutenberg_books").mkdir(parents=True)
    for name in recipe.BOOKS:
        (folder / "gutenberg_books" / name).write_text(BOOK.format(f"A tale of {name},\nof a cat."), encoding="utf-8")
    lines = []
    for i in range(600):
        kind = ("grimm", "mass_quantities")[i % 2]
        lines.append(
            json.dumps({"corpus": kind, "name": f"story {i}", "text": f"\n  Story {i}\n  of it.\n\n  End {i}."})
        )
    (folder / "public_domain_short_stories.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    tiny = "\n".join(f"Tiny {i} began.\n\nTiny {i} ended." for i in range(120))
    (folder / "tinystories_excerpt.txt").write_text(tiny, encoding="utf-8")
    return folder


def test_the_text_is_written_the_same_each_time_and_held_out_stories_stay_out(
    corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recipe, "FIRST", replace(recipe.FIRST, questions=100, phrases=10))
    monkeypatch.setattr(recipe, "SECOND", replace(recipe.SECOND, questions=100, phrases=10, chants=10))
    monkeypatch.setattr(recipe, "THIRD", replace(recipe.THIRD, questions=100, phrases=10, chants=10))
    for name in ("a", "b"):
        assert outcome(recipe, [corpora, tmp_path / name], monkeypatch) is None
    first, second = (
        {str(f.relative_to(tmp_path / name)): f.read_bytes() for f in (tmp_path / name).rglob("*.jsonl")}
        for name in "ab"
    )
    assert first == second
    kinds = [f"held-out/{kind}.jsonl" for kind in ("stories", "tales", "tiny")]
    kinds += [
        f"{part}/{kind}.jsonl"
        for part in ("first", "second", "third")
        for kind in ("arithmetic", "repetitions", "stories")
    ]
    assert sorted(first) == sorted(kinds)
    assert first["first/arithmetic.jsonl"] != first["second/arithmetic.jsonl"]
    trained = Counter(documents(tmp_path / "a" / "first" / "stories.jsonl"))
    held = set(documents(tmp_path / "a" / "held-out"))
    assert not set(trained) & held
    assert len(set(trained)) + len(held) == 3 + 600 + 120
    assert 10 <= len(held) <= 40
    assert trained["A tale of 55.txt, of a cat."] == 2
    assert {count for text, count in trained.items() if text.startswith("Tiny")} == {4}
    assert trained["Story 1 of it.\n\nEnd 1."] == 1


def test_a_book_without_its_marks_is_refused(
    corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (corpora / "gutenberg_books" / "55.txt").write_text("no marks", encoding="utf-8")
    assert outcome(recipe, [corpora, tmp_path / "out"], monkeypatch) == 2
    assert "55.txt is not a book of Project Gutenberg" in capsys.readouterr().err


# Measuring, with models that are known.


@pytest.fixture(scope="module")
def tokenizer_json() -> str:
    text = "Q: What is 48 plus 76?\nA: 124\nQ: What is 5 minus 76?\nA: -71 . One day a cat sat."
    return train_tokenizer([text] * 3, 300).to_str()


@pytest.fixture
def series(tmp_path: Path, tokenizer_json: str) -> Path:
    """Two checkpoints of drawn weights."""
    for step in (0, 4):
        m = random_model(replace(TINY, vocab_size=300, num_hidden_layers=1, max_position_embeddings=96), seed=step)
        write_folder(tmp_path / "run" / f"step{step}", model_files(m, "float32", tokenizer_json.encode()))
    return tmp_path / "run"


def test_answers_are_exact_or_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Continuations as a model might make them: right, wrong, and right but for what follows or is missing."""
    texts = {"plus": " {}", "minus": "{}"}

    def made_up(model: Model, tokenizer: Tokenizer, questions: Sequence[tuple[int, str, int]]) -> list[str]:
        return [texts[q[1]].format(recipe.answer(*q)) for q in questions]

    monkeypatch.setattr(measure, "answers", made_up)
    found = measure.arithmetic(None, None)
    assert found == {"addition": 1.0, "subtraction": 0.0, "negative": 0.0}
    texts.update({"plus": " {}1", "minus": " {}"})
    assert measure.arithmetic(None, None) == {"addition": 0.0, "subtraction": 1.0, "negative": 1.0}


def test_induction_of_a_model_that_copies_and_of_one_that_does_not(
    monkeypatch: pytest.MonkeyPatch, tokenizer_json: str, series: Path
) -> None:
    tokenizer = load_tokenizer(series / "step0")

    def copies(model: Model, ids: np.ndarray) -> np.ndarray:
        return np.eye(300)[np.roll(ids, measure.RANDOM_LENGTH - 1, axis=1)]

    monkeypatch.setattr(measure, "forward", copies)
    assert measure.induction(None, tokenizer) == 1.0
    monkeypatch.undo()
    assert measure.induction(load(series / "step0"), tokenizer) < 0.05


def test_a_uniform_model_needs_the_logarithm_of_its_vocabulary(tmp_path: Path, series: Path) -> None:
    (tmp_path / "held.jsonl").write_text(json.dumps({"text": "One day a cat sat. " * 40}) + "\n", encoding="utf-8")
    m, tokenizer = load(series / "step0"), load_tokenizer(series / "step0")
    uniform = replace(m, params=replace(m.params, embed_out=np.zeros_like(m.params.embed_out)))
    ids = tokenizer.encode("One day a cat sat. " * 40)
    per_byte = len(ids) * np.log(300) / (40 * len("One day a cat sat. "))
    # Whole rows only, which end in the middle of a sentence.
    assert abs(measure.nats_per_byte(uniform, tokenizer, tmp_path / "held.jsonl") / per_byte - 1) < 0.02


def test_a_series_is_measured_and_drawn(
    series: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "cats.jsonl").write_text(json.dumps({"text": "a cat sat " * 60}) + "\n", encoding="utf-8")
    monkeypatch.setattr(
        measure, "two_digit_questions", lambda: [(48, "plus", 76), (76, "minus", 48), (48, "minus", 76)]
    )
    argv = [series, "--held-out", tmp_path / "held", "--json", tmp_path / "figures.json"]
    assert outcome(measure, argv, monkeypatch) is None
    shown = capsys.readouterr().out
    assert shown.splitlines()[0].endswith("| induction | cats, nats/byte |")
    assert [line.split(" | ")[0] for line in shown.splitlines()[2:]] == ["| 0", "| 4"]
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [entry["step"] for entry in figures] == [0, 4]
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    (series / "losses.jsonl").write_text('{"step": 0}\n{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n')
    assert outcome(measure, [*argv, "--picture", tmp_path / "p.png"], monkeypatch) is None
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_goes_on_from_another_counts_its_steps(series: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (series / "losses.jsonl").write_text("".join(f'{{"step": {i}, "loss": {10 - i}}}\n' for i in range(1, 5)))
    first, second = runs = measure.runs_of([f"{series}:3", str(series)])
    assert (first.steps(), first.offset, second.steps(), second.offset) == ([0], 0, [0, 4], 3)
    assert measure.losses(runs) == [(1, 9), (2, 8), (3, 7), (4, 9), (5, 8), (6, 7), (7, 6)]
    with pytest.raises(InputError, match=r"name the step of .* from which"):
        measure.runs_of([str(series), str(series)])


def test_a_folder_without_checkpoints_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert outcome(measure, [tmp_path], monkeypatch) == 2
    assert "holds no step{N} folder" in capsys.readouterr().err
