"""A pytest plugin that writes the outcome of each test as soon as it is known: a killed run keeps what it has shown."""

from __future__ import annotations

import json
import os

OUTCOMES = "GPU_SUITE_OUTCOMES"
"""Environment variable with the path of the file; each of its lines is one outcome as JSON."""


def pytest_runtest_logreport(report) -> None:
    """Appends what a test's call says, or its setup or teardown if that is not a pass."""
    if report.when != "call" and report.outcome == "passed":
        return
    crash = getattr(report.longrepr, "reprcrash", None)
    reason = crash.message if crash else str(report.longrepr or "")
    line = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration, "reason": reason[:400]}
    with open(os.environ[OUTCOMES], "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
