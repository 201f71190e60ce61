"""The gdb session of gpu/host/README.md, run as it is written there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import neox.gpu.host.build
from neox.gpu.source import KERNELS

PAGE = Path(neox.gpu.host.build.__file__).with_name("README.md")


def test_the_session_of_the_page_stops_at_its_thread(tmp_path: Path) -> None:
    if not shutil.which("gdb"):
        pytest.skip("gdb is not installed")
    page = PAGE.read_text()
    (program,) = re.findall(r"```python\n(.*?)```", page, re.S)
    (tmp_path / "norm.py").write_text(program)
    commands = [c.replace("gpu/kernels", str(KERNELS)) for c in re.findall(r"^\(gdb\) (.*)$", page, re.M)]
    options = [f"-ex={command}" for command in ("set debuginfod enabled off", *commands)]
    command = ["gdb", "-q", "-batch", *options, "--args", sys.executable, str(tmp_path / "norm.py")]
    said = subprocess.run(command, capture_output=True, text=True).stdout
    assert "hit Breakpoint 1" in said, said
    shown = re.findall(r"^(?:\$\d+ = |\d+\t).*$", page, re.M)
    assert len(shown) == 4
    for line in shown:  # addresses differ from run to run
        assert re.sub(r"0x\w+", "", line) in re.sub(r"0x\w+", "", said), said
