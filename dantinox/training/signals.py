"""Graceful shutdown on SIGINT, SIGTERM and SIGHUP, and after the reader of the output is gone."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dantinox.system import run_lock

SIGPIPE = 13  # its number; the module has it on POSIX only
HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none
RESPONSE_S = 2.0  # seconds that the main thread has to respond before the watcher ends the process


class Interrupted(KeyboardInterrupt):
    """A signal ended the program; `code` is its exit code, 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.code = 128 + number


def stop_signals() -> tuple[int, ...]:
    """Return the signals that stop a program: SIGINT, SIGTERM, and SIGHUP unless it is ignored, as under nohup."""
    if HANGUP is None or signal.getsignal(HANGUP) is signal.SIG_IGN:
        return signal.SIGINT, signal.SIGTERM
    return signal.SIGINT, signal.SIGTERM, HANGUP


@contextlib.contextmanager
def handled(handler: Callable[[int, Any], None], numbers: Sequence[int] | None = None) -> Iterator[None]:
    """Within this context `handler` handles signals, by default `stop_signals()`; only the main thread can do so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = stop_signals() if numbers is None else numbers
    previous_handlers = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous_handler in previous_handlers.items():
            signal.signal(number, previous_handler)


class SignalHandler:
    """A context manager around a loop that checks `received` between steps.

    Python runs signal handlers between two instructions, so not while XLA compiles, which may take minutes. Inside
    `interruptible(on_signal)` a signal therefore ends the work at once. If the main thread does not respond, a watcher
    thread calls `on_signal` and ends the process. A second SIGINT or SIGTERM always interrupts.
    """

    def __init__(self, deferred: bool = False) -> None:
        """Make the handler; `deferred`: `interruptible` interrupts nothing, for other processes take part in it."""
        self.received: int | None = None
        self._deferred = deferred
        self._on_signal: Callable[[], None] | None = None
        self._handled, self._saving = threading.Event(), threading.Lock()

    def __enter__(self) -> "SignalHandler":
        # Only the main thread can set signal handlers.
        self._installed = threading.current_thread() is threading.main_thread()
        if self._installed:
            self._signals = stop_signals()
            self._handlers = contextlib.ExitStack()
            self._handlers.enter_context(handled(self._handle, self._signals))
            self._read_fd, self._write_fd = os.pipe()
            os.set_blocking(self._write_fd, False)
            self._previous_wakeup_fd = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
            self._watcher = threading.Thread(target=self._watch, name="signals", daemon=True)
            self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._installed:
            self._installed = False
            signal.set_wakeup_fd(self._previous_wakeup_fd)
            self._handlers.close()
            os.close(self._write_fd)  # ends the watcher
            self._watcher.join(RESPONSE_S)
            os.close(self._read_fd)

    @contextlib.contextmanager
    def interruptible(self, on_signal: Callable[[], None]) -> Iterator[None]:
        """Within this context a signal abandons the current work, after `on_signal` has saved what needs saving.

        Raises:
            Interrupted: a signal arrived.
        """
        if self._deferred:
            yield
            return
        self._on_signal = on_signal
        try:
            if self.received is not None:
                raise Interrupted(self.received)
            yield
        except Interrupted:
            with self._saving:  # the watcher may be saving too, and then ends the process
                on_signal()
            raise
        finally:
            self._on_signal = None

    def _handle(self, number: int, _: object) -> None:
        self._handled.set()
        if number == HANGUP and self.received is not None:
            return  # a terminal that closes sends more than one, and SIGTERM may come with it
        is_second, self.received = self.received not in (None, HANGUP), number
        if is_second or self._on_signal is not None:
            raise Interrupted(number)

    def _watch(self) -> None:
        while signal_byte := os.read(self._read_fd, 1):
            number, on_signal = signal_byte[0], self._on_signal
            if number not in self._signals or on_signal is None or self._handled.wait(RESPONSE_S):
                continue
            with self._saving:
                try:
                    on_signal()
                finally:
                    run_lock.release_all()
                    os._exit(128 + number)


@contextlib.contextmanager
def sigterm_as_exception() -> Iterator[None]:
    """Within this context SIGTERM and SIGHUP raise `Interrupted`, as Ctrl-C raises KeyboardInterrupt."""

    def handle(number: int, _: object) -> None:
        raise Interrupted(number)

    with handled(handle, [number for number in stop_signals() if number != signal.SIGINT]):
        yield
