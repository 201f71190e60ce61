"""The evaluation harness as others install it, on our server, against scores straight from the model."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neox.reference import shipped
from neox.reference.checkpoint.load import load
from neox.reference.generate import CachedDecoder, Request, complete
from neox.reference.model import Model, forward
from neox.reference.sampling import log_softmax
from neox.reference.tokenizer import Tokenizer, load_tokenizer

pytest.importorskip("starlette", reason="starlette and uvicorn are not installed: pip install -e '.[serve]'")
pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'lm-eval[api]'")
pytest.importorskip("aiohttp", reason="lm-eval cannot talk to servers: pip install 'lm-eval[api]'")

from serving import started

MAX_LENGTH = 120

DOCS = [
    {"question": "Once upon a time", "answer": " there was", "others": [" a king", " xyz", " there was"]},
    {"question": "He said, \u201cI  ", "answer": "am", "others": ["am", "q \u65e5\u672c", "will go"]},
    {"question": "", "answer": "The end", "others": ["The", "<|endoftext|> One", "zz"]},
    {"question": "word " * 150, "answer": " word word", "others": [" word", "s", " of the\n"]},
    {"question": "The old\t\n", "answer": "man", "others": ["man", "woman and", " "]},
]
COMMON = "dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n"
PAIR = 'doc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"\ntarget_delimiter: ""\n'
LIKELIHOOD = "output_type: loglikelihood\nmetric_list:\n  - metric: acc\n"
TASKS = {
    "scored": LIKELIHOOD + PAIR,
    "shots": LIKELIHOOD + PAIR + "num_fewshot: 2\nfewshot_split: test\n",
    "choices": 'output_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_target: 0\ntarget_delimiter: ""\n'
    'doc_to_choice: "{{others}}"\nmetric_list:\n  - metric: acc\n',
    "rolling": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{question}}{{answer}}"\n'
    "metric_list:\n  - metric: word_perplexity\n",
    "written": "output_type: generate_until\n" + PAIR + "metric_list:\n  - metric: exact_match\n"
    'generation_kwargs:\n  until: [".", "the "]\n  max_gen_toks: 15\n',
}


@cache
def model() -> Model:
    return load(shipped.path(), dtype="float64")


@cache
def tokenizer() -> Tokenizer:
    return load_tokenizer(shipped.path())


def scored(context: str, continuation: str) -> tuple[float, bool]:
    """The log-probability of a continuation, and whether each of its tokens is the likeliest.

    As the harness has it: spaces at the end of a context belong to the continuation, and an empty context is the
    end-of-text token.
    """
    kept = context.rstrip()
    encode = tokenizer().encode
    whole, before = encode(context + continuation), encode(kept)
    if not context:
        whole, before = encode(continuation), []
    if not before and whole[0] != tokenizer().eos:
        whole = [0, *whole]
    return of_ids(whole, max(1, len(before)))


def of_ids(ids: list[int], before: int) -> tuple[float, bool]:
    given = max(1, before - max(0, len(ids) - (MAX_LENGTH - 1)))
    ids = ids[-(MAX_LENGTH - 1) :]
    rows = [log_softmax(row) for row in forward(model(), [ids])[0, given - 1 : -1]]
    following = ids[given:]
    logprob = sum(row[index] for row, index in zip(rows, following, strict=True))
    return float(logprob), all(np.argmax(row) == index for row, index in zip(rows, following, strict=True))


def rolled(text: str) -> float:
    """The log-probability of a text, in windows that lie end to end, each after one token of the one before."""
    ids = [0, *tokenizer().encode(text)]
    size = MAX_LENGTH - 2
    total = 0.0
    for start in range(1, len(ids), size):
        stop = min(start + size, len(ids))
        # The last window is filled up with what came before it.
        first = max(0, stop - 1 - size) if start > 1 else 0
        total += of_ids(ids[first:stop], start - first)[0]
    return total


def written(context: str, stops: list[str]) -> str:
    ids = tokenizer().encode(context or "<|endoftext|>")[-(MAX_LENGTH - 1 - 15) :]
    return complete(CachedDecoder(model()), [Request(ids, 15, stop=tuple(stops))], tokenizer())[0].text


def results(folder: Path) -> list[dict[str, Any]]:
    (folder / "data.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS), encoding="utf-8")
    for name, lines in TASKS.items():
        common = COMMON.format(data=folder / "data.jsonl")
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{common}{lines}", encoding="utf-8")
    with started("--dtype", "float64") as (_, server):
        client = [sys.executable, str(Path(__file__).with_name("harness_client.py")), server.url, str(folder)]
        process = subprocess.run([*client, str(MAX_LENGTH)], capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 0, process.stderr
    found: list[dict[str, Any]] = json.loads(process.stdout.splitlines()[-1])
    return found


def expected(task: str, arguments: list[Any]) -> Any:
    match task:
        case "rolling":
            return rolled(arguments[0])
        case "written":
            return written(arguments[0], arguments[1]["until"])
    return scored(arguments[0], arguments[1])


def logprob_of(response: Any) -> float:
    return float(response[0] if isinstance(response, (list, tuple)) else response)


@pytest.mark.slow
def test_the_harness_finds_what_the_model_says(tmp_path: Path) -> None:
    found = results(tmp_path)
    kinds = {task: sum(row["task"] == task for row in found) for task in TASKS}
    assert kinds == {"scored": 5, "shots": 5, "choices": 15, "rolling": 5, "written": 5}
    for row in found:
        response, right = row["response"], expected(row["task"], row["arguments"])
        if row["task"] == "written":
            assert response == right
            continue
        # Sums of up to 500 log-probabilities, computed in float64 in different orders.
        assert abs(logprob_of(response) - logprob_of(right)) < 1e-9, row
        if row["task"] != "rolling":
            assert response[1] is right[1]
