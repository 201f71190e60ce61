"""examples/benchmark.py --backend gpu: every line of it on a tiny shape, its kernels, and its arithmetic."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from devices import DTYPES, all_devices

from neox.reference import GPT_NEOX_20B
from neox.reference.checkpoint.tensors import tensor_table

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
HOST = ["--backend", "gpu", "--device", "host"]


def benchmark(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, EXAMPLES / "benchmark.py", *flags], capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def program() -> ModuleType:
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module("benchmark_gpu")
    finally:
        sys.path.remove(str(EXAMPLES))


def test_a_dry_run_goes_through_all_of_it(tmp_path: Path, program) -> None:
    plan = program.DRY
    picture = ["--picture", str(tmp_path / "roof.png")] if importlib.util.find_spec("matplotlib") else []
    done = benchmark(*HOST, "--dry-run", "--json", str(tmp_path / "figures.json"), *picture)
    assert done.returncode == 0, done.stderr
    assert "left out" not in done.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["plan"]["steps"] == plan.steps
    rows = {row["name"]: row for row in figures["ceilings"] + figures["rows"]}
    decoded = [f"decode, batch {batch}, context {context}" for batch in plan.batches for context in plan.contexts]
    extremes = (min(plan.batches), max(plan.batches))
    decoded += [f"decode, batch {b}, context {plan.contexts[0]}, {order}" for b in extremes for order in program.ORDERS]
    choices = [f"{way}, {max(plan.batches)} texts" for way in program.WAYS]
    prompts = [f"{what} {length}" for length in plan.prompts for what in ("prompt of", "first token after")]
    products = [f"products of {n} rows, {how}" for n in plan.product_rows for how in ("burst", "sustained")]
    size = 2 * sum(spec.size for spec in tensor_table(replace(plan.config, num_hidden_layers=1)).values()) / 1e9
    loaded = [f"load of {size:.3g} GB"]
    assert list(rows) == ["read", "copy", *products, "graph of 3 empty kernels", *decoded, *choices, *prompts, *loaded]
    for name, row in rows.items():
        assert f"| {name} |" in done.stdout
        assert row["seconds"] > 0
        assert row["spread"] >= 0
        assert (row["of_ceiling"] is None) == name.startswith(("graph", "first", "load"))
    if picture:
        assert (tmp_path / "roof.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.oracle
def test_beside_transformers_all_choose_the_same_tokens(tmp_path: Path) -> None:
    """From one memory: the weights that torch is lent are those that were drawn."""
    pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    done = benchmark(*HOST, "--dry-run", "--peer", "--json", str(tmp_path / "figures.json"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| 2 of 2 |") == 2
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [(case["batch"], case["context"]) for case in figures] == [(1, 5), (3, 9)]
    assert all(case["first"]["ours"] == case["first"]["compiled"] for case in figures)


@pytest.mark.parametrize(
    ("flags", "phrase"),
    [
        ([*HOST, "--dry-run", "--picture", "roof.txt"], "its name must end with one of"),
        (["--shape", "gpt-neox-20b"], "gpt-neox-20b is for --backend gpu"),
        ([*HOST, "--shape", "gpt-2"], "invalid choice"),
        (["--peer"], "--peer is for --backend gpu"),
        (["--dry-run"], "--dry-run is for --backend gpu"),
    ],
)
def test_bad_flags_end_with_one_line(flags: list[str], phrase: str) -> None:
    done = benchmark(*flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert phrase in done.stderr


# The kernels.


def test_the_first_numbers_are_those_of_philox(program) -> None:
    """Its known answer for a counter and a key of zeros (Random123, kat_vectors), by Box and Muller."""
    device = all_devices()[0]
    drawn = device.empty(4, "float32")
    device.launch(
        program.SOURCE, "draw<float>", 1, 32, (drawn, np.int64(4), np.uint32(0), np.float32(0), np.float32(1))
    )
    bits = np.array([0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8], np.float64)
    radius = np.sqrt(-2 * np.log((bits[::2] + 0.5) / 2**32))
    angle = bits[1::2] * 2 * np.pi / 2**32
    expected = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()
    # An angle up to pi in float32 is off by 2^-23, its sine on a card by 2^-21 more, and a radius here is below 2.
    assert np.abs(drawn.get() - expected).max() < 2.0**-19


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_drawn_is_normal_and_the_same_whatever_the_grid(dtype, program) -> None:
    device, count = all_devices()[0], 20_003
    drawn = [
        program.draw(device.empty(count, dtype), replace(program.DRY, blocks=blocks), name, 0.5, 2.0).get()
        for blocks, name in ((2, "one"), (5, "one"), (2, "other"))
    ]
    assert np.array_equal(drawn[0], drawn[1])
    x, other = ((array.astype(np.float64) - 0.5) / 2 for array in (drawn[0], drawn[2]))
    # Each of these is a mean of `count` numbers of variance 1, 2, 96 and 1: five standard deviations of the mean.
    deviation = count**-0.5
    moments = (x.mean(), (x**2).mean() - 1, (x**4).mean() - 3, (x[1:] * x[:-1]).mean(), (x * other).mean())
    for moment, variance in zip(moments, (1, 2, 96, 1, 1), strict=True):
        assert abs(moment) < 5 * variance**0.5 * deviation
    assert (x == -0.25).sum() < count / 100  # exact zeros before the mean: hardly any


@pytest.mark.parametrize("count", [1, 7, 512, 4099])
def test_a_stream_reads_and_copies_every_word_once(count, program) -> None:
    values = np.random.default_rng(count).integers(0, 2**32, 4 * count, np.uint32)
    for device in all_devices():
        data, out, sums = device.array(values), device.empty(4 * count, np.uint32), device.empty(64, np.uint32)
        device.launch(program.SOURCE, "read_stream", 2, 32, (data, sums, np.int64(count)))
        assert sums.get().sum(dtype=np.uint32) == values.sum(dtype=np.uint32)
        device.launch(program.SOURCE, "copy_stream", 2, 32, (data, out, np.int64(count)))
        assert np.array_equal(out.get(), values)


# The arithmetic.


@pytest.mark.parametrize(("batch", "position", "gigabytes"), [(1, 0, 40.48), (32, 1024, 75.9), (64, 512, 75.9)])
def test_bytes_of_a_step_of_the_20b(program, batch, position, gigabytes) -> None:
    """Half of the positions' keys and values are 540,672 numbers: counted by hand for the model's card."""
    assert program.step_bytes(GPT_NEOX_20B, batch, position, 2) / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_a_share_is_that_of_the_limit_that_binds(program) -> None:
    limits = program.Limits(memory=100.0, compute=1000.0)
    assert program.share(program.Row("", 2.0, 0.0, bytes=50, flops=200), limits) == 0.25
    assert program.share(program.Row("", 2.0, 0.0, bytes=50, flops=1800), limits) == 0.9


def test_weights_have_the_scales_of_a_checkpoint(program) -> None:
    model = program.drawn_model(all_devices()[0], program.DRY)
    layer = model.params.layers[1]
    for array, mean, deviation in [
        (model.params.embed_out, 0, 0.02),
        (layer.attention.query_key_value.weight, 0, 0.02),
        (layer.mlp.dense_4h_to_h.weight, 0, 0.01),  # two layers: 0.02 / sqrt(4)
        (layer.input_layernorm.weight, 1, 0.1),
        (layer.input_layernorm.bias, 0, 0.02),
    ]:
        values = array.get().astype(np.float64)
        assert abs(values.mean() - mean) < 5 * deviation / values.size**0.5
        assert abs(values.std() / deviation - 1) < 5 / (2 * values.size) ** 0.5


def test_a_model_too_large_for_the_device_is_one_line(program, monkeypatch) -> None:
    device = program.open_device("host")
    monkeypatch.setattr(device, "_free_memory", lambda: 24_000_000_000)
    with pytest.raises(program.InputError, match=r"the weights take 41.1 GB, and the device has 24 GB free"):
        program.drawn_model(device, program.Plan())


def test_on_a_smaller_card_the_cases_that_do_not_fit_are_named(program, monkeypatch) -> None:
    def refuses(*_: object) -> object:
        raise program.InputError("too many texts")

    monkeypatch.setattr(program, "new_cache", refuses)
    plan = replace(program.DRY, batches=(3,), contexts=(5,), prompts=(), loaded_layers=1)
    report = program.run_all(all_devices()[0], plan)
    cases = ["", *(f", {order}" for order in program.ORDERS)]
    assert report.left_out == [f"decode, batch 3, context 5{case}: too many texts" for case in cases]
    assert not any(row.name.startswith("decode") for row in report.rows)
    assert report.rows[-1].name.startswith("load")
