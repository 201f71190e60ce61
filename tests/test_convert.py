"""examples/convert.py and examples/inspect_checkpoint.py, as their users run them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from closeness import assert_close
from test_neox_checkpoint import SMALL, drifted, numbers_of, written

from neox.reference import shipped
from neox.reference.checkpoint.layouts import source_in
from neox.reference.checkpoint.summary import PIECE, summarize
from neox.reference.checkpoint.tensors import EMBED_OUT, tensor_table
from neox.reference.config import parameter_count, read_config

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(program: str, *argv: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / program), *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def converted(*argv: str | Path) -> Path:
    done = run("convert.py", *argv)
    assert done.returncode == 0, done.stderr
    return Path(argv[1])


def inspected(*argv: str | Path) -> dict:
    done = run("inspect_checkpoint.py", *argv, "--json")
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout)


def test_there_and_back_is_the_same_to_the_bit(tmp_path: Path) -> None:
    wide = converted(shipped.path(), tmp_path / "wide", "--dtype", "float32", "--shard-size", "1MB")
    assert len(list(wide.glob("model-*-of-*.safetensors"))) > 1
    back = converted(wide, tmp_path / "back", "--dtype", "float16")
    assert inspected(back, "--compare", shipped.path())["same"]
    first, last = source_in(back), source_in(shipped.path())
    for spec in tensor_table(first.config).values():
        assert first.get(spec).dtype == last.get(spec).dtype == np.float16
        assert np.array_equal(first.get(spec).view(np.uint16), last.get(spec).view(np.uint16))
    assert (back / "tokenizer.json").read_bytes() == (shipped.path() / "tokenizer.json").read_bytes()


KILLED = """
import os, runpy, sys
from neox.reference.checkpoint import layouts

write, files = layouts.write_safetensors, []
def write_or_die(path, *rest):
    files.append(path)
    if len(files) == 4:
        path.write_bytes(b"half of it")
        os._exit(9)
    write(path, *rest)
layouts.write_safetensors = write_or_die
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_run_that_was_killed_goes_on_where_it_ended(tmp_path: Path) -> None:
    whole = converted(shipped.path(), tmp_path / "whole", "--shard-size", "500KB")
    out, argv = tmp_path / "out", [str(shipped.path()), str(tmp_path / "out"), "--shard-size", "500KB"]
    command = [sys.executable, "-c", KILLED, str(EXAMPLES / "convert.py"), *argv]
    assert subprocess.run(command, timeout=120).returncode == 9
    assert not out.exists()
    written = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("out.unfinished/*.safetensors")}
    assert len(written) == 3
    converted(*argv)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}
    assert written.items() <= {path.name: path.stat().st_mtime_ns for path in out.iterdir()}.items()


@pytest.mark.parametrize(
    ("argv", "phrase"),
    [
        (["--shard-size", "big"], "--shard-size must be a size such as 5GB"),
        (["--to", "neox", "--ranks", "3"], "attention heads, which 3 ranks cannot share"),
        (["--to", "paper"], "'paper'"),
        (["--dtype", "int8"], "'int8'"),
    ],
)
def test_a_wrong_flag_is_one_line(tmp_path: Path, argv: list[str], phrase: str) -> None:
    done = run("convert.py", shipped.path(), tmp_path / "out", *argv)
    assert done.returncode == 2
    assert phrase in done.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_inspecting_says_what_is_there(tmp_path: Path) -> None:
    report = inspected(shipped.path())
    config, source = read_config(shipped.path()), source_in(shipped.path())
    assert report["parameters"] == parameter_count(config)
    assert list(report["tensors"]) == list(tensor_table(config))
    for name, spec in tensor_table(config).items():
        found, array = report["tensors"][name], source.get(spec).astype(np.float64)
        assert tuple(found["shape"]) == array.shape
        assert (found["smallest"], found["largest"]) == (array.min(), array.max())
        assert_close(np.array(found["norm"]), np.linalg.norm(array.ravel()), rtol=1e-12)
    assert report["memory"]["gpu, float16 or bfloat16"]["weights"] == 2 * parameter_count(config)
    text = run("inspect_checkpoint.py", shipped.path()).stdout
    assert report["checksum"] in text
    assert f"{parameter_count(config):,}" in text


def test_a_checksum_is_that_of_the_numbers(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(3, 7)).astype(np.float16)
    digests = {summarize(x.astype(dtype)).digest for dtype in ("float16", "float32", "float64")}
    assert len(digests) == 1
    for other in (x.T.copy(), x + np.float16(1), np.where(x == x[0, 0], -x, x)):
        assert summarize(other.astype(np.float32)).digest not in digests
    precise = x.astype(np.float64) + 1e-12
    assert summarize(precise).digest not in digests


def test_what_is_not_finite_is_counted_and_left_out_of_the_rest() -> None:
    x = np.ones(PIECE + 5, np.float32)
    x[3], x[PIECE + 1], x[PIECE + 2], x[7] = np.nan, np.inf, -np.inf, -2
    found = summarize(x)
    assert (found.not_a_number, found.infinite) == (1, 2)
    assert (found.smallest, found.largest) == (-2, 1)
    assert found.norm == np.sqrt(PIECE + 5 - 4 + 4)


def test_a_difference_is_told(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "changed"
    shutil.copytree(shipped.path(), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[EMBED_OUT] = tensors[EMBED_OUT].copy()
    tensors[EMBED_OUT][5, 3] += np.float16(1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    done = run("inspect_checkpoint.py", shipped.path(), "--compare", folder)
    assert done.returncode == 1
    assert "1 tensors differ" in done.stdout
    assert "embed_out.weight" in done.stdout
    found = inspected(shipped.path(), "--compare", folder)
    assert not found["same"]
    assert list(found["tensors"]) == [EMBED_OUT]
    assert found["tensors"][EMBED_OUT]["count"] == 1
    assert abs(found["tensors"][EMBED_OUT]["largest"] - 1) < 1e-3
    assert inspected(shipped.path(), "--compare", shipped.path())["same"]


def test_drawn_weights_are_the_same_in_every_layout(tmp_path: Path) -> None:
    shape = ("pythia-14m", "--layers", "1", "--dtype", "float16")
    for name, options in {"a": ("--shard-size", "5MB"), "b": ("--to", "neox", "--ranks", "2")}.items():
        done = run("random_checkpoint.py", shape[0], tmp_path / name, *shape[1:], *options)
        assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "a").glob("model-*-of-*.safetensors"))) > 1
    assert inspected(tmp_path / "a", "--compare", tmp_path / "b")["same"]
    assert read_config(tmp_path / "a").num_hidden_layers == 1


@pytest.mark.parametrize(
    "wrong", [("--layers", "0"), ("--layers", "7"), ("--seed", "-1"), ("--ranks", "3", "--to", "neox")]
)
def test_a_shape_that_cannot_be_drawn_is_refused(tmp_path: Path, wrong: tuple[str, ...]) -> None:
    done = run("random_checkpoint.py", "pythia-14m", tmp_path / "out", *wrong)
    assert (done.returncode, done.stderr.count("\n"), list(tmp_path.iterdir())) == (2, 1, [])


def test_what_merging_norms_does_to_the_logits_is_said(tmp_path: Path) -> None:
    folder = written(tmp_path / "ranks", SMALL, numbers_of(), 2)
    equal = run("inspect_checkpoint.py", folder, "--merges", "--json")
    drifted(folder)
    apart = run("inspect_checkpoint.py", folder, "--merges", "--json")
    name = "largest difference of a log-probability"
    assert json.loads(equal.stdout)[name] < 1e-4  # folded vectors are rounded to float32
    assert 1e-2 < json.loads(apart.stdout)[name] < 10
    assert name in run("inspect_checkpoint.py", folder, "--merges").stdout
