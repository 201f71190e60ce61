"""How fast the reference is on this machine, beside transformers on the same weights, threads and prompt.

    python examples/benchmark.py --backend reference
    python examples/benchmark.py --train
    python examples/benchmark.py --backend gpu

The last is in benchmark_gpu.py, which says what it measures.

Each implementation is a process of its own with one model; rounds alternate between them, so that whatever disturbs the
machine disturbs both. The machine's limits are measured in the same run: a share of a limit says how much a better
program could gain. transformers is left out where it is not installed. The table goes to stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors.numpy import save_file
from tqdm import tqdm

import neox.reference as ref
from neox.reference import shipped
from neox.reference.checkpoint.tensors import tensor_table
from neox.reference.config import GPT_NEOX_20B, PYTHIA, Config, config_to_dict, parameter_count, read_config
from neox.reference.costs import cached_numbers, flops, step_numbers, training_flops
from neox.reference.decode import Cache, extend, new_cache
from neox.reference.errors import InputError, Parser, run
from neox.reference.prefill import CHUNK, prefill
from neox.reference.random_weights import random_tensor
from neox.reference.train import Settings, advance, begin, own_copy

SHAPES = {f"pythia-{size}": config for size, config in PYTHIA.items()} | {"shipped": read_config(shipped.path())}
LARGEST = {"gpt-neox-20b": GPT_NEOX_20B}  # for cards only
FLOAT = 4  # bytes; everything here is float32
Answer = dict[str, Any]


# What the machine can do at most.


def best_seconds(work: Callable[[], object], rounds: int = 3) -> float:
    def once() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return min(once() for _ in range(rounds))


def gemm_limit() -> float:
    """FLOP/s of a product of two large square float32 matrices."""
    n = 2048
    a = np.ones((n, n), np.float32)
    return 2 * n**3 / best_seconds(lambda: a @ a)


def memory_limit() -> float:
    """Bytes/s at which a matrix far larger than the processor's caches is read, by a product with a vector."""
    matrix, vector = np.ones((16384, 8192), np.float32), np.ones(8192, np.float32)
    return matrix.nbytes / best_seconds(lambda: matrix @ vector)


# What a prompt needs.


def memory_parts(config: Config, prompt: int, positions: int) -> dict[str, int]:
    """Bytes: the weights, the cache, and the arrays of the widest moment, which is inside a GELU of the prompt."""
    arrays = min(prompt, CHUNK) * (4 * config.intermediate_size + 4 * config.hidden_size) + config.vocab_size
    numbers = {"weights": parameter_count(config), "cache": cached_numbers(config, positions), "activations": arrays}
    return {name: FLOAT * number for name, number in numbers.items()}


# A worker: one implementation, one model.


class Implementation(Protocol):
    def prefill(self, ids: np.ndarray, capacity: int) -> np.ndarray:  # (B,T) -> (B,V)
        ...

    def step(self, ids: np.ndarray) -> np.ndarray:  # (B,1) -> (B,V)
        ...


class Reference:
    def __init__(self, folder: str) -> None:
        self.model = ref.load(folder, weights="stored")
        self.cache: Cache | None = None

    def prefill(self, ids: np.ndarray, capacity: int) -> np.ndarray:
        self.cache = None  # the last prompt's goes first, or there would be two
        self.cache = new_cache(self.model, len(ids), capacity)
        return prefill(self.model, self.cache, ids)

    def step(self, ids: np.ndarray) -> np.ndarray:
        assert self.cache
        return extend(self.model, self.cache, ids)[:, 0]


class Transformers:
    def __init__(self, folder: str) -> None:
        import torch
        import transformers

        self.tensor = torch.from_numpy
        torch.set_grad_enabled(False)
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.model = transformers.GPTNeoXForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def prefill(self, ids: np.ndarray, capacity: int) -> np.ndarray:
        output = self.model(self.tensor(ids), use_cache=True, logits_to_keep=1)
        self.cache = output.past_key_values
        return output.logits[:, -1].numpy()

    def step(self, ids: np.ndarray) -> np.ndarray:
        return self.model(self.tensor(ids), past_key_values=self.cache, use_cache=True).logits[:, -1].numpy()


IMPLEMENTATIONS: dict[str, Callable[[str], Implementation]] = {"reference": Reference, "transformers": Transformers}


# Training: both make the same updates, from the same weights, on the same rows.

UPDATES = Settings(steps=10**6)
Update = Callable[[np.ndarray], float]  # ids (B,T+1) -> the loss before it


def row_length(config: Config) -> int:
    return min(UPDATES.length, config.max_position_embeddings)


def reference_updates(folder: str) -> Update:
    state = begin(own_copy(ref.load(folder)))

    def update(ids: np.ndarray) -> float:
        nonlocal state
        state, progress = advance(state, UPDATES, ids)
        return progress.loss

    return update


def transformers_updates(folder: str) -> Update:
    import torch

    model = Transformers(folder).model.train()
    torch.set_grad_enabled(True)
    matrices, vectors = ([p for p in model.parameters() if p.ndim == dims] for dims in (2, 1))
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    step = 0

    def update(ids: np.ndarray) -> float:
        nonlocal step
        step += 1
        for group in optimizer.param_groups:
            group["lr"] = UPDATES.rate(step)
        rows = torch.from_numpy(ids)
        logits = model(rows[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), UPDATES.clip)
        optimizer.step()
        return loss.item()

    return update


UPDATERS: dict[str, Callable[[str], Update]] = {"reference": reference_updates, "transformers": transformers_updates}


def serve_updates(name: str, folder: str) -> None:
    """Make an update for each line of rows on stdin; answer with its seconds and its loss."""
    update = UPDATERS[name](folder)
    for line in sys.stdin:
        ids = np.array(json.loads(line)["rows"])
        start = time.perf_counter()
        loss = update(ids)
        print(json.dumps({"update": time.perf_counter() - start, "loss": loss}), flush=True)


def memory_in_use() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def continue_greedily(implementation: Implementation, prompt: np.ndarray, new_tokens: int) -> Answer:
    """Seconds of the prompt and of a step; the largest logits after the prompt, and the ids that followed."""
    start = time.perf_counter()
    logits = implementation.prefill(prompt, prompt.shape[1] + new_tokens)
    end = time.perf_counter()
    largest, ids = np.sort(logits[0])[-8:].tolist(), []
    for _ in range(new_tokens):
        ids.append(int(logits[0].argmax()))
        logits = implementation.step(np.array([ids[-1:]]))
    step = (time.perf_counter() - end) / new_tokens
    return {"prefill": end - start, "step": step, "largest": largest, "ids": ids}


def serve(name: str, folder: str) -> None:
    """Answer requests, one JSON object a line, until stdin ends."""
    if name == "limits":
        for _ in sys.stdin:
            print(json.dumps({"gemm": gemm_limit(), "memory": memory_limit()}), flush=True)
        return
    if name == "transformers":
        import transformers.models.gpt_neox.modeling_gpt_neox  # noqa: F401  the memory of an import is not the model's
    before, start = memory_in_use(), time.perf_counter()
    implementation = IMPLEMENTATIONS[name](folder)
    load = time.perf_counter() - start
    for line in sys.stdin:
        request = json.loads(line)
        answer = continue_greedily(implementation, np.array([request["prompt"]]), request["new_tokens"])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({**answer, "load": load, "memory": peak - before}), flush=True)


# The comparison.


class Worker:
    def __init__(self, name: str, folder: Path, threads: int, *flags: str) -> None:
        variables = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        environment = {**os.environ, **{variable: str(threads) for variable in variables}}
        command = [sys.executable, __file__, "--worker", name, str(folder), *flags]
        self.name = name
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, request: Answer) -> Answer:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise InputError(f"the {self.name} process ended with status {self.process.wait()}; its reason is above")
        return json.loads(line)

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()


def write_checkpoint(config: Config, folder: Path) -> None:
    """Random weights in the layout that both implementations read."""
    table = tqdm(tensor_table(config).items(), "drawing weights", disable=None, leave=False)
    save_file({name: random_tensor(spec) for name, spec in table}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config_to_dict(config)), encoding="utf-8")


def alternate(workers: list[Worker], request: Answer, rounds: int) -> dict[str, list[Answer]]:
    """Each worker's answers, in rounds; the first round warms up and is not counted."""
    answers: dict[str, list[Answer]] = {worker.name: [] for worker in workers}
    for i in tqdm(range(rounds + 1), "rounds", disable=None, leave=False):
        for worker in workers:
            answer = worker.ask(request)
            if i > 0:
                answers[worker.name].append(answer)
    return answers


def measure(config: Config, args: argparse.Namespace, folder: Path) -> dict[str, list[Answer]]:
    """Each implementation's answers, and the machine's limits beside them in every round."""
    write_checkpoint(config, folder)
    peer = ["transformers"] if not args.no_peer and find_spec("torch") and find_spec("transformers") else []
    flags = ["--train"] if args.train else []
    workers = [Worker(name, folder, args.threads, *flags) for name in ["limits", "reference", *peer]]
    rng = np.random.default_rng(0)
    if args.train:
        request = {"rows": rng.integers(0, config.vocab_size, (UPDATES.batch, row_length(config) + 1)).tolist()}
    else:
        prompt = rng.integers(0, config.vocab_size, args.prompt_tokens).tolist()
        request = {"prompt": prompt, "new_tokens": args.new_tokens}
    try:
        return alternate(workers, request, args.rounds)
    finally:
        for worker in workers:
            worker.stop()


# The report.


@dataclass(frozen=True)
class Row:
    """One quantity; medians over the rounds."""

    name: str
    unit: str
    reference: float
    spread: float  # (largest - smallest) / median
    transformers: float | None
    ratio: float | None  # reference / transformers, round by round
    limit: str = ""  # what the median means, and its share of the limit


def row(
    name: str, unit: str, answers: dict[str, list[Answer]], value: Callable[[Answer], float], limit: str = ""
) -> Row:
    ours, peer = (list(map(value, answers.get(key, []))) for key in IMPLEMENTATIONS)
    middle = statistics.median(ours)
    ratio = statistics.median(a / b for a, b in zip(ours, peer, strict=True)) if peer else None
    return Row(
        name, unit, middle, (max(ours) - min(ours)) / middle, statistics.median(peer) if peer else None, ratio, limit
    )


def rows(config: Config, prompt: int, new: int, limits: Answer, answers: dict[str, list[Answer]]) -> list[Row]:
    """What the table shows of the answers to a prompt and a number of new tokens."""
    ours = answers["reference"]
    computed = flops(config, 0, prompt) / statistics.median(a["prefill"] for a in ours)
    read = FLOAT * step_numbers(config, prompt + new // 2) / statistics.median(a["step"] for a in ours)
    gemm = f"{computed / 1e9:.0f} GFLOP/s, {computed / limits['gemm']:.0%} of the machine's {limits['gemm'] / 1e9:.0f}"
    memory = f"{read / 1e9:.1f} GB/s, {read / limits['memory']:.0%} of the machine's {limits['memory'] / 1e9:.1f}"
    return [
        row(f"prefill of {prompt}", "tok/s", answers, lambda a: prompt / a["prefill"], gemm),
        row(f"decode of {new}", "tok/s", answers, lambda a: 1 / a["step"], memory),
        row("load", "s", answers, lambda a: a["load"]),
        row("peak memory", "MB", answers, lambda a: a["memory"] / 1e6),
    ]


def training_rows(config: Config, limits: Answer, answers: dict[str, list[Answer]]) -> list[Row]:
    """What the table shows of the answers to an update's rows."""
    length = row_length(config)
    work = UPDATES.batch * training_flops(config, length)
    computed = work / statistics.median(a["update"] for a in answers["reference"])
    gemm = f"{computed / 1e9:.0f} GFLOP/s, {computed / limits['gemm']:.0%} of the machine's {limits['gemm'] / 1e9:.0f}"
    name = f"update on {UPDATES.batch} x {length}"
    return [row(name, "tok/s", answers, lambda a: UPDATES.batch * length / a["update"], gemm)]


def table(report: list[Row]) -> str:
    head = ("", "reference", "spread", "transformers", "ratio", "limit")
    lines = [head, ("---", "---:", "---:", "---:", "---:", "---")]
    for r in report:
        peer = "" if r.transformers is None else f"{r.transformers:.3g} {r.unit}"
        ratio = "" if r.ratio is None else f"{r.ratio:.2f}"
        lines.append((r.name, f"{r.reference:.3g} {r.unit}", f"{r.spread:.0%}", peer, ratio, r.limit))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def memory_line(parts: dict[str, int], measured: float) -> str:
    total = sum(parts.values())
    listed = " + ".join(f"{name} {size / 1e6:.0f}" for name, size in parts.items())
    return f"peak memory of the reference: {measured / 1e6:.0f} MB, {measured / total:.2f} x ({listed}) MB"


def agreement_line(answers: dict[str, list[Answer]]) -> str:
    """That both computed the same model: without it, a ratio says nothing."""
    ours, peer = (answers[name][0] for name in IMPLEMENTATIONS)
    same = sum(a == b for a, b in zip(ours["ids"], peer["ids"], strict=True))
    apart = np.abs(np.subtract(ours["largest"], peer["largest"])).max() / np.abs(peer["largest"]).max()
    return f"agreement: {same} of {len(ours['ids'])} greedy tokens the same, logits of the prompt within {apart:.0e}"


def same_losses_line(answers: dict[str, list[Answer]]) -> str:
    """That both made the same updates, to within what the order of float32 sums leaves open."""
    pairs = list(zip(*([a["loss"] for a in answers[name]] for name in IMPLEMENTATIONS), strict=True))
    apart = max(abs(ours - peer) / peer for ours, peer in pairs)
    return f"agreement: losses of {len(pairs)} updates, the last {pairs[-1][0]:.4f}, within {apart:.0e}"


def positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def flags() -> argparse.Namespace:
    parser = Parser(description="Measure the reference beside transformers on the same weights.", allow_abbrev=False)
    parser.add_argument("--backend", choices=["reference", "gpu"], default="reference")
    parser.add_argument("--train", action="store_true", help="measure updates of training instead")
    parser.add_argument("--shape", choices=SHAPES | LARGEST, help="of the model; its weights are drawn")
    parser.add_argument("--prompt-tokens", type=positive, default=512, metavar="N")
    parser.add_argument("--new-tokens", type=positive, default=32, metavar="N")
    parser.add_argument("--rounds", type=positive, default=7, metavar="N")
    parser.add_argument("--threads", type=positive, default=os.cpu_count(), metavar="N", help="of both")
    parser.add_argument("--no-peer", action="store_true", help="do not measure transformers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    card = parser.add_argument_group("with --backend gpu")
    card.add_argument("--device", choices=["cuda", "host"], default="cuda")
    card.add_argument("--dry-run", action="store_true", help="a tiny shape, to see that all of it runs")
    card.add_argument("--peer", action="store_true", help="beside transformers instead, in decoding")
    card.add_argument("--picture", type=Path, metavar="FILE", help="draw the roofline: .png, .svg or .pdf")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_json(args: argparse.Namespace, limits: Answer, report: list[Row], parts: dict[str, int]) -> None:
    figures = {"shape": args.shape, "limits": limits, "rows": [asdict(r) for r in report], "memory": parts}
    args.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")


def on_a_card(args: argparse.Namespace) -> None:
    import benchmark_gpu

    if not args.peer:
        return benchmark_gpu.benchmark(args, SHAPES | LARGEST)
    import benchmark_peer

    comparisons = benchmark_peer.benchmark(args, SHAPES | LARGEST)
    if args.json:
        args.json.write_text(json.dumps(comparisons, indent=1), encoding="utf-8")


def main() -> None:
    args = flags()
    if args.worker:
        return serve_updates(*args.worker) if args.train and args.worker[0] in UPDATERS else serve(*args.worker)
    if args.backend == "gpu":
        return on_a_card(args)
    for flag in ("dry_run", "picture", "peer"):
        if getattr(args, flag):
            raise InputError(f"--{flag.replace('_', '-')} is for --backend gpu")
    if args.shape in LARGEST:
        raise InputError(f"{args.shape} is for --backend gpu; here there are {', '.join(SHAPES)}")
    args.shape = args.shape or ("shipped" if args.train else "pythia-160m")
    config, positions = SHAPES[args.shape], args.prompt_tokens + args.new_tokens
    if not args.train and positions > config.max_position_embeddings:
        raise InputError(f"{positions} tokens, but the context of {args.shape} is {config.max_position_embeddings}")
    with tempfile.TemporaryDirectory() as folder:
        answers = measure(config, args, Path(folder))
    limits = {name: max(answer[name] for answer in answers["limits"]) for name in ("gemm", "memory")}
    if args.train:
        report, parts = training_rows(config, limits, answers), {}
    else:
        report = rows(config, args.prompt_tokens, args.new_tokens, limits, answers)
        parts = memory_parts(config, args.prompt_tokens, positions)
    print(f"{args.shape}, random weights, float32, {args.threads} threads, medians of {args.rounds} rounds\n")
    print(table(report) + "\n")
    if parts:
        print(memory_line(parts, max(answer["memory"] for answer in answers["reference"])))
    if "transformers" in answers:
        print(same_losses_line(answers) if args.train else agreement_line(answers))
    if args.json:
        write_json(args, limits, report, parts)


if __name__ == "__main__":
    run(main)
