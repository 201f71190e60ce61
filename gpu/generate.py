"""Continuing a text on a device: the loop of reference/generate.py around decode.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from numpy.typing import ArrayLike

from neox.gpu.decode import CachedDecoder, GreedyDecoder
from neox.gpu.model import Model
from neox.reference.generate import Request, one_sequence, stream
from neox.reference.sampling import Sampling
from neox.reference.tokenizer import Tokenizer


def decoder_for(
    model: Model,
    requests: Sequence[Request],
    tokenizer: Tokenizer | None = None,
    progress: Callable[[int], object] = lambda _: None,
) -> CachedDecoder:
    """The one that copies no more than these requests need. progress: as of CachedDecoder."""
    allowed = None if tokenizer is None else tokenizer.has_token(model.config.vocab_size)
    kind = GreedyDecoder if all(map(_likeliest_suffices, requests)) else CachedDecoder
    return kind(model, progress, allowed)


def _likeliest_suffices(request: Request) -> bool:
    sampling = request.sampling
    return sampling.temperature == 0 and sampling.repetition_penalty == 1 and request.logprobs is None


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
    """The ids that continue one text, each as soon as it is chosen: as reference.generate, of the same arguments."""
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    request = Request(one_sequence(ids).tolist(), max_tokens, sampling, ignore_eos=ignore_eos)
    pieces = stream(decoder_for(model, [request], tokenizer), [request], tokenizer)
    return (piece.id for piece in pieces)
