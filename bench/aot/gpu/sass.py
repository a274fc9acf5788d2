"""Find the steady state of a kernel in its machine code: what its loop issues for a tile that needs no mask.

A kernel has several loops around its matrix instructions: the first and last tiles are masked, the others are not, and
a loop may mask behind a branch. Through each innermost loop we take the path that multiplies most and issues fewest
instructions; the steady state is the path with the fewest instructions per multiplication.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")
_PRODUCT = re.compile(r"[HIQB]GMMA\.(?:SP\.)?(\d+)x(\d+)x(\d+)")
KINDS = {  # the first match counts
    "wgmma": re.compile(r"[HIQB]GMMA"),
    "exponential": re.compile(r"MUFU"),
    "float": re.compile(r"(F(?!2|ENCE|LO)|H(?:ADD|MUL|FMA|MNMX|SET)|F2F)"),
    "memory": re.compile(r"(LD|ST|SYNCS|WARP|WARPGROUP|UTMA|BAR|FENCE|DEPBAR|MEMBAR|ATOM|RED)"),
}


@dataclass(frozen=True)
class Instruction:
    """One line of machine code."""

    address: int
    predicate: str
    name: str
    operands: str

    @property
    def target(self) -> int | None:
        """Address that a jump goes to; None for other instructions and for indirect jumps."""
        match = _TARGET.search(self.operands) if self.name.split(".")[0] == "BRA" else None
        return int(match[1], 16) if match else None

    @property
    def ends(self) -> bool:
        """Whether the next instruction in memory never runs after it."""
        return not self.predicate and self.name.split(".")[0] in ("BRA", "EXIT", "RET")

    @property
    def products(self) -> int:
        """Multiply-adds of a matrix instruction; 0 for others."""
        shape = _PRODUCT.match(self.name)
        return int(shape[1]) * int(shape[2]) * int(shape[3]) if shape else 0


def functions(text: str) -> dict[str, list[Instruction]]:
    """Read the instructions of each function from `cuobjdump --dump-sass`."""
    code = {}
    for block in re.split(r"(?m)^\s*Function : ", text)[1:]:
        name, _, body = block.partition("\n")
        lines = (_LINE.match(line) for line in body.splitlines())
        code[name.strip()] = [Instruction(int(m[1], 16), (m[2] or "").strip(), m[3], m[4].strip()) for m in lines if m]
    return code


def steady_state(code: list[Instruction]) -> dict[str, Any] | None:
    """Find the steady state of one function; None if no loop multiplies with wgmma.

    Returns:
        "instructions" that a warp issues per tile, "multiply_adds" of a warpgroup, a count for each of `KINDS`, the
        "shape" of a matrix instruction, and which of its operands are "transposed".
    """
    paths = [_best_path(code, *loop) for loop in _innermost_loops(code)]
    paths = [path for path in paths if any(instruction.products for instruction in path)]
    if not paths:
        return None
    best = min(paths, key=lambda path: (len(path) / sum(each.products for each in path), len(path)))
    counts = Counter(_kind(instruction.name) for instruction in best)
    return {
        "instructions": len(best),
        "multiply_adds": sum(instruction.products for instruction in best),
        **{kind: counts[kind] for kind in KINDS},
        **_matrix_operands(best),
    }


def _matrix_operands(path: list[Instruction]) -> dict[str, str]:
    first = next(instruction for instruction in path if instruction.products)
    shape = "x".join(_PRODUCT.match(first.name).groups())
    return {"shape": shape, "transposed": "".join(re.findall(r"\.tnsp(\w)", first.operands))}


def _kind(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if pattern.match(name)), "other")


def _innermost_loops(code: list[Instruction]) -> Iterator[tuple[int, int]]:
    """Yield (first, last) instruction of each loop that has a product and contains no smaller such loop.

    A backward jump closes a loop only if every path to it passes its target: a barrier waits out of line and jumps
    back as well.
    """
    index = {instruction.address: i for i, instruction in enumerate(code)}
    targets = [(index.get(instruction.target), i) for i, instruction in enumerate(code)]
    backward = [(target, i) for target, i in targets if target is not None and target <= i]
    loops = [(first, last) for first, last in backward if any(each.products for each in code[first : last + 1])]
    loops = [(first, last) for first, last in loops if not _reaches(code, index, last, without=first)]
    for first, last in loops:
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b in loops):
            yield first, last


def _reaches(code: list[Instruction], index: dict[int, int], goal: int, without: int) -> bool:
    """Whether a path from the start reaches an instruction without passing another one."""
    pending, visited = [0], {without}
    while pending:
        if (i := pending.pop()) in visited or i >= len(code):
            continue
        if i == goal:
            return True
        visited.add(i)
        pending += _successors(code, index, i)
    return False


def _successors(code: list[Instruction], index: dict[int, int], i: int) -> list[int]:
    following = [] if code[i].ends else [i + 1]
    return following + ([index[code[i].target]] if code[i].target in index else [])


def _best_path(code: list[Instruction], first: int, last: int) -> list[Instruction]:
    """Find the path through a loop, by forward jumps only, with most products, most exponentials, fewest instructions.

    The criteria count in this order. Exponentials, because if two warpgroups divide the work, only one of them computes
    the weights.
    """
    index = {code[i].address: i for i in range(first, last + 1)}

    def cost(instruction: Instruction) -> tuple[int, int, int]:
        return -instruction.products, -(_kind(instruction.name) == "exponential"), 1

    best: dict[int, tuple[tuple[int, ...], int | None]] = {first: (cost(code[first]), None)}  # (cost, predecessor)
    for i in range(first, last + 1):  # jumps go forward, so all predecessors of i come before it
        if i not in best:
            continue
        for j in _successors(code, index, i):
            if first < j <= last and j > i:
                candidate = tuple(map(sum, zip(best[i][0], cost(code[j])))), i
                best[j] = min(best.get(j, candidate), candidate, key=lambda entry: entry[0])
    if last not in best:
        return []
    path, position = [], last
    while position is not None:
        path.append(code[position])
        position = best[position][1]
    return path[::-1]
