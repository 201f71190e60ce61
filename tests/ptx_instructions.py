"""What each PTX instruction does to a machine. A kernel that needs one more adds it here.

Source: NVIDIA, "Parallel Thread Execution ISA", the section of each instruction.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from ptx_machine import BITS, SPACES, TYPES, Machine, PtxError, Values, aligned, registers
from ptx_program import Instruction

RELATIONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def only(i: Instruction, *modifiers: str) -> None:
    """NotImplementedError if an instruction has a modifier, beside its types, that is not among these."""
    if not set(i.modifiers) <= {*modifiers, *TYPES}:
        raise NotImplementedError(f"PTX: {i}")


def elementwise(function: Callable[..., Values]) -> Callable[[Machine, Instruction], None]:
    """d = f(a, b, ...), all of one type."""

    def run(m: Machine, i: Instruction) -> None:
        only(i, "rn", "ftz", "approx", "lo", "to", "global")
        result = function(*(m.read(operand, i.kind) for operand in i.operands[1:]))
        m.write(i.operands[0], np.asarray(result).astype(TYPES[i.kind]))

    return run


def shifted(function: Callable[[Values, Values], Values]) -> Callable[[Machine, Instruction], None]:
    """Shifts by the width or more, which PTX defines and C does not, are refused."""

    def run(m: Machine, i: Instruction) -> None:
        value, by = m.read(i.operands[1], i.kind), m.read(i.operands[2], "u32")
        width = 8 * value.itemsize
        if (by >= width).any():
            raise PtxError(f"shift by the width or more in {i}")
        m.write(i.operands[0], function(value, by.astype(value.dtype)))

    return run


# Arithmetic.


def quotient(a: Values, b: Values) -> Values:
    return a / b if a.dtype.kind == "f" else (a - np.fmod(a, b)) // b  # towards zero


def multiply(m: Machine, i: Instruction) -> None:
    only(i, "rn", "ftz", "lo", "hi", "wide")
    a, b = m.read(i.operands[1], i.kind), m.read(i.operands[2], i.kind)
    if "hi" in i.modifiers:  # in Python's integers: NumPy has none of 128 bits
        m.write(i.operands[0], (a.astype(object) * b.astype(object) >> 8 * a.itemsize).astype(TYPES[i.kind]))
        return
    if "wide" in i.modifiers:
        double = TYPES[f"{i.kind[0]}{2 * int(i.kind[1:])}"]
        a, b = a.astype(double), b.astype(double)
    m.write(i.operands[0], a * b)


def fused_multiply_add(m: Machine, i: Instruction) -> None:
    only(i, "rn", "rm", "ftz")
    a, b, c = (m.read(operand, i.kind).astype(np.float64) for operand in i.operands[1:])
    exact = a * b + c
    rounded = exact.astype(TYPES[i.kind])
    if "rm" in i.modifiers:  # towards minus infinity
        rounded = np.where(rounded > exact, np.nextafter(rounded, rounded.dtype.type(-np.inf)), rounded)
    m.write(i.operands[0], rounded)


def convert(m: Machine, i: Instruction) -> None:
    to, source = i.modifiers[-2:]
    if to in ("f16x2", "bf16x2"):
        convert_pair(m, i)
        return
    only(i, "rn", "rzi", "ftz", "sat")
    value = m.read(i.operands[1], source)
    if "rzi" in i.modifiers:
        value = np.trunc(value)
    if value.dtype.kind == "f" and to[0] in "su":  # what lies beyond the integers becomes the last of them
        limits = np.iinfo(TYPES[to])
        value = np.clip(np.nan_to_num(value.astype(np.float64), nan=0), limits.min, limits.max)
    if "sat" in i.modifiers:
        value = np.clip(np.nan_to_num(value, nan=0), 0, 1)
    m.write(i.operands[0], value.astype(TYPES[to]))


def convert_pair(m: Machine, i: Instruction) -> None:
    """cvt d, high, low: each rounded to half the width of d."""
    only(i, "rn", "f16x2", "bf16x2")
    low, high = (m.read(operand, "f32").astype(TYPES[i.modifiers[1][:-2]]) for operand in i.operands[:0:-1])
    m.write(i.operands[0], np.stack([low, high], axis=1).view(BITS[4])[:, 0])


def insert_bits(m: Machine, i: Instruction) -> None:
    """bfi d, a, b, position, length: b with `length` bits of a at `position`."""
    a, b = m.read(i.operands[1], i.kind), m.read(i.operands[2], i.kind)
    position, length = int(i.operands[3]), int(i.operands[4])
    if position + length > 8 * a.itemsize:
        raise NotImplementedError(f"PTX: {i} beyond the register")
    mask = a.dtype.type(((1 << length) - 1) << position)
    m.write(i.operands[0], (b & ~mask) | ((a << a.dtype.type(position)) & mask))


def compare(m: Machine, i: Instruction) -> None:
    """Of a NaN nothing holds, not even that it differs; a relation that ends in u holds as well if one is NaN."""
    relation, unordered = i.modifiers[0], i.modifiers[0].removesuffix("u")
    only(i, "ftz", relation)
    a, b = m.read(i.operands[1], i.kind), m.read(i.operands[2], i.kind)
    if unordered not in RELATIONS:
        raise NotImplementedError(f"PTX: {i}")
    holds, nan = RELATIONS[unordered](a, b), np.isnan(a) | np.isnan(b)
    m.write(i.operands[0], holds | nan if relation != unordered else holds & ~nan)


def select(m: Machine, i: Instruction) -> None:
    a, b = m.read(i.operands[1], i.kind), m.read(i.operands[2], i.kind)
    m.write(i.operands[0], np.where(m.read(i.operands[3], "pred"), a, b))


def move(m: Machine, i: Instruction) -> None:
    """Also between a register and a vector of narrower ones, the first of which is the lowest bits."""
    into, source = i.operands
    vector = into if "<" in into else source
    if "<" not in vector:
        m.write(into, m.read(source, i.kind))
        return
    bits = np.dtype(TYPES[i.kind]).itemsize
    part = f"b{8 * bits // len(registers(vector))}"
    if vector is source:
        parts = [m.read(register, part) for register in registers(source)]
        m.write(into, np.stack(parts, axis=1).view(BITS[bits])[:, 0])
        return
    values = m.read(source, i.kind).reshape(-1, 1).view(TYPES[part])
    for k, register in enumerate(registers(into)):
        if register != "_":
            m.write(register, values[:, k])


# Memory.


def space_of(i: Instruction) -> str:
    for modifier in i.modifiers:
        if modifier in SPACES:
            return modifier
    return "global"  # a pointer made of a number may lead anywhere, but nobody makes one of a shared address


HINTS = ("L1::no_allocate", "L2::cache_hint", "L2::256B")  # to the caches, which this machine has not


SCOPES = ("relaxed", "acquire", "release", "sys")  # of the order of memory, which is always that of the program here


def policy(m: Machine, i: Instruction) -> None:
    only(i, "fractional", "L2::evict_first")
    m.write(i.operands[0], np.zeros(m.threads, np.uint64))


def load(m: Machine, i: Instruction) -> None:
    only(i, *SPACES, "nc", "v2", "v4", *HINTS, *SCOPES)
    dtype = np.dtype(TYPES[i.kind])
    if space_of(i) == "param":
        m.write(i.operands[0], np.full(m.threads, np.asarray(m.parameters[i.operands[1][1:-1]]).astype(dtype)))
        return
    into = registers(i.operands[0])
    threads = np.flatnonzero(m.active)
    if space_of(i) == "global" and "L2::256B" not in i.modifiers:
        m.touch_others_memory(threads)
    loaded = m.load(space_of(i), threads, m.address(i.operands[1])[threads], dtype.itemsize * len(into))
    for k, register in enumerate(into):
        value = np.zeros(m.threads, dtype)
        part = loaded[:, k * dtype.itemsize : (k + 1) * dtype.itemsize]
        value[threads] = np.ascontiguousarray(part).view(dtype)[:, 0]
        m.write(register, value.astype(np.int64) if dtype.kind == "i" else value)  # registers may be wider


def store(m: Machine, i: Instruction) -> None:
    only(i, *SPACES, "v2", "v4", *SCOPES)
    threads = np.flatnonzero(m.active)
    if space_of(i) == "global":
        m.touch_others_memory(threads)
    parts = [m.read(register, i.kind)[threads] for register in registers(i.operands[1])]
    values = np.ascontiguousarray(np.stack(parts, axis=1)).view(np.uint8)
    m.store(space_of(i), threads, m.address(i.operands[0])[threads], values)


def atomic(m: Machine, i: Instruction) -> None:
    """atom.inc: what was there before, thread after thread."""
    only(i, "global", "inc")
    if "inc" not in i.modifiers:
        raise NotImplementedError(f"PTX: {i}")
    threads, addresses, limit = np.flatnonzero(m.active), m.address(i.operands[1]), m.read(i.operands[2], "u32")
    m.touch_others_memory(threads)
    before = np.zeros(m.threads, np.uint32)
    for thread in threads:
        one, place = np.array([thread]), addresses[thread : thread + 1]
        before[thread] = m.load("global", one, place, 4).view(np.uint32)[0, 0]
        after = np.uint32(0) if before[thread] >= limit[thread] else before[thread] + np.uint32(1)
        m.store("global", one, place, np.array([[after]]).view(np.uint8))
    m.write(i.operands[0], before)


def fence(_: Machine, i: Instruction) -> None:
    """Every access is seen by all threads at once."""
    only(i, "gl")


def copy_async(m: Machine, i: Instruction) -> None:
    """cp.async [to], [source], width, wanted: `wanted` bytes, and zeros up to the width. The source is read at once."""
    only(i, "async", "ca", "cg", "shared", "global", "commit_group", "wait_group")
    if "commit_group" in i.modifiers:
        m.commit()
        return
    if "wait_group" in i.modifiers:
        m.land(int(i.operands[0]))
        return
    threads, width = np.flatnonzero(m.active), int(i.operands[2])
    to, source = (m.address(operand)[threads] for operand in i.operands[:2])
    aligned(threads, source, width)
    wanted = m.read(i.operands[3], "u32")[threads] if len(i.operands) > 3 else np.full(len(threads), width)
    values = np.zeros((len(threads), width), np.uint8)
    inside = np.arange(width) < wanted[:, None]
    readers, places = np.broadcast_to(threads[:, None], inside.shape), source[:, None] + np.arange(width)
    values[inside] = m.load("global", readers[inside], places[inside], 1)[:, 0]
    m.copy_later(threads, to, values)


# Control.


def branch(m: Machine, i: Instruction) -> None:
    m.next[m.active] = m.program.labels[i.operands[0]]


def wait(m: Machine, i: Instruction) -> None:
    """nanosleep."""


def depend(m: Machine, i: Instruction) -> None:
    only(i, "wait", "launch_dependents")
    if "wait" in i.modifiers:
        m.wait_for_earlier_launches()


def leave(m: Machine, _: Instruction) -> None:
    m.running &= ~m.active


def barrier(m: Machine, i: Instruction) -> None:
    """The machine has brought the warp or the block together."""
    if "red" in i.modifiers:
        reduce_at_barrier(m, i)
        return
    only(i, "warp", "sync")
    if i.operands not in (("0",), ("-1",), ("0xffffffff",)):  # the block's first barrier; all lanes
        raise NotImplementedError(f"PTX: {i}")


def reduce_at_barrier(m: Machine, i: Instruction) -> None:
    only(i, "red", "or")
    if "or" not in i.modifiers or i.operands[1] != "0":
        raise NotImplementedError(f"PTX: {i}")
    m.write(i.operands[0], np.full(m.threads, m.read(i.operands[2], "pred").any()))


# Warps.


def shuffle(m: Machine, i: Instruction) -> None:
    segment, mask = (m.read(operand, "s32")[m.active] for operand in i.operands[3:])
    if i.modifiers[1] != "bfly" or (segment != 31).any() or (mask != -1).any():
        raise NotImplementedError(f"PTX: {i}")
    register, _, valid = i.operands[0].partition("|")
    source = np.arange(m.threads) ^ m.read(i.operands[2], "u32").astype(np.int64)
    m.write(register, m.read(i.operands[1], "b32")[source])
    if valid:
        m.write(valid, np.ones(m.threads, bool))


def load_matrix(m: Machine, i: Instruction) -> None:
    """Lane 8k+r gives the address of row r of matrix k; lane l receives row l/4, columns 2(l%4) and the next."""
    only(i, "sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared")
    into = registers(i.operands[0])
    warps, addresses = np.flatnonzero(m.active).reshape(-1, 32), m.address(i.operands[1])
    for k, register in enumerate(into):
        givers = warps[:, 8 * k : 8 * k + 8].reshape(-1)
        matrices = m.load("shared", givers, addresses[givers], 16).view(np.uint16).reshape(-1, 8, 8)
        if "trans" in i.modifiers:
            matrices = matrices.swapaxes(1, 2)
        value = np.zeros(m.threads, np.uint32)
        value[m.active] = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1)
        m.write(register, value)


def multiply_matrices(m: Machine, i: Instruction) -> None:
    """mma.m16n8k16. Lane l, with g = l/4 and t = l%4, holds a[k] = A[g + 8(k%2)][2t + 8(k/2) ..+1], b[k] = B[2t + 8k
    ..+1][g] and c[k] = C[g + 8(k/2)][2t + k%2]."""
    only(i, "sync", "aligned", "m16n8k16", "row", "col")
    if i.modifiers[-4:] not in (("f32", "f16", "f16", "f32"), ("f32", "bf16", "bf16", "f32")):
        raise NotImplementedError(f"PTX: {i}")
    dtype = TYPES[i.modifiers[-2]]
    d, a, b, c = (registers(operand) for operand in i.operands)
    pairs_a, pairs_b = (np.stack([m.read(r, "b32") for r in names], axis=1) for names in (a, b))
    halves_a, halves_b = (x.view(BITS[2]).view(dtype).astype(np.float32) for x in (pairs_a, pairs_b))
    sums = np.stack([m.read(r, "f32") for r in c], axis=1)
    # (warp, g, t, k/2, k%2, half) and (warp, g, t, k, half), to (row, column)
    A = halves_a.reshape(-1, 8, 4, 2, 2, 2).transpose(0, 4, 1, 3, 2, 5).reshape(-1, 16, 16)
    B = halves_b.reshape(-1, 8, 4, 2, 2).transpose(0, 3, 2, 4, 1).reshape(-1, 16, 8)
    product = (A @ B).reshape(-1, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(-1, 4)
    for k, register in enumerate(d):
        m.write(register, sums[:, k] + product[:, k])


OPERATIONS: dict[str, Callable[[Machine, Instruction], None]] = {
    "abs": elementwise(np.abs),
    "add": elementwise(np.add),
    "and": elementwise(np.bitwise_and),
    "atom": atomic,
    "bar": barrier,
    "bfi": insert_bits,
    "bra": branch,
    "copysign": elementwise(lambda sign, size: np.copysign(size, sign)),
    "cp": copy_async,
    "createpolicy": policy,
    "cvt": convert,
    "cvta": elementwise(lambda address: address),
    "div": elementwise(quotient),
    "ex2": elementwise(np.exp2),
    "fma": fused_multiply_add,
    "griddepcontrol": depend,
    "ld": load,
    "ldmatrix": load_matrix,
    "mad": elementwise(lambda a, b, c: a * b + c),
    "membar": fence,
    "max": elementwise(np.fmax),  # of a number and NaN, the number
    "min": elementwise(np.fmin),
    "mma": multiply_matrices,
    "mov": move,
    "mul": multiply,
    "neg": elementwise(np.negative),
    "not": elementwise(np.invert),
    "or": elementwise(np.bitwise_or),
    "rcp": elementwise(np.reciprocal),
    "rem": elementwise(np.fmod),
    "ret": leave,
    "nanosleep": wait,
    "selp": select,
    "setp": compare,
    "shfl": shuffle,
    "shl": shifted(np.left_shift),
    "shr": shifted(np.right_shift),
    "sqrt": elementwise(np.sqrt),
    "st": store,
    "sub": elementwise(np.subtract),
    "xor": elementwise(np.bitwise_xor),
}
