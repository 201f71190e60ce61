"""Evaluate a GPT-NeoX model with EleutherAI's evaluation harness.

    python examples/evaluate.py --tasks local_arithmetic --metadata form=short
    python examples/evaluate.py --tasks local_piqa,local_lambada --data FOLDER --num_fewshot 5 --use_cache answers
    python examples/evaluate.py --model_args pretrained=pythia-70m --tasks lambada_openai,arc_easy --output_path results
    python examples/evaluate.py --model_args pretrained=FOLDER,backend=gpu --tasks hellaswag
    python examples/evaluate.py --tasks local_lambada --data FOLDER --limit 100 --compare-throughput
    python examples/evaluate.py --tensor-parallel 2 --tasks local_arithmetic_2da
    python examples/evaluate.py ls tasks

This is the harness's own command line (https://github.com/EleutherAI/lm-evaluation-harness), to which every argument
goes that is not named below. What is added: the model `neox`, which is the default; the tasks local_*, which need no
network, and the flag for their files; published values of the same tasks beside the results; tensor parallelism.
Results are the harness's table on stdout and, with --output_path, its JSON, which has the published values too. With
--use_cache FILE every answer is kept as soon as it is known, and a run that was interrupted goes on from there; the
file belongs to one model.

model_args of neox: pretrained=FOLDER|NAME (the model that comes with the package by default), revision,
backend=reference|gpu, dtype, weights (of the reference), max_length, seed, and any field of the config, such as
hidden_act=gelu_fast. With backend=gpu, --device host runs the kernels on the CPU.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neox.reference.errors import InputError, Parser, run

if TYPE_CHECKING:
    from harness import Open

    from neox.distributed import Communicator

INSTALL = 'the evaluation harness is not installed: pip install "neox20b[eval]"'
HERE = Path(__file__).resolve().parent
TASKS = HERE / "tasks"
PUBLISHED = HERE / "published.json"
OWN = "local_"  # with which the names of our tasks begin

# Flags.


def parser() -> Parser:
    flags = Parser(description=__doc__, add_help=False, allow_abbrev=False)
    flags.add_argument("--data", metavar="FOLDER", help="where the files of the tasks local_* are")
    flags.add_argument("--compare-throughput", action="store_true", help="also run transformers, and time both")
    flags.add_argument("--tensor-parallel", nargs="?", type=int, const=0, metavar="N", help="share the model among N")
    flags.add_argument("--allreduce", metavar="WAY", help="how the ranks add up, as of generate.py")
    flags.add_argument("--timeout", type=float, metavar="S", help="end all ranks when one hangs for so long")
    return flags


def values_of(arguments: Sequence[str], *names: str) -> list[str] | None:
    """What is given for a flag of the harness, the parts between commas by themselves; None if it is not given."""
    flags = Parser(add_help=False, allow_abbrev=False)
    flags.add_argument(*names, dest="values", nargs="+")
    found = flags.parse_known_args(arguments)[0].values
    return None if found is None else [part for value in found for part in value.split(",")]


def completed(arguments: Sequence[str], data: str | None) -> list[str]:
    """The harness's arguments, with our defaults for those that are missing."""
    whole = list(arguments)
    if not whole or whole[0] not in ("run", "ls", "validate"):
        whole.insert(0, "run")
    if whole[0] != "run" or {"-h", "--help"} & set(whole):
        return whole
    if values_of(whole, "--model", "-M") is None and values_of(whole, "--config", "-C") is None:
        whole += ["--model", "neox"]
    if values_of(whole, "--include_path") is None:
        whole += ["--include_path", str(TASKS)]
    if values_of(whole, "--batch_size", "-b") is None:
        whole += ["--batch_size", "16"]
    if data is not None:
        given = values_of(whole, "--metadata") or []
        whole += ["--metadata", *given, f"data={Path(data).resolve()}"]
    return whole


# Published values.

METRICS = {"acc": "acc", "acc_norm": "acc_norm", "ppl": "perplexity"}
FIELDS = ("task", "metric", "model", "value", "stderr")
Row = tuple[str, str, str, float, float | None]


def published_rows(results: Mapping[str, Any]) -> list[Row]:
    """The results and below each the published values of its task, where it was run as they were: without examples."""
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    rows: list[Row] = []
    for task, found in results["results"].items():
        if results["n-shot"].get(task) != 0:
            continue
        name = published["names"].get(task.removeprefix(OWN), task.removeprefix(OWN))
        for old, metric in METRICS.items():
            theirs = [(model, *of[name][old]) for model, of in published["models"].items() if old in of.get(name, {})]
            if theirs and f"{metric},none" in found:
                error = found.get(f"{metric}_stderr,none")
                rows.append((task, metric, "here", found[f"{metric},none"], error if error != "N/A" else None))
                rows += [(task, metric, *row) for row in theirs]
    return rows


def table(rows: Sequence[Row]) -> str:
    lines = ["|Task|Metric|Model|Value|Stderr|", "|----|------|-----|----:|-----:|"]
    for task, metric, model, value, error in rows:
        lines.append(f"|{task}|{metric}|{model}|{value:.4f}|{'' if error is None else f'{error:.4f}'}|")
    return "\n".join(lines)


# The harness.


def harness_first() -> None:
    """The harness uses a library that is called `evaluate`, as this file is: no longer look beside this file first."""
    sys.path[:] = [*(place for place in sys.path if Path(place).resolve() != HERE), str(HERE)]


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Of a module or a class, for a while."""
    before = vars(owner).get(name)  # as it stands there: getattr would unpack a static method
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is None:  # it came from elsewhere, as what a module imports when it is asked for
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def task_manager(arguments: Sequence[str]) -> Callable[..., Any]:
    """The harness reads 14,000 files to know its own tasks: not where only ours are asked for."""
    import lm_eval.tasks

    names = values_of(arguments, "--tasks", "-t")
    ours = names is not None and all(name.startswith(OWN) for name in names)
    return partial(lm_eval.tasks.TaskManager, include_defaults=not ours)


def timed(evaluated: Callable[..., Any], how: dict[str, Any]) -> Any:
    """The results of simple_evaluate's arguments, timed beside transformers."""
    from throughput import compare

    batch_size, model_args, logged = int(how.pop("batch_size")), how.pop("model_args"), how.pop("log_samples")
    for name in ("model", "device", "max_batch_size", "use_cache"):
        how.pop(name)
    results = compare(evaluated, model_args, batch_size, **how)
    if not logged:  # they were needed to compare
        results.pop("samples")
    return results


def in_words(times: Mapping[str, float]) -> str:
    return (
        f"answers in {times['neox_s']:.1f} s, by transformers in {times['transformers_s']:.1f} s: "
        f"{times['times_as_fast']:.2f} times as fast; largest difference of a log-probability "
        f"{times['largest_difference']:.1e}, flags or texts that differ: {times['different_flags_or_texts']}"
    )


def evaluate(arguments: Sequence[str], opener: Open | None = None, compare: bool = False) -> None:
    """Run the harness's command line; it looks up what is replaced here when it needs it."""
    harness_first()
    try:
        import lm_eval
        import lm_eval.tasks
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise InputError(INSTALL) from error
    import harness

    rows: list[Row] = []
    times: dict[str, float] = {}

    def compared(**how: Any) -> Any:
        results = timed(evaluated, how) if compare else evaluated(**how)
        if results is not None:
            rows.extend(published_rows(results))
            results["published"] = [dict(zip(FIELDS, row, strict=True)) for row in rows]
            times.update(results.get("throughput", {}))
        return results

    evaluated = lm_eval.simple_evaluate
    with (
        replaced(sys, "argv", [sys.argv[0], *arguments]),
        replaced(harness.NeoX, "open", staticmethod(opener or harness.open_backend)),
        replaced(lm_eval, "simple_evaluate", compared),
        replaced(lm_eval.tasks, "TaskManager", task_manager(arguments)),
    ):
        cli_evaluate()
    if times:
        print(in_words(times))
    if rows:
        print(f"beside published values (without examples; sources in {PUBLISHED.name})\n{table(rows)}")


# Tensor parallelism.


def on_rank(arguments: Sequence[str], sums: str | None, comm: Communicator) -> None:
    """Rank 0 runs the harness, with the help of all others."""
    harness_first()
    from ranks import help_with, lead

    if comm.rank:
        help_with(comm)
    else:
        with lead(comm, sums) as opener:
            evaluate(arguments, opener)


def main(argv: Sequence[str] | None = None) -> None:
    own, rest = parser().parse_known_args(argv)
    if not rest or rest in (["-h"], ["--help"]):
        print(f"{__doc__}\n{parser().format_usage()}")
        return
    if own.tensor_parallel is None and (own.allreduce or own.timeout) is not None:
        raise InputError("--allreduce and --timeout belong to --tensor-parallel")
    if own.compare_throughput and own.tensor_parallel is not None:
        raise InputError("--compare-throughput is for one process")
    arguments = completed(rest, own.data)
    if own.tensor_parallel is None:
        evaluate(arguments, compare=own.compare_throughput)
    else:
        from neox.distributed import run_ranks, split_way

        way, sums = split_way(own.allreduce)
        run_ranks(own.tensor_parallel or None, partial(on_rank, arguments, sums), way, own.timeout)


if __name__ == "__main__":
    run(main)
