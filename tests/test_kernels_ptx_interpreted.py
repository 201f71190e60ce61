"""The PTX that NVRTC emits computes what the source says, inline assembly included."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from numpy.typing import NDArray
from nvrtc import require_nvrtc
from ptx_device import PtxDevice
from ptx_machine import PtxError
from test_host_device import sources
from test_kernel_mutants import CASES
from test_kernels_ptx import check_all, seeds

from neox.gpu.source import Source


@pytest.fixture(autouse=True)
def nvrtc_is_there() -> None:
    require_nvrtc()


def wrappers(folder: Path, right: str = "", wrong: str = "") -> Source:
    """The kernels that use each wrapper, after a change of ptx.cuh."""
    source = sources(folder, "wrappers.cu")
    text = (folder / "ptx.cuh").read_text()
    assert right in text, "the mutant no longer fits the header"
    (folder / "ptx.cuh").write_text(text.replace(right, wrong, 1))
    return source


CHECKS = [(check, case) for check, (_, cases) in CASES.items() for case in cases]


@pytest.mark.parametrize(("check", "case"), CHECKS, ids=[f"{c.__name__}-{'-'.join(map(str, a))}" for c, a in CHECKS])
def test_what_the_compiler_made_of_each_kernel_is_right(check, case) -> None:
    check(PtxDevice(), *case)


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory) -> Source:
    return wrappers(tmp_path_factory.mktemp("kernels"))


@settings(max_examples=10)
@given(seeds)
def test_the_assembly_computes_what_its_stand_in_does(unchanged, seed) -> None:
    check_all(PtxDevice(), unchanged, seed)


# Wrong assembly, which the host device does not see at all.
MUTANTS = [
    ("{%4,%5,%6,%7}, {%8,%9}", "{%8,%9,%6,%7}, {%4,%5}"),
    ("{%4,%5,%6,%7}", "{%5,%4,%7,%6}"),
    ("{%4,%5,%6,%7}", "{%4,%6,%5,%7}"),
    ("{%8,%9}", "{%9,%8}"),
    ('"{%0,%1,%2,%3}, {%4', '"{%0,%1,%3,%2}, {%4'),
    ("{%8,%9}, {%0,%1,%2,%3}", "{%8,%9}, {%1,%0,%2,%3}"),
    ("{%8,%9}, {%0,%1,%2,%3}", "{%8,%9}, {%2,%3,%0,%1}"),
    ('DEFINE_MMA(__half, "f16")', 'DEFINE_MMA(__half, "bf16")'),
    ('DEFINE_MMA(__nv_bfloat16, "bf16")', 'DEFINE_MMA(__nv_bfloat16, "f16")'),
    ("m8n8.x2.trans.shared", "m8n8.x2.shared"),
    ("m8n8.x2.shared", "m8n8.x2.trans.shared"),
    ("m8n8.x4.shared", "m8n8.x4.trans.shared"),
    ("m8n8.x4.trans.shared", "m8n8.x4.shared"),
    ('"=r"(r[0]), "=r"(r[1]) :', '"=r"(r[1]), "=r"(r[0]) :'),
    ('"=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])', '"=r"(r[0]), "=r"(r[2]), "=r"(r[1]), "=r"(r[3])'),
    ("int bytes = wanted ? 16 : 0", "int bytes = 16"),
    ("int bytes = wanted ? 16 : 0", "int bytes = wanted ? 8 : 0"),
    ("int bytes = wanted ? 16 : 0", "int bytes = wanted ? 0 : 16"),
    ('"n"(KEEP)', '"n"(KEEP + 1)'),
    ("cp.async.commit_group;", ""),
    ('"=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)', '"=r"(x.x), "=r"(x.z), "=r"(x.y), "=r"(x.w)'),
    ("v4.u32 {%0,%1,%2,%3}, [%4]", "v4.u32 {%0,%1,%2,%3}, [%4+16]"),
    ("v4.f32 {%0,%1,%2,%3}, [%4]", "v4.f32 {%1,%0,%2,%3}, [%4]"),
    ("ld.acquire.sys.global.u32 %0, [%1]", "ld.acquire.sys.global.u32 %0, [%1+4]"),
    ("st.release.sys.global.u32 [%0], %1", "st.release.sys.global.u32 [%0+4], %1"),
    ("ld.relaxed.sys.global.u64 %0, [%1]", "ld.relaxed.sys.global.u64 %0, [%1+8]"),
    ("st.relaxed.sys.global.u64 [%0], %1", "st.relaxed.sys.global.u64 [%0+8], %1"),
]


@pytest.mark.parametrize(("right", "wrong"), MUTANTS, ids=[wrong for _, wrong in MUTANTS])
def test_wrong_assembly_is_killed(tmp_path, right, wrong) -> None:
    with pytest.raises((AssertionError, PtxError)):
        check_all(PtxDevice(), wrappers(tmp_path, right, wrong))


@pytest.mark.parametrize(
    ("body", "instruction"),
    [("x[0] = __popc(threadIdx.x);", "popc"), ("x[0] = __clz(threadIdx.x);", "clz")],
)
def test_an_instruction_it_does_not_know_is_named(tmp_path, body, instruction) -> None:
    with pytest.raises(NotImplementedError, match=instruction):
        interpreted(tmp_path, body)


def interpreted(folder: Path, body: str) -> NDArray[np.float32]:
    """x (64), zeros at first, after 64 threads have run the body."""
    (folder / "k.cu").write_text(f'extern "C" __global__ void k(float* x) {{ {body} }}')
    device = PtxDevice()
    x = device.zeros(64, "float32")
    device.launch(Source("k.cu", ("k",), folder), "k", 1, 64, (x,))
    return x.get()


ARITHMETIC = """
extern "C" __global__ void k(const float* x, const float* y, const int* a, const int* b, const long long* c, float* f,
                             int* i, long long* l) {
    int t = threadIdx.x;
    f[t] = fminf(x[t], y[t]);
    f[64 + t] = fmaxf(x[t], y[t]);
    f[128 + t] = x[t] < y[t];
    f[192 + t] = x[t] != y[t];
    f[256 + t] = !(x[t] >= y[t]);
    i[t] = a[t] / b[t];
    i[64 + t] = a[t] % b[t];
    i[128 + t] = __mulhi(a[t], b[t]);
    i[192 + t] = static_cast<int>(x[t]);
    l[t] = c[t] / b[t];
    l[64 + t] = __umul64hi(c[t], c[63 - t]);
}
"""


@pytest.fixture(scope="module")
def arithmetic(tmp_path_factory) -> Source:
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "k.cu").write_text(ARITHMETIC)
    return Source("k.cu", ("k",), folder)


@settings(max_examples=10)
@given(seeds)
def test_arithmetic_is_a_cards(arithmetic, seed) -> None:
    """NaN among floats, quotients towards zero, and floats beyond the integers."""
    rng = np.random.default_rng(seed)
    x, y = rng.choice(np.array([np.nan, np.inf, -np.inf, 0, -3.75, 2.5, 3e9, -3e9, 2.0**31], np.float32), (2, 64))
    a, c = rng.integers(-(2**31), 2**31, 64, np.int32), rng.integers(-(2**63), 2**63, 64, np.int64)
    b = rng.choice(np.array([-(2**30), -7, -2, 3, 5, 2**31 - 1], np.int32), 64)
    device = PtxDevice()
    f, i, whole = device.empty((5, 64), "float32"), device.empty((4, 64), "int32"), device.empty((2, 64), "int64")
    device.launch(arithmetic, "k", 1, 64, (*map(device.array, (x, y, a, b, c)), f, i, whole))
    assert np.array_equal(f.get(), [np.fmin(x, y), np.fmax(x, y), x < y, x != y, ~(x >= y)], equal_nan=True)
    product = c.view(np.uint64).astype(object) * c[::-1].view(np.uint64).astype(object)
    assert np.array_equal(whole.get()[1].view(np.uint64), product >> 64)
    wide, limits = a.astype(np.int64), np.iinfo(np.int32)
    nearest = np.clip(np.nan_to_num(x.astype(np.float64), nan=0), limits.min, limits.max)
    assert np.array_equal(i.get(), [np.trunc(a / b), np.fmod(a, b), wide * b >> 32, np.trunc(nearest)])
    assert whole.get()[0].tolist() == [abs(n) // abs(d) * (1 if (n < 0) == (d < 0) else -1) for n, d in pairs(c, b)]


def pairs(a: NDArray, b: NDArray) -> list[tuple[int, int]]:
    return list(zip(a.tolist(), b.tolist(), strict=True))


def test_a_warp_that_is_early_at_a_barrier_waits(tmp_path) -> None:
    """The second warp has half a round to go while the first is at the barrier again, above it in the text."""
    body = """
    #pragma unroll 1
    for (int i = 0; i < 3; i++) {
        __syncthreads();
        if (threadIdx.x < 32) continue;
        x[threadIdx.x] += 1.0f;
    }
    """
    assert interpreted(tmp_path, body).tolist() == [0] * 32 + [3] * 32


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("x[threadIdx.x + 1] = 1.0f;", "thread 63: access of 4 bytes outside global memory"),
        ("*reinterpret_cast<float4*>(x + threadIdx.x) = float4{1, 2, 3, 4};", "no multiple of that"),
        ("if (threadIdx.x < 32) __syncthreads(); x[threadIdx.x] = 1.0f;", "only some threads are at bar.sync"),
    ],
)
def test_what_a_card_would_refuse_is_refused(tmp_path, body, message) -> None:
    with pytest.raises(PtxError, match=message):
        interpreted(tmp_path, body)
