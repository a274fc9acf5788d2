"""Where does a kernel hang? Maps the program counters of a cuda-gdb log to machine code and source lines.

    make aot ARGS="--target h100 --op attention --keep runs/aot"    writes a listing of each kernel, NAME.sass
    .venv-aot/bin/python -m bench.aot.locate LOG runs/aot/h100/ROW

The log is that of a part of `python3 -m bench.gpu` that hung. A warp that waits for a barrier spins around a
SYNCS...TRYWAIT; its operand is the barrier's place in shared memory, and SYNCS.EXCH at the kernel's start lists all
barriers in their order.
"""

import bisect
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

PROG = "bench.aot.locate"
CONTEXT = 3  # source lines before the instruction that are shown
_NAMED = re.compile(r"0x([0-9a-f]+) <([\w$.]+)\+(\d+)>")
_COUNTER = re.compile(r"\b0x([0-9a-f]{8,16})\b")
_FUNCTION = re.compile(r"^\.text\.([\w$.]+):|^\s*Function : (\S+)")
_SOURCE = re.compile(r'//## File "([^"]+)", line (\d+)')
_LABEL = re.compile(r"^(\.L_\w+):")
_CODE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")


class Place(NamedTuple):
    """One instruction of a listing.

    Attributes:
        offset: bytes from the kernel's start.
        code: the instruction.
        source: the lines of Python that it and the instructions before it come from, nearest first.
        label: what jumps to it name it, or "".
    """

    offset: int
    code: str
    source: tuple[str, ...]
    label: str = ""


def listing(text: str) -> dict[str, list[Place]]:
    """Kernel -> its instructions, from `nvdisasm -g -c`."""
    kernels: dict[str, list[Place]] = {}
    places: list[Place] = []
    source: tuple[str, ...] = ()
    label = ""
    for line in text.splitlines():
        if found := _FUNCTION.match(line):
            places = kernels.setdefault(found[1] or found[2], [])
            source = ()
        elif found := _SOURCE.search(line):
            here = f"{'/'.join(Path(found[1]).parts[-3:])}:{found[2]}"
            source = (here, *[each for each in source if each != here])[: CONTEXT + 1]
        elif found := _LABEL.match(line):
            label = found[1]
        elif found := _CODE.match(line):
            places.append(Place(int(found[1], 16), " ".join(found[2].split()), source, label))
            label = ""
    return {name: places for name, places in kernels.items() if places}


def counters(log: str) -> Iterator[tuple[str, int]]:
    """(kernel, offset) of every program counter in a log, each once.

    cuda-gdb prints the kernel's name beside some counters only; those within the same kernel follow from its start.
    """
    starts = {name: int(pc, 16) - int(offset) for pc, name, offset in _NAMED.findall(log)}
    seen = set()
    for text in _COUNTER.findall(log):
        pc = int(text, 16)
        below = {name: start for name, start in starts.items() if 0 <= pc - start < 2**20}
        if below and pc not in seen:
            seen.add(pc)
            name = max(below, key=below.__getitem__)
            yield name, pc - below[name]


def describe(name: str, offset: int, places: Sequence[Place]) -> list[str]:
    """What is at an offset, and the barrier wait that it belongs to, if any."""
    at = bisect.bisect_right([place.offset for place in places], offset) - 1
    if at < 0:
        return [f"{name}+{offset:#x}: before the first instruction"]
    lines = [f"{name}+{offset:#x}: {places[at].code}"]
    if (wait := _wait_around(places, at)) is not None:
        at = wait
        lines.append(f"  waits: {places[at].code}")
    return [*lines, f"  source: {', after '.join(places[at].source) or 'unknown'}"]


def _wait_around(places: Sequence[Place], at: int) -> int | None:
    """The barrier wait that an instruction is part of.

    A wait tries once in line; where that fails, a jump leads out of line, to a loop that sleeps and tries again.
    """
    spin = next((i for i in range(at, max(-1, at - 8), -1) if places[i].label), None)
    if spin is not None:
        jumps = [i for i, place in enumerate(places) if f"({places[spin].label})" in place.code and i + 1 < spin]
        for i in jumps:
            if before := [j for j in range(max(0, i - 12), i) if "TRYWAIT" in places[j].code]:
                return before[-1]
    near = [i for i in range(max(0, at - 4), min(len(places), at + 5)) if "TRYWAIT" in places[i].code]
    return min(near, key=lambda i: abs(i - at), default=None)


def barriers(places: Sequence[Place]) -> list[str]:
    """The barriers that a kernel initialises: their places in shared memory."""
    return [found[1] for place in places if (found := re.search(r"SYNCS\.EXCH\S* \S+ (\[[^\]]+\])", place.code))]


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
    kernels: dict[str, list[Place]] = {}
    for path in sorted(folder.rglob("*.sass")):
        kernels |= listing(path.read_text())
    if not kernels or not log.is_file():
        what = (
            f"{log} is no file" if not log.is_file() else f"{folder} holds no .sass file; `make aot` with --keep does"
        )
        print(f"{PROG}: error: {what}", file=sys.stderr)
        return 2
    found: dict[str, list[int]] = {}
    for name, offset in counters(log.read_text(errors="replace")):
        found.setdefault(name, []).append(offset)
    if not found:
        print("no program counter of a kernel in this log")
    for name, offsets in found.items():
        if name not in kernels:
            print(f"{name}: no listing in {folder}")
            continue
        print(f"{name}: barriers at {', '.join(barriers(kernels[name])) or 'none'}")
        for offset in sorted(offsets):
            print("\n".join(describe(name, offset, kernels[name])))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
