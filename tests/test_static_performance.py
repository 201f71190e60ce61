"""Bounds on what machine code and launches say of speed: a slower kernel is seen where there is no card."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import static_performance
from nvrtc import require_nvrtc
from static_performance import (
    BUDGET,
    CASES,
    Case,
    Estimate,
    estimate,
    loaded_bytes,
    loops,
    machine_code,
    machine_codes,
    main_loop,
    nvdisasm,
    on_the_way,
    resident_blocks,
)

from neox.gpu import ops
from neox.gpu.source import KERNELS, Source

# What 132 multiprocessors must have on their way for 4.5 TB/s at a latency of 0.8 us is 27 KB each.
FLOOR = 27 * 1024
# Those that fall short, and why. A case that no longer does must leave the list.
FEW_ON_THEIR_WAY = {
    "gemm, 256 x 24576 -> 6144": "384 blocks on 132 multiprocessors; with so many rows arithmetic takes longer",
    "attention_decode, 1 x 128": "128 keys of a text are too little for a card",
    "attention_decode, 1 x 2048": "512 blocks are too few",
}
UNBUSY = {
    "attention_decode, 1 x 128": "64 blocks for 132 multiprocessors",
}


@pytest.fixture(autouse=True)
def tools_are_there() -> None:
    require_nvrtc()
    if nvdisasm() is None:
        pytest.skip("nvdisasm is not installed")


def shortfalls(case: Case, e: Estimate) -> set[str]:
    """The bounds that a kernel breaks."""
    broken = {
        "on their way": e.in_flight < FLOOR,
        "instructions": e.instructions > BUDGET or e.calls > 0,
        "busy": e.busy < 0.9,
        # Up to 8 rows of x every weight is read once; with 16 rows matvec reads them twice.
        "traffic": e.traffic > (2 if ", 16 x" in case.name else 1.001),
    }
    return {name for name, is_broken in broken.items() if is_broken}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_nothing_but_memory_holds_a_kernel_back(case: Case) -> None:
    listed = {"on their way": FEW_ON_THEIR_WAY, "busy": UNBUSY}
    assert shortfalls(case, estimate(case)) == {bound for bound, names in listed.items() if case.name in names}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_loop_that_is_counted_is_the_one_that_multiplies(case: Case) -> None:
    def products(code: tuple[static_performance.Instruction, ...], *names: str) -> int:
        return sum(i.name.startswith(names) for i in code)

    code = machine_code(case.source, case.kernel)
    on_tensor_cores = products(code, "HMMA")
    assert products(main_loop(code), "HMMA") == on_tensor_cores
    assert on_tensor_cores or products(main_loop(code), "FFMA", "HFMA") >= 48  # 24 dims of a key, and of a value


def test_four_bytes_at_a_time_are_seen_to_be_slow(tmp_path: Path) -> None:
    """matvec as most write it first: a lane loads two numbers, uses them, and only then asks for more."""
    text = (KERNELS / "matvec.cu").read_text(encoding="utf-8")
    head, _, rest = text.partition("    for (int first")
    end = rest.index("    constexpr int LANES")
    loop = """
    #pragma unroll 1
    for (int i = 2 * lane; i < I; i += 64)
        for (int j = 0; j < 2; j++) {
            uint32_t w = *reinterpret_cast<const uint32_t*>(row(weight, o, O, I) + i);
            uint32_t v = *reinterpret_cast<const uint32_t*>(row(x, n, N, I) + i);
            sum[0] += to_float(reinterpret_cast<const T*>(&v)[j]) * to_float(reinterpret_cast<const T*>(&w)[j]);
        }
"""
    (tmp_path / "matvec.cu").write_text(head + loop + rest[end:], encoding="utf-8")
    case = replace(CASES[0], source=replace(CASES[0].source, folder=tmp_path), streamed=1 / 2)
    assert "on their way" in shortfalls(case, estimate(case))


def test_weights_read_twice_and_empty_rounds_are_seen() -> None:
    good = estimate(CASES[0])
    assert not shortfalls(CASES[0], good)
    twice = replace(CASES[0], moved=2 * CASES[0].fewest)
    assert shortfalls(twice, estimate(twice)) == {"traffic"}
    uneven = replace(CASES[0], units=133)
    assert shortfalls(uneven, estimate(uneven)) == {"busy"}


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "blocks"),
    [(64, 0, 1024, 1), (32, 0, 1024, 2), (128, 0, 256, 2), (80, 12_544, 128, 6), (168, 34_816, 128, 3), (8, 0, 32, 32)],
)
def test_as_many_blocks_fit_as_the_occupancy_calculator_says(registers, shared, threads, blocks) -> None:
    assert resident_blocks(registers, shared, threads) == blocks


def test_sampling_takes_few_instructions_for_an_id() -> None:
    """In each of its passes over the logits, eight at a time: one multiprocessor makes them all."""
    bodies = [body for body in loops(machine_code(ops.SAMPLE, "sample")) if sum(map(loaded_bytes, body)) >= 8 * 4]
    taken = [1 + (max(i.place for i in body) - min(i.place for i in body)) // 16 for body in bodies]
    assert len(taken) >= 8
    assert max(taken) / 8 <= 36


def test_a_division_of_64_bits_for_each_slice_is_seen(tmp_path: Path) -> None:
    text = (KERNELS / "wide.cu").read_text(encoding="utf-8")
    for right, wrong in (("for (int at = begin; at < end", "for (long long at = begin; at < end"),):
        assert right in text
        text = text.replace(right, wrong)
    (tmp_path / "wide.cu").write_text(text, encoding="utf-8")
    case = next(case for case in CASES if case.name.startswith("wide, 32 x"))
    assert not shortfalls(case, estimate(case))
    slow = replace(case, source=replace(case.source, folder=tmp_path))
    assert shortfalls(slow, estimate(slow)) == {"instructions"}


# Loops that wait for the caches in every turn, and why that does no harm. Of all others a turn asks for 14 bytes of a
# lane.
SHORT = {
    "all_reduce.cu": "it waits for other devices, and adds up what it has asked for before",
    "attention_decode.cu": "few splits are joined",
    "embedding.cu": "of a rank's share, which goes into a sum over ranks",
    "sample.cu": "what is left when eight at a time have been taken",
    "sum_parts.cu": "parts of few ranks, each number by a thread",
}


@pytest.mark.parametrize("source", ops.SOURCES, ids=lambda source: source.file)
def test_no_loop_waits_for_each_number(source: Source) -> None:
    """A number from the second-level cache takes 270 cycles: a block that norms a row so would take 8 us of 54."""
    kernels = {kernel: code for kernel, code in machine_codes(source) if "naive" not in kernel}
    waiting = {kernel for kernel, code in kernels.items() for body in loops(code) if on_the_way(body) < 14}
    assert bool(waiting) == (source.file in SHORT), waiting


def test_a_norm_that_waits_for_each_number_is_seen(tmp_path: Path) -> None:
    text = (KERNELS / "common.cuh").read_text(encoding="utf-8")
    assert "int AHEAD = 8" in text
    (tmp_path / "common.cuh").write_text(text.replace("int AHEAD = 8", "int AHEAD = 1"), encoding="utf-8")
    (tmp_path / "fused_qkv.cu").write_text((KERNELS / "fused_qkv.cu").read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(AssertionError):
        test_no_loop_waits_for_each_number(replace(ops.FUSED_QKV, folder=tmp_path))


# How much of what is streamed each kernel asks for before the launches before it have ended: instructions of a lane.
AHEAD = {
    **dict.fromkeys((ops.FUSED_QKV, ops.FUSED_MLP, ops.FUSED_OUTPUT), 12),  # a round of stream.cuh
    ops.WIDE: 8,  # a slice's weights, in a loop over slices
}
TOUCHES = ("LD", "LDG", "LDGSTS", "ST", "STG", "ATOM", "ATOMG", "RED", "REDG")


def before_the_wait(code: tuple[static_performance.Instruction, ...]) -> list[static_performance.Instruction]:
    """On any way from the beginning to the first wait for earlier launches that lies on it: blocks may go apart."""
    places = {i.place: n for n, i in enumerate(code)}
    found, ahead = set[int](), [0]
    while ahead:
        n = ahead.pop()
        name, operands = code[n].name.split(".")[0], code[n].operands
        if n in found or name == "ACQBULK":
            continue
        assert name not in ("BRX", "JMP", "JMX"), "where it goes is not known"
        found.add(n)
        if name == "BRA":
            ahead.append(places[int(operands)])
        if code[n].predicated or name not in ("BRA", "EXIT"):
            ahead.append(n + 1)
    return [code[n] for n in sorted(found)]


def asked_for_early(code: tuple[static_performance.Instruction, ...]) -> tuple[int, int]:
    """Instructions before the wait for earlier launches: those that stream weights, and others on memory."""
    touching = [i for i in before_the_wait(code) if i.name.split(".")[0] in TOUCHES]
    streamed = [i for i in touching if i.name.startswith("LDGSTS") or "LTC256B" in i.name]
    return len(streamed), len(touching) - len(streamed)


@pytest.mark.parametrize("source", ops.SOURCES, ids=lambda source: source.file)
def test_until_earlier_launches_have_ended_only_weights_are_asked_for(source: Source) -> None:
    """In the machine code: a compiler might ask at once for what is `const __restrict__`, and so never written."""
    for kernel, code in machine_codes(source):
        assert asked_for_early(code) == (AHEAD.get(source, 0), 0), kernel


WAIT = "    after_earlier_launches();\n"
TAKE = "    if (threadIdx.x == 0) coming[1] = take_unit(work.taken, units);\n"
GELU = "    int f = blockIdx.x * blockDim.x + threadIdx.x;\n"
TOO_EARLY = [  # kernels that touch something before the wait
    ("stream.cuh", ops.FUSED_OUTPUT, "fused_output<__half, 8>", WAIT + TAKE, TAKE + WAIT),
    ("stream.cuh", ops.FUSED_MLP, "fused_mlp<__half, GeluFast, 96, 8>", WAIT + TAKE, TAKE + WAIT),
    ("gelu.cu", ops.GELU, "bias_gelu<__half, Gelu>", WAIT + GELU, GELU + "    if (x[f] == 1.0f) y[f] = 0;\n" + WAIT),
    ("wide.cu", ops.WIDE, "wide<__half, 32>", "at++) fetch_weights(at);", "at++) fetch_weights(at), fetch_x(at);"),
]


@pytest.mark.parametrize(("file", "source", "kernel", "right", "wrong"), TOO_EARLY, ids=[c[1].file for c in TOO_EARLY])
def test_what_is_touched_too_early_is_seen(tmp_path: Path, file, source, kernel, right, wrong) -> None:
    text = (KERNELS / source.file).read_text(encoding="utf-8")
    (tmp_path / source.file).write_text(text, encoding="utf-8")
    text = (KERNELS / file).read_text(encoding="utf-8")
    assert text.count(right) == 1
    (tmp_path / file).write_text(text.replace(right, wrong), encoding="utf-8")
    assert asked_for_early(machine_code(replace(source, folder=tmp_path), kernel)) != (AHEAD.get(source, 0), 0)


def test_copies_are_waited_for_by_groups() -> None:
    """Two groups of two copies of 16 bytes, of which all but the last is waited for."""
    names = [("LDGSTS.E.128", "[R1], [R2]")] * 2 + [("LDGDEPBAR", ""), ("DEPBAR.LE", "SB0, 0x1")]
    body = tuple(static_performance.Instruction(16 * i, *name) for i, name in enumerate(names))
    assert static_performance.on_the_way(body) == 64


def test_the_table_of_the_notes_is_what_is_compiled() -> None:
    if not static_performance.PAGE.is_file():
        pytest.skip("there is no gpu/ beside tests/")
    written = static_performance.shown() == static_performance.table()
    assert written, "python tests/static_performance.py writes it anew"


def test_every_case_names_a_kernel_that_exists() -> None:
    for case in CASES:
        assert isinstance(case.source, Source)
        assert case.kernel in case.source.kernels
