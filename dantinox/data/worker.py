"""A process of `dantinox.data.pool`: it receives a function, then blocks, and answers (result, error) to each."""

import contextlib
import os
import pickle
import sys
from multiprocessing.connection import Connection


def serve(connection: Connection) -> None:
    """Answer until the other end is closed, or its process has ended."""
    with contextlib.suppress(EOFError, ConnectionError):
        work = pickle.loads(connection.recv_bytes())
        while True:
            block = pickle.loads(connection.recv_bytes())
            try:
                answer = work(block), None
            except Exception as error:
                answer = None, _portable(error, getattr(block, "name", ""))
            connection.send_bytes(pickle.dumps(answer))


def _portable(error: Exception, name: str) -> Exception:
    """Return an error that can be pickled and says in one line where it was raised."""
    if isinstance(error, ValueError | OSError) and type(error).__module__ == "builtins":
        return error
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return ChildProcessError(f"{name}: {text}" if name else text)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
    os._exit(0)
