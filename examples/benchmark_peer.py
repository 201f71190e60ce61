"""gpu/ beside transformers, on the same card, in the same run, on the same weights. Called by benchmark.py:

    python examples/benchmark.py --backend gpu --peer
    python examples/benchmark.py --backend gpu --device host --dry-run --peer

torch is lent the memory of the weights that were drawn on the device (by DLPack): there is one copy of them.
transformers decodes as it is called by most, eagerly with a cache that grows, and as fast as it knows how, with a
static cache under torch.compile, whose compilation is not counted. All are timed by the host's clock until the last
token is in the host's memory, alternating, so that what disturbs the card disturbs all of them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from benchmark_gpu import Plan, drawn_model, place, plan_of, prompt_of
from tqdm import tqdm

from neox.gpu.decode import new_cache, new_step, prefill, run_step, trial_of
from neox.gpu.device import open_device
from neox.gpu.launches import captured
from neox.gpu.model import Model
from neox.reference.checkpoint.tensors import EMBED_OUT, named_tensors
from neox.reference.config import Config, config_to_dict
from neox.reference.errors import InputError

CASES = ((1, 128), (1, 1024), (8, 1024), (32, 1024))  # batch and context
DRY_CASES = ((1, 5), (3, 9))
REPEATS = 3
Steps = Callable[[int], list[int]]  # a number of steps -> the tokens after them, one of each text


@dataclass(frozen=True)
class Comparison:
    """Seconds of a step, each the median of its repeats."""

    batch: int
    context: int
    ours: float
    eager: float
    compiled: float
    first: dict[str, list[int]]  # tokens that follow the prompt


def import_peer() -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise InputError('--peer needs torch and transformers: pip install "neox20b[oracle]"') from error
    torch.set_grad_enabled(False)
    transformers.logging.set_verbosity_error()
    return torch, transformers


def peer_of(model: Model) -> Any:
    """transformers' model, built without memory and given ours."""
    torch, transformers = import_peer()
    config = transformers.GPTNeoXConfig(**config_to_dict(model.config))
    with torch.device("meta"):
        peer = transformers.GPTNeoXForCausalLM(config)
    tensors: Any = named_tensors(model.config, model.params)  # type: ignore[arg-type]
    model.device.synchronize()  # another library's stream does not wait for ours
    lent = {name: torch.from_dlpack(array.view()) for name, array in tensors.items()}
    head = peer.get_output_embeddings().weight  # some versions call it otherwise than the checkpoint does
    lent |= {name: lent[EMBED_OUT] for name, parameter in peer.named_parameters() if parameter is head}
    missing = peer.load_state_dict(lent, strict=False, assign=True).missing_keys
    if missing:
        raise RuntimeError(f"transformers expects more tensors: {missing}")
    neox = peer.gpt_neox  # its frequencies are no parameters, and were built without memory too
    with torch.device(lent[EMBED_OUT].device):
        neox.rotary_emb = type(neox.rotary_emb)(config)
    return peer.eval()


def our_steps(model: Model, ids: list[int], batch: int, capacity: int) -> Steps:
    """All texts are the same prompt. Each call goes on from it."""
    cache, step = new_cache(model, batch, capacity), new_step(model, batch, capacity)
    prefill(model, cache, [ids[:-1]] * batch)

    def launches() -> None:
        run_step(model, cache, step, None)

    def begin() -> None:
        place(step, len(ids) - 1)
        step.ids.set(step.ids.get() * 0 + ids[-1])

    begin()
    launches()
    graph = captured(model.device, launches, trial_of(model, step))

    def steps(count: int) -> list[int]:
        begin()
        for _ in range(count):
            graph.replay()
        tokens: list[int] = step.ids.get().tolist()
        return tokens

    return steps


def their_steps(peer: Any, ids: list[int], batch: int, capacity: int, compiled: str | None) -> Steps:
    """compiled: the backend of torch.compile, and a static cache; None for neither."""
    torch, transformers = import_peer()
    device = peer.device
    prompt = torch.tensor([ids] * batch, device=device)
    forward = peer if compiled is None else torch.compile(peer, fullgraph=True, backend=compiled, **mode(compiled))

    def fresh() -> Any:
        if compiled is None:
            return transformers.DynamicCache(config=peer.config)
        return transformers.StaticCache(config=peer.config, max_cache_len=capacity)

    def steps(count: int) -> list[int]:
        cache = fresh()
        peer(prompt[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        now, start = prompt[:, -1:], len(ids) - 1
        for position in range(start, start + count):
            at = torch.full((1,), position, device=device)
            output = forward(now, past_key_values=cache, use_cache=True, position_ids=at[None])
            now = output.logits[:, -1].argmax(-1, keepdim=True).clone()
        tokens: list[int] = now[:, 0].tolist()
        return tokens

    return steps


def mode(backend: str) -> dict[str, str]:
    """CUDA graphs, where the backend makes some."""
    return {"mode": "reduce-overhead"} if backend == "inductor" else {}


def seconds_of_a_step(steps: Steps, count: int) -> float:
    """Of many steps without those of a few: what comes before the first one is in both."""
    times = []
    for n in (1, 1 + count):
        start = time.perf_counter()
        steps(n)
        times.append(time.perf_counter() - start)
    return (times[1] - times[0]) / count


BACKENDS = {False: "inductor", True: "eager"}  # of torch.compile; for a dry run the one that compiles nothing


def compare(model: Model, peer: Any, batch: int, context: int, count: int, backend: str) -> Comparison:
    ids, capacity = prompt_of(model.config, context), context + count + 2
    kinds = {
        "ours": our_steps(model, ids, batch, capacity),
        "eager": their_steps(peer, ids, batch, capacity, None),
        "compiled": their_steps(peer, ids, batch, capacity, backend),
    }
    first = {name: steps(4) for name, steps in kinds.items()}  # warms up, and compiles
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(REPEATS):
        for name, steps in kinds.items():
            times[name].append(seconds_of_a_step(steps, count))
    return Comparison(batch, context, **{n: statistics.median(t) for n, t in times.items()}, first=first)


def table(comparisons: list[Comparison]) -> str:
    head = ("batch", "context", "ours, ms", "eager, ms", "static + compile, ms", "over eager", "over compiled", "same")
    lines = [head, ("---:",) * len(head)]
    for c in comparisons:
        same = sum(c.first["ours"] == tokens for tokens in c.first.values()) - 1
        figures = *(f"{1e3 * t:.4g}" for t in (c.ours, c.eager, c.compiled)), f"{c.eager / c.ours:.2f}"
        lines.append((f"{c.batch}", f"{c.context}", *figures, f"{c.compiled / c.ours:.2f}", f"{same} of 2"))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def benchmark(args: argparse.Namespace, shapes: dict[str, Config]) -> list[dict[str, Any]]:
    """What `--backend gpu --peer` does with its flags. "same": how many of the two chose our tokens."""
    import_peer()
    plan: Plan = plan_of(args, shapes)
    model = drawn_model(open_device(args.device), plan)
    peer, count = peer_of(model), plan.steps
    cases = [
        case for case in (DRY_CASES if args.dry_run else CASES) if case[1] + count < plan.config.max_position_embeddings
    ]
    comparisons = [
        compare(model, peer, *case, count, BACKENDS[args.dry_run])
        for case in tqdm(cases, "measuring", disable=None, leave=False)
    ]
    print(table(comparisons))
    return [asdict(c) for c in comparisons]
