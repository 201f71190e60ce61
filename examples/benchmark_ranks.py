"""What sharing a layer among ranks costs and gains on this machine.

    python examples/benchmark_ranks.py
    python examples/benchmark_ranks.py --shape pythia-160m --ranks 1 2
    python examples/benchmark_ranks.py --backend gpu --ranks 2 4 8
    python examples/benchmark_ranks.py --backend gpu --device host --dry-run

A step appends one position to a text of 128, in float32, through layers of a model's full width. Every number of ranks
with one thread each stands beside one rank with as many threads. Of the time of a step, `adds up` is what the sums over
the ranks take once all have come to them, and `waits` what the first spend waiting for the last. For cards:
benchmark_ranks_gpu.py.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from neox.distributed import Communicator, Shard, run_ranks
from neox.distributed.decode import new_cache
from neox.distributed.launch import ENVIRONMENT, find_mpiexec
from neox.distributed.model import layer, new_shard
from neox.distributed.sharding import slices
from neox.reference.checkpoint.tensors import TensorSpec
from neox.reference.config import GPT_NEOX_20B, PYTHIA
from neox.reference.decode import mix_over, query_blocks
from neox.reference.errors import InputError, Parser, run
from neox.reference.model import Array, rotary_tables

SHAPES = {f"pythia-{size}": config for size, config in PYTHIA.items()} | {"gpt-neox-20b": GPT_NEOX_20B}
CONTEXT = 128  # positions before the one that is appended


# On a rank.


@dataclass
class Timed:
    """A communicator that measures its sums, and apart from them how long a rank waits for the last to come."""

    inner: Communicator
    waited: list[float] = field(default_factory=list, init=False)
    added: list[float] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.rank, self.ranks = self.inner.rank, self.inner.ranks
        self.gather, self.broadcast, self.alive = self.inner.gather, self.inner.broadcast, self.inner.alive
        self.gather_into, self.meet = self.inner.gather_into, self.inner.meet

    def sum(self, part: Array) -> Array:
        start = time.perf_counter()
        self.inner.gather(np.empty(0))
        met = time.perf_counter()
        total = self.inner.sum(part)
        self.waited.append(met - start)
        self.added.append(time.perf_counter() - met)
        return total


def drawn(shape: str, layers: int, comm: Communicator) -> Shard:
    """A shard whose weights repeat a few random numbers: drawing all of them would take longer than measuring."""
    config = replace(SHAPES[shape], num_hidden_layers=layers, vocab_size=1024)
    block = np.random.default_rng(0).standard_normal(1 << 20, np.float32) * np.float32(0.01)

    def get(spec: TensorSpec) -> Array:
        return np.resize(block, [part.stop - part.start for part in slices(spec, comm.rank, comm.ranks)])

    return new_shard(config, get, np.dtype(np.float32), comm)


def step_of(shard: Shard) -> Callable[[Shard], None]:
    """One position through all layers; the shard is given to it, so that another communicator can be."""
    config = shard.config
    cache = new_cache(shard, 1, CONTEXT + 1, np.zeros(1, np.int64))
    cache.keys[:], cache.values[:] = 0.1, 0.1
    rotary = rotary_tables(config, np.array([[CONTEXT]]))
    blocks = query_blocks(cache, CONTEXT, 1)
    first = np.random.default_rng(1).standard_normal((1, 1, config.hidden_size), np.float32)

    def step(shard: Shard) -> None:
        x = first
        for index in range(config.num_hidden_layers):
            x = layer(shard, index, x, rotary, mix_over(cache, index, CONTEXT, blocks))

    return step


def seconds_of(step: Callable[[], None], steps: int) -> float:
    """The median."""
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(args: argparse.Namespace, comm: Communicator) -> None:
    """Rank 0 writes what it measured to the file named by --result."""
    shard = drawn(args.shape, args.layers, comm)
    step = step_of(shard)
    step(shard)  # the first brings everything into memory
    comm.gather(np.empty(0))
    whole = seconds_of(lambda: step(shard), args.steps)
    timed = Timed(comm)
    seconds_of(lambda: step(replace(shard, comm=timed)), args.steps)
    sums = len(timed.added) // args.steps  # of a step
    if comm.rank == 0:
        waits, adds = (sums * statistics.median(times) for times in (timed.waited, timed.added))
        result = {"step": whole, "waits": waits, "adds up": adds}
        args.result.write_text(json.dumps(result))


# Around the ranks.


@dataclass(frozen=True)
class Setting:
    ranks: int
    threads: int  # of each


def settings(counts: list[int]) -> list[Setting]:
    pairs = [(Setting(1, count), Setting(count, 1)) for count in counts]
    return list(dict.fromkeys(setting for pair in pairs for setting in pair))


def measured(args: argparse.Namespace, setting: Setting) -> dict[str, float]:
    """InputError if the ranks fail."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        flags = [
            "--shape",
            args.shape,
            "--layers",
            str(args.layers),
            "--steps",
            str(args.steps),
            "--result",
            str(result),
        ]
        command = [find_mpiexec(), "-n", str(setting.ranks), sys.executable, __file__, *flags]
        env = {**os.environ, **ENVIRONMENT, "OPENBLAS_NUM_THREADS": str(setting.threads)}
        done = subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode or not result.exists():
            raise InputError(f"{setting.ranks} ranks failed: {done.stderr.strip().splitlines()[-1]}")
        return dict(json.loads(result.read_text()))


def report(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rounds alternate between the settings, so that what disturbs the machine disturbs all."""
    chosen = settings(args.ranks)
    rounds: dict[Setting, list[dict[str, float]]] = {setting: [] for setting in chosen}
    with tqdm(total=args.rounds * len(chosen), desc="measuring", disable=None, leave=False) as bar:
        for _ in range(args.rounds):
            for setting in chosen:
                rounds[setting].append(measured(args, setting))
                bar.update()
    # The quickest round: other programs only ever add time.
    best = {setting: min(answers, key=lambda answer: answer["step"]) for setting, answers in rounds.items()}
    return [{**asdict(setting), **answer} for setting, answer in best.items()]


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| ranks | threads of each | step | waits | adds up |", "|---:|---:|---:|---:|---:|"]
    for row in rows:
        waits, adds = (100 * row[name] / row["step"] for name in ("waits", "adds up"))
        step = 1e3 * row["step"]
        lines.append(f"| {row['ranks']} | {row['threads']} | {step:.2f} ms | {waits:.2f}% | {adds:.2f}% |")
    return "\n".join(lines)


def parser() -> Parser:
    flags = Parser(description="What sharing a layer among ranks costs and gains.", allow_abbrev=False)
    flags.add_argument("--shape", choices=list(SHAPES), default="gpt-neox-20b")
    flags.add_argument("--layers", type=int, default=1)
    flags.add_argument("--ranks", type=int, nargs="+", default=None, help="1 2 4 by default; of cards 2 4 8")
    flags.add_argument("--steps", type=int, default=20)
    flags.add_argument("--rounds", type=int, default=3)
    flags.add_argument("--result", type=Path, help=argparse.SUPPRESS)  # given to the ranks
    card = flags.add_argument_group("--backend gpu")
    card.add_argument("--backend", choices=["reference", "gpu"], default="reference")
    card.add_argument("--device", choices=["cuda", "host"], default="cuda")
    card.add_argument("--allreduce", metavar="WAY", help="how the devices of several processes add up")
    card.add_argument("--dry-run", action="store_true", help="a tiny shape, to see that all of it runs")
    return flags


def main() -> None:
    args = parser().parse_args()
    if args.backend == "gpu":
        import benchmark_ranks_gpu

        return benchmark_ranks_gpu.benchmark(args, SHAPES)
    args.ranks = args.ranks or [1, 2, 4]
    if min(args.layers, args.steps, args.rounds, *args.ranks) < 1:
        raise InputError("--layers, --ranks, --steps and --rounds are at least 1")
    if args.result is not None:
        run_ranks(None, partial(measure, args))
    else:
        print(f"{args.shape}, {args.layers} layer(s), {os.cpu_count()} cores\n\n{table(report(args))}")


if __name__ == "__main__":
    run(main)
