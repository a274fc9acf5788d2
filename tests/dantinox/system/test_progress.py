"""Progress on standard error: of what takes long, on terminals and elsewhere, and never an error."""

import io
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
        time.sleep(0.3)


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["file", "terminal"])
def test_short_task_prints_nothing(stream, monkeypatch):
    monkeypatch.setattr("sys.stderr", stream)
    with Progress("reading 4 file(s)", 4) as progress:
        progress.advance(4)
    assert stream.getvalue() == ""


def test_long_task_prints_lines_in_a_file(monkeypatch):
    stream = io.StringIO()
    long_task(stream, monkeypatch, total=4)
    first, *_, last = stream.getvalue().splitlines()
    assert first == "reading 4 file(s): 25%, 0 s" and last == "reading 4 file(s): done in 0 s"
    assert "\r" not in stream.getvalue()


def test_long_task_rewrites_one_line_on_a_terminal(monkeypatch):
    stream = Terminal()
    long_task(stream, monkeypatch)
    text = stream.getvalue()
    assert "\n" not in text and text.startswith("\rreading 4 file(s): 0 s")
    assert text.endswith("\r" + " " * len("reading 4 file(s): 0 s") + "\r")


def test_failed_task_is_not_said_to_be_done(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    with pytest.raises(KeyboardInterrupt), Progress("tokenizing"):
        time.sleep(0.2)
        raise KeyboardInterrupt
    assert "tokenizing" in stream.getvalue() and "done" not in stream.getvalue()


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
