"""Starting ranks: by mpiexec, or by the program itself; and what is said where that cannot be."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest
from mpirun import MARK, mpiexec, needs_mpi, needs_mpich, processes, run, shared_memory, unused
from program import GENERATE, as_process

from neox.distributed import Alone
from neox.distributed.launch import TERMINAL, find_mpiexec, hides_progress, launched
from neox.reference import shipped
from neox.reference.config import read_config
from neox.reference.errors import InputError

TEXT = ["--prompt", "Once upon a time", "--max-tokens", "12"]


def generate(*arguments: str, **options: object):
    return run([sys.executable, str(GENERATE), *arguments], **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def expected() -> str:
    return as_process(TEXT).stdout


# Texts.


@needs_mpi
def test_the_program_starts_its_own_ranks(expected: str):
    job = generate(*TEXT, "--tensor-parallel", "3")
    assert job.status == 0, job.stderr
    assert job.stdout == expected
    assert "3 ranks, which add up by window" in job.stderr
    assert job.stderr.count("weights:") == 1  # only rank 0 speaks
    assert not job.left


@needs_mpi
@pytest.mark.parametrize(
    ("flag", "way"), [(None, "ipc"), ("ipc", "ipc"), ("mpi", "mpi"), ("host", "host"), ("window", "host")]
)
def test_ranks_with_devices_write_the_same_text(flag: str | None, way: str, expected: str):
    flags = ["--backend", "gpu", "--device", "host", "--dtype", "float32", *(["--allreduce", flag] if flag else [])]
    job = generate(*TEXT, "--tensor-parallel", "2", *flags)
    assert job.status == 0, job.stderr
    assert job.stdout == expected
    assert job.stderr.count("weights: of each rank") == 1
    assert f"devices add up by {way}" in job.stderr
    assert not job.left
    assert not job.leaked


@needs_mpi
@pytest.mark.parametrize(("ranks", "way"), [(1, "window"), (2, "allgather")])
def test_mpiexec_starts_the_ranks(ranks: int, way: str, expected: str):
    job = mpiexec(ranks, GENERATE, *TEXT, "--tensor-parallel", "--allreduce", way, "--timeout", "30")
    assert job.status == 0, job.stderr
    assert job.stdout == expected
    assert not job.leaked
    assert f"{ranks} ranks, which add up by {way}" in job.stderr


@needs_mpich  # Open MPI 5 does not tell its ranks where stdin ends
def test_prompts_come_from_stdin_and_completions_go_out_as_json():
    arguments = [
        "--prompt",
        "-",
        "--prompt",
        "The",
        "--max-tokens",
        "5",
        "--json",
        "--temperature",
        "0.7",
        "--seed",
        "3",
    ]
    alone = [json.loads(line) for line in as_process(arguments, stdin=b"Once upon").stdout.splitlines()]
    job = generate(*arguments, "--tensor-parallel", "2", stdin=b"Once upon")
    ours = [json.loads(line) for line in job.stdout.splitlines()]
    assert [(each["prompt"], each["text"], each["ids"]) for each in ours] == [
        (each["prompt"], each["text"], each["ids"]) for each in alone
    ]


@needs_mpich
def test_ranks_on_several_machines_add_up_by_allgather(expected: str):
    """MPICH can be told that no two ranks are on one machine."""
    job = mpiexec(2, GENERATE, *TEXT, "--tensor-parallel", env={"MPIR_CVAR_NOLOCAL": "1"})
    assert job.status == 0, job.stderr
    assert job.stdout == expected
    assert "2 ranks, which add up by allgather" in job.stderr
    job = mpiexec(2, GENERATE, *TEXT, "--tensor-parallel", "--allreduce", "window", env={"MPIR_CVAR_NOLOCAL": "1"})
    assert job.status == 2
    assert "the ranks are on several machines" in job.stderr
    assert not job.leaked


# Bad input.


def errors(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("error:")]


@needs_mpi
def test_a_bad_request_is_one_line_and_status_2():
    job = generate("--max-tokens", "0", "--tensor-parallel", "2")
    assert errors(job.stderr) == ["error: rank 0 of 2: max_tokens must be a whole number, 1 or more, not 0"]
    assert (job.status, job.stdout) == (2, "")
    assert not job.leaked
    heads = read_config(shipped.path()).num_attention_heads
    job = generate("--tensor-parallel", str(heads + 1))
    assert errors(job.stderr) == [f"error: the model has {heads} attention heads, too few for {heads + 1} ranks"]
    assert job.status == 2
    job = generate("--model", "nowhere", "--tensor-parallel", "2")
    (said,) = errors(job.stderr)
    assert said.startswith("error: rank 0 of 2: no such folder: 'nowhere'")
    assert job.status == 2


@needs_mpi
def test_more_ranks_than_were_started_are_refused():
    job = mpiexec(2, GENERATE, *TEXT, "--tensor-parallel", "3")
    assert errors(job.stderr) == ["error: rank 0 of 2: --tensor-parallel asks for 3 ranks, but mpiexec started 2"]
    assert (job.status, job.stdout) == (2, "")
    assert not job.leaked


@needs_mpi
def test_an_mpiexec_of_another_mpi_is_noticed():
    """What Open MPI's mpiexec tells its processes; to MPICH's library each of them is alone in the world."""
    env = {"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "0"}
    job = generate(*TEXT, "--tensor-parallel", env=env, timeout=20)
    (said,) = errors(job.stderr)
    assert said.startswith("error: rank 0 of 3: mpiexec started 3 ranks, but the MPI library of this Python sees 1")
    assert (job.status, job.stdout) == (2, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tensor-parallel"], "needs a number of ranks, or mpiexec -n N"),
        (["--tensor-parallel", "-2"], "at least one rank, not -2"),
        (["--timeout", "3"], "belong to --tensor-parallel"),
        (["--allreduce", "window"], "belong to --tensor-parallel"),
        (["--tensor-parallel", "2", "--allreduce", "pigeon"], "--allreduce must be one of window, allgather, not"),
        (["--tensor-parallel", "2", "--allreduce", "host"], "--allreduce must be one of window, allgather, not"),
        (
            ["--backend", "gpu", "--tensor-parallel", "2", "--allreduce", "pigeon"],
            "must be one of window, allgather, ipc, nccl, mpi, host",
        ),
        (["--backend", "gpu", "--layer-norms", "fold"], "--layer-norms belongs to"),
    ],
)
def test_flags_that_do_not_fit_are_refused(arguments: list[str], message: str):
    outcome = as_process(arguments)
    assert outcome.status == 2
    assert message in outcome.stderr
    assert outcome.stdout == ""


# Without MPI.


def test_nothing_of_mpi_is_imported_before_there_are_ranks_of_it():
    program = """
        import sys
        sys.modules["mpi4py"] = None  # as where it is not installed
        import numpy as np
        from neox import distributed as dist
        from neox.reference import load, shipped
        model = load(shipped.path())
        texts = dist.virtual(2, lambda comm: list(dist.generate(dist.shard(model, comm), [1, 2, 3], max_tokens=4)))
        assert texts[0] == texts[1] and len(texts[0]) == 4
    """
    done = subprocess.run([sys.executable, "-c", dedent(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_where_there_is_no_mpi_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r'no mpiexec here: pip install "neox20b\[distributed\]"'):
        find_mpiexec()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "mpiexec").touch(mode=0o755)
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="no mpi4py here"):
        find_mpiexec()
    monkeypatch.undo()


def test_a_rank_without_an_mpi_library_says_so():
    env = {"PMI_SIZE": "1", "PMI_RANK": "0", "MPI4PY_LIBMPI": "no-such-library.so"}
    outcome = run([sys.executable, str(GENERATE), "--tensor-parallel"], env=env)
    (said,) = errors(outcome.stderr)
    assert "needs MPI" in said
    assert 'pip install "neox20b[distributed]"' in said
    assert outcome.status == 2


def test_the_mpiexec_of_this_python_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for folder in ("prefix/bin", "path"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "mpiexec").touch(mode=0o755)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "prefix"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert find_mpiexec() == str(tmp_path / "prefix" / "bin" / "mpiexec")
    (tmp_path / "prefix" / "bin" / "mpiexec").unlink()
    assert find_mpiexec() == str(tmp_path / "path" / "mpiexec")


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        ({"PMI_SIZE": "4", "PMI_RANK": "3"}, (3, 4)),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, (1, 2)),
        ({"PMI_SIZE": "4"}, None),
    ],
)
def test_a_launcher_is_known_by_what_it_tells(environment: dict[str, str], place: tuple[int, int] | None):
    assert launched(environment) == place


def test_only_rank_0_shows_progress_and_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch):
    first, second = Alone(), Alone()
    second.rank = 1
    assert hides_progress(first) is None  # tqdm then looks for itself
    assert hides_progress(second) is True
    monkeypatch.setenv(TERMINAL, "1")
    assert hides_progress(first) is False
    assert hides_progress(second) is True


# Ending the launcher.


def start(tmp_path: Path) -> tuple[subprocess.Popen, str]:
    """A long text over two ranks, which has begun."""
    mark = uuid.uuid4().hex
    command = [sys.executable, str(GENERATE), "--tensor-parallel", "2", "--max-tokens", "400", "--ignore-eos"]
    env = {**os.environ, MARK: mark, "OPENBLAS_NUM_THREADS": "1"}
    with (tmp_path / "out").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.DEVNULL, env=env, start_new_session=True)
    wait_until(lambda: (tmp_path / "out").stat().st_size > 20)
    return process, mark


def wait_until(condition: Callable[[], bool], seconds: float = 15) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@needs_mpi
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_what_ends_the_program_ends_its_ranks(number: signal.Signals, tmp_path: Path):
    before = shared_memory()
    process, mark = start(tmp_path)
    assert len(processes(mark)) > 4  # the program, mpiexec, two ranks and their watchers
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    assert process.wait(5) != 0
    assert wait_until(lambda: not processes(mark), seconds=3), processes(mark)
    assert not unused(shared_memory() - before)
