"""The steady state of a kernel in its machine code: what the loop issues for a tile that needs no mask.

A kernel has several loops around its matrix instructions: the first and last tiles mask, the others do not, and a loop
may mask behind a branch. The steady state is the cheapest way through one of them: of the innermost loops, each by the
way through it that multiplies most and issues least, the one that issues least for a multiplication.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")
_PRODUCT = re.compile(r"[HIQB]GMMA\.(?:SP\.)?(\d+)x(\d+)x(\d+)")
KINDS = {  # the first that fits
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
        """Where a jump goes; None for every other instruction, and for a jump to what a register holds."""
        found = _TARGET.search(self.operands) if self.name.split(".")[0] == "BRA" else None
        return int(found[1], 16) if found else None

    @property
    def ends(self) -> bool:
        """What follows it in memory does not follow it in time."""
        return not self.predicate and self.name.split(".")[0] in ("BRA", "EXIT", "RET")

    @property
    def products(self) -> int:
        """Multiply-adds of a matrix instruction."""
        found = _PRODUCT.match(self.name)
        return int(found[1]) * int(found[2]) * int(found[3]) if found else 0


def functions(text: str) -> dict[str, list[Instruction]]:
    """Function -> its instructions, from `cuobjdump --dump-sass`."""
    found = {}
    for block in re.split(r"(?m)^\s*Function : ", text)[1:]:
        name, _, body = block.partition("\n")
        lines = (_LINE.match(line) for line in body.splitlines())
        found[name.strip()] = [Instruction(int(m[1], 16), (m[2] or "").strip(), m[3], m[4].strip()) for m in lines if m]
    return found


def steady(code: list[Instruction]) -> dict[str, Any] | None:
    """The steady state of one function; None where no loop multiplies by wgmma.

    Returns:
        {"instructions": issued by a warp for one tile, "multiply_adds": of a warpgroup, and a count for each of KINDS;
        "shape": of a matrix instruction, and "transposed": which of its operands are}.
    """
    ways = [_through(code, *loop) for loop in _innermost(code)]
    ways = [way for way in ways if any(each.products for each in way)]
    if not ways:
        return None
    best = min(ways, key=lambda way: (len(way) / sum(each.products for each in way), len(way)))
    kinds = Counter(_kind(each.name) for each in best)
    return {
        "instructions": len(best),
        "multiply_adds": sum(each.products for each in best),
        **{kind: kinds[kind] for kind in KINDS},
        **_matrices(best),
    }


def _matrices(way: list[Instruction]) -> dict[str, str]:
    one = next(each for each in way if each.products)
    shape = "x".join(_PRODUCT.match(one.name).groups())
    return {"shape": shape, "transposed": "".join(re.findall(r"\.tnsp(\w)", one.operands))}


def _kind(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if pattern.match(name)), "other")


def _innermost(code: list[Instruction]) -> Iterator[tuple[int, int]]:
    """(first, last) instruction of each loop with a product and no smaller such loop in it.

    A jump back is a loop's where its target is passed on every way to it: barriers wait out of line, and jump back too.
    """
    index = {each.address: i for i, each in enumerate(code)}
    back = [(index[each.target], i) for i, each in enumerate(code) if each.target in index and index[each.target] <= i]
    loops = [(a, b) for a, b in back if any(each.products for each in code[a : b + 1])]
    loops = [(a, b) for a, b in loops if not _reaches(code, index, b, without=a)]
    for a, b in loops:
        if not any((c, d) != (a, b) and a <= c and d <= b for c, d in loops):
            yield a, b


def _reaches(code: list[Instruction], index: dict[int, int], goal: int, without: int) -> bool:
    """Whether there is a way from the start to an instruction that does not pass another."""
    todo, seen = [0], {without}
    while todo:
        if (i := todo.pop()) in seen or i >= len(code):
            continue
        if i == goal:
            return True
        seen.add(i)
        todo += _next(code, index, i)
    return False


def _next(code: list[Instruction], index: dict[int, int], i: int) -> list[int]:
    """Where control may go from an instruction."""
    following = [] if code[i].ends else [i + 1]
    return following + ([index[code[i].target]] if code[i].target in index else [])


def _through(code: list[Instruction], first: int, last: int) -> list[Instruction]:
    """The way through a loop, forward jumps only, that multiplies most, then has most exponentials, then issues least.

    Exponentials, because where two warpgroups divide the work, one of them makes the weights.
    """
    index = {code[i].address: i for i in range(first, last + 1)}
    worth = lambda each: (-each.products, -(_kind(each.name) == "exponential"), 1)
    best: dict[int, tuple[tuple[int, ...], int | None]] = {first: (worth(code[first]), None)}
    for i in range(first, last + 1):  # jumps go forward: all that lead here were seen
        if i not in best:
            continue
        for j in _next(code, index, i):
            if first < j <= last and j > i:
                cost = tuple(map(sum, zip(best[i][0], worth(code[j])))), i
                best[j] = min(best.get(j, cost), cost, key=lambda each: each[0])
    if last not in best:
        return []
    way, at = [], last
    while at is not None:
        way.append(code[at])
        at = best[at][1]
    return way[::-1]
