"""Run the parts until a deadline, and keep the results of each part even if others fail."""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from bench.gpu import archive, process
from bench.gpu.process import MARK

ROOT = Path(__file__).parents[2]
MARGIN = 5.0  # seconds reserved for writing and stopping
DEBUGGER_NOISE = ("[", "warning:", "Using host", "To ", "add-auto", "set auto", "line to", "For more", "info ", '"')
SHOWN = 12  # failing lines that are printed at the end of a part
WIDTH = 220  # characters of a printed line
AT_ONCE = min(4, os.cpu_count() or 1)  # parts of one group that run concurrently
Result = dict[str, Any]
PrintLine = Callable[[str], None]


class Part(NamedTuple):
    """One command.

    Attributes:
        name: its name in the results.
        command: the program and its arguments.
        share: the largest fraction of the total time that it may take.
        group: neighbours with the same non-empty group run concurrently; nothing in them is timed.
        env: additional environment variables.
    """

    name: str
    command: Sequence[str]
    share: float
    group: str = ""
    env: Mapping[str, str] = MappingProxyType({})


def run_parts(
    parts: Sequence[Part], out: Path, deadline: float, archive_path: Path, print_line: PrintLine = print
) -> list[Result]:
    """Run the parts, and write summary.json and the archive after each one.

    Args:
        parts: the parts, in order.
        out: folder of logs and results.
        deadline: of `time.monotonic`.
        archive_path: the archive; summary.json is written beside it.
        print_line: called with each line of progress.

    Returns:
        The result of each part, in order.
    """
    total = deadline - time.monotonic()
    results: dict[str, Result] = {}

    def limit(part: Part) -> float:
        return min(deadline - time.monotonic() - MARGIN, part.share * total)

    def finish(part: Part, result: Result) -> None:
        results[part.name] = result
        in_order = [results[other.name] for other in parts if other.name in results]
        write_results(in_order, out, archive_path)
        print_line(f"{part.name}: {describe(result)}")
        for line in result.get("failing", ()):
            print_line(f"  {line}")

    for _, members in groupby(parts, key=lambda part: part.group or part.name):
        waiting = list(members)
        with ThreadPoolExecutor(AT_ONCE if len(waiting) > 1 else 1) as threads:
            futures = {}
            for part in waiting:
                futures[threads.submit(_run_within, part, out, limit)] = part
            try:
                for future in as_completed(futures):
                    finish(futures[future], future.result())
            except BaseException:
                for future in futures:
                    future.cancel()
                _stop_children()
                raise
    return [results[part.name] for part in parts]


def _run_within(part: Part, out: Path, limit: Callable[[Part], float]) -> Result:
    seconds = limit(part)
    return run_part(part, out, seconds) if seconds >= 1 else {"part": part.name, "result": "no time left"}


def run_part(part: Part, out: Path, limit: float) -> Result:
    """Run one part with a time limit; its output goes to <part>.log."""
    log = out / f"{part.name}.log"
    log.write_text("", "utf-8")
    # Concurrent processes share the GPU's memory.
    shares = bool(part.group) or "-n" in part.command
    env = os.environ | {"PYTHONUNBUFFERED": "1"} | ({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if shares else {})
    env |= part.env
    ended = process.run(part.command, log, limit, ROOT, env)
    text = log.read_text(errors="replace", encoding="utf-8")
    result: Result = {"part": part.name, "result": _result(ended.code, limit, text), "seconds": round(ended.seconds, 1)}
    if ended.code != 0:
        result["failing"] = failing_lines(text, pytest="pytest" in part.command)
    if "pytest" in part.command:
        result["tests"] = count_outcomes(text)
    if (lines := out / f"{part.name}.jsonl").exists():
        result["cases"] = len(lines.read_text("utf-8").splitlines())
    return result


def _result(code: int | None, limit: float, log: str) -> str:
    if code is None:
        return f"cut short after {limit:.0f} s"
    if code == 0:
        return "done"
    if code < 0:
        name = signal.Signals(-code).name if -code in list(signal.Signals) else str(-code)
        return f"crashed with {name}: {last_line(log)}"
    return f"failed with exit code {code}: {last_line(log)}"


def failing_lines(log: str, *, pytest: bool = False) -> list[str]:
    """Extract the lines of a log that say what failed, or its last lines."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    marked = [line.removeprefix(MARK) for line in lines if line.startswith(MARK)]
    marked += list(hang_lines(lines))
    if not marked and pytest:
        marked = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    shown = [line[:WIDTH] for line in (marked or lines[-3:])]
    more = len(shown) - SHOWN
    return shown if more <= 0 else [*shown[: SHOWN - 1], f"... and {more + 1} more lines, in the log"]


def hang_lines(lines: Sequence[str]) -> Iterator[str]:
    """Extract where a stopped process hung: the innermost line of this repository per thread, and cuda-gdb's output."""
    yielded: set[str] = set()
    in_stack = in_debugger = False
    for line in lines:
        in_debugger |= line.startswith("== cuda-gdb")
        if in_debugger:
            if not line.startswith(DEBUGGER_NOISE):
                yield line
        elif line.endswith("(most recent call first):"):
            in_stack = True
        elif in_stack and str(ROOT) in line and f"{ROOT}/.venv" not in line:
            in_stack = False
            if line not in yielded:
                yielded.add(line)
                yield "hangs at " + line.replace(f"{ROOT}/", "")


def last_line(log: str) -> str:
    """The last line that is not empty."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return lines[-1][:WIDTH] if lines else "no output"


def count_outcomes(log: str) -> dict[str, int]:
    """Count the outcomes that `pytest -v` has reported so far; "of" is the number of tests, or 0 while it collects."""
    selected = re.search(r"/ (\d+) selected|collected (\d+) items?$|workers? \[(\d+) items?\]", log, re.M)
    num_tests = next((int(n) for n in selected.groups() if n), 0) if selected else 0
    outcome = r"(PASSED|FAILED|SKIPPED|ERROR)"  # pytest-xdist prints it before the test's name
    reported = re.findall(rf"(?m)^(?:\[gw\d+\] \[.*?\] {outcome} |\S+::.* {outcome}\b)", log)
    return {"of": num_tests} | Counter((before or after).lower() for before, after in reported)


def describe(result: Result) -> str:
    """Format one part's result in a line: how it ended, and how many tests and cases it ran."""
    words = [result["result"]]
    if "tests" in result:
        counts = dict(result["tests"])
        words.append(", ".join(f"{n} {what}" for what, n in counts.items() if what != "of") or "no test ended")
        words[-1] += f" of {counts['of'] or 'an unknown number'}"
    if "cases" in result:
        words.append(f"{result['cases']} cases")
    return ", ".join([*words, f"{result.get('seconds', 0)} s"])


def summarize_run(results: Sequence[Result], tiny: bool) -> list[str]:
    """Summarize the run in a few lines."""

    def names(*words: str) -> list[str]:
        return [part["part"] for part in results if part["result"].startswith(words)]

    lines = [f"{len(names('done'))} of {len(results)} parts done"]
    titles = {("failed", "crashed"): "failed", ("cut",): "cut short", ("no time",): "no time left for"}
    for words, title in titles.items():
        lines += [f"{title}: {', '.join(names(*words))}"] if names(*words) else []
    if tiny:
        lines.append("a rehearsal at tiny sizes: it shows that the parts run, not how fast anything is")
    return lines


def write_results(results: Sequence[Result], out: Path, archive_path: Path) -> None:
    """Write summary.json into `out` and beside the archive, then the archive."""
    text = json.dumps(list(results), indent=1) + "\n"
    (out / "summary.json").write_text(text, "utf-8")
    if left_out := archive.write(archive_path, out):
        text = json.dumps([*results, {"part": "archive", "result": "done", "left out": left_out}], indent=1) + "\n"
    (archive_path.parent / "summary.json").write_text(text, "utf-8")


def _stop_children() -> None:
    """Stop every child of this process, each a session of its own."""
    for child, _, parent, _ in process.processes():
        if parent == os.getpid():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child, signal.SIGKILL)


def installed(name: str) -> bool:
    """Whether a module can be imported, without importing it."""
    return importlib.util.find_spec(name) is not None


def clear(out: Path, parts: Sequence[Part]) -> None:
    """Remove the files of an earlier run of these parts, because some files are appended to."""
    for part in parts:
        for suffix in (".jsonl", ".log", ".json", ".html"):
            (out / f"{part.name}{suffix}").unlink(missing_ok=True)
        shutil.rmtree(out / part.name, ignore_errors=True)
