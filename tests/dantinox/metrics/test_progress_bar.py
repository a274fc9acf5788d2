"""The progress of a run: a rate of lines, the time left, narrow and dumb terminals, an output that is gone."""

import io
import re

import pytest

from dantinox.metrics import progress_bar
from dantinox.metrics.progress_bar import ProgressLine
from dantinox.system.console import Console


class Clock:
    """Seconds that pass when a test says so."""

    now = 1000.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress_bar, "time", clock)
    return clock


def show(clock, steps, seconds, *, every=1, total=None, width=200, **options):
    """What is printed when each step takes this time in seconds, and the first one a minute more."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        console = lambda: Console(file=out, highlight=False, soft_wrap=True, width=width, **options)
        patch.setattr(progress_bar, "plain_console", console)
        with ProgressLine(total or steps[-1], steps[0] - 1) as line:
            clock.now += 60
            for step in steps:
                clock.now += seconds
                if step % every == 0 or step in (1, steps[-1]):
                    line.update(step, {"loss": 2.0, "lr": 1e-3, "tokens_per_s": 1e4, "mfu": 0.5})
    return out.getvalue()


TERMINAL = {"force_terminal": True, "color_system": None}


@pytest.mark.parametrize("seconds", [0.001, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("first", [1, 501])
def test_lines_without_a_terminal_are_few_and_have_the_time_left(clock, seconds, every, first):
    steps = range(first, first + 400)
    lines = show(clock, steps, seconds, every=every).splitlines()
    assert len(lines) <= 2 + 400 * seconds / 10 and len(lines) >= 2
    assert re.match(rf"step {steps[-1]}/{steps[-1]} ", lines[-1]) and "compiled" in lines[0]
    for line in lines[1:]:
        step = int(re.match(r"step (\d+)/", line)[1])
        left = round((steps[-1] - step) * seconds)
        minutes, rest = divmod(left, 60)
        time = f"{minutes}:{rest:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
        assert line.endswith(f"| eta {time}"), (line, left)


@pytest.mark.parametrize("width", [200, 100, 80, 60, 47])
def test_terminal_is_updated_in_place_and_shows_the_time_left(clock, width):
    out = show(clock, range(1, 1001), 0.01, width=width, **TERMINAL)
    assert out.count("\n") == 1  # at the end
    frames = re.sub(r"\x1b\[[?\d]*[A-Za-z]", "", out).strip("\n").split("\r")
    assert 10 <= len(frames) <= 130  # ten a second
    assert all(len(frame) <= width for frame in frames)
    assert all(re.search(r"loss 2\.0000 .*\| eta 0:\d\d$", frame.rstrip()) for frame in frames[4:])
    assert "step 1000/1000" in frames[-1]


def test_dumb_terminal_gets_lines_as_a_file_does(clock, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert len(show(clock, range(1, 101), 1.0, **TERMINAL).splitlines()) == 11


class Broken(io.StringIO):
    """An output that fails."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


@pytest.mark.parametrize("options", [{}, TERMINAL], ids=["file", "terminal"])
@pytest.mark.parametrize(
    "error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left"), OSError(5, "I/O error")]
)
def test_output_that_fails_is_given_up(error, options, monkeypatch, capsys):
    console = Console(file=Broken(error), **options)
    monkeypatch.setattr(progress_bar, "plain_console", lambda: console)
    with ProgressLine(3) as line:
        for step in (1, 2, 3):
            line.update(step, {"loss": float("nan"), "lr": 0.0, "tokens_per_s": float("inf"), "mfu": 0.0})
            line.print_line("an evaluation")
        line.print_last("saved")
    is_closed = isinstance(error, BrokenPipeError)
    assert line.has_failed and line.is_closed == is_closed
    told = [] if is_closed else [f"standard output: {error.strerror}; training continues without it"]
    assert capsys.readouterr().err.splitlines() == [*told, "saved"]
