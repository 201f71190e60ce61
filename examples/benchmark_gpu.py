"""How near gpu/ comes to what a card can do. Called by benchmark.py:

    python examples/benchmark.py --backend gpu --json figures.json --picture roofline.png
    python examples/benchmark.py --backend gpu --device host --dry-run

The ceilings come first, in the same run: how fast memory is read and copied, how fast cuBLAS multiplies (in a burst,
and for longer than a card's power allows that), what a launch costs inside a graph. Then decode steps, replays of the
captured graph; prompts; the first token; loading. Weights, keys and values are drawn on the device, in the layout and
at the scales of a checkpoint at the start of training: on zeros a card computes faster. A dry run goes the same way on
a tiny shape; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from pictures import check_picture, pyplot
from safetensors.numpy import save_file
from tqdm import tqdm

from neox.gpu import load
from neox.gpu.decode import (
    WHOLE,
    Cache,
    SamplingDecoder,
    Step,
    Ways,
    choose,
    new_cache,
    new_step,
    prefill,
    run_step,
    trial_of,
)
from neox.gpu.device import Array, Device, open_device
from neox.gpu.launches import captured
from neox.gpu.load import arranged
from neox.gpu.model import Model, rotary_arrays, unembed
from neox.gpu.ops import TYPES
from neox.gpu.sampling import on_device
from neox.gpu.source import Source
from neox.reference.checkpoint.tensors import TensorSpec, build_params, named_tensors, tensor_table
from neox.reference.config import GPT_NEOX_20B, Config, config_to_dict
from neox.reference.costs import cached_numbers, flops, layer_weights, output_weights
from neox.reference.errors import InputError
from neox.reference.sampling import GREEDY, Sampling

SOURCE = Source(
    "benchmark.cu",
    (*(f"draw<{T}>" for T in TYPES.values()), "read_stream", "copy_stream", "nothing"),
    Path(__file__).resolve().parent,
)


@dataclass(frozen=True)
class Plan:
    """What is measured, and for how long."""

    config: Config = GPT_NEOX_20B
    dtype: str = "float16"
    stream_bytes: int = 8 << 30  # far more than the 50 MB of an H200's cache
    blocks: int = 1056  # of kernels that stay: eight on each of 132 multiprocessors
    product_rows: tuple[int, ...] = (512, 2048)
    burst: int = 10  # products
    sustained: float = 1.0  # seconds: what a card's power allows shows only after some tenths
    nodes: int = 135  # of the graph of empty kernels: three for a layer, three for the rest
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    contexts: tuple[int, ...] = (128, 1024, 1760)
    warm_up: int = 8  # steps
    steps: int = 32
    repeats: int = 5
    prompts: tuple[int, ...] = (128, 512, 2048)
    loaded_layers: int = 4  # of the checkpoint that is written and loaded; a whole one would not fit on every disk


TINY = Config(61, 48, 2, 2, 40, max_position_embeddings=64)
DRY = Plan(
    config=TINY,
    stream_bytes=8 << 12,
    blocks=2,
    product_rows=(5, 9),
    burst=2,
    sustained=0.001,
    nodes=3,
    batches=(1, 3),
    contexts=(5, 17),
    warm_up=1,
    steps=2,
    repeats=2,
    prompts=(7, 30),
    loaded_layers=1,
)


# What a card can do.


@dataclass(frozen=True)
class Limits:
    """bytes/s, FLOP/s."""

    memory: float
    compute: float


DATASHEET = Limits(4.8e12, 989.5e12)  # NVIDIA H200 SXM: HBM3e, and 16-bit tensor cores without sparsity


@dataclass(frozen=True)
class Row:
    """One quantity: the median of its repeats."""

    name: str
    seconds: float
    spread: float  # (largest - smallest) / median
    bytes: float = 0  # the fewest that must be read or written
    flops: float = 0
    tokens: float = 0  # read or made in that time
    of_datasheet: float | None = None  # the larger of the two shares, of memory and of compute
    of_ceiling: float | None = None  # the same, of what was measured in this run

    @property
    def memory(self) -> float:
        return self.bytes / self.seconds

    @property
    def compute(self) -> float:
        return self.flops / self.seconds


def share(row: Row, limits: Limits) -> float:
    """Of the time that the limits leave no way around."""
    return max(row.memory / limits.memory, row.compute / limits.compute)


def timed(device: Device, work: Callable[[], object]) -> float:
    """Seconds on the device's clock."""
    start = device.mark()
    work()
    return device.seconds(start, device.mark())


def row(name: str, seconds: list[float], **amounts: float) -> Row:
    middle = statistics.median(seconds)
    return Row(name, middle, (max(seconds) - min(seconds)) / middle, **amounts)


def measured(device: Device, name: str, work: Callable[[], object], repeats: int, **amounts: float) -> Row:
    work()  # compiles, opens libraries, brings clocks up
    return row(name, [timed(device, work) for _ in range(repeats)], **amounts)


# What is drawn on the device.


def draw(out: Array, plan: Plan, name: str, mean: float = 0, deviation: float = 1) -> Array:
    """mean + deviation N(0,1), the same for a name and a place in the array."""
    numbers = np.int64(out.size), np.uint32(zlib.crc32(name.encode())), np.float32(mean), np.float32(deviation)
    kernel = f"draw<{TYPES[out.dtype.name]}>"
    out.device.launch(SOURCE, kernel, plan.blocks, 256 if out.size > 10**6 else 32, (out, *numbers))
    return out


def scale(spec: TensorSpec, layers: int) -> tuple[float, float]:
    """Mean and deviation, about those that training starts from; norms and biases are not what leaves them out."""
    if len(spec.shape) == 1:
        return (1, 0.1) if spec.name.endswith("norm.weight") else (0, 0.02)
    return 0, 0.02 / (2 * layers) ** 0.5 if spec.sharding == "row" else 0.02


Shape = Callable[[TensorSpec], tuple[int, ...]]


def drawn_model(device: Device, plan: Plan, shape: Shape = lambda spec: spec.shape) -> Model:
    """shape: of a tensor, which may be a rank's slice."""
    config = plan.config
    needed, free = 2 * sum(math.prod(shape(spec)) for spec in tensor_table(config).values()), device.free_memory()
    if needed > free:
        raise InputError(
            f"the weights take {needed / 1e9:.3g} GB, and the device has {free / 1e9:.3g} GB free: a smaller --shape"
        )

    def put(spec: TensorSpec) -> Array:
        return draw(device.empty(shape(spec), plan.dtype), plan, spec.name, *scale(spec, config.num_hidden_layers))

    named: Any = build_params(config, lambda spec: spec)  # type: ignore[arg-type, return-value]
    return Model(config, arranged(named, put), *rotary_arrays(config, device))


# The ceilings.


def streams(device: Device, plan: Plan) -> list[Row]:
    """How fast memory is read, and copied; what is read is half of the memory of a copy."""
    words = plan.stream_bytes // 4
    data = replace(draw(device.empty(words, "float32"), plan, "stream"), dtype=np.dtype(np.uint32))
    half, threads = words // 2, 32 if plan.blocks < 132 else 256
    sums = device.empty(plan.blocks * threads, np.uint32)

    def launch(kernel: str, *arguments: Any) -> None:
        device.launch(SOURCE, kernel, plan.blocks, threads, arguments)

    return [
        measured(
            *(device, "read", lambda: launch("read_stream", data, sums, np.int64(words // 4)), plan.repeats),
            bytes=plan.stream_bytes,
        ),
        measured(
            *(device, "copy", lambda: launch("copy_stream", data, data[half:], np.int64(half // 4)), plan.repeats),
            bytes=plan.stream_bytes,
        ),
    ]


def factors_of(device: Device, plan: Plan, n: int, outputs: int, inputs: int) -> tuple[Array, Array, Array]:
    """x (N,I), weight (O,I), and where their product goes."""
    x, weight = (draw(device.empty((rows, inputs), plan.dtype), plan, f"{rows}") for rows in (n, outputs))
    return x, weight, device.empty((n, outputs), "float32")


def products(device: Device, plan: Plan) -> list[Row]:
    """cuBLAS on a layer's four products, one after the other: some times over, and as long as `sustained` says."""
    c, f = plan.config.hidden_size, plan.config.intermediate_size
    rows = []
    for n in plan.product_rows:
        factors = [factors_of(device, plan, n, *shape) for shape in ((3 * c, c), (c, c), (f, c), (c, f))]

        def once(factors: list[tuple[Array, Array, Array]] = factors) -> None:
            for x, weight, out in factors:
                device.matmul(x, weight, out)

        work = 2 * n * (4 * c * c + 2 * c * f)
        once()
        burst = [timed(device, once) for _ in range(plan.burst)]
        count = max(2, round(plan.sustained / statistics.median(burst)))
        long = timed(device, lambda count=count, once=once: [once() for _ in range(count)])  # type: ignore[misc]
        rows += [row(f"products of {n} rows, burst", burst, flops=work)]
        rows += [row(f"products of {n} rows, sustained", [long / count], flops=work)]
    return rows


def empty_graph(device: Device, plan: Plan) -> Row:
    def launches() -> None:
        for _ in range(plan.nodes):
            device.launch(SOURCE, "nothing", 1, 32, ())

    launches()
    graph = device.capture(launches)
    return measured(device, f"graph of {plan.nodes} empty kernels", graph.replay, plan.repeats)


# The model.


def step_bytes(config: Config, batch: int, position: int, itemsize: int) -> int:
    """That a step must read: every weight once, the keys and values of every text."""
    weights = layer_weights(config) + output_weights(config)
    return itemsize * (weights + batch * cached_numbers(config, position))


def filled_cache(model: Model, plan: Plan, batch: int, capacity: int) -> Cache:
    cache = new_cache(model, batch, capacity)
    draw(cache.keys, plan, "keys")
    draw(cache.values, plan, "values")
    return cache


def place(step: Step, context: int) -> None:
    """All texts at this position, with tokens of which no two are alike while there are enough."""
    (batch,) = step.ids.shape
    step.ids.set(np.arange(batch, dtype=np.int32))
    step.place.texts.set(np.arange(batch, dtype=np.int32))
    step.place.positions.set(np.full(batch, context, np.int32))


ONE_BY_ONE, OVERLAPPED = "one launch after another", "overlapped launches"
ORDERS = (ONE_BY_ONE, OVERLAPPED)  # that a device chooses from, if it is not said


def decode(model: Model, plan: Plan, batch: int, context: int, ways: Ways = WHOLE, order: str = "") -> Row:
    """Replays of the captured step, from this context on. The amounts are those of a whole model."""
    device = model.device
    last = context + max(plan.warm_up, plan.steps)
    cache, step = filled_cache(model, plan, batch, last + 1), new_step(model, batch, last + 1)

    def launches() -> None:
        run_step(model, cache, step, None, ways)

    place(step, context)
    launches()  # compiles what a capture cannot
    place(step, context)
    if order:
        graph = device.capture(launches, overlapped=order == OVERLAPPED)
    else:
        graph = captured(device, launches, trial_of(model, step) if ways.alone else None)

    def replays(count: int) -> None:
        for _ in range(count):
            graph.replay()

    place(step, context)
    replays(plan.warm_up)
    seconds = []
    for _ in range(plan.repeats):
        place(step, context)
        seconds.append(timed(device, lambda: replays(plan.steps)) / plan.steps)
    require_tokens(step.ids)
    middle = context + plan.steps // 2
    amounts = {
        "bytes": step_bytes(model.config, batch, middle, model.dtype.itemsize),
        "flops": batch * flops(model.config, middle, middle + 1),
        "tokens": batch,
    }
    name = f"decode, batch {batch}, context {context}"
    return row(f"{name}, {order}" if order else name, seconds, **amounts)


def require_tokens(ids: Array) -> None:
    if ids.get().min() < 0:
        raise RuntimeError("some logits are not finite: what was measured is no model")


def prompt_of(config: Config, length: int) -> list[int]:
    ids: list[int] = np.random.default_rng(length).integers(0, config.vocab_size, length).tolist()
    return ids


WAYS = {  # of choosing an id
    "arg-max": GREEDY,
    "sampling": Sampling(0.8, seed=1),
    "sampling, top-k": Sampling(0.8, top_k=50, seed=1),
    "sampling, all filters": Sampling(0.8, top_k=50, top_p=0.9, min_p=0.02, seed=1),
}


def choice(model: Model, plan: Plan, name: str) -> Row:
    """An id for each text of a batch, from logits that lie there."""
    device, batch = model.device, max(plan.batches)
    step, samplings = new_step(model, batch, 1), [WAYS[name]] * batch
    place(step, 0)
    draw(step.logits, plan, "logits", deviation=3)
    ways = on_device(samplings, device) if WAYS[name].temperature else None

    def launches() -> None:
        choose(step, None, ways)

    launches()  # compiles what a capture cannot
    graph = device.capture(launches)
    result = measured(device, f"{name}, {batch} texts", graph.replay, plan.repeats, bytes=step.logits.nbytes)
    require_tokens(step.ids)
    return result


def read_prompt(model: Model, plan: Plan, length: int) -> Row:
    cache, step = new_cache(model, 1, length), new_step(model, 1, length)
    ids = prompt_of(model.config, length)

    def work() -> None:
        last = prefill(model, cache, [ids])
        unembed(model, last, step.work.normed, step.logits)

    amounts = {"bytes": step_bytes(model.config, 0, 0, model.dtype.itemsize), "flops": flops(model.config, 0, length)}
    return measured(model.device, f"prompt of {length}", work, plan.repeats, **amounts, tokens=length)


def first_token(model: Model, plan: Plan, length: int) -> Row:
    """On the host's clock, from the prompt to the first token in the host's memory."""
    ids, decoder = prompt_of(model.config, length), SamplingDecoder(model, [GREEDY])

    def once() -> float:
        start = time.perf_counter()
        decoder.start([ids], length + 1)
        return time.perf_counter() - start

    once()
    return row(f"first token after {length}", [once() for _ in range(plan.repeats)], tokens=1)


def loading(model: Model, plan: Plan) -> Row:
    """Of a checkpoint of the same shape with fewer layers, just written, so that the system still has it in memory."""
    config = replace(model.config, num_hidden_layers=plan.loaded_layers)
    with tempfile.TemporaryDirectory() as folder:
        tensors: Any = named_tensors(config, model.params)  # type: ignore[arg-type]
        save_file({name: array.get() for name, array in tensors.items()}, Path(folder, "model.safetensors"))
        Path(folder, "config.json").write_text(json.dumps(config_to_dict(config)), encoding="utf-8")

        def once() -> float:
            start = time.perf_counter()
            load(folder, plan.dtype, model.device)
            model.device.synchronize()
            return time.perf_counter() - start

        size = sum(array.nbytes for array in tensors.values())
        return row(f"load of {size / 1e9:.3g} GB", [once() for _ in range(2)], bytes=size)


# All of it.


@dataclass(frozen=True)
class Report:
    ceilings: list[Row]
    rows: list[Row]
    left_out: list[str]
    limits: Limits  # the best of the ceilings; of products, of the sustained ones
    clocks: list[str] = field(default_factory=list)  # before and after, as nvidia-smi says


def clocks() -> str:
    """Of the card; empty without nvidia-smi."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    query = "--query-gpu=name,clocks.sm,clocks.mem,power.draw,temperature.gpu"
    return subprocess.run([program, query, "--format=csv,noheader"], capture_output=True, text=True).stdout.strip()


def cases(model: Model, plan: Plan) -> Iterator[tuple[str, Callable[[], Row]]]:
    for batch in plan.batches:
        for context in plan.contexts:
            name = f"decode, batch {batch}, context {context}"
            yield name, lambda batch=batch, context=context: decode(model, plan, batch, context)  # type: ignore[misc]
    context = plan.contexts[0]
    for batch in sorted({plan.batches[0], plan.batches[-1]}) if model.device.can_overlap else ():
        for order in ORDERS:
            name = f"decode, batch {batch}, context {context}, {order}"
            yield name, lambda batch=batch, order=order: decode(model, plan, batch, context, order=order)  # type: ignore[misc]
    for name in WAYS:
        yield name, lambda name=name: choice(model, plan, name)  # type: ignore[misc]
    for length in plan.prompts:
        yield f"prompt of {length}", lambda length=length: read_prompt(model, plan, length)  # type: ignore[misc]
        yield f"first token after {length}", lambda length=length: first_token(model, plan, length)  # type: ignore[misc]
    yield "load", lambda: loading(model, plan)


def with_shares(rows: list[Row], limits: Limits) -> list[Row]:
    """Of what the device bounds: loading is bounded elsewhere, and empty kernels have no share of anything."""

    def shared(r: Row) -> Row:
        bounded = (r.bytes or r.flops) and not r.name.startswith("load")
        return replace(r, of_datasheet=share(r, DATASHEET), of_ceiling=share(r, limits)) if bounded else r

    return [shared(r) for r in rows]


def run_all(device: Device, plan: Plan) -> Report:
    before, rows, left_out = clocks(), [], []
    ceilings = [*streams(device, plan), *products(device, plan), empty_graph(device, plan)]
    sustained = max(r.compute for r in ceilings if r.name.endswith("sustained"))
    limits = Limits(max(r.memory for r in ceilings), sustained)
    model = drawn_model(device, plan)
    for name, work in tqdm(list(cases(model, plan)), "measuring", disable=None, leave=False):
        try:
            rows.append(work())
        except InputError as error:  # as many keys and values as some cases have do not fit on every card
            left_out.append(f"{name}: {error}")
    return Report(with_shares(ceilings, limits), with_shares(rows, limits), left_out, limits, [before, clocks()])


# What is shown.


def cells(r: Row) -> tuple[str, ...]:
    def shown(value: float | None, form: str) -> str:
        return form.format(value) if value else ""

    return (
        r.name,
        f"{1e3 * r.seconds:.4g}",
        f"{r.spread:.1%}",
        shown(r.tokens and r.tokens / r.seconds, "{:.4g}"),
        shown(r.bytes / 1e9, "{:.4g}"),
        shown(r.memory / 1e9, "{:.4g}"),
        shown(r.compute / 1e12, "{:.4g}"),
        shown(r.of_datasheet, "{:.1%}"),
        shown(r.of_ceiling, "{:.1%}"),
    )


def table(report: Report) -> str:
    head = ("", "ms", "spread", "tok/s", "GB", "GB/s", "TFLOP/s", "of the datasheet", "of the ceiling")
    lines = [head, ("---", *["---:"] * (len(head) - 1)), *map(cells, report.ceilings + report.rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def as_json(report: Report, plan: Plan, device: str) -> str:
    figures = {**asdict(report), "plan": asdict(plan), "device": device, "datasheet": asdict(DATASHEET)}
    return json.dumps(figures, indent=1)


def draw_roofline(report: Report, path: Path) -> None:
    """Operations a second over operations for each byte, under the roofs of this run and of the datasheet."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 5))
    intensity = np.geomspace(0.5, 5000, 200)
    for limits, style, label in ((report.limits, "-", "measured in this run"), (DATASHEET, ":", "datasheet, H200")):
        roof = np.minimum(intensity * limits.memory, limits.compute) / 1e12
        axes.loglog(intensity, roof, style, color="black", label=label)
    for kind, marker in (("decode", "o"), ("prompt", "s")):
        points = [(r.flops / r.bytes, r.compute / 1e12) for r in report.rows if r.name.startswith(kind)]
        axes.loglog(*zip(*points, strict=True), marker, label=kind)
    axes.set(xlabel="FLOP per byte", ylabel="TFLOP/s")
    axes.legend()
    figure.savefig(path)
    plt.close(figure)


@contextmanager
def explained_time(limit: float = 360) -> Iterator[None]:
    """Says on stderr if it took longer than it should."""
    start = time.perf_counter()
    yield
    if (taken := time.perf_counter() - start) > limit:
        print(f"this took {taken:.0f} s; on an H200 it should take less than {limit:.0f}", file=sys.stderr)


def plan_of(args: argparse.Namespace, shapes: dict[str, Config]) -> Plan:
    if args.dry_run:
        return DRY
    config = shapes[args.shape or "gpt-neox-20b"]
    longest = config.max_position_embeddings
    steps = max(Plan.warm_up, Plan.steps)
    return replace(
        Plan(config),
        contexts=tuple(c for c in Plan.contexts if c + steps < longest),
        prompts=tuple(p for p in Plan.prompts if p <= longest),
        loaded_layers=min(Plan.loaded_layers, config.num_hidden_layers),
    )


def benchmark(args: argparse.Namespace, shapes: dict[str, Config]) -> None:
    """What `--backend gpu` does with its flags."""
    if args.picture:
        check_picture(args.picture)
    plan, device = plan_of(args, shapes), open_device(args.device)
    with explained_time():
        report = run_all(device, plan)
    name = "a tiny shape, to see that all of it runs" if args.dry_run else args.shape or "gpt-neox-20b"
    print(f"{name}, drawn weights, {plan.dtype}, medians of {plan.repeats} repeats\n\n{table(report)}\n")
    for line in report.left_out:
        print(f"left out: {line}")
    if args.json:
        args.json.write_text(as_json(report, plan, args.device), encoding="utf-8")
    if args.picture:
        draw_roofline(report, args.picture)
