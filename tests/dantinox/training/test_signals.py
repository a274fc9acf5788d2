"""SIGINT, SIGTERM and SIGHUP: handled at once if nothing is lost, otherwise after the step."""

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from dantinox.training import signals
from dantinox.training.signals import Interrupted, SignalHandler, handled, sigterm_as_exception, stop_signals

FOLDER = Path(__file__).parents[3] / "dantinox" / "training"
EACH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])


@EACH
def test_signal_waits_for_steps_and_interrupts_evaluations(number):
    saved = []
    with SignalHandler() as stop:
        assert stop.received is None
        signal.raise_signal(number)
        assert stop.received == number and saved == []  # the step continues
        with pytest.raises(Interrupted) as error, stop.interruptible(lambda: saved.append("before")):
            saved.append("this was not to be done")
        assert error.value.code == 128 + number
    with SignalHandler() as stop:
        with pytest.raises(Interrupted), stop.interruptible(lambda: saved.append("inside")):
            signal.raise_signal(number)
            saved.append("neither was this")
        if number != signal.SIGHUP:
            with pytest.raises(Interrupted):  # who asks twice does not want to wait
                signal.raise_signal(number)
    assert saved == ["before", "inside"]


def test_signal_handlers_are_restored():
    before = [signal.getsignal(number) for number in stop_signals()]
    with pytest.raises(ZeroDivisionError), SignalHandler():
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in stop_signals()] == before
    with pytest.raises(KeyboardInterrupt) as error:
        signal.raise_signal(signal.SIGINT)
    assert not isinstance(error.value, Interrupted)


@pytest.mark.parametrize("first", [signal.SIGHUP, signal.SIGTERM])
def test_terminal_that_sends_several_hangups_does_not_cut_the_save_short(first):
    saved = []

    def save():
        signal.raise_signal(signal.SIGHUP)
        saved.append("all")

    with SignalHandler() as stop:
        signal.raise_signal(first)
        signal.raise_signal(signal.SIGHUP)
        assert stop.received == first
    with SignalHandler() as stop, pytest.raises(Interrupted) as error, stop.interruptible(save):
        signal.raise_signal(first)
    assert saved == ["all"] and error.value.code == 128 + first


def test_ignored_hangup_stays_ignored():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert stop_signals() == (signal.SIGINT, signal.SIGTERM)
        with sigterm_as_exception(), SignalHandler() as stop, stop.interruptible(lambda: None):
            signal.raise_signal(signal.SIGHUP)
            assert stop.received is None and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signal_outside_the_loop_is_an_exception_with_its_exit_code(number):
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE)]
    with pytest.raises(Interrupted) as error, sigterm_as_exception():
        signal.raise_signal(number)
    assert error.value.code == 128 + number
    with handled(lambda number, frame: None):
        after = [signal.getsignal(each) for each in (signal.SIGQUIT, signal.SIGPIPE)]
        assert after == before[2:]  # these are not for us
    assert [
        signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE)
    ] == before


def test_system_without_hangup_has_two_stop_signals(monkeypatch):
    monkeypatch.setattr(signals, "HANGUP", None)  # as on Windows
    assert stop_signals() == (signal.SIGINT, signal.SIGTERM)


DEAF = """
    import hashlib, sys
    sys.path.insert(0, sys.argv[1])
    from signals import SignalHandler

    with SignalHandler() as stop, stop.interruptible(lambda: print("saved", flush=True)):
        print("ready", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # Python hears nothing until it returns, as in a compilation
"""


@EACH
@pytest.mark.sampled(2)
def test_unresponsive_program_is_saved_and_exits_in_five_seconds(number):
    command = [sys.executable, "-S", "-c", textwrap.dedent(DEAF), str(FOLDER)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.2)
        start = time.monotonic()
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert time.monotonic() - start < 5
        assert (process.returncode, out, err) == (128 + number, "saved\n", "")
    finally:
        process.kill()
