"""Each rank puts its slices on its device and nothing else, from any layout; what is wrong ends all ranks alike."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from device_checks import CONFIG, SEQUENTIAL, own_device
from devices import DTYPES
from test_checkpoint import random_tensors, write_sharded, write_single
from test_neox_checkpoint import IDS, SMALL, drifted, numbers_of, unmerged, written

from neox.distributed import Alone, Communicator, DeviceShard, device_shard, forward, load, virtual
from neox.distributed.comm import AgreedError
from neox.distributed.load import number_of_card
from neox.distributed.sums import HostSums
from neox.reference import load as load_whole
from neox.reference.checkpoint.tensors import named_tensors


def loaded(folder: Path, comm: Communicator, **options: Any) -> DeviceShard:
    part = load(folder, comm, backend="gpu", device=own_device(comm.rank), **options)
    assert isinstance(part, DeviceShard)
    return part


def arrays_held(part: DeviceShard) -> dict[str, np.ndarray]:
    """By name; the biases that are added after sums, by layer."""
    table: dict[str, Any] = named_tensors(part.config, part.model.params)  # type: ignore[arg-type]
    held = {name: array.get() for name, array in table.items() if array is not None}
    biases = {f"{i}.{j}": bias.get() for i, each in enumerate(part.biases) for j, bias in enumerate(each)}
    return held | biases


@pytest.mark.parametrize("config", [CONFIG, SEQUENTIAL])
@pytest.mark.parametrize(
    ("stored", "dtype"), [(np.float16, "float16"), (np.float32, "float32"), (ml_dtypes.bfloat16, "float16")]
)
def test_a_rank_holds_its_slices_of_the_whole(config, stored, dtype, tmp_path, monkeypatch) -> None:
    """In pieces of a few rows, through several readers."""
    monkeypatch.setattr(sys.modules["neox.gpu.load"], "PIECE", 500)  # where the package holds a function of that name
    folder = write_sharded(tmp_path, config, random_tensors(config, stored))
    whole = load_whole(folder)

    def program(comm: Communicator) -> None:
        ours = arrays_held(loaded(folder, comm, dtype=dtype))
        expected = arrays_held(device_shard(whole, comm, HostSums(comm), own_device(comm.rank), dtype))
        assert list(ours) == list(expected)
        assert all(np.array_equal(ours[name], expected[name]) for name in ours)

    for ranks in (1, 2, 3):
        virtual(ranks, program)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_default_is_half_precision_and_any_other_can_be_had(dtype, tmp_path) -> None:
    folder = write_single(tmp_path, CONFIG, random_tensors(CONFIG))
    assert loaded(folder, Alone()).model.dtype == np.float16
    assert loaded(folder, Alone(), dtype=dtype).model.dtype.name == dtype


def test_norms_of_each_rank_are_kept_where_as_many_ranks_trained_the_model(tmp_path) -> None:
    config = replace(SMALL, intermediate_size=144)  # 72 neurons each
    folder = tmp_path / "neox"
    written(folder, config, numbers_of(config), 2)
    exact = unmerged(drifted(folder), config, IDS)

    def program(comm: Communicator) -> np.ndarray:
        return forward(loaded(folder, comm, dtype="float32", layer_norms="per_rank"), IDS)

    for logits in virtual(2, program):
        assert np.abs(logits - exact).max() <= 20 * 2.0**-24 * np.abs(exact).max()


def test_the_memory_of_a_rank_is_said_once_and_too_little_ends_all(tmp_path, capsys, monkeypatch) -> None:
    folder = write_single(tmp_path, CONFIG, random_tensors(CONFIG))
    virtual(2, lambda comm: loaded(folder, comm))
    assert capsys.readouterr().err.count("weights: of each rank") == 1
    monkeypatch.setattr(type(own_device(0)), "_free_memory", lambda self: 1000)
    with pytest.raises(AgreedError, match=r"the weights take .* more ranks would each hold less"):
        virtual(2, lambda comm: loaded(folder, comm))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "int8"}, "dtype must be one of float32, float16, bfloat16, not 'int8'"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"layer_norms": "none"}, "layer_norms"),
        ({"sums": "telepathy"}, "sums must be one of"),
    ],
)
def test_what_is_wrong_is_said_alike_on_all_ranks(options, said, tmp_path) -> None:
    folder = write_single(tmp_path, CONFIG, random_tensors(CONFIG))

    def program(comm: Communicator) -> str:
        with pytest.raises(AgreedError, match=said) as caught:
            loaded(folder, comm, **options)
        return str(caught.value)

    assert len(set(virtual(2, program))) == 1


def test_shares_that_kernels_cannot_read_end_all_before_anything_is_loaded(tmp_path) -> None:
    config = replace(CONFIG, intermediate_size=40)
    folder = write_single(tmp_path, config, random_tensors(config))
    with pytest.raises(AgreedError, match="rank 0 of 2 would compute 20 neurons of each MLP"):
        virtual(2, lambda comm: loaded(folder, comm))


def test_a_device_that_is_missing_ends_all(tmp_path) -> None:
    folder = write_single(tmp_path, CONFIG, random_tensors(CONFIG))
    with pytest.raises(AgreedError, match="no device 'tpu'"):
        virtual(2, lambda comm: load(folder, comm, backend="gpu", device="tpu"))


def test_ranks_of_one_machine_take_its_cards_in_turn() -> None:
    machines = ["a", "b", "a", "a", "b"]
    assert [number_of_card(machines, rank) for rank in range(5)] == [0, 0, 1, 2, 1]


def test_a_card_is_opened_by_its_number(monkeypatch) -> None:
    """Two ranks of this machine; the host device has no number."""
    loading = sys.modules["neox.distributed.load"]  # where the package holds a function of that name
    monkeypatch.setattr(loading, "open_device", lambda name, **options: (name, options))

    def opened(name: str) -> list:
        return virtual(2, lambda comm: loading.own_device(name, comm))

    assert opened("cuda") == [("cuda", {"number": 0}), ("cuda", {"number": 1})]
    assert opened("host") == [("host", {})] * 2
