"""A weaker host device is noticed: each mutant of its headers makes the test named beside it fail.

These tests hold the device to its diagnoses. Were it to lose one, the kernels' tests would go on passing.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial

import pytest
import test_host_device as tests
from devices import host
from test_host_device import sources
from test_kernels_ptx import check_tile

from neox.gpu.host import build
from neox.gpu.host.module import KernelError
from neox.gpu.source import Source

Check = Callable[[Source], None]


def missing_barrier(kernel: str) -> Check:
    case = next(barrier for barrier in tests.BARRIERS if barrier[0] == kernel)
    return lambda source: tests.test_a_missing_barrier_is_seen_by_forward_or_reverse_order(source, *case)


def fault(kernel: str) -> Check:
    case = next(fault for fault in tests.FAULTS if fault[0] == kernel)
    return lambda source: tests.test_a_fault_is_told_with_its_thread_and_line(source, *case)


def tile(source: Source) -> None:
    for by_columns in (True, False):
        check_tile(host(), source, "float16", by_columns)


QUEUE = """ready.bottom = (ready.bottom + 2 * MOST_THREADS - 1) % (2 * MOST_THREADS);
        ready.size++;
        ready_at(0) = woken[i];"""

# Header, right, wrong, the check that must fail, the kernels it takes.
MUTANTS: list[tuple[str, str, str, Check, str]] = [
    ("schedule.h", "ready_at(ready.size++) = woken[i];", QUEUE, missing_barrier("two_sums"), "faulty.cu"),
    ("schedule.h", "if (request.order == FORWARD) for", "for",
     tests.test_schedules_are_forward_reverse_and_drawn, "faulty.cu"),
    ("async_copy.h", "if (request.order == REVERSE ||", "if (true ||", missing_barrier("async_copy"), "faulty.cu"),
    ("async_copy.h", "if (request.order == REVERSE ||", "if (", missing_barrier("async_overwrite"), "faulty.cu"),
    ("memory.h", "poison(__start_host_shared, __stop_host_shared - __start_host_shared);", "",
     tests.test_what_was_never_written_is_nan, "faulty.cu"),
    ("shared.ld", "*(.bss._ZZN12_GLOBAL__N_1*)", "", tests.test_what_was_never_written_is_nan, "faulty.cu"),
    ("memory.h", "poison(dynamic_shared.start, request.shared_bytes);", "",
     tests.test_what_was_never_written_is_nan, "faulty.cu"),
    ("memory.h", "mprotect(pages + used, PAGE, PROT_NONE);", "",
     tests.test_access_past_dynamic_shared_memory_is_told, "faulty.cu"),
    ("barrier.h", "b.place.line != place.line ||", "", fault("divergent_barrier"), "faulty.cu"),
    ("launch.h", "if (block.barrier.arrived) {", "if (false) {", fault("early_end"), "faulty.cu"),
    ("launch.h", "if (!failed && block.alive) report_deadlock();", "",
     tests.test_deadlock_says_who_waits_where, "faulty.cu"),
    ("launch.h", "while (std::gcd(progress.step, progress.blocks) != 1)", "while (false)",
     partial(tests.test_each_thread_of_each_block_runs_once, order="seeded", seed=1), "faulty.cu"),
    ("warp.h", "if (mask & warp.done)", "if (false)", tests.test_mask_of_lanes_that_have_ended_is_told, "faulty.cu"),
    ("warp.h", "else if (c.mask & mask)", "else if (false)", fault("overlapping_masks"), "faulty.cu"),
    ("warp.h", "c.operation != operation || c.place.line != p.line", "false", fault("two_collectives"), "faulty.cu"),
    ("warp.h", "source > (lane | (width - 1)) ? lane", "source > lane ? lane",
     partial(tests.check_shuffles, by=3, schedule=("forward", 0)), "faulty.cu"),
    ("half.h", "wide + 0x7fff + (wide >> 16 & 1)", "wide + 0x8000",
     partial(tests.test_half_types_round_as_numpy_does, dtype="bfloat16"), "faulty.cu"),
    ("half.h", "return H::rounded(double(float(a)) * double(float(b)) + double(float(c)))",
     "return H::rounded(float(double(float(a)) * double(float(b)) + double(float(c))))",
     tests.test_fused_multiply_add_rounds_once, "faulty.cu"),
    ("tensor_core.h", "a[g + 8 * (i % 2)][2 * t + which + 8 * (i / 2)]",
     "a[g + 8 * (i / 2)][2 * t + which + 8 * (i % 2)]", tile, "wrappers.cu"),
    ("tensor_core.h", "TRANSPOSED ? element(rows, column, row)", "false ? element(rows, column, row)",
     tile, "wrappers.cu"),
    ("tensor_core.h", "m->d[i] = m->c[i] +", "m->d[i] =", tile, "wrappers.cu"),
]  # fmt: skip


@pytest.mark.wrong_kernels
@pytest.mark.parametrize(
    ("header", "right", "wrong", "check", "file"), MUTANTS, ids=[f"{m[0]}-{m[1]}" for m in MUTANTS]
)
def test_a_weaker_host_device_is_noticed(header, right, wrong, check, file, tmp_path, monkeypatch) -> None:
    for path in (*build.HERE.glob("*.h"), build.HERE / "shared.ld"):
        shutil.copy(path, tmp_path)
    text = (tmp_path / header).read_text()
    assert right in text, "the mutant no longer fits the header"
    (tmp_path / header).write_text(text.replace(right, wrong, 1))
    monkeypatch.setattr(build, "HERE", tmp_path)
    monkeypatch.setenv("NEOX_CACHE", str(tmp_path / "cache"))
    build._headers.cache_clear()
    kernels = tmp_path / "kernels"
    kernels.mkdir()
    try:
        with pytest.raises((AssertionError, KernelError, pytest.fail.Exception)):
            check(sources(kernels, file))
    finally:
        build._headers.cache_clear()
