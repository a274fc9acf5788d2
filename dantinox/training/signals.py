"""Ctrl-C and SIGTERM: nothing is cut in two, and nothing is waited for that can be done again."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PATIENCE = 2.0  # seconds that the main thread has to answer, before what it computes is given up


class Interrupted(KeyboardInterrupt):
    """A signal ended the program; `code` is its exit code, 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


class StopRequest:
    """Use as a context manager around a loop, which looks at `asked` between its steps.

    Python hears a signal between two of its instructions: not while XLA compiles, which may take minutes. So while the
    loop is in `leave(rescue)`, where all there is to save is known, a signal ends it at once; and where the main
    thread does not answer, a watching thread calls `rescue` and ends the process. A second signal always interrupts.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self._rescue: Callable[[], None] | None = None
        self._heard, self._rescuing = threading.Event(), threading.Lock()

    def __enter__(self) -> "StopRequest":
        # Only the main thread may listen; elsewhere signals stay with whoever owns them.
        self._listening = threading.current_thread() is threading.main_thread()
        if self._listening:
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._woken = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            self._watcher = threading.Thread(target=self._watch, name="signals", daemon=True)
            self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._listening:
            self._listening = False
            signal.set_wakeup_fd(self._woken)
            for number, handler in self._before.items():
                signal.signal(number, handler)
            os.close(self._write)  # ends the watcher
            self._watcher.join(PATIENCE)
            os.close(self._read)

    @contextlib.contextmanager
    def leave(self, rescue: Callable[[], None]) -> Iterator[None]:
        """Inside, what is computed may be dropped; `rescue`, called at a signal, saves all there is to save.

        Raises:
            Interrupted: there was a signal.
        """
        self._rescue = rescue
        try:
            if self.asked is not None:
                raise Interrupted(self.asked)
            yield
        except Interrupted:
            with self._rescuing:  # or the watcher is at it, and ends the process
                rescue()
            raise
        finally:
            self._rescue = None

    def _handle(self, number: int, _: object) -> None:
        self._heard.set()
        again, self.asked = self.asked is not None, number
        if again or self._rescue is not None:
            raise Interrupted(number)

    def _watch(self) -> None:
        while word := os.read(self._read, 1):
            number, rescue = word[0], self._rescue
            if number not in SIGNALS or rescue is None or self._heard.wait(PATIENCE):
                continue
            with self._rescuing:
                try:
                    rescue()
                finally:
                    os._exit(128 + number)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Inside, SIGTERM raises `Interrupted` where nothing else listens, as Ctrl-C raises KeyboardInterrupt."""

    def handle(number: int, _: object) -> None:
        raise Interrupted(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
