"""Ends all processes of a run when one of them fails, dies or hangs: collectives on devices would wait for ever.

A thread in each process tells process 0 every `BEAT_S` seconds that it is alive and how far its main thread is. A
process that fails says so in the store of the coordination service; process 0 says it of those that are silent. Whoever
reads it ends, in the main thread if that waits in `agreement`, else without unwinding the stack.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NoReturn

import jax
from jax.errors import JaxRuntimeError

from dantinox.distributed import agreement, processes
from dantinox.distributed.agreement import ROOT, AgreedError
from dantinox.system import run_lock, streams

BEAT_S = 2.0
DEAD_S = 30.0  # without a heartbeat; Python may hold its global lock for some of them
STUCK_S = 1800.0  # without a step, and ten times as long as the longest step so far
GRACE_S = 3.0  # that the main thread has to end by itself
UNWIND_S = 30.0  # that the main thread has to end once another process, or itself, has failed
LEAVE_S = 10.0  # that process 0, which serves the store, waits for the others to have read why they end
FAILED = f"{ROOT}/failed"


@dataclass
class _Peer:
    """What process 0 knows of another process, by its own clock."""

    mark: str = ""
    heard: float = field(default_factory=time.monotonic)


class Watch:
    """The thread of one process; `mark` is called where the main thread makes progress."""

    def __init__(self) -> None:
        self.torn = False  # this process ends without the others
        self.progress, self._moved, self._longest = 0, time.monotonic(), 0.0
        self._leaving, self._peers = threading.Event(), [_Peer() for _ in range(processes.count())]
        self._heard = time.monotonic()  # from the store
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Exchange the names of the hosts and start the thread."""
        agreement.hosts[:] = agreement.gather("hosts", socket.gethostname(), processes.JOIN_S)
        self._thread.start()
        if not processes.is_first():
            threading.Thread(target=self._guard, name="watch of process 0", daemon=True).start()

    def mark(self) -> None:
        """Note that the main thread has made progress, such as a step."""
        now = time.monotonic()
        if self.progress:
            self._longest = max(self._longest, now - self._moved)
        self.progress, self._moved = self.progress + 1, now

    def leave(self) -> None:
        """End the thread, and with it the judgement of other processes."""
        self._leaving.set()
        self._thread.join(2 * agreement.POLL_MS / 1000)

    def tear(self, error: BaseException) -> None:
        """End this process for an error that the others do not know yet, and tell them; threads do not wait longer."""
        if self.torn:
            return
        self.torn = True
        self._leaving.set()
        if error is not agreement.failure:
            text = agreement.message_of(error)
            self._tell(processes.index(), f"has ended: {text}")
            agreement.failure = AgreedError(text)
        timer = threading.Timer(UNWIND_S, _exit, [1])
        timer.daemon = True
        timer.start()

    def _tell(self, index: int, text: str) -> None:
        """Tell all processes that one has failed; the first message counts."""
        with contextlib.suppress(JaxRuntimeError):  # another was faster, or the store is gone
            processes.client().key_value_set(FAILED, json.dumps([index, text]))

    def wait_for_readers(self) -> None:
        """In process 0, wait until the others have read why they end: the store ends with this process."""
        store = processes.client()
        if not processes.is_first():
            with contextlib.suppress(JaxRuntimeError):
                store.key_value_set(f"{ROOT}/left/{processes.index()}", "", allow_overwrite=True)
            return
        deadline = time.monotonic() + LEAVE_S
        with contextlib.suppress(JaxRuntimeError):
            while time.monotonic() < deadline:
                left = len(store.key_value_dir_get(f"{ROOT}/left/"))
                silent = sum(time.monotonic() - peer.heard > 3 * BEAT_S for peer in self._peers[1:])
                if left + silent >= processes.count() - 1:
                    return
                time.sleep(0.1)

    def verdict(self, limit_s: float) -> AgreedError | None:
        """Wait up to `limit_s` seconds for the message of a process that failed, and return it."""
        deadline = time.monotonic() + limit_s
        while agreement.failure is None and time.monotonic() < deadline:
            time.sleep(0.1)
        return agreement.failure

    def _guard(self) -> None:
        """End this process if the store is silent, as in a frozen process 0: calls to it have no time limit."""
        silent = 0  # seen so in a row: after a pause of this whole process, the other thread is first
        while not self._leaving.wait(BEAT_S):
            silent = silent + 1 if time.monotonic() - self._heard > DEAD_S else 0
            if silent > 2:
                self._end_without_store(f"has died or hangs: it was not heard for {DEAD_S:.0f} s")

    def _end_without_store(self, text: str) -> NoReturn:
        streams.report(f"error: {agreement.describe(0)} {text}")
        _exit(1)

    def _run(self) -> None:
        store, own = processes.client(), processes.index()
        beat = -BEAT_S
        while not self._leaving.is_set():
            try:
                if time.monotonic() - beat >= BEAT_S:
                    beat = time.monotonic()
                    store.key_value_set(f"{ROOT}/beat/{own}", f"{self.progress} {beat}", allow_overwrite=True)
                    self._heard = time.monotonic()
                    if own == 0:
                        self._look(store.key_value_dir_get(f"{ROOT}/beat/"))
                index, text = json.loads(store.blocking_key_value_get(FAILED, agreement.POLL_MS))
                failure = AgreedError(f"{agreement.describe(index)} {text}")
            except JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" in str(error):
                    continue
                if (
                    not self._leaving.is_set()
                ):  # at once: JAX aborts processes that lose the store, with its own message
                    self._end_without_store("has died, or cannot be reached")
                return
            self._end(failure)
            return

    def _look(self, beats: list[tuple[str, str]]) -> None:
        """In process 0, name a process that is dead or stuck."""
        now, marks = time.monotonic(), dict(enumerate([0] * processes.count()))
        for key, text in beats:
            index, mark = int(key.rpartition("/")[2]), text
            marks[index] = int(text.split()[0])
            if self._peers[index].mark != mark:
                self._peers[index] = _Peer(mark, now)
        for index, peer in enumerate(self._peers):
            if index and now - peer.heard > DEAD_S:
                self._tell(index, f"has died or hangs: it was not heard for {DEAD_S:.0f} s")
                return
        behind = min(marks, key=lambda index: marks[index])
        if self.progress and now - self._moved > max(STUCK_S, 10 * self._longest):
            self._tell(behind, f"is the last in a run that made no step for {now - self._moved:.0f} s")

    def _end(self, failure: AgreedError) -> None:
        if self._leaving.is_set():
            return
        agreement.failure = failure
        if self._leaving.wait(GRACE_S):
            return
        if processes.is_first():
            streams.report(f"error: {failure}")
        run_lock.release_all()
        self.wait_for_readers()
        _exit(1)


watch: Watch | None = None


def mark() -> None:
    """Note that the main thread has made progress; with one process, nothing is done."""
    if watch is not None:
        watch.mark()


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Within this context an error that ends this process ends the others too; with one process, nothing is done."""
    if watch is None:
        yield
        return
    try:
        yield
    except JaxRuntimeError as error:  # of a collective, perhaps because another process is gone, or of full memory
        is_own = "RESOURCE_EXHAUSTED" in str(error)
        if not is_own and (verdict := watch.verdict(DEAD_S + 3 * BEAT_S)) is not None:
            watch.tear(verdict)
            raise verdict from None
        watch.tear(error)
        raise
    except BaseException as error:
        if not agreement.is_settled(error):
            watch.tear(error)
        raise


def run(program: Callable[[], int]) -> int:
    """Run a program that has joined others and return its exit code.

    If it ends in all processes, they leave together. Otherwise the process ends without waiting for its devices.
    """
    global watch
    watch = Watch()
    watch.start()
    try:
        code = program()
    except SystemExit as stop:
        code = agreement.exit_code(stop)
    except KeyboardInterrupt as interruption:
        watch.tear(interruption)
        code = agreement.exit_code(interruption)
    except BaseException as error:
        traceback.print_exc()
        watch.tear(error)
        code = 1
    if not watch.torn:
        try:
            agreement.gather("end", None)
            watch.leave()
            jax.distributed.shutdown()
            return code
        except (AgreedError, JaxRuntimeError):
            pass  # another process has failed meanwhile; this one has done its work
    watch.wait_for_readers()
    _exit(code)


def _exit(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
