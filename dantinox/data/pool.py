"""Processes that work on a stream of blocks.

They are programs of their own (`dantinox.data.worker`), not forks of this process or imports of its main module: JAX,
whose threads do not survive a fork, costs them neither time nor memory.
"""

import os
import pickle
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from dantinox.data.worker import receive, send

MAX_PROCESSES = 32  # more would wait for the process that reads
BYTES_PER_PROCESS = 1 << 22  # of files; less is not worth a start


def process_count(size: int) -> int:
    """Return the number of processes for files of `size` bytes; 0: the work is done in this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(cores, MAX_PROCESSES, size // BYTES_PER_PROCESS)
    return count if count > 1 else 0


class WorkerLostError(ChildProcessError):
    """A process was killed."""


class Pool:
    """Context manager of processes that call one function.

    Args:
        work: the function; with the results it is pickled, once for each process.
        count: number of processes; 0: it is called in this process.
    """

    def __init__(self, work: Callable[[Any], Any], count: int) -> None:
        self._work, self._count = work, count
        self._processes: list[subprocess.Popen[bytes]] = []
        self._idle: queue.SimpleQueue[tuple[subprocess.Popen[bytes], Connection]] = queue.SimpleQueue()

    def __enter__(self) -> "Pool":
        self._threads = ThreadPoolExecutor(max(1, self._count), "blocks")
        try:
            for _ in range(self._count):
                self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        own, other = Pipe()
        with other:
            paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "dantinox.data.worker", str(other.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[other.fileno()],
                # One thread each. Ctrl-C reaches this process only, which then ends the others.
                env=os.environ | {"PYTHONPATH": paths, "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
                process_group=0,
            )
        self._processes.append(process)
        self._idle.put((process, own))
        own.send_bytes(pickle.dumps(self._work))

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        self._threads.shutdown(cancel_futures=True)

    def map[B](self, blocks: Iterable[B]) -> Iterator[tuple[B, Any]]:
        """Yield each block with the result of the work on it, in order; few blocks are held at a time.

        Raises:
            WorkerLostError: a process was killed.
            Exception: what the work raised.
        """
        if not self._count:
            for block in blocks:
                yield block, self._work(block)
            return
        pending: deque[tuple[B, Future[Any]]] = deque()
        for block in blocks:
            pending.append((block, self._threads.submit(self._call, block)))
            while len(pending) > 2 * self._count:
                done, future = pending.popleft()
                yield done, future.result()
        for done, future in pending:
            yield done, future.result()

    def call(self, argument: Any) -> Any:
        """Return what the work returns."""
        [(_, result)] = self.map([argument])
        return result

    def _call(self, block: Any) -> Any:
        process, connection = self._idle.get()
        try:
            send(connection, block)
            result, error = receive(connection)
        except (EOFError, OSError):
            self._idle.put((process, connection))  # so that no other thread waits for it
            code = process.wait()
            reason = f"signal {-code} (memory may be full)" if code < 0 else f"code {code}"
            raise WorkerLostError(f"a process that prepares the text has ended: {reason}") from None
        self._idle.put((process, connection))
        if error is not None:
            raise error
        return result
