"""Continuing a text on a device: the loop of reference/generate.py around decode.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from numpy.typing import ArrayLike

from neox.gpu.decode import CachedDecoder, SamplingDecoder
from neox.gpu.model import Model
from neox.reference.generate import Piece, Request, one_sequence
from neox.reference.generate import stream as stream_with
from neox.reference.sampling import Sampling
from neox.reference.tokenizer import Tokenizer


def decoder_for(
    model: Model,
    requests: Sequence[Request],
    tokenizer: Tokenizer | None = None,
    progress: Callable[[int], object] = lambda _: None,
) -> CachedDecoder:
    """The one that copies no more than these requests need. progress: as of CachedDecoder.

    Ids are chosen on the device unless some request wants log-probabilities or has a repetition penalty.
    """
    allowed = None if tokenizer is None else tokenizer.has_token(model.config.vocab_size)
    if any(map(_needs_logits, requests)):
        return CachedDecoder(model, progress, allowed)
    return SamplingDecoder(model, [request.sampling for request in requests], progress, allowed)


def _needs_logits(request: Request) -> bool:
    return request.logprobs is not None or request.sampling.repetition_penalty != 1


def stream(
    model: Model,
    requests: Sequence[Request],
    tokenizer: Tokenizer | None = None,
    progress: Callable[[int], object] = lambda _: None,
) -> Iterator[Piece]:
    """As that of reference/generate.py, of the same requests."""
    return stream_with(decoder_for(model, requests, tokenizer, progress), requests, tokenizer)


def generate(
    model: Model,
    ids: ArrayLike,
    max_tokens: int = 100,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    tokenizer: Tokenizer | None = None,
    ignore_eos: bool = False,
) -> Iterator[int]:
    """The ids that continue one text, each as soon as it is chosen: as reference.generate, of the same arguments.

    A seed repeats a text here, but gives another than in the reference, unless there is a repetition penalty.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    request = Request(one_sequence(ids).tolist(), max_tokens, sampling, ignore_eos=ignore_eos)
    return (piece.id for piece in stream(model, [request], tokenizer))
