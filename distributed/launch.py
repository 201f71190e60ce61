"""Starting a program on several ranks, and ending it on all of them.

    mpiexec -n 4 python program.py --tensor-parallel     mpiexec starts four processes, each of which calls run_ranks
    python program.py --tensor-parallel 4                run_ranks finds mpiexec and starts itself that way

Whatever goes wrong on one rank ends all: one line says on which and why, and the exit status is not 0.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from neox.distributed.comm import AgreedError, Communicator
from neox.distributed.mpi import MpiRank, import_mpi, join, open_world, ranks_here
from neox.distributed.watch import GRACE, Pulse, Watched, divide, end_with_parent
from neox.reference.cores import cores, use_cores
from neox.reference.errors import InputError

if TYPE_CHECKING:
    from mpi4py import MPI

TERMINAL = "NEOX_TERMINAL"  # set for the ranks if the stderr that mpiexec passes on is a terminal
FAREWELL = 1.0  # seconds that ranks may be apart when their work is done
INSTALL = 'pip install "neox20b[distributed]"'

# What launchers tell each process: how many there are, and which it is.
LAUNCHERS = (("PMI_SIZE", "PMI_RANK"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"))
THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")

# So that any MPI starts more ranks than there are cores, and as root in a container.
ENVIRONMENT = {
    "PYTHONUNBUFFERED": "",  # or Python writes the end of a line by itself, and the ranks' lines mix
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",  # Open MPI 5
    "OMPI_MCA_rmaps_base_oversubscribe": "1",  # Open MPI 4
    "OMPI_MCA_osc": "^ucx",  # complains of shared windows, which it then leaves to others
}

# Before there are ranks.


def launched(environment: Mapping[str, str] = os.environ) -> tuple[int, int] | None:
    """Which rank of how many a launcher says this process is; None if none has started it."""
    for size, rank in LAUNCHERS:
        if size in environment and rank in environment:
            return int(environment[rank]), int(environment[size])
    return None


def find_mpiexec() -> str:
    """That of this Python's environment, which belongs to the MPI library there; or else the first on the path."""
    beside = Path(sys.prefix) / "bin" / "mpiexec"
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("mpiexec")
    if found is None or importlib.util.find_spec("mpi4py") is None:
        missing = "mpiexec" if found is None else "mpi4py"
        raise InputError(f"tensor parallelism needs MPI, and there is no {missing} here: {INSTALL}")
    return found


def start(ranks: int) -> int:
    """Run this very program under mpiexec; its exit status. What ends this process ends all ranks."""
    terminal = {TERMINAL: "1"} if sys.stderr.isatty() else {}
    process = subprocess.Popen(
        [find_mpiexec(), "-n", str(ranks), sys.executable, *sys.orig_argv[1:]],
        env={**os.environ, **ENVIRONMENT, **terminal},
        preexec_fn=lambda: end_with_parent(signal.SIGTERM),
    )
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: process.terminate())  # which it passes on to the ranks
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to mpiexec as well
    code = process.wait()
    return code if code >= 0 else 128 - code


# On every rank.


def hides_progress(comm: Communicator) -> bool | None:
    """What to give tqdm as `disable`: only rank 0 shows how far it is, and only on a terminal.

    mpiexec passes stderr on, so what a rank sees is never a terminal itself.
    """
    if comm.rank:
        return True
    return False if TERMINAL in os.environ else None


def _check_world(size: int, wanted: int | None, found: int) -> None:
    """InputError unless the launcher, the user and the MPI library speak of the same number of ranks."""
    if found != size:
        raise InputError(
            f"mpiexec started {size} ranks, but the MPI library of this Python sees {found}: of different MPIs; "
            f"leave out mpiexec, and --tensor-parallel {size} finds the right one"
        )
    if wanted not in (None, size):
        raise InputError(f"--tensor-parallel asks for {wanted} ranks, but mpiexec started {size}")


def _share_cores(world: MPI.Intracomm) -> None:
    """As many threads for each rank as there are cores for it, unless the user has said how many."""
    if not any(name in os.environ for name in THREADS):
        use_cores(max(1, cores() // ranks_here(world)))


def _join(place: tuple[int, int], wanted: int | None, allreduce: str | None) -> MpiRank:
    rank, size = place
    world = open_world()
    _check_world(size, wanted, world.size)
    _share_cores(world)
    member, way = join(world, allreduce)
    if rank == 0:
        print(f"tensor parallelism: {size} ranks, which add up by {way}", file=sys.stderr)
    return member


class _LeftTooEarly(Exception):
    """This rank's program has ended, and that of the others has not."""


def _work(member: MpiRank, program: Callable[[Communicator], None], pulse: Pulse) -> None:
    """The program, and then a meeting, to which who has left the others at work comes alone."""
    try:
        program(Watched(member, pulse))
    except SystemExit as end:
        if end.code:
            raise
    pulse.wait(True)
    if not member.part(FAREWELL):
        raise _LeftTooEarly


def _explain(name: str, error: BaseException) -> tuple[str, int]:
    """What went wrong on this rank, in one line after a traceback where that may be a mistake here; the exit status."""
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 1
        return f"error: {name} called sys.exit({error.code!r}) before its work was done", code
    if isinstance(error, _LeftTooEarly):
        return f"error: {name} ended while others were still at work", 1
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted: {name}", 130
    if isinstance(error, InputError):
        return f"error: {name}: {error}", 2
    return f"{''.join(traceback.format_exception(error))}error: {name}: {type(error).__name__}: {error}", 1


def _abort(text: str, code: int) -> NoReturn:
    """Say it, and end all ranks; if there are none yet, this process, which mpiexec answers in the same way."""
    os.write(2, f"{text}\n".encode())
    if "mpi4py.MPI" in sys.modules:
        time.sleep(GRACE)  # mpiexec passes it on before it ends everything
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # MPI would add a line that says no more
        import_mpi().COMM_WORLD.Abort(code)
    os._exit(code)


def _be_rank(
    place: tuple[int, int], ranks: int | None, program: Callable[[Communicator], None], way: str | None, pulse: Pulse
) -> None:
    rank, size = place
    try:
        pulse.wait(True)
        member = _join(place, ranks, way)
        pulse.wait(False)
        _work(member, program, pulse)
        pulse.settle()
    except AgreedError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        pulse.settle()
        sys.exit(2)
    except BaseException as error:
        if rank and isinstance(error, (InputError, KeyboardInterrupt)):
            time.sleep(2 * GRACE)  # rank 0 may have the same to say; it then ends this rank too
        text, code = _explain(f"rank {rank} of {size}", error)
        pulse.settle()
        _abort(text, code)


def run_ranks(
    ranks: int | None,
    program: Callable[[Communicator], None],
    allreduce: str | None = None,
    timeout: float | None = None,
) -> None:
    """Run program on every rank; returns when it has on all. In a process that mpiexec did not start, start it.

    ranks: how many; None: as many as mpiexec started. allreduce: the way to add up, of mpi.py; None: the best.
    timeout: seconds without progress after which a rank counts as hanging; None: any.
    """
    place = launched()
    if ranks is not None and ranks < 1:
        raise InputError(f"--tensor-parallel needs at least one rank, not {ranks}")
    if place is None and ranks is None:
        raise InputError("--tensor-parallel needs a number of ranks, or mpiexec -n N before the command")
    if place is None:
        assert ranks is not None
        sys.exit(start(ranks))
    pulse = divide(f"rank {place[0]} of {place[1]}", timeout)
    _be_rank(place, ranks, program, allreduce, pulse)
