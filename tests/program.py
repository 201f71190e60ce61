"""Running examples/generate.py: as a process of its own, or, which is faster, its main function in this one."""

from __future__ import annotations

import importlib.util
import io
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from neox.reference.errors import run

GENERATE = Path(__file__).resolve().parents[1] / "examples" / "generate.py"


@dataclass(frozen=True)
class Outcome:
    status: int
    stdout: str
    stderr: str


@cache
def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_program", GENERATE)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def in_process(argv: Sequence[str], stdin: bytes, capsys: pytest.CaptureFixture[str]) -> Outcome:
    """As the shell would see it; sys.stdin is replaced for the time."""
    capsys.readouterr()
    before, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(stdin))
    try:
        run(lambda: module().main(argv))
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdin = before
    captured = capsys.readouterr()
    return Outcome(status, captured.out, captured.err)


def as_process(argv: Sequence[str | bytes], stdin: bytes = b"", env: Mapping[str, str] | None = None) -> Outcome:
    ended = subprocess.run(
        [sys.executable, str(GENERATE), *argv],
        input=stdin,
        capture_output=True,
        env={**os.environ, **(env or {})},
        timeout=120,
        check=False,
    )
    return Outcome(ended.returncode, ended.stdout.decode("utf-8"), ended.stderr.decode("utf-8"))
