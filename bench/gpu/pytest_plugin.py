"""A pytest plugin for tests on a GPU: print failures at once, and report where a test hangs before it is ended.

`python -m pytest -p bench.gpu.pytest_plugin`. pytest-timeout ends the test, if it is installed.
"""

import os
import sys
import threading
from collections.abc import Iterator

import pytest

from bench.gpu.process import DEBUGGER_SECONDS, MARK, TEST_SECONDS, attach_debugger, debugger, prepare_child

REPORT_AFTER = TEST_SECONDS - DEBUGGER_SECONDS - 5.0  # seconds
LINES = 8  # lines of an assertion's message that are printed


def pytest_configure(config: pytest.Config) -> None:
    """Make the test process die with its parent and print its stacks on a signal."""
    prepare_child()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Start a timer for each test that reports where it hangs."""

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
