"""A pytest plugin for tests on a GPU: failures are printed at once, and a hung test says where before it is ended.

`python -m pytest -p bench.gpu.pytest_plugin`; pytest-timeout, where installed, ends the test.
"""

import os
import sys
import threading
from collections.abc import Iterator

import pytest

from bench.gpu.process import DEBUGGER_SECONDS, MARK, TEST_SECONDS, attach_debugger, debugger, prepare_child

REPORT_AFTER = TEST_SECONDS - DEBUGGER_SECONDS - 5.0  # seconds
LINES = 8  # of an assertion's message


def pytest_configure(config: pytest.Config) -> None:
    prepare_child()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Arm a timer around each test."""

    def report() -> None:
        sys.__stderr__.write(f"\n{MARK}{item.nodeid}: hangs\n")
        sys.__stderr__.flush()
        if debugger():
            attach_debugger(os.getpid(), sys.__stderr__.fileno())

    timer = threading.Timer(REPORT_AFTER, report)
    timer.daemon = True
    timer.start()
    try:
        return (yield)
    finally:
        timer.cancel()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Print a failed test and its message."""
    if not report.failed or os.environ.get("PYTEST_XDIST_WORKER"):
        return
    crash = getattr(report.longrepr, "reprcrash", None)
    message = crash.message if crash else str(report.longrepr)
    lines = [line for line in message.splitlines() if line.strip()][:LINES]
    print("".join(f"\n{MARK}{line[:300]}" for line in (report.nodeid, *lines)), flush=True)
