"""Training programs of several processes on this machine, each with simulated CPU devices."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = """--data text.txt --tokenizer char --n-layers 1 --dim 16 --n-heads 2 --n-kv-heads 1 --window 8 --max-context 32
--seq-len 16 --batch-size 16 --grad-accum 2 --ema-decay 0.9 --warmup-ratio 0 --schedule constant --dtype float32
--log-every 1 --eval-every 4 --eval-batches 2 --sample-tokens 0 --save-every 5 --max-checkpoints 2""".split()
MESH = ["--mesh", "data=2,fsdp=2"]
# Imports take most of a start: one process makes them, and each program is a fork of it from before JAX's own start.
STARTER = """
import json, os, sys
import jax, orbax.checkpoint, tensorboard.summary.writer.event_file_writer
from dantinox.cli import train
for line in sys.stdin:
    order = json.loads(line)
    read, write = os.pipe()
    if os.fork() == 0:  # it waits for the program, which the test may kill
        pid = os.fork()
        if pid:
            os.write(write, str(pid).encode()), os.close(write)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            with open(order["place"] + ".code.part", "w") as file:
                file.write(str(status))
            os.rename(order["place"] + ".code.part", order["place"] + ".code")
            os._exit(0)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(order["place"] + "." + name, os.O_WRONLY | os.O_CREAT, 0o644), number)
        os.chdir(order["folder"])
        os.environ.update(order["environment"])
        sys.argv = ["dantinox-train", *order["words"]]
        exec(order["code"])
        train.program()
    os.close(write)
    print(os.read(read, 20).decode(), flush=True)
    os.close(read)
"""


@contextlib.contextmanager
def training_folder(path: Path) -> Iterator[Path]:
    """Within this context a folder has a text, and the test and its programs run in it."""
    before = Path.cwd()
    (path / "text.txt").write_text("".join(f"{i} Nel mezzo del cammin di nostra vita\n" for i in range(300)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DANTINOX_CACHE", str(path / "cache"))
        os.chdir(path)
        yield path
        os.chdir(before)


@dataclass
class Program:
    """A program that was started."""

    place: Path
    pid: int

    def code(self, limit: float = 90) -> int:
        """Wait for the exit code: that of the program, or the negative number of the signal that killed it."""
        path, deadline = self.place.with_suffix(".code"), time.monotonic() + limit
        while not path.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.place} did not end in {limit} s: {self.out()[-1000:]} {self.err()[-3000:]}")
            time.sleep(0.02)
        return int(path.read_text())

    def out(self) -> str:
        """Its output so far, without the lines of the library that connects CPUs."""
        text = self._read(".out")
        return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("[Gloo]"))

    def err(self) -> str:
        """Its errors so far."""
        return self._read(".err")

    def _read(self, suffix: str) -> str:
        path = self.place.with_suffix(suffix)
        return path.read_text(errors="replace") if path.exists() else ""


class Starter:
    """Starts programs in a folder."""

    def __init__(self, folder: Path, devices: int = 2) -> None:
        self.folder, self.devices, self.number = folder, devices, 0
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "JAX_PLATFORMS": "cpu"}
        environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_ENABLE_COMPILATION_CACHE": "true"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", STARTER], cwd=folder, env=environment, **pipes)

    def start(self, words: Sequence[object], code: str = "", devices: int | None = None, **variables: str) -> Program:
        """Start a program.

        Args:
            words: its command line.
            code: run before it.
            devices: number of simulated devices.
            variables: of the environment.
        """
        self.number += 1
        flags = f"--xla_force_host_platform_device_count={self.devices if devices is None else devices}"
        variables = {"XLA_FLAGS": f"{flags} --xla_backend_optimization_level=0"} | variables
        place = self.folder / "programs" / str(self.number)
        place.parent.mkdir(exist_ok=True)
        order = {"words": list(map(str, words)), "code": code, "environment": variables}
        order |= {"folder": str(self.folder), "place": str(place)}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return Program(place, int(self.process.stdout.readline()))

    def group(self, *words: object, codes: Sequence[str] = ("", "")) -> list[Program]:
        """Start the processes of one run, each with one of the `codes`."""
        place = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", len(codes)]
        return [self.start([*words, *place, "--process", i], code) for i, code in enumerate(codes)]

    def close(self) -> None:
        """End the starter."""
        self.process.stdin.close()
        self.process.wait(60)


def ended(programs: list[Program], limit: float = 90) -> list[int]:
    """Wait for the exit codes; programs that run longer are killed."""
    deadline = time.monotonic() + limit
    try:
        return [program.code(max(1.0, deadline - time.monotonic())) for program in programs]
    finally:
        for program in programs:
            if not program.place.with_suffix(".code").exists():
                os.kill(program.pid, signal.SIGKILL)


def said(programs: list[Program]) -> str:
    """The ends of all outputs, for a message."""
    return "\n".join(f"{program.out()[-2000:]}\n{program.err()[-3000:]}" for program in programs)


def free_port() -> int:
    """A port that no program listens to."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
