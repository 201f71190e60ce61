"""What adding up costs between devices, and what several cards should give. Called by benchmark_ranks.py:

    python examples/benchmark_ranks.py --backend gpu --ranks 2 4 8
    python examples/benchmark_ranks.py --backend gpu --device host --dry-run

Sums are measured inside a captured graph, by the device's clock: between ranks that share one card, each on a stream of
its own, and between processes, on as many cards as there are. What several cards give is projected from one: from the
step of one rank's shard, with nothing added up, and the sums between streams. It is labelled so, with its formula.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from benchmark_gpu import DRY, Plan, Row, decode, drawn_model, row, timed

from neox.distributed import Communicator, run_ranks, split_way
from neox.distributed.comm import Alone
from neox.distributed.device import new_device_shard, ways_of
from neox.distributed.launch import ENVIRONMENT, find_mpiexec
from neox.distributed.load import own_device
from neox.distributed.sharding import check_ranks, slices
from neox.distributed.sums import PATIENCE, choose_sums
from neox.gpu import ops
from neox.gpu.device import Array, Device, open_device
from neox.reference.checkpoint.tensors import TensorSpec
from neox.reference.config import Config
from neox.reference.errors import InputError

CONTEXT = 128  # positions before the one that is appended
LEFT_OUT = (
    "Not in it: the links between cards (NVLink, about 2 us for a sum), what the hosts tell each other for each token, "
    "and that all ranks wait for the slowest."
)


@dataclass(frozen=True)
class Amounts:
    """What is measured, and how often."""

    rows: tuple[int, ...] = (1, 16, 64)  # of a batch, that are added up at a time
    sums: int = 90  # in a graph: as many as there are in two steps of the 20B


def amounts_of(args: argparse.Namespace) -> Amounts:
    return Amounts(rows=(1, 3), sums=3) if args.dry_run else Amounts()


def plan_of(args: argparse.Namespace, shapes: dict[str, Config]) -> Plan:
    if args.dry_run:
        return replace(DRY, config=replace(DRY.config, intermediate_size=64))
    return Plan(shapes[args.shape])


def per_sum(device: Device, name: str, launches: Callable[[], None], amounts: Amounts, repeats: int) -> Row:
    """Of a graph in which there are so many sums."""
    launches()  # compiles what a capture cannot
    graph = device.capture(launches)
    graph.replay()
    return row(name, [timed(device, graph.replay) / amounts.sums for _ in range(repeats)])


# On one card.


def mailboxes(device: Device, ranks: int, capacity: int) -> tuple[list[Array], Array]:
    """One for each rank, and their addresses."""
    boxes = [device.zeros(ops.mailbox_bytes(capacity), np.uint8) for _ in range(ranks)]
    return boxes, device.array(np.array([box.address for box in boxes], np.uint64))


def sums_of_streams(device: Device, plan: Plan, amounts: Amounts, ranks: int, rows: int) -> Row:
    size = rows * plan.config.hidden_size
    boxes, addresses = mailboxes(device, ranks, size)
    parts = [device.zeros(size, np.float32) for _ in range(ranks)]

    def program(rank: int) -> None:
        for _ in range(amounts.sums):
            ops.all_reduce(addresses, rank, size, parts[rank], PATIENCE)

    name = f"{rows} x {plan.config.hidden_size}, {ranks} streams of one card"
    programs = [partial(program, rank) for rank in range(ranks)]
    measured = per_sum(device, name, lambda: device.at_once(programs), amounts, plan.repeats)
    if any(box[8:12].get().any() for box in boxes):
        raise RuntimeError(f"{name}: a rank did not come; the kernels found no room on the card together")
    return measured


# Between processes.


def measure(args: argparse.Namespace, plan: Plan, sums_way: str | None, comm: Communicator) -> None:
    """On each of the ranks; rank 0 writes what it measured to the file named by --result."""
    amounts, device = amounts_of(args), own_device(args.device, comm)
    sums, found = choose_sums(comm, device, sums_way), []
    for rows in amounts.rows:
        part = device.zeros(rows * plan.config.hidden_size, np.float32)

        def add_up(part: Array = part) -> None:
            for _ in range(amounts.sums):
                sums.add_up(part)

        name = f"{rows} x {plan.config.hidden_size}, {comm.ranks} processes"
        if sums.captured:
            found.append(per_sum(device, name, add_up, amounts, plan.repeats))
        else:
            found.append(row(name, [timed(device, add_up) / amounts.sums for _ in range(plan.repeats)]))
        comm.gather(np.empty(0))  # nobody is still at work when the next begin
    sums.check()
    if comm.rank == 0:
        args.result.write_text(json.dumps([vars(each) for each in found]), encoding="utf-8")


def sums_of_processes(args: argparse.Namespace, ranks: int) -> tuple[list[Row], str]:
    """And how they added up. InputError if the ranks fail."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        flags = ["--backend", "gpu", "--device", args.device, "--shape", args.shape, "--result", str(result)]
        flags += ["--dry-run"] if args.dry_run else []
        flags += ["--allreduce", args.allreduce] if args.allreduce else []
        program = Path(__file__).with_name("benchmark_ranks.py")
        command = [find_mpiexec(), "-n", str(ranks), sys.executable, str(program), *flags]
        done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, stderr=subprocess.PIPE, text=True)
        if done.returncode or not result.exists():
            raise InputError(f"{ranks} ranks failed: {done.stderr.strip().splitlines()[-1]}")
        way = next(line for line in done.stderr.splitlines() if line.startswith("devices add up by"))
        return [Row(**each) for each in json.loads(result.read_text(encoding="utf-8"))], way


# What several cards should give.


class First(Alone):
    """Rank 0 of so many, whose others are not there."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks


class NoSums:
    """Parts stay what they are."""

    captured = True

    def add_up(self, part: Array) -> None:
        pass

    def check(self) -> None:
        pass


def shard_step(device: Device, plan: Plan, ranks: int) -> float:
    """Seconds of a captured step of rank 0, with nothing added up."""

    def shape(spec: TensorSpec) -> tuple[int, ...]:
        return tuple(cut.stop - cut.start for cut in slices(spec, 0, ranks))

    shard = new_device_shard(drawn_model(device, plan, shape), First(ranks), NoSums())
    context = CONTEXT if plan.config.max_position_embeddings > 2 * CONTEXT else 5
    return decode(shard.model, plan, 1, context, ways_of(shard)).seconds


@dataclass(frozen=True)
class Projection:
    cards: int
    shard: float  # seconds of a step of one rank's shard
    sum: float  # of one row, between streams of one card
    sums: int

    @property
    def step(self) -> float:
        return self.shard + self.sums * self.sum


# All of it.


def micro(seconds: float) -> str:
    return f"{1e6 * seconds:.4g}"


def sums_table(rows: list[Row]) -> str:
    lines = [f"| {r.name} | {micro(r.seconds)} | {r.spread:.1%} |" for r in rows]
    return "\n".join(["| sum of | us | spread |", "| --- | ---: | ---: |", *lines])


def projection_table(projections: list[Projection]) -> str:
    head = ["| cards | a shard's step, ms | sums | us each | projected step, ms | projected tok/s |"]
    head.append("| ---: | ---: | ---: | ---: | ---: | ---: |")
    lines = [
        f"| {p.cards} | {1e3 * p.shard:.4g} | {p.sums} | {micro(p.sum)} | {1e3 * p.step:.4g} | {1 / p.step:.4g} |"
        for p in projections
    ]
    return "\n".join([*head, *lines])


def benchmark(args: argparse.Namespace, shapes: dict[str, Config]) -> None:
    """What `--backend gpu` does with the flags of benchmark_ranks.py."""
    plan, amounts = plan_of(args, shapes), amounts_of(args)
    counts = args.ranks or ([2] if args.dry_run else [2, 4, 8])
    _, sums_way = split_way(args.allreduce, "gpu")
    if args.result is not None:
        return run_ranks(None, partial(measure, args, plan, sums_way))
    for ranks in counts:
        check_ranks(plan.config, ranks)
        if not 1 <= ranks <= ops.MOST_RANKS:
            raise InputError(f"a kernel adds up the parts of 1 to {ops.MOST_RANKS} ranks, not {ranks}")
    device = open_device(args.device)
    rows = [sums_of_streams(device, plan, amounts, ranks, n) for ranks in counts for n in amounts.rows]
    sum_of_a_row = {ranks: rows[i * len(amounts.rows)].seconds for i, ranks in enumerate(counts)}
    ways = []
    for ranks in counts:
        found, way = sums_of_processes(args, ranks)
        rows += found
        ways.append(f"{ranks} processes: {way}")
    sums = plan.config.num_hidden_layers + 1
    projections = [Projection(n, shard_step(device, plan, n), sum_of_a_row[n], sums) for n in counts]
    name = "a tiny shape, to see that all of it runs" if args.dry_run else args.shape
    print(f"{name}, {plan.dtype}, medians of {plan.repeats} repeats of a graph of {amounts.sums} sums\n")
    print(sums_table(rows), *ways, sep="\n")
    print(f"\nProjected, not measured: step = a shard's step + {sums} x the sum of a row between streams. {LEFT_OUT}\n")
    print(projection_table(projections))
