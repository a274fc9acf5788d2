"""Find where a kernel hangs: map the program counters of a cuda-gdb log to machine code and source lines.

    make aot ARGS="--target h100 --op attention --keep runs/aot"    writes a listing of each kernel, NAME.sass
    .venv-aot/bin/python -m bench.aot.locate LOG runs/aot/h100/ROW

The log is that of a part of `python3 -m bench.gpu` that hung. A warp that waits for a barrier spins around a
SYNCS...TRYWAIT, whose operand is the barrier's address in shared memory. The SYNCS.EXCH at the kernel's start list all
barriers in their order.
"""

import bisect
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dantinox.system.streams import run_main

PROG = "bench.aot.locate"
CONTEXT = 3  # source lines to show before that of the instruction
_NAMED = re.compile(r"0x([0-9a-f]+) <([\w$.]+)\+(\d+)>")
_COUNTER = re.compile(r"\b0x([0-9a-f]{8,16})\b")
_FUNCTION = re.compile(r"^\.text\.([\w$.]+):|^\s*Function : (\S+)")
_SOURCE = re.compile(r'//## File "([^"]+)", line (\d+)')
_LABEL = re.compile(r"^(\.L_\w+):")
_CODE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")


class Instruction(NamedTuple):
    """One instruction of a listing.

    Attributes:
        offset: bytes from the kernel's start.
        text: the instruction.
        source: the Python lines of it and of the instructions before it, nearest first.
        label: the label that jumps to it use, or "".
    """

    offset: int
    text: str
    source: tuple[str, ...]
    label: str = ""


def parse_listing(text: str) -> dict[str, list[Instruction]]:
    """Read the instructions of each kernel from the output of `nvdisasm -g -c`."""
    kernels: dict[str, list[Instruction]] = {}
    code: list[Instruction] = []
    source: tuple[str, ...] = ()
    label = ""
    for line in text.splitlines():
        if match := _FUNCTION.match(line):
            code = kernels.setdefault(match[1] or match[2], [])
            source = ()
        elif match := _SOURCE.search(line):
            line_name = f"{'/'.join(Path(match[1]).parts[-3:])}:{match[2]}"
            source = (line_name, *[other for other in source if other != line_name])[: CONTEXT + 1]
        elif match := _LABEL.match(line):
            label = match[1]
        elif match := _CODE.match(line):
            code.append(Instruction(int(match[1], 16), " ".join(match[2].split()), source, label))
            label = ""
    return {name: code for name, code in kernels.items() if code}


def program_counters(log: str) -> Iterator[tuple[str, int]]:
    """Yield (kernel, offset) of every distinct program counter in a log.

    cuda-gdb prints the kernel's name with some counters only; the kernel of the others follows from its start address.
    """
    starts = {name: int(pc, 16) - int(offset) for pc, name, offset in _NAMED.findall(log)}
    visited = set()
    for text in _COUNTER.findall(log):
        pc = int(text, 16)
        below = {name: start for name, start in starts.items() if 0 <= pc - start < 2**20}
        if below and pc not in visited:
            visited.add(pc)
            name = max(below, key=below.__getitem__)
            yield name, pc - below[name]


def describe(name: str, offset: int, code: Sequence[Instruction]) -> list[str]:
    """Describe the instruction at an offset, and the barrier wait that it belongs to, if any."""
    position = bisect.bisect_right([instruction.offset for instruction in code], offset) - 1
    if position < 0:
        return [f"{name}+{offset:#x}: before the first instruction"]
    lines = [f"{name}+{offset:#x}: {code[position].text}"]
    if (wait := _wait_around(code, position)) is not None:
        position = wait
        lines.append(f"  waits: {code[position].text}")
    return [*lines, f"  source: {', after '.join(code[position].source) or 'unknown'}"]


def _wait_around(code: Sequence[Instruction], position: int) -> int | None:
    """Find the barrier wait that an instruction is part of.

    A wait tries once in line; if that fails, it jumps to a loop out of line that sleeps and tries again.
    """
    spin = next((i for i in range(position, max(-1, position - 8), -1) if code[i].label), None)
    if spin is not None:
        target = f"({code[spin].label})"
        for i in (i for i in range(spin - 1) if target in code[i].text):
            if before := [j for j in range(max(0, i - 12), i) if "TRYWAIT" in code[j].text]:
                return before[-1]
    near = [i for i in range(max(0, position - 4), min(len(code), position + 5)) if "TRYWAIT" in code[i].text]
    return min(near, key=lambda i: abs(i - position), default=None)


def barriers(code: Sequence[Instruction]) -> list[str]:
    """The addresses in shared memory of the barriers that a kernel initialises."""
    exchanges = (re.search(r"SYNCS\.EXCH\S* \S+ (\[[^\]]+\])", instruction.text) for instruction in code)
    return [match[1] for match in exchanges if match]


def main(argv: Sequence[str] | None = None) -> int:
    """Print every program counter of a log with its instruction and source."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if len(arguments) != 2:
        print(f"{PROG}: error: give LOG and the FOLDER of listings", file=sys.stderr)
        return 2
    log, folder = Path(arguments[0]), Path(arguments[1])
    kernels: dict[str, list[Instruction]] = {}
    for path in sorted(folder.rglob("*.sass")):
        kernels |= parse_listing(path.read_text("utf-8"))
    if not kernels or not log.is_file():
        reason = f"{folder} holds no .sass file; `make aot` with --keep writes them"
        if not log.is_file():
            reason = f"{log} is not a file"
        print(f"{PROG}: error: {reason}", file=sys.stderr)
        return 2
    offsets_by_kernel: dict[str, list[int]] = {}
    for name, offset in program_counters(log.read_text(errors="replace", encoding="utf-8")):
        offsets_by_kernel.setdefault(name, []).append(offset)
    if not offsets_by_kernel:
        print("no program counter of a kernel in this log")
    for name, offsets in offsets_by_kernel.items():
        if name not in kernels:
            print(f"{name}: no listing in {folder}")
            continue
        print(f"{name}: barriers at {', '.join(barriers(kernels[name])) or 'none'}")
        for offset in sorted(offsets):
            print("\n".join(describe(name, offset, kernels[name])))
    return 0


if __name__ == "__main__":
    run_main(main)
