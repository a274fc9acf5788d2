"""Check and measure everything on this GPU within a time limit: `python3 -m bench.gpu`.

Only the standard library is imported here, and what needs nothing else: whatever else is missing or broken, this
program starts, and writes the results of the parts that work.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from bench.gpu import parts, runner
from dantinox.system.streams import run_main

PROG = "bench.gpu"
SMOKE_CASES = (  # bench.gpu.smoke.CASES, which needs JAX
    "grouped-y",
    "attention-d128",
    "attention-d128-gradients",
    "decode-5-splits",
    "grouped-gradients",
    "experts-gradients",
    "loss-gradients",
    "attention-d256",
    "attention-d64-segments-window",
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"{PROG}: error: {message}", file=sys.stderr)
        raise SystemExit(2)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the flags."""
    parser = _Parser(prog=PROG, description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="profiles", help="folder of the results (default: %(default)s)")
    parser.add_argument(
        "--archive", metavar="FILE", help="one .tar.gz of all results, rewritten after every part (default: in --out)"
    )
    parser.add_argument("--minutes", type=float, default=8.5, help="time limit of the program (default: %(default)s)")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="parts by name, or the start of names")
    parser.add_argument(
        "--tiny",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="the smallest version of each part, kernels interpreted (default: on a CPU)",
    )
    parser.add_argument("--list", action="store_true", help="print the parts and their commands, and stop")
    arguments = parser.parse_args(argv)
    if not arguments.minutes > 0.1:
        parser.error(f"--minutes is {arguments.minutes}; allowed: more than 0.1")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run all parts; return 1 if one failed. The reason is in summary.json."""
    start = time.monotonic()
    arguments = parse(argv)
    try:
        tiny = has_no_gpu() if arguments.tiny is None else arguments.tiny
        out = Path(arguments.out).absolute()
        archive = Path(arguments.archive).absolute() if arguments.archive else out / "gpu-results.tar.gz"
        for folder in (out, archive.parent):
            folder.mkdir(parents=True, exist_ok=True)
        chosen = choose(parts.suite(out, tiny, arguments.minutes * 60, SMOKE_CASES), arguments.only)
    except (ValueError, OSError) as error:
        print(f"{PROG}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if arguments.list:
        for part in chosen:
            print(f"{part.name}: {' '.join(part.command)}")
        return 0
    runner.clear(out, chosen)
    done = runner.run_parts(chosen, out, start + arguments.minutes * 60, archive, lambda line: print(line, flush=True))
    for line in runner.summarize_run(done, tiny):
        print(line)
    print(f"archive: {archive}")
    return 0 if all(part["result"] == "done" for part in done) else 1


def choose(suite: Sequence[runner.Part], only: Sequence[str]) -> list[runner.Part]:
    """Select parts by name.

    Args:
        suite: all parts.
        only: names, or the start of names that no part has in full; empty: all parts.

    Raises:
        ValueError: no part's name begins with one of them.
    """
    for name in only:
        if not any(part.name.startswith(name) for part in suite):
            raise ValueError(f"--only {name!r} names no part; allowed: {', '.join(part.name for part in suite)}")
    names = {part.name for part in suite}
    starts = tuple(name for name in only if name not in names)
    return [part for part in suite if not only or part.name in only or (starts and part.name.startswith(starts))]


def has_no_gpu() -> bool:
    """Whether JAX runs on a CPU here. Another process finds out, because this one must not hold the GPU's memory.

    Raises:
        ValueError: JAX finds no device.
    """
    code = "import jax; print(jax.default_backend())"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, encoding="utf-8"
        )
    except subprocess.TimeoutExpired:
        return False  # a GPU that does not respond; the first part will report it
    if done.returncode:
        raise ValueError(f"JAX finds no device: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return done.stdout.strip() == "cpu"


if __name__ == "__main__":
    run_main(main)
