"""NVRTC compiles every kernel for every card it must run on, and none of them spills a register."""

from __future__ import annotations

from pathlib import Path

import pytest
from nvrtc import architectures, compiled, require_nvrtc, usage

from neox.gpu import ops
from neox.gpu.source import Source

# 1024 threads of 64 registers fill a multiprocessor. Where blocks are smaller, more are allowed, and it is said why.
REGISTERS = {
    "attention_decode.cu": 96,  # a query and an average: five blocks of 128 threads fit; in 16 bits, with 80, six
    # Sums, scores and queries of a whole tile: in the 20B, with 168, three blocks of 128 threads fit.
    "attention_prefill.cu": 255,
    "wide.cu": 168,  # 64 sums and their fragments: two blocks of 128 threads fit, which have 96 KB on their way
    "gemm.cu": 96,  # 32 sums and their fragments: five blocks of 128 threads fit
    # Two blocks of 256 threads fit, which have 64 to 96 KB on their way.
    **dict.fromkeys(("fused_qkv.cu", "fused_mlp.cu", "fused_output.cu"), 128),
    "matvec.cu": 128,  # two blocks of 256 threads fit, which have 64 KB on their way
}


@pytest.fixture(autouse=True)
def nvrtc_is_there() -> None:
    require_nvrtc()


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
BENCHMARK = Source("benchmark.cu", ("draw<float>", "draw<__half>", "read_stream", "copy_stream", "nothing"), EXAMPLES)


@pytest.mark.parametrize("source", [*ops.SOURCES, BENCHMARK], ids=lambda source: source.file)
def test_every_kernel_compiles_for_every_card_without_spills(source: Source) -> None:
    for arch in architectures():
        used = usage(source, arch)
        assert set(used) == set(source.kernels)
        for kernel, taken in used.items():
            assert taken.spilled_bytes == taken.stack_bytes == 0, f"{kernel} on sm_{arch}"
            assert taken.registers <= REGISTERS.get(source.file, 64), f"{kernel} on sm_{arch}"


def test_every_kernel_file_is_listed() -> None:
    from neox.gpu.source import KERNELS

    assert {source.file for source in ops.SOURCES} == {path.name for path in KERNELS.glob("*.cu")}


def test_a_spill_would_be_seen(tmp_path: Path) -> None:
    """256 values alive at once, in the 32 registers that 2048 threads on one multiprocessor leave."""
    text = """
    extern "C" __global__ void __launch_bounds__(1024, 2) greedy(float* x) {
        float v[256];
        #pragma unroll
        for (int i = 0; i < 256; i++) v[i] = x[i * 1024 + threadIdx.x];
        __syncthreads();
        #pragma unroll
        for (int i = 0; i < 256; i++) x[i * 1024 + threadIdx.x] = v[255 - i] * v[i];
    }
    """
    (tmp_path / "greedy.cu").write_text(text)
    assert usage(Source("greedy.cu", ("greedy",), tmp_path), "90")["greedy"].spilled_bytes > 0


def test_what_nvrtc_lacks_is_refused(tmp_path: Path) -> None:
    """g++ knows INFINITY, NVRTC does not: this is why both must compile a kernel."""
    (tmp_path / "k.cu").write_text('extern "C" __global__ void k(float* x) { *x = INFINITY; }')
    with pytest.raises(Exception, match="INFINITY"):
        compiled(Source("k.cu", ("k",), tmp_path), "90")


def test_the_table_of_the_readme_is_what_is_compiled() -> None:
    import kernel_table

    if not kernel_table.PAGE.is_file():
        pytest.skip("there is no gpu/ beside tests/")
    assert kernel_table.shown() == kernel_table.table(), "python tests/kernel_table.py writes it anew"
