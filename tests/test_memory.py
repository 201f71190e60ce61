"""At the 20B's real width, loading and decoding hold no second copy of the weights.

A checkpoint of two layers is written as float16 shards, loaded with its matrices left on disk, and decoded from, in a
process of its own whose private memory is watched. Pages of a mapped file are not private: the system can drop them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest

from neox.reference.checkpoint.tensors import TensorSpec, tensor_table
from neox.reference.config import GPT_NEOX_20B, config_to_dict

LAYERS = 2
CONFIG = replace(GPT_NEOX_20B, num_hidden_layers=LAYERS)
CAPACITY = 64
DISK = 6_000_000_000  # bytes that must be free; the checkpoint takes 3.1e9

# Everything below is measured in bytes.
LARGEST = 4 * max(spec.size for spec in tensor_table(CONFIG).values())
SMALLEST_MATRIX = 2 * CONFIG.hidden_size**2
CACHE = 2 * LAYERS * CAPACITY * CONFIG.hidden_size * 4

PROGRAM = dedent(
    """
    import json, re, sys, threading
    import numpy as np
    from neox.reference.checkpoint.load import load
    from neox.reference.decode import extend, new_cache
    from neox.reference.prefill import prefill

    def private():
        with open("/proc/self/status") as file:
            return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", file.read())[1])

    def watch():
        while not done.wait(0.002):
            samples.append(private())

    samples, done = [private()], threading.Event()
    start = samples[0]
    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load(sys.argv[1], weights="stored")
    cache = new_cache(model, 1, int(sys.argv[2]))
    logits = [prefill(model, cache, [[1, 2, 3, 50276]])]
    for _ in range(2):
        logits.append(extend(model, cache, logits[-1].argmax(-1)[:, None])[:, 0])
    done.set()
    watcher.join()
    samples.append(private())
    finite = bool(np.isfinite(logits).all())
    report = {"start": start, "peak": max(samples), "finite": finite, "dtype": model.params.embed_out.dtype.name}
    print(json.dumps({**report, "length": cache.length, "samples": len(samples)}))
    """
)


def write_tensor(file: object, spec: TensorSpec, block: bytes) -> None:
    """float16 numbers: a random block over and over, since drawing 1.5e9 of them would take longer than the test."""
    left = 2 * spec.size
    while left:
        left -= os.write(file, block[:left])  # type: ignore[arg-type]


def write_shard(path: Path, specs: list[TensorSpec], block: bytes) -> None:
    header, offset = {}, 0
    for spec in specs:
        end = offset + 2 * spec.size
        header[spec.name] = {"dtype": "F16", "shape": spec.shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb", buffering=0) as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for spec in specs:
            write_tensor(file.fileno(), spec, block)


pytestmark = pytest.mark.slow


@pytest.fixture
def wide_checkpoint(tmp_path: Path) -> Iterator[Path]:
    """One shard for the embedding and each layer, one for what follows them; deleted after the test."""
    free = shutil.disk_usage(tmp_path).free
    if free < DISK:
        pytest.skip("less than 6 GB of disk are free")
    if not Path("/proc/self/status").exists():
        pytest.skip("this system does not say how much private memory a process has")
    values = np.random.default_rng(0).standard_normal(1 << 20) / np.sqrt(CONFIG.hidden_size)
    block = values.astype(np.float16).tobytes()
    shards: dict[str, list[TensorSpec]] = {}
    for name, spec in tensor_table(CONFIG).items():
        part = name.split(".")[2] if ".layers." in name else name.split(".")[1].split("_")[0]
        shards.setdefault(f"model-{part}.safetensors", []).append(spec)
    (tmp_path / "config.json").write_text(json.dumps(config_to_dict(CONFIG)))
    weight_map = {spec.name: file for file, specs in shards.items() for spec in specs}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for file, specs in shards.items():
        write_shard(tmp_path / file, specs, block)
    yield tmp_path
    for file in shards:
        (tmp_path / file).unlink()


def test_a_wide_checkpoint_is_loaded_and_decoded_without_a_second_copy(wide_checkpoint: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(wide_checkpoint), str(CAPACITY)]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "2"}  # each thread keeps buffers of its own
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["dtype"] == "float16"
    assert report["finite"]
    assert report["length"] == 6
    assert report["samples"] > 100  # or the peak could have passed unseen
    assert report["peak"] < 1.3 * LARGEST + CACHE, f"{report['peak'] / 1e9:.2f} GB"
    # And more closely: there is no room for a copy of any matrix, not even of the smallest as it is stored.
    assert report["peak"] < report["start"] + CACHE + SMALLEST_MATRIX, f"{report['peak'] / 1e6:.0f} MB"
