"""Decoding on a device: prompts of any lengths, cached steps, captured steps, texts that end, and generation."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from devices import DTYPES, ROUNDING, a_device, all_devices, devices, on_a_card
from gpu_models import SMALL, assert_right, device_configs, drawn
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from strategies import draw_ids, seeds

import neox.gpu as gpu
import neox.reference as reference
from neox.gpu import decode, ops
from neox.gpu import model as gpu_model
from neox.gpu.decode import CachedDecoder, SamplingDecoder
from neox.gpu.device import Array, CudaDevice, Device, HostDevice
from neox.gpu.model import FEW
from neox.reference import shipped
from neox.reference.config import Config
from neox.reference.errors import InputError
from neox.reference.generate import Request, gathered, stream
from neox.reference.sampling import GREEDY, Sampling, candidates

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=3)


@cache
def on_device(device: Device, config: Config, dtype: str, seed: int = 0) -> gpu.Model:
    return gpu.to_device(drawn(config, seed, dtype), device, dtype)


def texts_of(config: Config, lengths: list[int], seed: int) -> list[list[int]]:
    return [draw_ids(config, 1, length, seed + i)[0].tolist() for i, length in enumerate(lengths)]


def check_all(logits: NDArray, config: Config, texts: list[list[int]], dtype: str, seed: int = 0) -> None:
    """One row for each text: what follows its last token."""
    for row, text in zip(logits, texts, strict=True):
        assert_right(row[None], drawn(config, seed, dtype), np.array([text]), dtype, last=True)


@settings(max_examples=20)
@given(
    devices(), device_configs(), LENGTHS, st.sampled_from(DTYPES), st.integers(0, 4), st.sampled_from((3, 2048)), seeds
)
def test_prompts_and_steps_are_the_whole_text(device, config, lengths, dtype, steps, chunk, seed) -> None:
    """The logits after a prompt and after each step, of texts of unequal lengths, in chunks and at once."""
    decoder = CachedDecoder(on_device(device, config, dtype))
    texts = texts_of(config, lengths, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "CHUNK", chunk)
        check_all(decoder.start(texts, max(lengths) + steps), config, texts, dtype)
    for step in range(steps):
        added = [(7 * step + i) % config.vocab_size for i in range(len(texts))]
        texts = [[*text, id] for text, id in zip(texts, added, strict=True)]
        check_all(decoder.step(added), config, texts, dtype)


def test_positions_over_1000(monkeypatch) -> None:
    """In chunks of which the second goes on within a tile of keys, and the third holds the ends of two texts."""
    monkeypatch.setattr(decode, "CHUNK", 500)
    config = replace(SMALL, hidden_size=48, num_attention_heads=2, num_hidden_layers=1, max_position_embeddings=1100)
    texts = texts_of(config, [1030, 3], 0)
    decoder = CachedDecoder(on_device(all_devices()[0], config, "float16"))
    check_all(decoder.start(texts, 1033), config, texts, "float16")
    for id in range(3):
        texts = [[*text, id] for text in texts]
        check_all(decoder.step([id, id]), config, texts, "float16")


@given(devices(), st.sampled_from(DTYPES), seeds)
@settings(max_examples=10)
def test_a_captured_step_is_the_step_as_it_is(device, dtype, seed) -> None:
    model, texts = on_device(device, SMALL, dtype), texts_of(SMALL, [5, 2], seed)
    captured, plain = CachedDecoder(model), CachedDecoder(model)
    assert np.array_equal(captured.start(texts, 12), plain.start(texts, 12))
    for id in range(6):
        plain._launches.compiled = False  # as before its first step: nothing is captured
        assert np.array_equal(captured.step([id, id + 1]), plain.step([id, id + 1]))
    assert captured._launches.graph is not None
    assert plain._launches.graph is None


@pytest.mark.parametrize(
    ("dtype", "parallel", "rows", "launches"),
    [("float16", True, 2, 3), ("bfloat16", True, 16, 3), ("float32", True, 2, 10), ("float16", False, 2, 12)],
)
def test_a_layer_of_few_texts_is_three_launches(dtype, parallel, rows, launches) -> None:
    """In 16 bits and a parallel block. Beside the layers: embedding, norm, product, the likeliest, next positions."""
    config = replace(SMALL, use_parallel_residual=parallel)
    device = HostDevice()
    decoder = CachedDecoder(on_device(device, config, dtype))
    decoder.start(texts_of(config, [2] * rows, 0), 5)
    decoder.step([1] * rows)
    graph = device.capture(decoder._launches.launch)
    assert len(graph.captured.launches) == 5 + config.num_hidden_layers * launches


@given(devices(), st.sampled_from((1, 3, 8, 9, 16)), st.sampled_from(("float16", "bfloat16")), seeds)
@settings(max_examples=10)
def test_fused_layers_compute_what_the_plain_ones_do(device, rows, dtype, seed) -> None:
    """To some roundings in 16 bits of the largest logit, at each of which the two may round to neighbours."""
    config, texts = SMALL, [[1 + seed % 7, 3]] * rows
    model = on_device(device, config, dtype)
    logits = []
    for fuses in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not fuses:
                patch.setattr(decode, "fuses", lambda *_: False)
            decoder = CachedDecoder(model)
            decoder.start(texts, 5)
            logits.append([decoder.step([7 + i % 3 for i in range(rows)]) for _ in range(2)])
    ours, plain = np.array(logits)
    assert np.abs(ours - plain).max() <= 4 * config.num_hidden_layers * ROUNDING[dtype] * np.abs(plain).max()


def test_a_step_allocates_nothing_and_waits_for_nothing() -> None:
    """Such a step could not be captured; and replays alone go on by themselves."""
    for device in all_devices():
        model, texts = on_device(device, SMALL, "float16"), texts_of(SMALL, [5, 2], 0)
        alone, told = CachedDecoder(model), CachedDecoder(model)
        chosen = told.start(texts, 15).argmax(axis=1)
        alone.start(texts, 15)
        for _ in range(8):
            assert np.array_equal(alone.chosen(), chosen)
            chosen = told.step(chosen.tolist()).argmax(axis=1)
            alone.go_on()


@pytest.mark.parametrize("rows", [[0], [1], [2], [0, 2], [1, 2], [0, 1, 2]])
def test_texts_that_go_on_are_not_touched_by_those_that_ended(rows) -> None:
    device, texts = a_device(1), texts_of(SMALL, [5, 2, 9], 3)
    decoder = CachedDecoder(on_device(device, SMALL, "float32"))
    decoder.start(texts, 20)
    for step, kept in enumerate([[0, 1, 2], rows, range(len(rows)), [len(rows) - 1], [0]]):
        if len(kept) < len(texts):
            decoder.keep(kept)
        texts = [[*texts[i], step + i] for i in kept]
        check_all(decoder.step([text[-1] for text in texts]), SMALL, texts, "float32")


def test_fewer_texts_are_captured_again_though_their_products_are_other_kernels() -> None:
    device = CudaDevice() if on_a_card() else HostDevice()  # which has compiled nothing yet
    model = gpu.to_device(drawn(SMALL, 0, "float16"), device, "float16")
    texts = texts_of(SMALL, [2] * (FEW + 1), 0)
    decoder = CachedDecoder(model)
    decoder.start(texts, 12)
    for id in range(3):
        decoder.step([id] * len(texts))
    decoder.keep(range(1, len(texts)))
    for id in range(3, 6):
        logits = decoder.step([id] * FEW)
    assert decoder._launches.graph is not None
    check_all(logits[:2], SMALL, [[*text, *range(6)] for text in texts[1:3]], "float16")


def test_more_texts_than_can_be_captured_go_on(monkeypatch) -> None:
    for module in (decode, gpu_model):
        monkeypatch.setattr(module, "MANY", 2)
    for device in all_devices():
        texts = texts_of(SMALL, [5, 2, 3], 0)
        decoder = CachedDecoder(on_device(device, SMALL, "float16"))
        decoder.start(texts, 12)
        for id in range(3):
            logits = decoder.step([id] * 3)
        check_all(logits, SMALL, [[*text, 0, 1, 2] for text in texts], "float16")
        assert decoder._launches.graph is None


def test_a_full_cache_is_refused() -> None:
    decoder = CachedDecoder(on_device(all_devices()[0], SMALL, "float32"))
    decoder.start([[1, 2, 3], [4]], 4)
    decoder.step([5, 6])
    with pytest.raises(InputError, match="5 tokens, but this cache holds 4"):
        decoder.step([5, 6])


def test_a_cache_that_does_not_fit_is_refused(monkeypatch) -> None:
    device = all_devices()[0]
    decoder = CachedDecoder(on_device(device, SMALL, "float32"))
    position = 2 * 3 * 120 * 4  # keys and values, layers, hidden_size, bytes
    monkeypatch.setattr(device, "_free_memory", lambda: 25 * position)
    with pytest.raises(InputError, match=r"2 text\(s\) of 13 tokens .* enough for 25 positions"):
        decoder.start([[1], [2]], 13)


# Generation.


@cache
def shipped_reference() -> reference.Model:
    return reference.load(shipped.path(), dtype="float64")


@cache
def shipped_on(device: Device, dtype: str) -> gpu.Model:
    return gpu.load(shipped.path(), dtype=dtype, device=device)


PROMPT = reference.load_tokenizer(shipped.path()).encode("Once upon a time, there was a little girl")
# Between the two best logits, of the largest: 8 roundings to the dtype in a row, all the same way.
MARGINS = {"float32": 1e-5, "float16": 8 * 2.0**-11, "bfloat16": 8 * 2.0**-8}


@pytest.mark.parametrize("dtype", DTYPES)
def test_greedy_generation_is_the_references_outside_a_margin(dtype) -> None:
    """Along the reference's own text: the same choice wherever its margin exceeds the one stated for the dtype."""
    chosen = list(reference.generate(shipped_reference(), PROMPT, max_tokens=60, ignore_eos=True))
    exact = reference.forward(shipped_reference(), [PROMPT + chosen])[0, len(PROMPT) - 1 : -1]
    best, margin = np.sort(exact, axis=1), MARGINS[dtype] * np.abs(exact).max()
    clear = best[:, -1] - best[:, -2] > margin
    assert clear.mean() > 0.25
    decoder = CachedDecoder(shipped_on(all_devices()[0], dtype))
    logits = [decoder.start([PROMPT], 80)[0], *(decoder.step([id])[0] for id in chosen[:-1])]
    assert np.array_equal(np.argmax(logits, axis=1)[clear], np.array(chosen)[clear])
    assert np.abs(logits - exact).max() < margin / 2


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.8, "seed": 1}, {"temperature": 1, "top_k": 20, "top_p": 0.9, "seed": 2}]
)
def test_generation_is_the_references(sampling) -> None:
    """In float32, whose logits are so near that draws on the host fall on the same ids."""
    arguments = {"max_tokens": 40, "ignore_eos": True, **sampling}
    expected = list(reference.generate(shipped_reference(), PROMPT, **arguments))
    for device in all_devices()[:2]:
        model = shipped_on(device, "float32")
        request = Request(PROMPT, 40, Sampling(**sampling), ignore_eos=True)
        assert [piece.id for piece in stream(CachedDecoder(model), [request])] == expected
        if not sampling:
            assert list(gpu.generate(model, PROMPT, **arguments)) == expected


def test_ids_that_the_device_takes_are_what_the_logits_say() -> None:
    """With ids that no token belongs to, and of texts that end at different steps."""
    model = on_device(a_device(2), SMALL, "float16")
    allowed = np.arange(SMALL.vocab_size) % 3 > 0
    texts = texts_of(SMALL, [5, 2, 9], 0)
    greedy, full = SamplingDecoder(model, [GREEDY] * 3, allowed=allowed), CachedDecoder(model)
    short, long = greedy.start(texts, 20), full.start(texts, 20)
    for kept in ([0, 1, 2], [0, 2], [0, 1], [1], [0]):
        chosen = np.where(allowed, long, -np.inf).argmax(axis=1)
        assert np.array_equal(short, chosen)
        greedy.keep(kept)
        full.keep(kept)
        short, long = greedy.step(chosen[kept].tolist()), full.step(chosen[kept].tolist())


# Sampling on the device.

WAYS = [
    Sampling(0.9, top_k=30, seed=1),
    GREEDY,
    Sampling(1.0, top_p=0.9, min_p=0.01, seed=2),
    Sampling(1.2, seed=2),
]


def requests_of(lengths: Sequence[int], tokens: Sequence[int]) -> list[Request]:
    texts = texts_of(SMALL, list(lengths), 5)
    return [Request(*given, ignore_eos=True) for given in zip(texts, tokens, WAYS, strict=True)]


def ids_of(model: gpu.Model, requests: Sequence[Request]) -> list[tuple[int, ...]]:
    return [completion.ids for completion in gathered(gpu.stream(model, requests), len(requests))]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_seed_gives_the_same_text_in_any_batch(dtype) -> None:
    """Texts of unequal lengths that end at different steps, and in another order, against each one alone."""
    requests = requests_of([5, 2, 7, 4], [5, 2, 6, 7])
    for device in all_devices()[:2]:
        model = on_device(device, SMALL, dtype)
        alone = [ids_of(model, [request])[0] for request in requests]
        assert ids_of(model, requests) == alone
        assert ids_of(model, [*requests[::-1], requests[0]]) == [*alone[::-1], alone[0]]
        assert ids_of(model, [replace(requests[3], sampling=replace(WAYS[3], seed=3))]) != [alone[3]]


def test_draws_of_a_text_are_those_of_the_reference_by_its_numbers() -> None:
    """Each id follows from the logits after the ids before it and from its own number, captured steps included."""
    device = all_devices()[0]
    model, request = on_device(device, SMALL, "float32"), requests_of([5, 2, 9, 4], [9] * 4)[2]
    allowed = np.arange(SMALL.vocab_size) % 3 > 0
    decoder, full = SamplingDecoder(model, [request.sampling], allowed=allowed), CachedDecoder(model)
    decoder.start([request.prompt], 20)
    logits, drawn_ids = full.start([request.prompt], 20), []
    seeds, numbers = device.array(np.array([2], np.uint64)), device.empty(1, "uint64")
    for position in range(len(request.prompt) - 1, len(request.prompt) + 10):
        ops.uniform(seeds, device.zeros(1, "int32"), device.array(np.array([position], np.int32)), numbers)
        ids, p = candidates(logits[0], request.sampling, allowed=allowed)
        drawn_ids.append(int(decoder.chosen()[0]))
        assert drawn_ids[-1] == ids[np.searchsorted(np.cumsum(p), float(numbers.get()[0]) / 2**64, side="right")]
        decoder.go_on()
        logits = full.step(drawn_ids[-1:])
    assert decoder._launches.graph is not None
    assert len(set(drawn_ids)) > 3


@pytest.mark.parametrize("batch", [1, 3])
def test_only_ids_are_copied(batch, monkeypatch) -> None:
    copied, get = [], Array.get

    def counted(array: Array) -> NDArray:
        copied.append(array.nbytes)
        return get(array)

    monkeypatch.setattr(Array, "get", counted)
    requests = requests_of([5, 2, 9, 4], [6] * 4)[:batch]
    assert len(list(gpu.stream(on_device(all_devices()[0], SMALL, "float32"), requests))) == 6 * batch
    assert copied == [4 * batch] * 6


def test_where_ids_are_chosen() -> None:
    model, request = on_device(all_devices()[0], SMALL, "float32"), Request([1], 1, Sampling(1.0))
    on_the_host = [replace(request, logprobs=0), replace(request, sampling=Sampling(1.0, repetition_penalty=1.1))]
    assert type(gpu.decoder_for(model, [request, request])) is SamplingDecoder
    for other in on_the_host:
        assert type(gpu.decoder_for(model, [request, other])) is CachedDecoder
    with pytest.raises(ValueError, match="2 prompts for 1 samplings"):
        SamplingDecoder(model, [GREEDY]).start([[1], [2]], 5)


def test_logits_that_are_not_finite_are_told() -> None:
    model = drawn(SMALL, 0, "float32")
    final = replace(model.params.final_layer_norm, weight=np.full(120, 3e38, np.float32))
    wild = gpu.to_device(
        replace(model, params=replace(model.params, final_layer_norm=final)), all_devices()[0], "float32"
    )
    with pytest.raises(InputError, match="not finite"):
        list(itertools.islice(gpu.generate(wild, [1, 2, 3]), 3))
