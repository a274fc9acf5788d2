"""Run one part as a child process that dies with its parent and, before it is killed, reports where it hangs."""

import contextlib
import ctypes
import faulthandler
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

MARK = "!! "  # prefix of the lines of a log that say what failed
PR_SET_PDEATHSIG = 1
TEST_SECONDS = 75.0  # time limit of one test
DEBUGGER_SECONDS = 20.0
GRACE_SECONDS = 2.0
# Set before it attaches: loading the symbols of the host's libraries would take too long.
DEBUGGER_SETTINGS = ("set auto-solib-add off", "set debuginfod enabled off", "set pagination off", "set width 0")
# Commands for cuda-gdb: kernels on the device, warps with their program counters, threads that share one.
DEBUGGER_COMMANDS = (
    "info cuda kernels",
    "info cuda warps",
    "info cuda threads",
    "x/6i $pc",
    "info threads",
)


class Ended(NamedTuple):
    """How a process ended.

    Attributes:
        code: exit status; negative for a signal; None if the time limit ended it.
        seconds: wall time.
    """

    code: int | None
    seconds: float


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends; does nothing on other systems."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent ended before the request
        os._exit(1)


def prepare_child() -> None:
    """Make a child die with its parent and print its Python stacks on SIGUSR1; every child calls this first."""
    die_with_parent()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)


def run(command: Sequence[str], log: Path, limit: float, cwd: Path, env: dict[str, str]) -> Ended:
    """Run a command with a time limit; its output, and a report on where it hangs, go to the log.

    Args:
        command: the program and its arguments.
        log: file to append to.
        limit: seconds after which the process and all its children are stopped.
        cwd: working directory of the command.
        env: environment variables of the command; it inherits no others.
    """
    start = time.monotonic()
    with log.open("ab") as file:
        # In a session of its own, so that stopping the part stops its children too.
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
            describe_hang(process.pid, file.fileno())
        finally:
            stop(process)
    return Ended(code, time.monotonic() - start)


def stop(process: subprocess.Popen) -> None:
    """Stop a session with SIGTERM, then with SIGKILL."""
    for kill in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, kill)  # children may outlive their leader
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
        if process.poll() is not None and not session_members(process.pid):
            return


def session_members(session: int) -> list[int]:
    """Process ids of a session, from /proc; empty without /proc."""
    return [pid for pid, state, _, process_session in processes() if process_session == session and state != "Z"]


def processes() -> Iterator[tuple[int, str, int, int]]:
    """Yield (process id, state, parent, session) of every process, from /proc; nothing without /proc."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):  # it may have ended meanwhile
            state, parent, _, session = path.read_text("utf-8").rpartition(") ")[2].split()[:4]
            yield int(path.parent.name), state, int(parent), int(session)


def uses_gpu(pid: int) -> bool:
    """Whether a process holds an NVIDIA device open."""
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if os.readlink(link).startswith("/dev/nvidia"):
                    return True
    return False


def debugger() -> str | None:
    """Path of cuda-gdb, or None."""
    return shutil.which("cuda-gdb") or next(
        (str(path) for path in sorted(Path("/usr/local").glob("cuda*/bin/cuda-gdb"))), None
    )


def describe_hang(session: int, log: int) -> None:
    """Write where the processes of a session hang: Python stacks, then kernels, warps and program counters.

    Args:
        session: id of the session's first process.
        log: file descriptor of the log.
    """
    members = session_members(session)
    for pid in members:
        if installs_stack_dump(pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)
    time.sleep(0.5)
    for pid in [pid for pid in members if uses_gpu(pid)] or members[:1]:
        attach_debugger(pid, log)


def installs_stack_dump(pid: int) -> bool:
    """Whether a process handles SIGUSR1; otherwise the signal would end it."""
    with contextlib.suppress(OSError, StopIteration, ValueError, IndexError):
        lines = Path(f"/proc/{pid}/status").read_text("utf-8").splitlines()
        caught = next(line for line in lines if line.startswith("SigCgt:"))
        return bool(int(caught.split()[1], 16) >> (signal.SIGUSR1 - 1) & 1)
    return False


def attach_debugger(pid: int, log: int) -> None:
    """Write cuda-gdb's output about a running process, within a time limit."""
    program = debugger()
    if program is None:
        os.write(log, b"\ncuda-gdb is not installed: no kernels, warps or program counters of the hung process\n")
        return
    command = [program, "-batch", "-nx"]
    for line in DEBUGGER_SETTINGS:
        command += ["-iex", line]
    command += ["-p", str(pid)]
    for line in DEBUGGER_COMMANDS:
        command += ["-ex", line]
    os.write(log, f"\n== cuda-gdb on process {pid} ==\n".encode())
    try:
        subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=DEBUGGER_SECONDS, start_new_session=True
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        os.write(log, f"cuda-gdb: {type(error).__name__}\n".encode())
