"""A TensorBoard on loopback, queried over HTTP as its web page queries it."""

import contextlib
import gzip
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import quote
from urllib.request import urlopen

TIMEOUT = 90  # seconds; a busy machine starts TensorBoard slowly


@dataclass
class TensorBoard:
    """A running TensorBoard at `address`; queries wait until `deadline` for data to load."""

    address: str
    deadline: float

    def get(self, path: str) -> Any:
        """The JSON at a path, as soon as it is not empty."""
        while True:
            with contextlib.suppress(URLError), urlopen(self.address + path, timeout=TIMEOUT) as answer:
                body = answer.read()
                if data := json.loads(gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body):
                    return data
            assert time.monotonic() < self.deadline, f"TensorBoard has nothing at {path}"
            time.sleep(0.1)

    def profile(self, path: str) -> Any:
        """The answer of the profile plugin."""
        return self.get("data/plugin/profile/" + path)

    def trace(self, run: str) -> list[dict[str, Any]]:
        """The events of the trace of a run on one host."""
        run = quote(run, safe="")
        (host,) = self.profile(f"hosts?run={run}&tag=trace_viewer@")
        return self.profile(f"data?run={run}&tag=trace_viewer@&host={quote(host['hostname'])}")["traceEvents"]


@contextlib.contextmanager
def tensorboard(logdir: Path) -> Iterator[TensorBoard]:
    """Run TensorBoard on a folder, on a free port."""
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w+") as log:
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", logdir, "--host", "127.0.0.1", "--port", "0"]
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + TIMEOUT
            while not (address := re.search(r"http://127\.0\.0\.1:\d+/", (Path(folder) / "log").read_text())):
                assert server.poll() is None and time.monotonic() < deadline, (Path(folder) / "log").read_text()
                time.sleep(0.1)
            yield TensorBoard(address[0], deadline)
        finally:
            server.kill()
            server.wait()
