"""Running programs under mpiexec from a test: never for longer than said, and nothing is left behind unnoticed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from neox.distributed.launch import ENVIRONMENT, find_mpiexec
from neox.reference.errors import InputError

MARK = "NEOX_TEST_JOB"  # an environment variable by which the processes of a job are found


def _missing(library: str = "") -> str:
    """Why tests that need MPI, or one of its libraries, cannot run."""
    try:
        version = subprocess.run([find_mpiexec(), "--version"], capture_output=True, text=True, check=False).stdout
    except InputError as error:
        return str(error)
    return "" if library in version else f"MPI is here, but not that of {library}"


needs_mpi = pytest.mark.skipif(bool(_missing()), reason=_missing())
needs_mpich = pytest.mark.skipif(bool(_missing("HYDRA")), reason=_missing("HYDRA"))


@dataclass(frozen=True)
class Job:
    status: int
    stdout: str
    stderr: str
    seconds: float
    left: list[str]  # processes of the job that outlived it
    leaked: set[str]  # names of shared memory that it made and that no process uses


def processes(mark: str) -> list[str]:
    """Command lines of the processes that were started with this mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue  # it has ended, or is another user's
    return [command for command in found if command]  # a zombie has none


def _left(mark: str, patience: float = 1.0) -> list[str]:
    """Processes that are still there when those being ended have had time to."""
    end = time.monotonic() + patience
    while (left := processes(mark)) and time.monotonic() < end:
        time.sleep(0.05)
    return left


def shared_memory() -> set[str]:
    """Names of the shared memory on this machine."""
    folder = Path("/dev/shm")
    return {str(path) for path in folder.iterdir()} if folder.is_dir() else set()


def unused(names: set[str]) -> set[str]:
    """Those that no process has mapped: what is left of a job, unlike what another one is just using."""
    mapped = ""
    for maps in Path("/proc").glob("[0-9]*/maps") if names else []:
        with suppress(OSError):  # it has ended, or is another user's
            mapped += maps.read_text(encoding="utf-8", errors="replace")
    return {name for name in names if name not in mapped and Path(name).exists()}


def run(command: Sequence[str], timeout: float = 60, env: Mapping[str, str] | None = None, stdin: bytes = b"") -> Job:
    """A command in a process group of its own, which is ended after `timeout` seconds."""
    mark, start, names = uuid.uuid4().hex, time.monotonic(), shared_memory()
    # One thread of BLAS: sums within a product are then those of virtual ranks, to the bit.
    own = {**os.environ, **ENVIRONMENT, "OPENBLAS_NUM_THREADS": "1", MARK: mark, **(env or {})}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, tempfile.TemporaryFile() as given:
        given.write(stdin)
        given.seek(0)
        process = subprocess.Popen(command, stdin=given, stdout=out, stderr=err, env=own, start_new_session=True)
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
        seconds = time.monotonic() - start
        left = _left(mark)
        out.seek(0)
        err.seek(0)
        return Job(status, out.read().decode(), err.read().decode(), seconds, left, unused(shared_memory() - names))


def mpiexec(ranks: int, program: Path, *arguments: str, **options: object) -> Job:
    """A Python program on several ranks; options as those of run."""
    command = [find_mpiexec(), "-n", str(ranks), sys.executable, str(program), *arguments]
    return run(command, **options)  # type: ignore[arg-type]
