"""The parent's side of a worker: ask, wait, and restart the process if it crashed or took too long."""

import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from bench.aot import hardware
from bench.aot.cases import Case
from bench.aot.gpu import compiler as gpu_compiler
from bench.aot.tpu import compiler as tpu_compiler

START_SECONDS = 180  # importing jax and tokamax and loading a compiler, on a busy machine


def dumps_folder(folder: Path, target: hardware.Target, case: Case) -> Path:
    """The folder below `folder` to which a worker copies the dumps of a case."""
    return folder / target.name / re.sub(r"\W+", "-", case.key)


class WorkerClosedError(Exception):
    """The worker was closed, so it answers nothing more."""


class Worker:
    """A worker process for one target, started by the first request.

    Args:
        target: the accelerator.
        timeout: seconds after which a compile is given up.
        keep: folder to which the compilers' dumps are copied, or None.
        python: an interpreter that has the compiler.
    """

    def __init__(
        self, target: hardware.Target, timeout: float, keep: Path | None = None, python: str = sys.executable
    ) -> None:
        self.versions: dict[str, str] = {}
        self._target, self._timeout, self._keep, self._python = target, timeout, keep, python
        self._folder = Path(tempfile.mkdtemp(prefix=f"aot-{target.name}-"))
        self._closed = False
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process for good. `ask` raises `WorkerClosedError`, also where another thread waits in it."""
        self._closed = True
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def ask(self, case: Case) -> dict[str, Any]:
        """Return the row of a case; a crash or a timeout is a row too.

        Raises:
            WorkerClosedError: the worker was closed, perhaps by another thread.
            ValueError: the compiler does not start.
        """
        if self._closed:
            raise WorkerClosedError
        if self._process is None:
            self._start()
            first = self._answer(START_SECONDS)
            if "versions" not in first:
                log = self._folder / "log.txt"
                lines = log.read_text(errors="replace", encoding="utf-8").split("\n") if log.exists() else []
                last = next((line.strip() for line in reversed(lines) if line.strip()), first["reason"])
                raise ValueError(f"the compiler for {self._target.name} does not start: {last[:300]}")
            self.versions = first["versions"]
        request: dict[str, Any] = {"case": vars(case)}
        if self._keep:
            request["keep"] = str(dumps_folder(self._keep, self._target, case).resolve())
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it died since the last answer; waiting for the next one tells how
        row = self._answer(self._timeout)
        if row["status"] == "again":  # it needs a fresh process
            self.stop()
            return self.ask(case)
        return row

    def stop(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def _start(self) -> None:
        dumps = self._folder / "dumps"
        shutil.rmtree(dumps, ignore_errors=True)
        (dumps / "triton").mkdir(parents=True)
        if isinstance(self._target, hardware.Gpu):
            variables = gpu_compiler.environment(dumps)
        else:
            variables = tpu_compiler.environment(self._target, dumps)
        self._lines = lines = queue.Queue()
        process = subprocess.Popen(
            [self._python, "-m", "bench.aot.worker", self._target.name, str(dumps)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **variables, "PYTHONUNBUFFERED": "1", "JAX_ENABLE_COMPILATION_CACHE": "false"},
            cwd=Path(__file__).resolve().parents[2],
            start_new_session=True,  # the parent handles Ctrl-C
            encoding="utf-8",
        )

        def forward_lines() -> None:
            for line in process.stdout:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=forward_lines, daemon=True).start()
        self._process = process
        if self._closed:  # meanwhile: `close` may have found no process to end
            self.stop()
            raise WorkerClosedError

    def _answer(self, seconds: float) -> dict[str, Any]:
        """Return the next answer. A process that gives none is ended, and the next `ask` starts another."""
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            self.stop()
            return {"status": "failed", "reason": f"took more than {seconds:g} s"}
        if self._closed:
            raise WorkerClosedError
        if line is None:
            code = self._process.wait() if self._process else "?"
            self.stop()
            return {"status": "failed", "reason": f"the compiler's process ended with code {code}"}
        return json.loads(line)
