"""The PTX that NVRTC emits computes what the source says, inline assembly included."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from nvrtc import require_nvrtc
from ptx_device import PtxDevice
from ptx_machine import PtxError
from test_host_device import sources
from test_kernel_mutants import CASES
from test_kernels_ptx import TYPES, check_tile

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


def check_wrappers(source: Source) -> None:
    device = PtxDevice()
    for dtype in TYPES:
        for by_columns in (True, False):
            check_tile(device, source, dtype, by_columns)
    y = device.empty(4, "float32")
    device.launch(source, "unwanted", 1, 1, (device.array(np.ones(4, np.float32)), y))
    assert (y.get() == 0).all()


CHECKS = [(check, case) for check, (_, cases) in CASES.items() for case in cases]


@pytest.mark.parametrize(("check", "case"), CHECKS, ids=[f"{c.__name__}-{'-'.join(map(str, a))}" for c, a in CHECKS])
def test_what_the_compiler_made_of_each_kernel_is_right(check, case) -> None:
    check(PtxDevice(), *case)


def test_the_assembly_computes_what_its_stand_in_does(tmp_path) -> None:
    check_wrappers(wrappers(tmp_path))


# Wrong assembly, which the host device does not see at all.
MUTANTS = [
    ("{%4,%5,%6,%7}", "{%4,%6,%5,%7}"),
    ("{%8,%9}", "{%9,%8}"),
    ('"{%0,%1,%2,%3}, {%4', '"{%0,%1,%3,%2}, {%4'),
    ("{%8,%9}, {%0,%1,%2,%3}", "{%8,%9}, {%1,%0,%2,%3}"),
    ("m8n8.x2.trans.shared", "m8n8.x2.shared"),
    ("m8n8.x2.shared", "m8n8.x2.trans.shared"),
    ("m8n8.x4.shared", "m8n8.x4.trans.shared"),
    ("m8n8.x4.trans.shared", "m8n8.x4.shared"),
    ('"=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])', '"=r"(r[0]), "=r"(r[2]), "=r"(r[1]), "=r"(r[3])'),
    ("int bytes = wanted ? 16 : 0", "int bytes = 16"),
    ('DEFINE_MMA(__nv_bfloat16, "bf16")', 'DEFINE_MMA(__nv_bfloat16, "f16")'),
]


@pytest.mark.parametrize(("right", "wrong"), MUTANTS, ids=[wrong for _, wrong in MUTANTS])
def test_wrong_assembly_is_killed(tmp_path, right, wrong) -> None:
    with pytest.raises((AssertionError, PtxError)):
        check_wrappers(wrappers(tmp_path, right, wrong))


@pytest.mark.parametrize(
    ("body", "instruction"),
    [("x[0] = __popc(threadIdx.x);", "popc"), ("x[0] = __umulhi(threadIdx.x, 1u << 31);", "mul.hi.u32|shr")],
)
def test_an_instruction_it_does_not_know_is_named(tmp_path, body, instruction) -> None:
    with pytest.raises(NotImplementedError, match=instruction):
        interpreted(tmp_path, body)


def interpreted(folder: Path, body: str) -> None:
    (folder / "k.cu").write_text(f'extern "C" __global__ void k(float* x) {{ {body} }}')
    device = PtxDevice()
    device.launch(Source("k.cu", ("k",), folder), "k", 1, 64, (device.zeros(64, "float32"),))


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
