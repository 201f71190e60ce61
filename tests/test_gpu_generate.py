"""The program with --backend gpu: the text of the reference, by kernels that run on the CPU or a card."""

from __future__ import annotations

import json

import numpy as np
import pytest
from devices import on_a_card
from program import Outcome, as_process, in_process

GPU = ["--backend", "gpu", "--device", "cuda" if on_a_card() else "host"]
PROMPTS = ["--prompt", "There was once a", "--prompt", "The wolf said"]


def lines_of(outcome: Outcome) -> list[dict]:
    assert outcome.status == 0, outcome.stderr
    return [json.loads(line) for line in outcome.stdout.splitlines()]


def test_the_program_writes_what_the_reference_writes(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--prompt", "Once upon a time", "-n", "20"]
    outcome = in_process([*argv, *GPU], b"", capsys)
    assert outcome.status == 0, outcome.stderr
    assert outcome.stdout == in_process(argv, b"", capsys).stdout
    assert "as float16" in outcome.stderr
    assert "generation 20 tokens" in outcome.stderr


def test_several_prompts_with_log_probabilities(capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*PROMPTS, "-n", "6", "--json", "--logprobs", "2"]
    expected = lines_of(in_process(argv, b"", capsys))
    # Sums of at most 640 terms in float32 differ by less than 640 of its roundings, each of a term of a few units.
    for ours, theirs in zip(
        lines_of(in_process([*argv, *GPU, "--dtype", "float32"], b"", capsys)), expected, strict=True
    ):
        assert ours["text"] == theirs["text"]
        for a, b in zip(ours["logprobs"], theirs["logprobs"], strict=True):
            np.testing.assert_allclose(a["logprob"], b["logprob"], atol=640 * 2.0**-24 * 8, rtol=0)


def test_a_seed_repeats_a_text_on_the_device(capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*GPU, "--dtype", "bfloat16", "--temperature", "1", "--top-p", "0.9", "-n", "6", "--seed", "5"]
    first = in_process(argv, b"", capsys)
    assert first.status == 0, first.stderr
    assert in_process(argv, b"", capsys).stdout == first.stdout


@pytest.mark.skipif(on_a_card(), reason="there is a card")
def test_without_a_card_one_line_says_what_to_do(tmp_path) -> None:
    outcome = as_process(["--backend", "gpu", "-n", "3"])
    assert outcome.status == 2
    assert outcome.stdout == ""
    error = outcome.stderr.splitlines()[-1]
    assert error.startswith("error: ")
    assert "host" in error
