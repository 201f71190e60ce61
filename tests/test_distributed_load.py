"""Each rank reads its slices and nothing else, and ranks that see different files do not compute together."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from textwrap import dedent
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from closeness import assert_close
from distributed_checks import CONFIGS
from strategies import TINY, arrays_of, draw_ids
from test_checkpoint import Tensors, random_tensors, write_sharded, write_single
from test_neox_checkpoint import IDS, SMALL, drifted, numbers_of, unmerged, written

from neox.distributed import Alone, Communicator, Shard, forward, load, shard, virtual
from neox.distributed.comm import AgreedError
from neox.reference.checkpoint.load import load as load_whole
from neox.reference.checkpoint.tensors import tensor_table
from neox.reference.config import Config
from neox.reference.errors import InputError


def loaded(ranks: int, *paths: Path, **options: Any) -> list[Shard]:
    """On every rank; from one folder, or each from its own."""
    parts = virtual(ranks, lambda comm: load(paths[comm.rank % len(paths)], comm, **options))
    return [part for part in parts if isinstance(part, Shard)]


def arrays_held(part: Shard) -> list[np.ndarray]:
    return [*arrays_of(part.model.params), *arrays_of(part.biases)]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(
    ("stored", "dtype", "weights"),
    [
        (np.float16, "float32", "upcast"),
        (np.float16, "float32", "stored"),
        (ml_dtypes.bfloat16, "float32", "stored"),
        (np.float32, "float64", "auto"),
        (np.float32, "float32", "auto"),
    ],
)
def test_a_rank_holds_its_slices_of_the_whole(config: Config, stored: Any, dtype: str, weights: str, tmp_path: Path):
    folder = write_sharded(tmp_path, config, random_tensors(config, stored))
    whole = load_whole(folder, dtype=dtype, weights=weights)
    for ranks in (1, 2):
        for part in loaded(ranks, folder, dtype=dtype, weights=weights):
            expected = shard(whole, part.comm)
            pairs = list(zip(arrays_held(part), arrays_held(expected), strict=True))
            assert pairs
            assert all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


def test_logits_are_those_of_the_whole_model_in_memory(tmp_path: Path):
    folder = write_single(tmp_path, TINY, random_tensors(TINY))
    whole, ids = load_whole(folder), draw_ids(TINY, 2, 9, 1)
    from_files = virtual(3, lambda comm: forward(load(folder, comm), ids))[0]
    from_memory = virtual(3, lambda comm: forward(shard(whole, comm), ids))[0]
    assert np.array_equal(from_files, from_memory)


# Memory.

on_linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured as Linux reports it")
WIDE = Config(20000, 1024, 3, 8, 4096)

PROGRAM = dedent(
    """
    import json, re, sys, threading
    import numpy as np
    from neox.distributed import load
    from strategies import arrays_of

    class First:  # rank 0, whose others see just what it sees
        rank, ranks = 0, int(sys.argv[2])
        gather = lambda self, part: [part] * self.ranks
        broadcast = lambda self, value: value
        alive = lambda self: None

    def private():
        with open("/proc/self/status") as file:
            return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", file.read())[1])

    def watch():
        while not done.wait(0.001):
            samples.append(private())

    load(sys.argv[1], First(), weights=sys.argv[3])  # all that is imported late, is imported
    samples, done = [private()], threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    part = load(sys.argv[1], First(), weights=sys.argv[3])
    done.set()
    watcher.join()
    held = sum(array.nbytes for array in [*arrays_of(part.model.params), *arrays_of(part.biases)])
    print(json.dumps({"held": held, "peak": max(samples) - samples[0], "samples": len(samples)}))
    """
)


def private_memory(folder: Path, ranks: int, weights: str) -> dict[str, int]:
    """Bytes that rank 0 holds, and the most it had in memory of its own while it loaded them."""
    command = [sys.executable, "-c", PROGRAM, str(folder), str(ranks), weights]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough that a second copy of any matrix shows: 157 MB in float16."""
    block = np.random.default_rng(0).standard_normal(1 << 20, np.float32).astype(np.float16)
    tensors = {name: np.resize(block, spec.shape) for name, spec in tensor_table(WIDE).items()}
    return write_single(tmp_path_factory.mktemp("wide"), WIDE, tensors)


@on_linux
def test_loading_takes_no_more_memory_than_the_shard(wide: Path):
    for ranks in (1, 3):
        memory = private_memory(wide, ranks, "upcast")
        assert memory["held"] >= 4 * 78e6 / ranks * 0.99
        assert memory["peak"] <= 1.05 * memory["held"]
        assert memory["samples"] > 20


@on_linux
def test_what_stays_as_it_is_stored_takes_no_memory_of_its_own(wide: Path):
    memory = private_memory(wide, 2, "stored")
    assert memory["peak"] <= 0.05 * memory["held"]


# What ranks must agree on.


def changed(tensors: Tensors, name: str, index: Any) -> Tensors:
    different = {**tensors, name: tensors[name].copy()}
    different[name][index] += 1
    return different


OTHERS = {
    "another model": lambda tensors: random_tensors(TINY, seed=1),
    "another dtype": lambda tensors: {name: array.astype(np.float32) for name, array in tensors.items()},
    "another norm": lambda tensors: changed(tensors, "gpt_neox.layers.1.input_layernorm.weight", 60),
    "another id": lambda tensors: changed(tensors, "embed_out.weight", (-1, 0)),
}


@pytest.mark.parametrize("other", OTHERS)
def test_ranks_that_see_different_checkpoints_do_not_start(other: str, tmp_path: Path):
    tensors = random_tensors(TINY)
    folders = [write_single(tmp_path / name, TINY, tensors) for name in ("a", "b")]
    folders.append(write_single(tmp_path / "c", TINY, OTHERS[other](tensors)))
    with pytest.raises(AgreedError, match="rank 2 of 3 sees another checkpoint, or config, than rank 0"):
        loaded(3, *folders)


def test_ranks_with_different_configs_do_not_start(tmp_path: Path):
    tensors = random_tensors(TINY)
    a = write_single(tmp_path / "a", TINY, tensors)
    b = write_single(tmp_path / "b", replace(TINY, layer_norm_eps=1e-3), tensors)
    with pytest.raises(AgreedError, match="rank 1 of 2"):
        loaded(2, a, b)


def raised_on_each(ranks: int, *paths: Path, **options: Any) -> list[str]:
    """The AgreedError that every rank gets."""

    def program(comm: Communicator) -> str:
        with pytest.raises(AgreedError) as caught:
            load(paths[comm.rank % len(paths)], comm, **options)
        return str(caught.value)

    return virtual(ranks, program)


def test_a_file_that_one_rank_lacks_ends_all_and_names_the_rank(tmp_path: Path):
    whole = write_sharded(tmp_path / "whole", TINY, random_tensors(TINY))
    part = write_sharded(tmp_path / "part", TINY, random_tensors(TINY))
    (gone := sorted(part.glob("*.safetensors"))[1]).unlink()
    said = raised_on_each(3, whole, part, whole)
    assert said == [said[0]] * 3
    assert re.match(rf"rank 1 of 3: .*{gone.name}", said[0])


def test_what_is_wrong_everywhere_is_said_once_and_of_no_rank(tmp_path: Path):
    folder = write_single(tmp_path, TINY, random_tensors(TINY))
    assert raised_on_each(6, folder) == ["the model has 5 attention heads, too few for 6 ranks"] * 6
    said = "rank 0 of 2: weights must be one of auto, upcast, stored, streamed, not 'no'"
    assert raised_on_each(2, folder, weights="no") == [said] * 2
    (said, _) = raised_on_each(2, folder, dtype="int8")
    assert said.startswith("dtype must be")


def test_a_backend_that_there_is_not_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="backend must be one of reference, gpu, not 'tpu'"):
        load(tmp_path, Alone(), backend="tpu")


def test_a_number_that_is_not_finite_is_found_by_the_rank_that_reads_it(tmp_path: Path):
    tensors = random_tensors(TINY)
    tensors["gpt_neox.layers.0.attention.dense.weight"][3, -1] = np.nan
    folder = write_single(tmp_path, TINY, tensors)

    def program(comm: Communicator) -> str:
        try:
            load(folder, comm)
        except InputError as error:
            return str(error)
        return ""

    assert [bool(said) for said in virtual(3, program)] == [False, False, True]


# Checkpoints of gpt-neox, whose ranks each have norms of their own.


def neox_checkpoint(folder: Path, seed: int = 0) -> tuple[Path, list[dict[str, np.ndarray]]]:
    """Of two ranks, whose norms differ; and what each rank holds, in float64."""
    written(folder, SMALL, numbers_of(seed=seed), 2)
    return folder, drifted(folder)


def test_norms_of_each_rank_are_kept_where_as_many_ranks_trained_the_model(tmp_path: Path):
    """136 neurons: 17 tiles of 8, and yet each rank must get the 68 that it had in the training."""
    folder, held = neox_checkpoint(tmp_path / "neox")
    exact = unmerged(held, SMALL, IDS)

    def program(comm: Communicator) -> np.ndarray:
        return forward(load(folder, comm, dtype="float64", layer_norms="per_rank"), IDS)

    for logits in virtual(2, program):
        assert_close(logits, exact, 1e-12)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("norms", ["mean", "fold"])
def test_any_number_of_ranks_reads_what_others_have_written(ranks: int, norms: str, tmp_path: Path):
    folder, _ = neox_checkpoint(tmp_path / "neox")
    whole = load_whole(folder, layer_norms=norms)
    for part in loaded(ranks, folder, layer_norms=norms):
        pairs = zip(arrays_held(part), arrays_held(shard(whole, part.comm)), strict=True)
        assert all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


def test_norms_cannot_be_kept_apart_on_other_numbers_of_ranks(tmp_path: Path):
    folder, _ = neox_checkpoint(tmp_path / "neox")
    (said, *_) = raised_on_each(4, folder, layer_norms="per_rank")
    assert "trained on 2 ranks: their norms cannot be kept apart on 4" in said


def test_ranks_whose_norms_differ_still_must_see_one_checkpoint(tmp_path: Path):
    a, _ = neox_checkpoint(tmp_path / "a")
    b, _ = neox_checkpoint(tmp_path / "b", seed=1)
    said = raised_on_each(2, a, b, layer_norms="per_rank")
    assert said == ["rank 1 of 2 sees another checkpoint, or config, than rank 0"] * 2
