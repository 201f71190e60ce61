"""Continue a text with a GPT-NeoX model.

    python examples/generate.py --prompt "Once upon a time"
    python examples/generate.py --model pythia-70m --prompt "The capital of France is" --temperature 0.8 --top-p 0.95
    cat story.txt | python examples/generate.py --model path/to/folder --prompt - --stop "The end" --json
    python examples/generate.py --backend gpu --device host --prompt "Once upon a time"
    python examples/generate.py --tensor-parallel 2 --prompt "Once upon a time"

The prompt and its continuation go to stdout, everything else to stderr. With several --prompt, the texts are continued
side by side and printed one after the other, an empty line between them. Without --model, a small model that comes with
the package is used.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from neox.reference import shipped
from neox.reference.checkpoint.hub import find
from neox.reference.checkpoint.load import load
from neox.reference.config import Config
from neox.reference.errors import InputError, Parser, run
from neox.reference.generate import CachedDecoder, Completion, Piece, Request, gathered, stream
from neox.reference.sampling import Sampling, new_seed
from neox.reference.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from neox.distributed import Communicator

PROMPT = "Once upon a time"
DTYPES = {"reference": ("float32", "float64"), "gpu": ("float16", "bfloat16", "float32")}  # the default first

# Flags.


def parser() -> Parser:
    flags = Parser(description="Continue a text with a GPT-NeoX model.", allow_abbrev=False)
    flags.add_argument(
        "--prompt", action="append", metavar="TEXT", help=f"- reads stdin; may be repeated; without one, {PROMPT!r}"
    )
    flags.add_argument("--max-tokens", "--max-new-tokens", "-n", type=int, default=100, metavar="N")
    _add_model(flags.add_argument_group("model"))
    _add_sampling(flags.add_argument_group("sampling"))
    _add_ranks(flags.add_argument_group("tensor parallelism"))
    flags.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before it; may be repeated")
    flags.add_argument("--ignore-eos", action="store_true", help="go on after the end-of-text token")
    flags.add_argument("--no-stream", action="store_true", help="print the text when it is complete")
    flags.add_argument("--json", action="store_true", help="print a JSON object for each prompt")
    flags.add_argument(
        "--logprobs", type=int, metavar="N", help="log-probabilities in the JSON, also of the N best ids"
    )
    return flags


def _add_model(flags: argparse._ArgumentGroup) -> None:
    flags.add_argument("--model", metavar="PATH|NAME", help="a folder, or a name on huggingface.co such as pythia-70m")
    flags.add_argument("--revision", help="of a named model, such as step1000; of a folder, a folder inside it")
    flags.add_argument("--backend", choices=list(DTYPES), default="reference", help="NumPy, or CUDA kernels")
    flags.add_argument("--device", choices=["cuda", "host"], help="of --backend gpu; host runs its kernels on the CPU")
    every = sorted({dtype for dtypes in DTYPES.values() for dtype in dtypes})
    flags.add_argument("--dtype", choices=every, help="to compute in: float32 by default, on the gpu float16")
    flags.add_argument(
        "--weights",
        choices=["auto", "upcast", "stored", "streamed"],
        help="of the reference: converted to --dtype at once; kept as stored and converted at every use; or read one "
        "layer while another computes. auto, the default: what memory allows",
    )
    flags.add_argument(
        "--layer-norms",
        choices=["mean", "fold", "per_rank"],
        help="of a checkpoint of gpt-neox, each rank of which has its own: averaged, the default; folded into the "
        "weights, exactly; or kept, by as many ranks",
    )
    flags.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="replace a field of the config: hidden_act=gelu",
    )


def _add_sampling(flags: argparse._ArgumentGroup) -> None:
    flags.add_argument("--temperature", "--temp", type=float, default=0.0, help="0, the default, takes the likeliest")
    flags.add_argument("--top-k", type=int, default=0, help="keep this many ids; 0: all")
    flags.add_argument("--top-p", type=float, default=1.0, help="keep the likeliest ids of this total probability")
    flags.add_argument("--min-p", type=float, default=0.0, help="keep ids this fraction as likely as the likeliest")
    flags.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: what occurred is less likely")
    flags.add_argument("--seed", type=int, help="of the first prompt, one more for each next; random by default")


def _add_ranks(flags: argparse._ArgumentGroup) -> None:
    flags.add_argument(
        "--tensor-parallel",
        nargs="?",
        type=int,
        const=0,
        metavar="N",
        help="share the model among N processes; without N: those that mpiexec started",
    )
    flags.add_argument(
        "--allreduce",
        metavar="WAY",
        help="how the ranks add up, the best by default: by memory that they share (window) or by MPI (allgather); "
        "on the gpu, by way of the host (host)",
    )
    flags.add_argument(
        "--timeout", type=float, metavar="S", help="end all ranks when one makes no progress for so long"
    )


def overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """FIELD=VALUE, where VALUE is JSON or else a string."""
    fields: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"--set needs FIELD=VALUE, not {pair!r}")
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError:
            fields[name] = value
    return fields


# From flags to requests.


def read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"stdin is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}") from error


def read_prompts(prompts: Sequence[str]) -> list[str]:
    if prompts.count("-") > 1:
        raise InputError("stdin can be only one of the prompts")
    return [read_stdin() if prompt == "-" else prompt for prompt in prompts]


def samplings(args: argparse.Namespace, count: int) -> list[Sampling]:
    """One for each prompt, with seeds that follow each other: the same prompt twice gives two samples."""
    given = Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty, args.seed)
    seed = new_seed() if given.seed is None else given.seed
    return [replace(given, seed=seed + i) for i in range(count)]


def read_requests(args: argparse.Namespace, prompts: Sequence[str], tokenizer: Tokenizer) -> list[Request]:
    if args.logprobs is not None and not args.json:
        raise InputError("--logprobs is part of the JSON: add --json")
    return [
        Request(tokenizer.encode(prompt), args.max_tokens, sampling, tuple(args.stop), args.ignore_eos, args.logprobs)
        for prompt, sampling in zip(prompts, samplings(args, len(prompts)), strict=True)
    ]


def model_folder(args: argparse.Namespace) -> Path:
    if args.model is not None:
        return find(args.model, args.revision)
    if args.revision is not None:
        raise InputError("--revision needs a --model")
    return shipped.path()


# Backends: what continues texts, and how many positions it reads for them.

Read = Callable[[int], None]  # called with the number of positions that were read


@dataclass(frozen=True)
class Backend:
    config: Config
    stream: Callable[[Sequence[Request], Tokenizer, Read], Iterator[Piece]]
    positions: Callable[[Sequence[int]], int]  # of the lengths of the prompts


def check_backend(args: argparse.Namespace) -> None:
    """InputError if flags do not belong together."""
    if args.dtype is not None and args.dtype not in DTYPES[args.backend]:
        raise InputError(f"--backend {args.backend} computes in {' or '.join(DTYPES[args.backend])}, not {args.dtype}")
    if args.backend == "gpu" and args.weights is not None:
        raise InputError("--weights belongs to --backend reference: on the gpu weights are always kept as --dtype")
    if args.backend == "gpu" and args.layer_norms is not None and args.tensor_parallel is None:
        raise InputError("--layer-norms belongs to --backend reference; convert.py writes a checkpoint merged so")
    if args.backend != "gpu" and args.device is not None:
        raise InputError("--device belongs to --backend gpu")
    if args.tensor_parallel is None and (args.allreduce or args.timeout) is not None:
        raise InputError("--allreduce and --timeout belong to --tensor-parallel")


def open_backend(args: argparse.Namespace, folder: Path) -> Backend:
    """InputError for whatever is wrong with the model or the device."""
    fields, dtype = overrides(args.set), args.dtype or DTYPES[args.backend][0]
    if args.backend == "gpu":
        from neox import gpu

        on_device = gpu.load(folder, dtype=dtype, device=args.device or "cuda", **fields)
        return Backend(on_device.config, partial(gpu.stream, on_device), sum)
    model = load(folder, dtype=dtype, weights=args.weights or "auto", layer_norms=args.layer_norms or "mean", **fields)
    # Shorter prompts are padded: all are read side by side.
    return Backend(
        model.config, lambda asked, tokenizer, read: stream(CachedDecoder(model, read), asked, tokenizer), max
    )


# What is printed.


def note(text: str) -> None:
    print(text, file=sys.stderr)


@dataclass
class Timing:
    """Seconds, filled in as they pass."""

    load: float = 0.0
    prompt: float = 0.0  # to the first token
    generation: float = 0.0  # from there to the last

    def watch(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        start = last = time.perf_counter()
        for number, piece in enumerate(pieces):
            last = time.perf_counter()
            if number == 0:
                self.prompt, start = last - start, last
            yield piece
        self.generation = last - start


def rates(timing: Timing, requests: Sequence[Request], completions: Sequence[Completion]) -> dict[str, Any]:
    """Counts and speeds, in tokens per second. The first token of each text comes with the prompts."""
    read = sum(len(request.prompt) for request in requests)
    made = sum(len(completion.ids) for completion in completions)
    stepped = made - len(completions)
    return {
        "load_s": timing.load,
        "prompt_tokens": read,
        "prompt_tokens_per_s": read / timing.prompt,
        "generated_tokens": made,
        "generated_tokens_per_s": stepped / timing.generation if stepped else None,
        "peak_memory_bytes": peak_memory(),
    }


def peak_memory() -> int | None:
    """Bytes of memory that the process had in use at once; None where the system does not say."""
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def report(args: argparse.Namespace, requests: Sequence[Request], ends: Sequence[str], rate: dict[str, Any]) -> None:
    speed = rate["generated_tokens_per_s"]
    memory = rate["peak_memory_bytes"]
    parts = [
        f"load {rate['load_s']:.2f} s",
        f"prompt {rate['prompt_tokens']} tokens, {rate['prompt_tokens_per_s']:.0f} tok/s",
        f"generation {rate['generated_tokens']} tokens" + (f", {speed:.1f} tok/s" if speed else ""),
        *([f"peak memory {memory / 1e6:.0f} MB"] if memory else []),
        f"finish: {', '.join(ends)}",
    ]
    note(" | ".join(parts))
    if args.temperature > 0:
        note(f"repeat with --seed {requests[0].sampling.seed}")


def show(prompts: Sequence[str], pieces: Iterable[Piece], at_once: bool) -> list[Completion]:
    """Print prompt and continuation, a single one as it comes."""
    seen: list[Piece] = []
    for piece in pieces:
        if not at_once:
            # The prompt waits for the first token, so that whatever goes wrong before leaves nothing on stdout.
            print(piece.text if seen else prompts[0] + piece.text, end="", flush=True)
        seen.append(piece)
    completions = gathered(seen, len(prompts))
    if at_once:
        texts = (prompt + completion.text for prompt, completion in zip(prompts, completions, strict=True))
        print("\n\n".join(texts), end="")
    print(flush=True)
    return completions


def token(tokenizer: Tokenizer, index: int, logprob: float | None) -> dict[str, Any]:
    return {"id": index, "token": tokenizer.decode([index]), "logprob": logprob}


def as_json(tokenizer: Tokenizer, prompt: str, request: Request, completion: Completion) -> dict[str, Any]:
    logprobs = [
        {
            **token(tokenizer, piece.id, piece.logprob),
            "top": [token(tokenizer, index, logprob) for index, logprob in piece.top],
        }
        for piece in completion.pieces
    ]
    return {
        "prompt": prompt,
        "text": completion.text,
        "ids": completion.ids,
        "finish_reason": completion.finish_reason,
        "seed": request.sampling.seed if request.sampling.temperature > 0 else None,
        **({"logprobs": logprobs} if request.logprobs is not None else {}),
    }


def continue_texts(args: argparse.Namespace, open_model: Callable[[argparse.Namespace, Path], Backend]) -> None:
    if args.model is None:
        note("model: the small one that comes with the package; others by --model, such as pythia-70m, or a folder")
    timing = Timing()
    start = time.perf_counter()
    folder = model_folder(args)
    tokenizer = load_tokenizer(folder)
    prompts = read_prompts(args.prompt or [PROMPT])
    requests = read_requests(args, prompts, tokenizer)
    backend = open_model(args, folder)
    if tokenizer.eos is not None and tokenizer.eos != backend.config.eos_token_id:
        note(f"the config's end-of-text id is {backend.config.eos_token_id}; the tokenizer's, {tokenizer.eos}, is used")
    timing.load = time.perf_counter() - start

    total = backend.positions([len(request.prompt) for request in requests])
    with tqdm(total=total, desc="prompt", unit="token", delay=2, disable=None, leave=False) as bar:

        def read(positions: int) -> None:
            bar.update(positions)
            if bar.n == total:
                bar.close()  # before the text begins

        pieces = timing.watch(backend.stream(requests, tokenizer, read))
        if args.json:
            completions = gathered(pieces, len(requests))
        else:
            completions = show(prompts, pieces, at_once=args.no_stream or len(prompts) > 1)
    rate = rates(timing, requests, completions)
    if args.json:
        for prompt, request, completion in zip(prompts, requests, completions, strict=True):
            name = args.model or "shipped"
            line = {"model": name, **as_json(tokenizer, prompt, request, completion), "timing": rate}
            print(json.dumps(line, ensure_ascii=False))
    report(args, requests, [completion.finish_reason for completion in completions], rate)


# Tensor parallelism.


def on_rank(args: argparse.Namespace, sums: str | None, comm: Communicator) -> None:
    """Rank 0 continues the texts, with the help of all others."""
    from neox import distributed

    def load_shard(folder: Path) -> distributed.AnyShard:
        how: dict[str, Any] = {"weights": args.weights or "auto", "layer_norms": args.layer_norms or "mean"}
        where: dict[str, Any] = {
            "device": args.device or "cuda",
            "sums": sums,
        }  # of which the reference takes no notice
        return distributed.load(folder, comm, args.backend, args.dtype, **how, **where, **overrides(args.set))

    if comm.rank:
        for _ in distributed.follow(distributed.decoder_of(load_shard(model_folder(args))), comm):
            pass
        return
    with ExitStack() as ends:

        def open_shard(args: argparse.Namespace, folder: Path) -> Backend:
            shard = load_shard(folder)

            def pieces(requests: Sequence[Request], tokenizer: Tokenizer, read: Read) -> Iterator[Piece]:
                part = distributed.decoder_of(shard, read)
                leader = ends.enter_context(distributed.Leader(part, comm, requests, tokenizer))
                return stream(leader, requests, tokenizer)

            return Backend(shard.config, pieces, sum if args.backend == "gpu" else max)

        continue_texts(args, open_shard)


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    check_backend(args)
    # Weights that overflow are reported once, by an error of our own.
    warnings.simplefilter("ignore", RuntimeWarning)
    for output in (sys.stdout, sys.stderr):
        if hasattr(output, "reconfigure"):
            output.reconfigure(encoding="utf-8", errors="backslashreplace")
    if args.tensor_parallel is None:
        continue_texts(args, open_backend)
    else:
        from neox.distributed import run_ranks, split_way

        way, sums = split_way(args.allreduce, args.backend)
        run_ranks(args.tensor_parallel or None, partial(on_rank, args, sums), way, args.timeout)


if __name__ == "__main__":
    run(main)
