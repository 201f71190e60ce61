"""examples/benchmark.py: every line of it on the smallest shape, and what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "examples" / "benchmark.py"
SMALL = ["--shape", "pythia-14m", "--prompt-tokens", "70", "--new-tokens", "3", "--rounds", "2"]


def benchmark(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, PROGRAM, *flags], capture_output=True, text=True, timeout=300)


def test_the_reference_alone(tmp_path: Path) -> None:
    done = benchmark(*SMALL, "--no-peer", "--threads", "1", "--json", str(tmp_path / "figures.json"))
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("prefill of 70", "decode of 3", "load", "peak memory"):
        assert f"| {name} |" in done.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [row["name"] for row in figures["rows"]] == ["prefill of 70", "decode of 3", "load", "peak memory"]
    assert all(row["reference"] > 0 and row["transformers"] is None for row in figures["rows"])
    assert figures["limits"]["gemm"] > 1e9
    assert figures["limits"]["memory"] > 1e8


@pytest.mark.oracle
def test_beside_transformers_both_continue_alike() -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    done = benchmark(*SMALL)
    assert done.returncode == 0, done.stderr
    assert "agreement: 3 of 3 greedy tokens the same" in done.stdout


TRAIN = ["--train", "--rounds", "1", "--threads", "1"]


def test_updates_of_the_reference_alone(tmp_path: Path) -> None:
    done = benchmark(*TRAIN, "--no-peer", "--json", str(tmp_path / "figures.json"))
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^\| update on 16 x 256 \| .* tok/s \|.*% of the machine's", done.stdout, re.MULTILINE)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [row["reference"] > 10 for row in figures["rows"]] == [True]


@pytest.mark.oracle
def test_beside_transformers_both_make_the_same_updates() -> None:
    """Losses of the second update, after both have changed the weights."""
    pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    done = benchmark(*TRAIN)
    assert done.returncode == 0, done.stderr
    (within,) = re.findall(r"agreement: losses of 1 updates, .* within (\S+)", done.stdout)
    assert float(within) < 1e-5


@pytest.mark.parametrize(
    ("flags", "phrase"),
    [
        (["--shape", "gpt-2"], "invalid choice"),
        (["--rounds", "0"], "not a positive whole number"),
        (["--prompt-tokens", "2048"], "the context of pythia-160m is 2048"),
        (["--backend", "tpu"], "invalid choice"),
    ],
)
def test_bad_flags_end_with_one_line(flags: list[str], phrase: str) -> None:
    done = benchmark(*flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert phrase in done.stderr
