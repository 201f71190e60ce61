"""What a user can do wrong: one line on stderr that says what it was, nothing on stdout, exit status 2."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from program import Outcome, as_process, in_process
from safetensors.numpy import load_file, save_file

from neox.reference import shipped
from neox.reference.config import read_config

NOTES = ("model: ", "weights: ")  # lines that are no complaint
SHIPPED = read_config(shipped.path())
LAYERS, WIDTH = SHIPPED.num_hidden_layers, SHIPPED.hidden_size
TOO_LONG = f"tokens, but the model's context is {SHIPPED.max_position_embeddings}"
QKV = "gpt_neox.layers.2.attention.query_key_value.weight"
NORM = "gpt_neox.layers.1.input_layernorm.bias"


def assert_one_line(outcome: Outcome, phrases: Sequence[str]) -> None:
    lines = [line for line in outcome.stderr.splitlines() if not line.startswith(NOTES)]
    assert outcome.status == 2, outcome
    assert outcome.stdout == ""
    assert len(lines) == 1, outcome.stderr
    assert lines[0].startswith("error: ")
    for phrase in phrases:
        assert phrase in lines[0]


# Damage.

Damage = Callable[[Path], object]


def weights(change: Callable[[dict[str, np.ndarray]], object]) -> Damage:
    """Rewrite the weights after changing the dictionary of tensors."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return damage


def filled(name: str, value: float) -> Damage:
    """One number of a tensor replaced."""
    return weights(lambda tensors: tensors[name].reshape(-1).__setitem__(5, value))


def file_bytes(name: str, change: Callable[[bytes], bytes]) -> Damage:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def header(content: bytes, length: int | None = None) -> Damage:
    """The header of the weights replaced; `length` is what the file says its length is."""
    size = len(content) if length is None else length
    return file_bytes("model.safetensors", lambda old: struct.pack("<Q", size) + content + old[-999:])


def config(**fields: object) -> Damage:
    """Fields of config.json replaced; None removes one."""

    def damage(folder: Path) -> None:
        d = {**json.loads((folder / "config.json").read_text()), **fields}
        (folder / "config.json").write_text(json.dumps({k: v for k, v in d.items() if v is not None}))

    return damage


def index(content: object) -> Damage:
    """The weights in one shard, beside an index that says something."""

    def damage(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return damage


def removed(*names: str) -> Damage:
    def damage(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return damage


def all_tensors_in(shard: str) -> dict[str, str]:
    return dict.fromkeys(load_file(shipped.path() / "model.safetensors"), shard)


MODELS: dict[str, tuple[Damage, list[str]]] = {
    "tensors missing": (weights(lambda t: [t.pop(QKV), t.pop(NORM)]), ["missing", QKV, NORM]),
    "tensors unknown": (weights(lambda t: t.update(extra=t[NORM], other=t[NORM] + 1)), ["extra", "other"]),
    "tensor misshapen": (
        weights(lambda t: t.update({QKV: t[QKV][:-1].copy()})),
        [QKV, f"[{3 * WIDTH - 1}, "],
    ),
    "tensor of integers": (weights(lambda t: t.update({QKV: t[QKV].astype(np.int32)})), [QKV]),
    "weights truncated": (file_bytes("model.safetensors", lambda b: b[:-1000]), ["model.safetensors", "not a whole"]),
    "weights truncated in the header": (file_bytes("model.safetensors", lambda b: b[:500]), ["model.safetensors"]),
    "weights empty": (file_bytes("model.safetensors", lambda b: b""), ["model.safetensors"]),
    "header is not JSON": (header(b"{" * 64), ["model.safetensors", "header"]),
    "header is not UTF-8": (header(b"\xff" * 64), ["model.safetensors", "header"]),
    "header is a list": (header(b"[1, 2]  "), ["model.safetensors", "header"]),
    "header longer than the file": (header(b"{}      ", 2**40), ["model.safetensors", "header"]),
    "header longer than any file": (header(b"{}      ", 2**64 - 1), ["model.safetensors", "header"]),
    "weights missing": (removed("model.safetensors"), ["model.safetensors"]),
    "index names a missing file": (
        index({"weight_map": all_tensors_in("model-00002-of-00002.safetensors")}),
        ["model-00002-of-00002.safetensors"],
    ),
    "index without a map": (index({"metadata": {}}), ["weight_map"]),
    "index is a list": (index([1]), ["index.json"]),
    "index leads out of the folder": (index({"weight_map": all_tensors_in("../outside.safetensors")}), ["outside"]),
    "NaN in a weight": (filled(QKV, np.nan), [QKV, "finite"]),
    "infinity in a vector": (filled(NORM, -np.inf), [NORM, "finite"]),
    "weights that overflow": (
        weights(lambda t: t.update({"gpt_neox.final_layer_norm.weight": np.full(WIDTH, 3e38, np.float32)})),
        ["logits are not finite"],
    ),
    "config missing": (removed("config.json"), ["config.json"]),
    "config is not JSON": (file_bytes("config.json", lambda b: b[:50]), ["config.json", "JSON"]),
    "config is a list": (file_bytes("config.json", lambda b: b"[]"), ["config.json", "list"]),
    "config of another model": (config(model_type="llama"), ["llama"]),
    "config without a size": (config(hidden_size=None), ["missing", "hidden_size"]),
    "config with two rotary bases": (config(rotary_emb_base=500), ["rotary_emb_base", "500", "10000"]),
    "config with heads that do not divide": (
        config(num_attention_heads=7),
        [f"hidden_size {WIDTH}", "7"],
    ),
    "config with an unknown activation": (config(hidden_act="relu"), ["relu"]),
    "config with a scaled rotation": (config(rope_scaling={"type": "linear", "factor": 2}), ["linear"]),
    "config with fewer layers than weights": (config(num_hidden_layers=LAYERS - 1), [f"gpt_neox.layers.{LAYERS - 1}."]),
    "config with more layers than weights": (config(num_hidden_layers=LAYERS + 1), [f"gpt_neox.layers.{LAYERS}."]),
    "config with a negative size": (config(num_hidden_layers=-1), ["num_hidden_layers", "-1"]),
    "tokenizer missing": (removed("tokenizer.json"), ["tokenizer.json", "does not exist"]),
    "tokenizer corrupt": (file_bytes("tokenizer.json", lambda b: b[:999]), ["tokenizer.json", "is not a tokenizer"]),
    "folder empty": (removed("config.json", "model.safetensors", "tokenizer.json"), [".json"]),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_damaged_model(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, phrases = MODELS[case]
    folder = tmp_path / "model"
    shutil.copytree(shipped.path(), folder)
    damage(folder)
    outcome = in_process(["--model", str(folder), "--prompt", "Once", "-n", "2"], b"", capsys)
    assert_one_line(outcome, phrases)


def test_the_undamaged_copy_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(shipped.path(), tmp_path / "model")
    outcome = in_process(["--model", str(tmp_path / "model"), "--prompt", "Once", "-n", "2"], b"", capsys)
    assert outcome.status == 0
    assert outcome.stdout.startswith("Once")


# Flags and prompts. Each with the words to expect.

FLAGS: list[tuple[list[str], list[str]]] = [
    (["--prompt", ""], ["prompt is empty", "<|endoftext|>"]),
    (["--prompt", "-"], ["prompt is empty"]),
    (["--prompt", "a", "--prompt", ""], ["prompt is empty"]),
    (["--prompt", "-", "--prompt", "-"], ["stdin"]),
    (["--prompt", "a " * 600], [TOO_LONG]),
    (
        ["--prompt", "a", "--prompt", "a " * 600],
        [TOO_LONG],
    ),
    (["--prompt", "half \ud800"], ["not valid Unicode"]),
    (["--prompt"], ["expected one argument"]),
    (["--max-tokens", "0"], ["max_tokens", "1 or more"]),
    (["--max-tokens", "-3"], ["max_tokens", "-3"]),
    (["--max-tokens", "many"], ["--max-tokens", "'many'"]),
    (["-n", "1.5"], ["--max-tokens", "'1.5'"]),
    (["--temperature", "-1"], ["temperature", "-1"]),
    (["--temperature", "nan"], ["temperature", "nan"]),
    (["--temp", "inf"], ["temperature", "inf"]),
    (["--temperature", "hot"], ["--temperature", "'hot'"]),
    (["--top-k", "-1"], ["top_k", "-1"]),
    (["--top-p", "0"], ["top_p", "more than 0"]),
    (["--top-p", "1.01"], ["top_p", "1.01"]),
    (["--min-p", "1"], ["min_p", "less than 1"]),
    (["--min-p", "-0.5"], ["min_p", "-0.5"]),
    (["--repetition-penalty", "0"], ["repetition_penalty", "more than 0"]),
    (["--repetition-penalty", "-2"], ["repetition_penalty", "-2"]),
    (["--seed", "-1"], ["seed", "-1"]),
    (["--stop", ""], ["stop string is empty"]),
    (["--logprobs", "-1", "--json"], ["logprobs", "-1"]),
    (["--logprobs", "2"], ["--json"]),
    (["--backend", "abacus"], ["--backend", "'abacus'"]),
    (["--dtype", "float8"], ["--dtype", "'float8'"]),
    (["--dtype", "float16"], ["reference computes in float32 or float64, not float16"]),
    (["--backend", "gpu", "--device", "host", "--dtype", "float64"], ["gpu computes in float16", "not float64"]),
    (["--backend", "gpu", "--device", "host", "--weights", "stored"], ["--weights belongs to --backend reference"]),
    (["--device", "host"], ["--device belongs to --backend gpu"]),
    (["--backend", "gpu", "--device", "abacus"], ["--device", "'abacus'"]),
    (["--weights", "none"], ["--weights", "'none'"]),
    (["--set", "hidden_act"], ["--set", "FIELD=VALUE"]),
    (["--set", "hidden_act=relu"], ["hidden_act", "relu"]),
    (["--set", "hidden_axe=gelu"], ["hidden_axe", "hidden_act"]),
    (["--set", "hidden_size=256"], ["256"]),
    (["--set", "max_position_embeddings=0"], ["max_position_embeddings", "0"]),
    (["--set", "rotary_pct=0.9999"], ["rotary_pct"]),
    (["--unknown", "1"], ["unrecognized arguments: --unknown 1"]),
    (["stray"], ["unrecognized arguments: stray"]),
    (["--revision", "step1000"], ["--revision needs a --model"]),
    (["--model", ""], ["no such folder"]),
    (["--model", "no/such/folder"], ["no such folder"]),
    (["--model", str(shipped.path()), "--revision", "step7"], ["step7"]),
    (["--model", str(shipped.path() / "model.safetensors")], ["is a file"]),
]


@pytest.mark.parametrize(("argv", "phrases"), FLAGS, ids=[" ".join(argv)[:40] for argv, _ in FLAGS])
def test_a_wrong_flag(argv: list[str], phrases: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert_one_line(in_process(argv, b"", capsys), phrases)


@pytest.mark.parametrize("stdin", [b"\xff", b"good until here \xe2\x82", b"\xed\xa0\x80"])
def test_stdin_that_is_not_utf8(stdin: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    assert_one_line(in_process(["--prompt", "-"], stdin, capsys), ["stdin is not UTF-8: byte"])


# The same in processes of their own, where nothing of pytest stands between the program and its streams.


def test_processes_end_as_main_does() -> None:
    assert_one_line(as_process(["--prompt", "-"], b"\xff\xfe"), ["stdin is not UTF-8: byte 0 is 0xff"])
    assert_one_line(as_process(["--prompt", b"\xff"]), ["not valid Unicode"])
    assert_one_line(as_process(["--top-k", "x"]), ["--top-k"])


def test_a_model_that_overflows_in_a_process_of_its_own_shows_no_warnings(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(shipped.path(), folder)
    damage, phrases = MODELS["weights that overflow"]
    damage(folder)
    # Long enough that the positions are shared among threads, to which NumPy's error state does not reach.
    assert_one_line(as_process(["--model", str(folder), "--prompt", "a " * 200]), phrases)


@pytest.mark.parametrize("name", ["pythia-70m", "gpt-neox-20b", "someone/something"])
def test_a_model_to_download_without_a_network(name: str, tmp_path: Path) -> None:
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    assert_one_line(as_process(["--model", name, "--prompt", "a"], env=offline), [name, "HF_HUB_OFFLINE"])
