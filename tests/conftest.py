"""How the tests run: the profiles of hypothesis, and an end of run that counts what was skipped and why."""

from __future__ import annotations

import os
from collections import Counter

import pytest
from hypothesis import HealthCheck, settings

# A slow, shared machine must not fail a test, so there is no deadline and no health check that measures time.
dev = settings(max_examples=30, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("dev", dev)
settings.register_profile("ci", dev, derandomize=True, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


if os.environ.get("NEOX_TEST_DEVICE") == "stand-in":
    import stand_in_cuda

    stand_in_cuda.install()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """An oracle that is not installed is a reason to skip, and never to pass."""
    if item.get_closest_marker("oracle"):
        for name in ("torch", "transformers"):
            pytest.importorskip(name, reason=f"{name} is not installed: pip install -e '.[oracle]'")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each reason to skip, with how many tests it took."""
    reports = terminalreporter.stats.get("skipped", [])
    reasons = Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in reports)
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"skipped {count}: {reason}")
