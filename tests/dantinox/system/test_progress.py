"""Progress on standard error: of what takes long, on terminals and elsewhere, and never an error."""

import io
import re
import time

import pytest

from dantinox.system.progress import Progress, megabytes


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(9, "Bad file descriptor")


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(Progress, "terminal_seconds", 0.05)
    monkeypatch.setattr(Progress, "quiet_seconds", 0.05)
    monkeypatch.setattr(Progress, "line_seconds", 0.05)


def long_task(stream, monkeypatch, **options) -> None:
    monkeypatch.setattr("sys.stderr", stream)
    with Progress("reading 4 file(s)", **options) as progress:
        progress.advance()
        time.sleep(0.2)
        for _ in range(100):  # on a busy machine, until the task was shown twice
            if not isinstance(stream, io.StringIO) or stream.closed or stream.getvalue().count("reading") != 1:
                break
            time.sleep(0.1)


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["file", "terminal"])
def test_short_task_prints_nothing(stream, monkeypatch):
    for name in ("terminal_seconds", "quiet_seconds"):
        monkeypatch.setattr(Progress, name, 30)
    monkeypatch.setattr("sys.stderr", stream)
    with Progress("reading 4 file(s)", 4) as progress:
        progress.advance(4)
    assert stream.getvalue() == ""


def test_long_task_prints_lines_in_a_file(monkeypatch):
    stream = io.StringIO()
    long_task(stream, monkeypatch, total=4)
    first, _, *_, last = stream.getvalue().splitlines()
    assert re.fullmatch(r"reading 4 file\(s\): 25%, \d+ s", first)
    assert re.fullmatch(r"reading 4 file\(s\): done in \d+ s", last)
    assert "\r" not in stream.getvalue()


def test_long_task_rewrites_one_line_on_a_terminal(monkeypatch):
    stream = Terminal()
    long_task(stream, monkeypatch)
    assert re.fullmatch(r"(\rreading 4 file\(s\): \d+ s){2,}\r {22,}\r", stream.getvalue())


def test_failed_task_is_not_said_to_be_done(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    with pytest.raises(KeyboardInterrupt), Progress("tokenizing"):
        time.sleep(0.2)
        raise KeyboardInterrupt
    assert "tokenizing" in stream.getvalue() and "done" not in stream.getvalue()


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_streams_that_cannot_be_written_are_ignored(monkeypatch):
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed, Broken()):
        long_task(stream, monkeypatch)


def test_sizes_are_readable():
    assert [megabytes(n) for n in (0, 123_456, 12_345_678, 1_234_567_890)] == [
        "0.0 MB",
        "0.1 MB",
        "12.3 MB",
        "1,235 MB",
    ]
