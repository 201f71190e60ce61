"""examples/evaluate.py: its tasks, its command line, what is printed, and going on after an interruption."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from neox.reference import scoring
from neox.reference.errors import InputError

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def loaded(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


evaluate = loaded(EXAMPLES / "evaluate.py", "evaluate_program")
local = loaded(EXAMPLES / "tasks" / "local.py", "local_tasks")

# Arithmetic.

KINDS = ["1dc", "2da", "2ds", "2dm", "3da", "3ds", "4da", "4ds", "5da", "5ds"]
DIGITS = {"2dm": 2, "2da": 2, "2ds": 2, "3da": 3, "3ds": 3, "4da": 4, "4ds": 4, "5da": 5, "5ds": 5, "1dc": 1}
SYMBOLS = {"plus": "+", "minus": "-", "times": "*"}


@pytest.mark.parametrize("kind", KINDS)
def test_arithmetic_is_right(kind: str):
    """Python's own arithmetic has the same answers; numbers reach the largest of their digits, and not beyond."""
    numbers: list[int] = []
    for doc in local.arithmetic_docs(kind, 500):
        match = re.fullmatch(r"Question: What is (.+)\?\nAnswer:", doc["query"])
        assert match is not None
        text = re.sub("[a-z]+", lambda word: SYMBOLS[word[0]], match[1])
        assert doc["answer"] == f" {eval(text)}"
        numbers += map(int, re.findall(r"\d+", text))
    limit = 10 ** DIGITS[kind]
    assert 0 <= min(numbers) < limit / 20 + 1
    assert limit * 0.9 <= max(numbers) < limit
    if kind == "1dc":
        assert re.fullmatch(r"\d [-+*] \(\d [-+*] \d\)", text)


def test_arithmetic_is_the_same_every_time_and_another_for_another_seed():
    first = local.arithmetic_docs("2da")
    assert len(first) == 2000
    assert first == local.arithmetic_docs("2da")
    assert first[:100] == local.arithmetic_docs("2da", 100)
    assert first[:100] != local.arithmetic_docs("2da", 100, seed=1)
    assert local.arithmetic_docs("2da", 1, form="short")[0]["query"].startswith("Q: What is ")
    with pytest.raises(InputError, match="form must be long or short, not 'x'"):
        local.arithmetic_docs("2da", form="x")


def test_every_kind_has_its_task():
    found = {path.stem.removeprefix("arithmetic_") for path in (EXAMPLES / "tasks").glob("arithmetic_*.yaml")}
    assert found == set(KINDS)
    for kind in KINDS:
        text = (EXAMPLES / "tasks" / f"arithmetic_{kind}.yaml").read_text(encoding="utf-8")
        assert f"task: local_arithmetic_{kind}\n" in text
        assert text.endswith(f"dataset_kwargs:\n  kind: {kind}\n")


# Files.


def test_documents_of_the_tasks():
    assert local.lambada({"text": "a b c"}) == {"query": "a b", "answer": " c"}
    assert local.winogrande({"sentence": "As _ ran.", "option1": "x", "option2": "y", "answer": "2"}) == {
        "contexts": ["As x", "As y"],
        "ending": "ran.",
        "gold": 1,
    }
    doc = {"question": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}
    assert local.arc(doc) == {"query": "Question: q\nAnswer:", "choices": ["x", "y"], "gold": 1}
    assert local.prepared("arc_easy")(local.arc(doc)) == local.arc(doc)
    assert local.piqa({"goal": "g", "sol1": "x", "sol2": "y", "label": 1})["query"] == "Question: g\nAnswer:"
    doc = {"activity_label": "A", "ctx_a": "b", "ctx_b": "cD", "endings": ["[t] e", "f  g"], "label": "0"}
    assert local.hellaswag(doc) == {"query": "A: b Cd", "choices": [" e", "f g"], "gold": 0}


def test_files_that_are_missing_double_or_damaged(tmp_path: Path):
    with pytest.raises(InputError, match="say where it is by --data FOLDER"):
        local.file_of(None, "piqa")
    with pytest.raises(InputError, match="there is none"):
        local.file_of(str(tmp_path), "piqa")
    (tmp_path / "piqa_a.jsonl").write_text('{"goal": "g"}\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"piqa_a\.jsonl, line 1: KeyError: 'sol1'"):
        local.read(local.file_of(str(tmp_path), "piqa"), local.prepared("piqa"))
    (tmp_path / "piqa_b.jsonl").write_text('{"goal"', encoding="utf-8")
    with pytest.raises(InputError, match=r"line 1: JSONDecodeError"):
        local.read(tmp_path / "piqa_b.jsonl", local.prepared("piqa"))
    with pytest.raises(InputError, match=r"there is piqa_a\.jsonl, piqa_b\.jsonl"):
        local.file_of(str(tmp_path), "piqa")


def test_the_split_of_several(tmp_path: Path):
    for name in ("piqa_train", "piqa_val", "piqa_test"):
        (tmp_path / f"{name}.jsonl").touch()
        assert local.file_of(str(tmp_path), "piqa").stem == name


# The command line.


def test_what_is_missing_is_filled_in():
    ours = ["--model", "neox", "--include_path", str(EXAMPLES / "tasks"), "--batch_size", "16"]
    assert evaluate.completed(["--tasks", "x"], None) == ["run", "--tasks", "x", *ours]
    given = ["run", "-M", "hf", "--include_path", "y", "-b", "2"]
    assert evaluate.completed(given, None) == given
    assert evaluate.completed(["ls", "tasks"], "x") == ["ls", "tasks"]
    filled = evaluate.completed(["--metadata", "form=short", "--tasks", "x"], "/data")
    assert filled[-3:] == ["--metadata", "form=short", "data=/data"]


def test_values_of_flags():
    assert evaluate.values_of(["--tasks", "a,b", "c", "--limit", "3"], "--tasks", "-t") == ["a", "b", "c"]
    assert evaluate.values_of(["-t", "a"], "--tasks", "-t") == ["a"]
    assert evaluate.values_of(["--limit", "3"], "--tasks", "-t") is None


def test_help(capsys: pytest.CaptureFixture[str]):
    evaluate.main(["--help"])
    assert "examples/evaluate.py ls tasks" in capsys.readouterr().out


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(InputError, match=r'pip install "neox20b\[eval\]"'):
        evaluate.evaluate(["run"])


def test_flags_of_ranks_need_ranks():
    with pytest.raises(InputError, match="belong to --tensor-parallel"):
        evaluate.main(["--timeout", "3", "--tasks", "x"])


# Published values.


def results(shots: int = 0) -> dict[str, Any]:
    return {
        "results": {
            "local_lambada": {"perplexity,none": 9.5, "perplexity_stderr,none": "N/A", "acc,none": 0.25},
            "piqa": {"acc,none": 0.5, "acc_stderr,none": 0.01},
            "elsewhere": {"acc,none": 0.5},
        },
        "n-shot": {"local_lambada": shots, "piqa": shots, "elsewhere": shots},
    }


def test_published_values_stand_beside_ours():
    rows = evaluate.published_rows(results())
    assert ("local_lambada", "perplexity", "here", 9.5, None) in rows
    assert ("local_lambada", "perplexity", "gpt-neox-20b", 3.676, 0.076) in rows
    assert ("piqa", "acc", "here", 0.5, 0.01) in rows
    assert ("piqa", "acc", "pythia-70m", 0.5947, 0.0115) in rows
    assert not any(task == "elsewhere" for task, *_ in rows)
    assert evaluate.published_rows(results(5)) == []
    assert "|piqa|acc|here|0.5000|0.0100|" in evaluate.table(rows)
    assert "|local_lambada|perplexity|here|9.5000||" in evaluate.table(rows)


# With the harness.

MISSING = "the harness is not installed: pip install -e '.[eval]'"
harness = pytest.mark.filterwarnings("ignore")


def run_evaluate(arguments: Sequence[str]) -> None:
    pytest.importorskip("lm_eval", reason=MISSING)
    before = list(sys.path)
    try:
        evaluate.main(["--tasks", "local_arithmetic_2da", "--metadata", "form=short", "count=60", *arguments])
    finally:
        sys.path[:] = before


@harness
@pytest.mark.oracle
def test_a_run_that_is_interrupted_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """The second run reads only what the first had not answered; the third reads nothing."""
    read: list[int] = []
    real = scoring.TreeReader.read

    def counted(reader: scoring.TreeReader, batch: scoring.Batch) -> scoring.Judgement:
        if not read and stops:
            read.append(len(batch.ids))
        elif stops:
            raise KeyboardInterrupt
        else:
            read.append(len(batch.ids))
        return real(reader, batch)

    monkeypatch.setattr(scoring.TreeReader, "read", counted)
    arguments = ["--use_cache", str(tmp_path / "answers"), "--output_path", str(tmp_path / "out")]
    stops = True
    with pytest.raises(KeyboardInterrupt):
        run_evaluate(arguments)
    stops, first = False, sum(read)
    run_evaluate(arguments)
    again = sum(read) - first
    assert again > 0
    printed = capsys.readouterr().out
    assert "|local_arithmetic_2da|" in printed
    run_evaluate(arguments)
    assert sum(read) == first + again
    assert capsys.readouterr().out.splitlines()[1:] == printed.splitlines()[1:]
    read.clear()
    run_evaluate([])
    assert max(first, again) < sum(read) <= first + again
    saved = [json.loads(path.read_text(encoding="utf-8")) for path in tmp_path.rglob("results_*.json")]
    assert saved[0]["published"] == []  # of arithmetic there are none
    assert saved[0]["results"]["local_arithmetic_2da"]["acc,none"] is not None


@harness
@pytest.mark.oracle
def test_the_readme_s_command():
    """On three questions of each kind."""
    pytest.importorskip("lm_eval", reason=MISSING)
    command = "examples/evaluate.py --tasks local_arithmetic --metadata form=short --limit 3"
    ran = subprocess.run(
        [sys.executable, *command.split()], cwd=EXAMPLES.parent, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    assert all(f"|local_arithmetic_{kind}|" in ran.stdout for kind in KINDS)


@harness
@pytest.mark.oracle
def test_bad_input_is_one_line():
    pytest.importorskip("lm_eval", reason=MISSING)
    command = [sys.executable, str(EXAMPLES / "evaluate.py"), "--tasks", "local_piqa", "--data", "/nowhere"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 2
    assert ran.stderr.splitlines()[-1] == "error: piqa reads one file piqa*.jsonl in /nowhere; there is none"
    assert "Traceback" not in ran.stderr


@harness
@pytest.mark.oracle
def test_the_library_that_has_the_name_of_the_program_is_found():
    run_evaluate(["--limit", "2"])
    assert Path(str(importlib.import_module("evaluate").__file__)).parent != EXAMPLES
