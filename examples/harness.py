"""A GPT-NeoX model as EleutherAI's evaluation harness sees one: three kinds of requests, and their answers.

    loglikelihood            how likely is a continuation, and would the model have written it itself
    loglikelihood_rolling    how likely is a whole document
    generate_until           what does the model write, up to a stop string

Answers are those of the harness's own model for transformers, `HFLM`, computed in float32. What is asked for is sorted
and shares what it has in common (reference/scoring.py), so the size of batches changes nothing but memory.

Importing this needs the harness: pip install "neox20b[eval]".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from neox.reference import shipped
from neox.reference.checkpoint.hub import find
from neox.reference.checkpoint.load import load
from neox.reference.config import Config
from neox.reference.errors import InputError
from neox.reference.generate import Completion, Request, complete, gathered
from neox.reference.sampling import GREEDY, Sampling
from neox.reference.scoring import Pair, Reader, TreeReader, begun, rolling_windows, scores
from neox.reference.sharing import SharingDecoder
from neox.reference.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer

TOGETHER = 16  # texts that are written side by side, unless --batch_size says otherwise
LONGEST_ANSWER = 256  # tokens, where a task does not say; the harness's own default
SEED = 1234  # of sampled answers; the harness's own default

# What computes.


@dataclass(frozen=True)
class Engine:
    """A model that reads trees of texts, and continues texts."""

    reader: Reader
    complete: Callable[[Sequence[Request], Tokenizer], list[Completion]]

    @property
    def config(self) -> Config:
        return self.reader.config


Open = Callable[..., Engine]  # of a folder, and of model_args that are not the adapter's own


def open_reference(
    folder: Path, device: str | None = None, dtype: str = "float32", weights: str = "auto", **fields: Any
) -> Engine:
    """device: what the harness says to every model; this one has none."""
    model = load(folder, dtype=dtype, weights=weights, **fields)
    return Engine(TreeReader(model), partial(complete, SharingDecoder(model)))


def device_named(device: str | None) -> str:
    """What the harness's --device means here."""
    names = {None: "cuda", "cuda:0": "cuda", "cuda": "cuda", "host": "host"}
    if device not in names:
        raise InputError(f"--device must be cuda or host, not {device}")
    return names[device]


def open_gpu(folder: Path, device: str | None = None, dtype: str = "float16", **fields: Any) -> Engine:
    from neox import gpu
    from neox.gpu.scoring import DeviceReader

    model = gpu.load(folder, dtype=dtype, device=device_named(device), **fields)

    def completed(requests: Sequence[Request], tokenizer: Tokenizer) -> list[Completion]:
        return gathered(gpu.stream(model, requests, tokenizer), len(requests))

    return Engine(DeviceReader(model), completed)


BACKENDS: dict[str, Open] = {"reference": open_reference, "gpu": open_gpu}


def open_backend(folder: Path, backend: str = "reference", **arguments: Any) -> Engine:
    if backend not in BACKENDS:
        raise InputError(f"backend must be {' or '.join(BACKENDS)}, not {backend!r}")
    return BACKENDS[backend](folder, **arguments)


def folder_of(pretrained: str | None, revision: str | None) -> Path:
    if pretrained is None and revision is not None:
        raise InputError("revision needs a pretrained=NAME")
    return shipped.path() if pretrained is None else find(pretrained, revision)


# What is asked for.


def pair_of(tokenizer: Tokenizer, context: str, continuation: str, begin: int) -> Pair:
    """The ids of a context and of what follows it.

    White space at the end of the context is counted to the continuation, and both are encoded together: a token that
    spans the border is the continuation's.
    """
    kept = context.rstrip()
    ids = tokenizer.encode(kept)
    return begun(ids, tokenizer.encode(context + continuation)[len(ids) :], begin)


SAMPLED = {"top_k", "top_p", "min_p", "repetition_penalty"}
OTHERS = {"until", "do_sample", "temperature", "max_gen_toks"}
NEUTRAL = {"num_beams": 1, "use_cache": True}  # what tasks say to transformers, and what is done in any case


def sampling_of(arguments: dict[str, Any], seed: int) -> Sampling:
    """InputError for an argument that is not implemented."""
    unknown = {k: v for k, v in arguments.items() if k not in SAMPLED | OTHERS and NEUTRAL.get(k) != v}
    if unknown:
        raise InputError(f"these gen_kwargs are not implemented: {', '.join(f'{k}={v}' for k, v in unknown.items())}")
    if not arguments["do_sample"]:
        return GREEDY
    filters = {name: value for name, value in arguments.items() if name in SAMPLED}
    return Sampling(arguments.get("temperature", 1.0), seed=seed, **filters)


@dataclass(frozen=True)
class Task:
    """A text to write, and the strings before which it ends."""

    request: Request
    stops: tuple[str, ...]


def task_of(tokenizer: Tokenizer, config: Config, context: str, arguments: dict[str, Any], seed: int) -> Task:
    """The context is cut on the left, so that the longest answer fits behind it."""
    given = dict(normalize_gen_kwargs(arguments, LONGEST_ANSWER))
    stops = tuple(stop for stop in handle_stop_sequences(given["until"], END_OF_TEXT) if stop)
    longest = given["max_gen_toks"]
    room = config.max_position_embeddings - longest
    if room < 1:
        raise InputError(f"max_gen_toks={longest} leaves no room in a context of {config.max_position_embeddings}")
    prompt = tokenizer.encode(context)[-room:] or [beginning(tokenizer, config)]
    return Task(Request(prompt, longest, sampling_of(given, seed), stops), stops)


def beginning(tokenizer: Tokenizer, config: Config) -> int:
    """The token before a text that has nothing before it."""
    begin = config.eos_token_id if tokenizer.eos is None else tokenizer.eos
    if begin is None:
        raise InputError("neither the tokenizer nor the config has an end-of-text token, with which texts begin")
    return begin


def answer_of(tokenizer: Tokenizer, ids: Sequence[int], stops: Sequence[str]) -> str:
    text = tokenizer.decode([index for index in ids if index not in tokenizer.special])
    return str(postprocess_generated_text(text, list(stops), None))


# The adapter.


def bar(total: int, what: str, disable: bool) -> tqdm[Any]:
    return tqdm(total=total, desc=what, unit="token", unit_scale=True, disable=disable or None)


@register_model("neox")
class NeoX(TemplateLM):  # type: ignore[misc]  # to mypy the harness is untyped
    """pretrained: a folder or name, the shipped model by default. Other model_args are those of the backend."""

    open: Open = staticmethod(open_backend)  # what opens the model; where it is on several ranks, another

    def __init__(
        self,
        pretrained: str | None = None,
        revision: str | None = None,
        batch_size: int | str = TOGETHER,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        seed: int = SEED,
        **arguments: Any,
    ) -> None:
        """max_length: texts are cut to it, if it is less than the model's context. seed: of sampled answers.

        InputError for whatever is wrong with the model or the arguments.
        """
        super().__init__()
        folder = folder_of(pretrained, revision)
        self._neox_tokenizer = load_tokenizer(folder)
        if max_length is not None:
            arguments["max_position_embeddings"] = max_length
        self._engine = self.open(folder, **arguments)
        self._together = TOGETHER if str(batch_size).startswith("auto") else int(batch_size)
        self._seed = seed

    @property
    def eot_token_id(self) -> int:
        return beginning(self._neox_tokenizer, self._engine.config)

    @property
    def max_length(self) -> int:
        return self._engine.config.max_position_embeddings

    @property
    def max_gen_toks(self) -> int:
        return LONGEST_ANSWER

    @property
    def batch_size(self) -> int:
        return self._together

    @property
    def tokenizer_name(self) -> str:
        """Names the harness's own cache of requests."""
        return "neox"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self._neox_tokenizer.encode(string)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        texts = [request.args for request in requests]
        pairs = [pair_of(self._neox_tokenizer, context, rest, self.eot_token_id) for context, rest in texts]
        return self._answered(texts, pairs, disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        pairs: list[Pair] = [(context, continuation) for _, context, continuation in requests]
        return self._answered([texts for texts, _, _ in requests], pairs, disable_tqdm)

    def _answered(
        self, texts: Sequence[tuple[str, str]], pairs: Sequence[Pair], disable: bool
    ) -> list[tuple[float, bool]]:
        found: dict[int, tuple[float, bool]] = {}
        for index, total, greedy in self._scored(pairs, "log-likelihoods", disable):
            found[index] = total, greedy
            self.cache_hook.add_partial("loglikelihood", texts[index], found[index])
        return [found[index] for index in range(len(pairs))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        texts = [self.tok_encode(*request.args) for request in requests]
        windows = [rolling_windows(ids, self.eot_token_id, self.max_length) for ids in texts]
        owners = [index for index, own in enumerate(windows) for _ in own]
        sums, waiting = [0.0] * len(requests), [len(own) for own in windows]
        pairs = [window for own in windows for window in own]
        for place, total, _ in self._scored(pairs, "documents", disable_tqdm):
            owner = owners[place]
            sums[owner] += total
            waiting[owner] -= 1
            if not waiting[owner]:
                self.cache_hook.add_partial("loglikelihood_rolling", requests[owner].args, sums[owner])
        return sums

    def _scored(self, pairs: Sequence[Pair], what: str, disable: bool) -> Iterator[tuple[int, float, bool]]:
        with bar(0, what, disable) as progress:

            def read(done: int, total: int) -> None:
                progress.total = total
                progress.update(done - progress.n)

            for index, score in scores(self._engine.reader, pairs, read):
                yield index, score.total, score.greedy

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        tokenizer, config = self._neox_tokenizer, self._engine.config
        asked = [request.args for request in requests]
        tasks = [task_of(tokenizer, config, text, how, self._seed + i) for i, (text, how) in enumerate(asked)]
        answers = [""] * len(tasks)
        order = sorted(
            range(len(tasks)), key=lambda i: tuple(tasks[i].request.prompt)
        )  # those that begin alike together
        with tqdm(total=len(tasks), desc="answers", disable=disable_tqdm or None) as progress:
            for first in range(0, len(order), self._together):
                group = order[first : first + self._together]
                texts = [tasks[i].request for i in group]
                for index, completion in zip(group, self._engine.complete(texts, tokenizer), strict=True):
                    answers[index] = answer_of(tokenizer, completion.ids, tasks[index].stops)
                    self.cache_hook.add_partial("generate_until", asked[index], answers[index])
                progress.update(len(group))
        return answers
