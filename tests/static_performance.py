"""What can be known of a kernel's speed without a card, from its machine code for sm_90 and its launch.

`python tests/static_performance.py` writes the table in gpu/NOTES.md. Needs NVRTC and nvdisasm, of the extra `nvrtc`.

A kernel that streams over weights, or keys and values, is as fast as memory if enough bytes are on their way at any
moment, if the instructions for each number do not take longer than the number, and if every multiprocessor has
something to do until the end. All three are counted in the loop that loads most. A new kernel is a line in CASES.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from nvrtc import compiled, usage

from neox.gpu import fused, ops
from neox.gpu.source import Source
from neox.reference.config import GPT_NEOX_20B

PAGE = Path(__file__).resolve().parents[1] / "gpu" / "NOTES.md"
BEGIN, END = "<!-- static performance -->\n", "<!-- /static performance -->\n"

# An H200.
PROCESSORS, CLOCK, LANES = 132, 1.98e9, 128  # instructions of a lane that a multiprocessor starts in a cycle
THREADS, BLOCKS, REGISTERS, SHARED = 2048, 32, 65536, 228 * 1024  # of a multiprocessor
MEMORY = 4.3e12  # bytes/s that a good kernel reads
BUDGET = PROCESSORS * LANES * CLOCK / (MEMORY / 2)  # 15.6 instructions of a lane in the time that 16 bits take to come


@dataclass(frozen=True)
class Case:
    """A kernel at the 20B's shapes."""

    name: str
    source: Source
    kernel: str
    block: int
    grid: int
    units: int  # of work, shared out among blocks; as many as blocks, or more where blocks stay
    streamed: float  # share of its loads that are of what is streamed: the rest are of x, from the caches
    fewest: int  # bytes that any kernel must move
    moved: int  # bytes that this one asks of memory
    dynamic: int = 0  # bytes of shared memory that the launch adds


C, F, H, D = 6144, 24576, 64, 96
assert (GPT_NEOX_20B.hidden_size, GPT_NEOX_20B.intermediate_size) == (C, F)
T, EIGHT = "__half", 8


def skinny(rows: int, outputs: int, inputs: int, texts: int) -> Case:
    around = texts * (2 * inputs + 4 * outputs)
    grid = -(-outputs // ops.MATVEC_OUTPUTS) * -(-texts // rows)
    weights = 2 * outputs * inputs
    return Case(
        name=f"matvec, {texts} x {inputs} -> {outputs}",
        source=ops.MATVEC,
        kernel=f"matvec<{T}, {rows}>",
        block=ops.MATVEC_THREADS,
        grid=grid,
        units=grid,
        streamed=2 / (2 + rows),  # two outputs' pieces for each row's
        fewest=weights + around,
        moved=-(-texts // rows) * weights + around,
    )


def tiled(texts: int, outputs: int, inputs: int) -> Case:
    tiles, around = -(-outputs // ops.GEMM_TILE) * -(-texts // ops.GEMM_TILE), texts * (2 * inputs + 4 * outputs)
    fewest = 2 * outputs * inputs + around
    name, kernel = f"gemm, {texts} x {inputs} -> {outputs}", f"gemm<{T}>"
    return Case(name, ops.GEMM, kernel, ops.GEMM_THREADS, tiles, tiles, 1 / 2, fewest, fewest)


def batch(texts: int, outputs: int, inputs: int) -> Case:
    """Units are slices, which are shared out evenly. Parts of tiles stay in the caches."""
    rows = next(rows for rows in ops.WIDE_ROWS if rows >= texts)
    slices = -(-outputs // ops.WIDE_OUTPUTS) * -(-inputs // ops.WIDE_SLICE)
    fewest = 2 * outputs * inputs + texts * (2 * inputs + 4 * outputs)
    return Case(
        name=f"wide, {texts} x {inputs} -> {outputs}",
        source=ops.WIDE,
        kernel=f"wide<{T}, {rows}>",
        block=ops.WIDE_THREADS,
        grid=min(ops.WIDE_TOGETHER * PROCESSORS, slices),
        units=slices,
        streamed=ops.WIDE_OUTPUTS / (ops.WIDE_OUTPUTS + rows),
        fewest=fewest,
        moved=fewest,
        dynamic=ops.wide_shared_bytes(rows),
    )


def fused_stream(name: str, source: Source, kernel: str, texts: int, outputs: int, inputs: int, beside: int) -> Case:
    """beside: bytes of what is no weight. Rows of x are in shared memory, but for those of fused_output."""
    rows = next(rows for rows in ops.FUSED_ROWS if rows >= texts)
    dynamic, share = (0, 2 / (2 + rows // 8)) if source is ops.FUSED_OUTPUT else (2 * texts * (inputs + 32), 1)
    units, fewest = outputs // fused.UNIT, 2 * outputs * inputs + beside
    grid = min(fused.TOGETHER * PROCESSORS, units)
    kernel = f"{name}<{T}, {kernel}{rows}>"
    return Case(f"{name}, {texts}", source, kernel, fused.THREADS, grid, units, share, fewest, fewest, dynamic)


def fused_step(texts: int, context: int = 128) -> list[Case]:
    """The three launches of a layer."""
    keys = texts * 4 * C * context
    return [
        fused_stream("fused_qkv", ops.FUSED_QKV, "", texts, 3 * C, C, 10 * texts * C),
        fused_stream("fused_mlp", ops.FUSED_MLP, f"GeluFast, {D}, ", texts, F, C, keys + texts * 2 * (3 * C + F)),
        fused_stream("fused_output", ops.FUSED_OUTPUT, "", texts, C, C + F, texts * (2 * (C + F) + 8 * C)),
    ]


def attention(texts: int, context: int) -> Case:
    splits = max(1, min(512 // (texts * H), context // 128))  # as decode.new_step has it
    fewest = texts * 4 * C * context
    kernel, grid = f"attention_decode_split<{T}, {D}>", texts * H * splits
    name = f"attention_decode, {texts} x {context}"
    return Case(name, ops.ATTENTION_DECODE, kernel, ops.ATTENTION_THREADS, grid, grid, 1, fewest, fewest)


CASES = [
    *(skinny(rows, 3 * C, C, rows) for rows in (1, 2, 4, 8)),
    *(skinny(1, F, C, 1), skinny(1, C, C, 1), skinny(1, C, F, 1), skinny(1, 50432, C, 1), skinny(8, 3 * C, C, 16)),
    *(batch(8, 50432, C), *(batch(texts, *shape) for texts in (32, 64) for shape in ((3 * C, C), (C, F)))),
    *(batch(64, 50432, C), tiled(256, 3 * C, C), tiled(256, C, F)),
    *(*fused_step(1), *fused_step(8), *fused_step(16)),
    *(attention(1, 128), attention(1, 2048), attention(32, 1024)),
]


# Machine code.


@dataclass(frozen=True)
class Instruction:
    place: int  # bytes from the kernel's beginning
    name: str  # with its suffixes
    operands: str
    predicated: bool = False


def nvdisasm() -> str | None:
    """Where the program is: on the path, or in the package nvidia-cuda-nvdisasm."""
    inside = [Path(folder, "nvidia", "cu13", "bin") for folder in sys.path]
    return shutil.which("nvdisasm") or next(
        (found for p in inside if (found := shutil.which("nvdisasm", path=p))), None
    )


LINE = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);")
LABEL = re.compile(r"^(\.L\w+):")


def machine_code(source: Source, kernel: str) -> tuple[Instruction, ...]:
    """Of one kernel for sm_90, branches with the place they go to."""
    return next(code for name, code in machine_codes(replace(source, kernels=(kernel,))) if name == kernel)


FUNCTION = re.compile(r"^\s*\.text\.(\S+):")


@cache
def machine_codes(source: Source) -> tuple[tuple[str, tuple[Instruction, ...]], ...]:
    """Of all kernels of a file, with their names."""
    program = nvdisasm()
    assert program
    code, mangled, _ = compiled(source, "90")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code + b"\0")  # CuPy takes the last byte for the end of a text
        file.flush()
        text = subprocess.run([program, "-c", file.name], capture_output=True, text=True, check=True).stdout
    names, lines = {value: name for name, value in mangled.items()}, text.splitlines()
    starts = [(i, begin[1]) for i, line in enumerate(lines) if (begin := FUNCTION.match(line))]
    ends = [i for i, _ in starts[1:]] + [len(lines)]
    return tuple((names.get(f, f), _instructions(lines[i:end])) for (i, f), end in zip(starts, ends, strict=True))


def _instructions(lines: list[str]) -> tuple[Instruction, ...]:
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in lines:
        if label := LABEL.match(line):
            labels[label[1]] = 16 * len(found)
        elif instruction := LINE.match(line):
            place, predicate, name, operands = instruction.groups()
            found.append(Instruction(int(place, 16), name, operands, predicate is not None))
    resolved = re.compile(r"`\((\.L\w+)\)")
    return tuple(
        replace(i, operands=str(labels[target[1]]))
        if i.name.startswith("BRA") and (target := resolved.search(i.operands))
        else i
        for i in found
    )


SIZES = {"128": 16, "64": 8, "U8": 1, "S8": 1, "U16": 2, "S16": 2}


def loaded_bytes(instruction: Instruction) -> int:
    """That a lane asks of global memory."""
    kind, *suffixes = instruction.name.split(".")
    if kind not in ("LDG", "LDGSTS"):
        return 0
    return next((SIZES[s] for s in suffixes if s in SIZES), 4)


def loops(code: tuple[Instruction, ...]) -> list[tuple[Instruction, ...]]:
    """From where a branch goes back to, up to that branch; those with no such loop of loads inside."""
    back = [(int(i.operands), i.place) for i in code if i.name.startswith("BRA") and i.operands.isdigit()]
    spans = [(first, last) for first, last in back if first < last]
    bodies = {span: tuple(i for i in code if span[0] <= i.place <= span[1]) for span in spans}
    loading = {span: body for span, body in bodies.items() if any(map(loaded_bytes, body))}
    return [
        body
        for (first, last), body in loading.items()
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b in loading)
    ]


def copying_loop(code: tuple[Instruction, ...]) -> tuple[Instruction, ...]:
    """The smallest that copies to shared memory and waits for copies, in the turns that most are: what a turn does only
    at the end of a tile is left out. Empty if there is none."""

    def takes_part(body: tuple[Instruction, ...]) -> bool:
        names = {i.name.split(".")[0] for i in body}
        return {"LDGSTS", "DEPBAR"} <= names

    back = [(int(i.operands), i.place) for i in code if i.name.startswith("BRA") and i.operands.isdigit()]
    bodies = [code[first // 16 : last // 16 + 1] for first, last in back if first < last]
    return way_round(min(filter(takes_part, bodies), key=len, default=()))


def way_round(body: tuple[Instruction, ...]) -> tuple[Instruction, ...]:
    """From a loop's beginning to the branch back, along that way that copies most, and of those along the shortest."""
    ways: dict[int, tuple[int, int, tuple[Instruction, ...]]] = {}
    for instruction in reversed(body):
        here, on = instruction.place, instruction.place + 16
        jumps = instruction.name.startswith("BRA") and instruction.operands.isdigit()
        stays = instruction.predicated or not instruction.name.startswith(("BRA", "EXIT"))
        next_ones = [ways[p] for p in ([int(instruction.operands)] if jumps else []) + [on] * stays if p in ways]
        if instruction is body[-1]:
            next_ones = [(0, 0, ())]
        if next_ones:
            copied, length, rest = max(next_ones, key=lambda way: way[:2])
            copies = loaded_bytes(instruction) * instruction.name.startswith("LDGSTS")
            ways[here] = copied + copies, length - 1, (instruction, *rest)
    return ways[body[0].place][2] if body else ()


def main_loop(code: tuple[Instruction, ...]) -> tuple[Instruction, ...]:
    """That which copies, or loads most."""
    return copying_loop(code) or max(loops(code), key=lambda body: sum(map(loaded_bytes, body)))


def on_the_way(body: tuple[Instruction, ...]) -> int:
    """The most bytes that a thread has asked for and not yet waited for, in a loop that goes on.

    A register that was loaded is waited for when it is read. Asynchronous copies go in groups, and DEPBAR waits for
    all but the last few of them.
    """
    registers: dict[int, int] = {}  # waited for, and the bytes that fill it and its neighbours
    groups, group, most = list[int](), 0, 0
    for instruction in (*body, *body, *body):
        kind, size = instruction.name.split(".")[0], loaded_bytes(instruction)
        named = [int(n) for n in re.findall(r"\bR(\d+)", instruction.operands)]
        wide = {first + k for first in named for k in range(4)}
        registers = {r: n for r, n in registers.items() if not (set(named) & set(range(r, r + max(1, n // 4))))}
        if kind == "LDG" and named:
            registers = {r: n for r, n in registers.items() if r not in wide or r not in named[:1]}
            registers[named[0]] = size
        elif kind == "LDGSTS":
            group += size
        elif kind == "LDGDEPBAR":
            groups, group = [*groups, group], 0
        elif kind == "DEPBAR" and (keep := re.search(r"SB0, 0x(\w+)", instruction.operands)):
            groups = groups[len(groups) - int(keep[1], 16) :] if int(keep[1], 16) else []
        most = max(most, sum(registers.values()) + sum(groups) + group)
    return most


# What it comes to.


@dataclass(frozen=True)
class Estimate:
    registers: int
    resident: int  # blocks on a multiprocessor
    in_flight: float  # bytes that a multiprocessor has on their way
    instructions: float  # of a lane, for each number of 16 bits that is streamed
    waves: float  # units of work for each place that a block can have on the card
    busy: float  # share of the multiprocessors' time, if every unit takes as long
    traffic: float  # bytes moved / fewest
    calls: int  # of subroutines, which are not counted: a division of 64 bits is one


def resident_blocks(registers: int, shared: int, threads: int) -> int:
    """Registers are given to warps by 256, shared memory to blocks with 1 KB of the system's."""
    warps = -(-threads // 32)
    by_registers = REGISTERS // (-(-registers * 32 // 256) * 256 * warps)
    return min(BLOCKS, THREADS // threads, by_registers, SHARED // (shared + 1024))


def estimate(case: Case) -> Estimate:
    taken = usage(replace(case.source, kernels=(case.kernel,)), "90")[case.kernel]
    body = main_loop(machine_code(case.source, case.kernel))
    resident = resident_blocks(taken.registers, taken.shared_bytes + case.dynamic, case.block)
    there = min(resident, case.grid / PROCESSORS)
    streamed = sum(map(loaded_bytes, body)) * case.streamed
    waiting = on_the_way(body)  # of both kinds: rows of x come one by one after what is streamed, or in the same group
    each = case.units / PROCESSORS
    return Estimate(
        taken.registers,
        resident,
        max(min(waiting, streamed), waiting * case.streamed) * case.block * there,
        len(body) / (streamed / 2),
        case.units / (PROCESSORS * resident),
        each / -(-case.units // PROCESSORS),
        case.moved / case.fewest,
        sum(i.name.startswith("CALL") for i in body),
    )


def table() -> str:
    head = "kernel, at the 20B's shapes|registers|blocks each|KB on their way|instructions each|waves|busy|traffic"
    lines = [f"| {' | '.join(head.split('|'))} |", "| --- " + "| ---: " * 7 + "|"]
    for case in CASES:
        e = estimate(case)
        figures = f"{e.registers}|{e.resident}|{e.in_flight / 1024:.0f}|{e.instructions:.1f}|{e.waves:.1f}"
        cells = [case.name, *figures.split("|"), f"{e.busy:.0%}", f"{e.traffic:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def shown() -> str:
    return PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]


def write() -> None:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    write()
