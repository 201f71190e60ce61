"""The same evaluation by our adapter and by the harness's own model for transformers: how long each takes.

Only what answers requests is measured: not loading, and not what the harness does before and after.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from harness import NeoX, folder_of

from neox.reference.errors import InputError

METHODS = ("loglikelihood", "loglikelihood_rolling", "generate_until")
INSTALL = 'comparing needs torch, transformers and accelerate: pip install "lm-eval[hf]"'


@dataclass
class Clock:
    """Seconds that an adapter took to answer."""

    seconds: float = 0.0

    def watch(self, adapter: Any) -> Any:
        """The same adapter, from now on measured."""
        for name in METHODS:
            setattr(adapter, name, self._timed(getattr(adapter, name)))
        return adapter

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            answers = method(*args, **kwargs)
            self.seconds += time.perf_counter() - start
            return answers

        return measured


def of_transformers(pretrained: str | None, revision: str | None, batch_size: int, max_length: int) -> Any:
    """HFLM on the CPU, computing in float32 throughout."""
    try:
        import torch
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise InputError(INSTALL) from error
    exact = {"dtype": torch.float32, "softmax_dtype": torch.float32}
    folder = str(folder_of(pretrained, revision))
    return HFLM(pretrained=folder, device="cpu", batch_size=batch_size, max_length=max_length, **exact)


def answers(samples: dict[str, Any]) -> list[Any]:
    """All of them, in one order."""
    ordered = sorted((task, sample["doc_id"], sample["resps"]) for task in samples for sample in samples[task])
    return [answer for _, _, answered in ordered for (answer,) in answered]


def parts(answer: Any) -> tuple[float, Any]:
    """A log-probability, and what else there is to an answer: a greedy flag, or a text."""
    if isinstance(answer, str):
        return 0.0, answer
    return (answer, None) if isinstance(answer, float) else tuple(answer)


def largest_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[float, int]:
    """Of log-probabilities; and how many greedy flags and texts are not the same."""
    pairs = [(parts(own), parts(other)) for own, other in zip(answers(ours), answers(theirs), strict=True)]
    differences = [abs(own - other) for (own, _), (other, _) in pairs]
    return max(differences, default=0.0), sum(own != other for (_, own), (_, other) in pairs)


def compare(evaluate: Callable[..., Any], model_args: dict[str, Any], batch_size: int, **how: Any) -> Any:
    """Our results, with the times of both under "throughput"."""
    ours = NeoX(**model_args, batch_size=batch_size)
    place = {name: model_args.get(name) for name in ("pretrained", "revision")}
    theirs = of_transformers(**place, batch_size=batch_size, max_length=ours.max_length)
    clocks = {"neox": Clock(), "transformers": Clock()}
    how["log_samples"] = True
    results, expected = (
        evaluate(model=clock.watch(adapter), **how)
        for clock, adapter in zip(clocks.values(), (ours, theirs), strict=True)
    )
    largest, different = largest_difference(results["samples"], expected["samples"])
    results["throughput"] = {
        **{f"{name}_s": clock.seconds for name, clock in clocks.items()},
        "times_as_fast": clocks["transformers"].seconds / clocks["neox"].seconds,
        "largest_difference": largest,
        "different_flags_or_texts": different,
    }
    return results
