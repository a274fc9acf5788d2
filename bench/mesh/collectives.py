"""Read from a compiled program what its devices exchange."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8, "f64": 8}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_OPERATION = re.compile(r"= (.*?) (" + "|".join(KINDS) + r")(-start)?\(")
_CALLED = re.compile(r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One exchange of a program.

    Attributes:
        kind: one of `KINDS`.
        bytes: size of a device's result; of a reduce-scatter, of what it reads.
        count: how often it runs; a loop of unknown length counts once.
        largest: size of the largest array in the result.
    """

    kind: str
    bytes: int
    count: int
    largest: int


def collectives(text: str) -> list[Collective]:
    """Return the exchanges of a compiled program, given as the text of its HLO."""
    bodies: dict[str, list[str]] = {}
    name, entry = "", ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name = match[2]
            bodies[name] = []
            entry = name if match[1] else entry
        elif name:
            bodies[name].append(line)
    return list(_walk(bodies, entry, 1))


def _walk(bodies: dict[str, list[str]], name: str, count: int) -> Iterator[Collective]:
    for line in bodies.get(name, []):
        if match := _OPERATION.search(line):
            yield _collective(line, match, count)
            continue
        called = _CALLED.findall(line) + [
            branch.strip(" %") for group in _BRANCHES.findall(line) for branch in group.split(",")
        ]
        for other in called:
            yield from _walk(bodies, other, count * _trips(bodies, line))


def _trips(bodies: dict[str, list[str]], line: str) -> int:
    """Return how often an operation runs what it calls: 1, or the trips of a loop that counts from 0."""
    if " while(" not in line:
        return 1
    if match := _KNOWN_TRIPS.search(line):
        return int(match[1])
    condition = "\n".join(bodies.get(re.search(r"condition=%?([\w.\-]+)", line)[1], []))
    bounds = re.findall(r"= s32\[\]\S* constant\((\d+)\)", condition)
    return int(bounds[0]) if len(bounds) == 1 and "direction=LT" in condition else 1


def _collective(line: str, match: re.Match[str], count: int) -> Collective:
    sizes = [_size(*shape) for shape in _SHAPE.findall(match[1])]
    kind = match[2]
    if match[3]:  # an asynchronous one returns its operands too, and then perhaps its state
        sizes = [size for size in sizes if size > 4] or sizes
        sizes = sizes[len(sizes) // 2 :] if kind != "all-reduce" else sizes
    if kind == "reduce-scatter":
        sizes = [size * _group_size(line) for size in sizes]
    return Collective(kind, sum(sizes), count, max(sizes, default=0))


def _size(dtype: str, dimensions: str) -> int:
    size = 1 if dtype.startswith("f8") else _BYTES.get(dtype, 4)
    for dimension in filter(None, dimensions.split(",")):
        size *= int(dimension)
    return size


def _group_size(line: str) -> int:
    """Return the number of devices that exchange with each other."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(axis.split("=") for axis in match[1].split(","))
        return math.prod(int(sizes[axis.strip()]) for axis in match[2].split(","))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(match[1])
    match = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    return len(match[1].split(",")) if match else 1


def totals(found: list[Collective]) -> dict[str, tuple[int, int]]:
    """Return (count, bytes) of each kind that occurs."""
    sums: dict[str, tuple[int, int]] = {}
    for one in found:
        count, size = sums.get(one.kind, (0, 0))
        sums[one.kind] = (count + one.count, size + one.count * one.bytes)
    return sums
