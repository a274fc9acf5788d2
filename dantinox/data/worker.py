"""A process of `dantinox.data.pool`: it receives a function, then blocks, and answers (result, error) to each."""

import contextlib
import itertools
import os
import pickle
import sys
from multiprocessing.connection import Connection
from typing import Any

from dantinox.system.malloc import release_freed_memory

BLOCKS_PER_RELEASE = 8  # of memory


def serve(connection: Connection) -> None:
    """Answer until the other end is closed, or its process has ended."""
    with contextlib.suppress(EOFError, ConnectionError):
        work = pickle.loads(connection.recv_bytes())
        for number in itertools.count(1):
            block = receive(connection)
            try:
                answer = work(block), None
            except Exception as error:
                answer = None, _portable(error, getattr(block, "name", ""))
            send(connection, answer)
            del block, answer
            if number % BLOCKS_PER_RELEASE == 0:
                release_freed_memory()


def send(connection: Connection, value: object) -> None:
    """Send a value; its arrays and byte arrays are not copied into the pickle."""
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    connection.send_bytes(pickle.dumps((len(buffers), pickled)))
    for buffer in buffers:
        connection.send_bytes(buffer.raw())


def receive(connection: Connection) -> Any:
    """Return the value that the other end sends.

    Raises:
        EOFError: the other end is closed.
    """
    count, pickled = pickle.loads(connection.recv_bytes())
    return pickle.loads(pickled, buffers=[connection.recv_bytes() for _ in range(count)])


def _portable(error: Exception, name: str) -> Exception:
    """Return an error that can be pickled and says in one line where it was raised."""
    if isinstance(error, ValueError | OSError) and type(error).__module__ == "builtins":
        return error
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return ChildProcessError(f"{name}: {text}" if name else text)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
    os._exit(0)
