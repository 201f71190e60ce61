"""The walk through a model prints what `forward` computes, where it computes it; and the 20B's costs add up."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from neox.reference import shipped
from neox.reference.checkpoint.load import load
from neox.reference.checkpoint.tensors import tensor_table
from neox.reference.config import Config, config_to_dict, read_config
from neox.reference.errors import InputError
from neox.reference.model import forward
from neox.reference.random_weights import random_tensor
from neox.reference.tokenizer import load_tokenizer

PROGRAM = Path(__file__).resolve().parents[1] / "examples" / "walkthrough.py"
SHIPPED = read_config(shipped.path())
LAYERS = SHIPPED.num_hidden_layers
PROMPT = "There was once a little house"

pytestmark = pytest.mark.skipif(not PROGRAM.is_file(), reason="examples/ is not beside tests/")

NUMBER = r"(?:-?\d+\.\d{3}|-inf)"
SHOWN = re.compile(rf"  (\S*hook_\w+|logits) +\(([^)]+)\) +({NUMBER}(?: +{NUMBER})*)(?: \.\.\.)? +\S")


@cache
def walkthrough() -> ModuleType:
    spec = importlib.util.spec_from_file_location("walkthrough_program", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def sequential_model(folder: Path) -> Path:
    """A model in which the MLP comes after the attention, with the tokenizer that ships."""
    wide = replace(SHIPPED, hidden_size=60, num_attention_heads=5, rotary_pct=0.5)
    config = replace(wide, intermediate_size=37, num_hidden_layers=3, use_parallel_residual=False)
    save_file({name: random_tensor(spec) for name, spec in tensor_table(config).items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_to_dict(config)))
    (folder / "tokenizer.json").write_bytes((shipped.path() / "tokenizer.json").read_bytes())
    return folder


@pytest.fixture(params=["parallel", "sequential"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return shipped.path() if request.param == "parallel" else sequential_model(tmp_path)


def intermediates(folder: Path) -> dict[str, NDArray]:
    """What passes the tap, in its order, and the logits."""
    seen: dict[str, NDArray] = {}

    def tap(name: str, array: NDArray) -> NDArray:
        seen[name] = array.copy()
        return array

    logits = forward(load(folder), [load_tokenizer(folder).encode(PROMPT)], tap)
    return {**seen, "logits": logits}


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> list[str]:
    capsys.readouterr()
    walkthrough().main(argv)
    return capsys.readouterr().out.splitlines()


def steps(lines: list[str], layer: int) -> list[tuple[str, str, list[float]]]:
    """Name in full, letters and sizes, and values of each line that shows an intermediate."""
    found = [match for line in lines if (match := SHOWN.match(line))]
    whole = re.compile(r"blocks\.|ln_final\.|hook_embed|logits")
    names = [match[1] if whole.match(match[1]) else f"blocks.{layer}.{match[1]}" for match in found]
    return [(name, match[2], [float(v) for v in match[3].split()]) for name, match in zip(names, found, strict=True)]


def sizes(config: Config, length: int) -> dict[str, int]:
    """Of every letter, by the glossary of model.py."""
    return {
        "B": 1,
        "T": length,
        "S": length,
        "C": config.hidden_size,
        "H": config.num_attention_heads,
        "D": config.head_dim,
        "F": config.intermediate_size,
        "V": config.vocab_size,
        "1": 1,
    }


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_each_intermediate_of_one_layer_and_the_end_of_the_others_in_their_order(
    folder: Path, layer: int, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = [name for name, _, _ in steps(printed(capsys, *arguments(folder, layer)), layer)]
    own = re.compile(rf"blocks\.{layer}\.|(?!blocks\.)|.*hook_resid_post")
    assert shown == [name for name in intermediates(folder) if own.match(name)]


def arguments(folder: Path, layer: int = 1) -> tuple[str, ...]:
    return ("--model", str(folder), "--prompt", PROMPT, "--layer", str(layer))


def test_shapes_and_values_are_those_that_forward_computes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays, config = intermediates(folder), read_config(folder)
    expected = sizes(config, arrays["logits"].shape[1])
    for name, dims, values in steps(printed(capsys, *arguments(folder)), 1):
        letters = [part.partition("=")[0] for part in dims.split(",")]
        assert [int(part.split("=")[-1]) for part in dims.split(",")] == list(arrays[name].shape), name
        assert [expected[letter] for letter in letters] == list(arrays[name].shape), name
        assert letters[2:] == ["T", "S"] or "S" not in letters  # which sizes cannot tell: queries come before keys
        last = arrays[name][tuple({"B": 0, "T": -1, "H": 0}.get(letter, slice(3)) for letter in letters)]
        np.testing.assert_allclose(values, last, rtol=0, atol=6e-4, err_msg=name)  # three decimals are printed


def test_the_likeliest_tokens_come_with_their_probabilities(capsys: pytest.CaptureFixture[str]) -> None:
    logits = intermediates(shipped.path())["logits"][0, -1].astype(np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum()
    best = np.argsort(-probabilities)[:5]
    found = [re.fullmatch(r" +([\d.]+)%  id (\d+)  (.+)", line) for line in printed(capsys, *arguments(shipped.path()))]
    rows = [match for match in found if match]
    assert [int(row[2]) for row in rows] == best.tolist()
    np.testing.assert_allclose([float(row[1]) / 100 for row in rows], probabilities[best], rtol=0, atol=6e-5)
    decode = load_tokenizer(shipped.path()).decode
    assert [row[3] for row in rows] == [repr(decode([index])) for index in best]


def test_a_layer_in_one_line_says_what_would_follow_if_it_were_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, *arguments(shipped.path(), layer=0))
    last = read_config(shipped.path()).num_hidden_layers - 1
    guess = next(line for line in lines if f"blocks.{last}.hook_resid_post" in line)
    best = intermediates(shipped.path())["logits"][0, -1].argmax()
    assert guess.endswith(f"would say {load_tokenizer(shipped.path()).decode([best])!r}")


def test_large_values_do_not_run_together() -> None:
    row = np.array([[[-12345.678, -23456.789, 34567.891, 4.0]]])
    assert walkthrough().first_values("BTC", row).split() == ["-12345.678", "-23456.789", "34567.891", "..."]


def test_equations_are_those_of_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line.strip() for line in printed(capsys)]
    assert "q, k, v = split(query_key_value(LN1(x)))   per head: its q, its k, its v   [1]" in lines
    assert "x = (mlp + attention) + x   both read the same x   [3, 4]" in lines


def test_a_sequential_model_is_not_told_to_be_parallel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "--model", str(sequential_model(tmp_path)))
    assert not [line for line in lines if "(mlp + attention)" in line]


def test_lines_fit_a_terminal_of_100_columns(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "--model", str(folder), "--prompt", 10 * PROMPT)
    assert max(len(line) for line in lines if not line.startswith("Model ")) <= 100  # that one holds the path


def test_all_tokens_of_a_long_prompt_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "--prompt", 10 * PROMPT)
    end = next(i for i, line in enumerate(lines) if "The values shown" in line)
    listed = " | ".join(line[8:] for line in lines[2:end]).split(" | ")
    tokenizer = load_tokenizer(shipped.path())
    assert listed == [f"{i} {tokenizer.decode([i])!r}" for i in tokenizer.encode(10 * PROMPT)]


# The 20B.


def test_a_layer_of_the_20b_is_walked_through_in_less_than_4_gb() -> None:
    command = [sys.executable, str(PROGRAM), "--model", "gpt-neox-20b-shape"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8") as process:
        assert process.stdout is not None
        text = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert usage.ru_maxrss * 1024 < 4e9
    shapes = ("C=6144", "(B=1,T=6,H=64,D=96)", "(B=1,T=6,F=24576)", "vocabulary is cut to 1024 rows")
    costs = ("20,554,567,680", "41.1 GB", "82.2 GB", "1.08 MB", "2.21 GB", "40.5 GFLOP", "42.7 GFLOP", "83.9 TFLOP")
    assert not [fact for fact in (*shapes, *costs) if fact not in text]
    assert "nan" not in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    ("argv", "phrase"),
    [
        (("--layer", str(LAYERS)), f"--layer {LAYERS}: this model's are 0 to {LAYERS - 1}"),
        (("--layer", "-1"), f"0 to {LAYERS - 1}"),
        (("--prompt", ""), "the prompt is empty"),
        (("--revision", "step1"), "--revision needs a --model"),
        (("--model", "gpt-neox-20b-shape", "--prompt", "x"), "leave out --prompt"),
        (("--model", "gpt-neox-20b-shape", "--layer", "1"), "one layer"),
        (("--model", "no/such/folder"), "no such folder"),
        (("--layer", "one"), "invalid int value"),
        (("--prompt", "word " * 600), f"context is {SHIPPED.max_position_embeddings}"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_bad_input_is_named(argv: tuple[str, ...], phrase: str) -> None:
    with pytest.raises(InputError, match=re.escape(phrase)):
        walkthrough().main(argv)
