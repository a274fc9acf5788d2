"""Map the parts of a traced kernel onto the regions of its schedule, and count how often each bundle is executed.

Both are trees in the order of the program: a `pl.when` becomes a region that a jump skips, a loop one that a jump
repeats. libtpu has fewer regions than the program has parts, because it computes short branches in every step, unrolls
short loops and merges neighbors with one condition; and it adds regions that copy blocks, or that guard the steps of
its own pipeline. A region can belong to a part only if both multiply matrices or neither does, and so on. If several
mappings remain, the one with the most executed bundles counts, as an upper bound.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from bench.aot.tpu import vliw_schedule
from bench.aot.tpu.grid_steps import Part
from bench.aot.tpu.vliw_schedule import Region

MATRIX_UNITS = ("MXU", "MATMUL", "MATPUSH")
Usage = dict[str, list[int]]  # unit -> slots used in each bundle


@dataclass(frozen=True, eq=False)
class _Node:
    """A region.

    Attributes:
        region: its bundles.
        own_size: the number of bundles that are not in the regions in it.
        has_matmul, has_transcendental: whether its bundles use the unit.
        moves_block: whether a block is copied or a transfer is started whenever the region is executed.
        guards_moves: whether predicates, or the regions in it, decide which blocks are copied.
        inner: the regions in it.
    """

    region: Region
    own_size: int
    has_matmul: bool
    has_transcendental: bool
    moves_block: bool
    guards_moves: bool
    inner: tuple["_Node", ...]


class _Match(NamedTuple):
    """The best mappings of some regions.

    Attributes:
        unmatched: bundles of regions without a part, in code that is executed more than once.
        most: executed bundles of the mapping with the most.
        least: executed bundles of the mapping with the fewest.
        untidy: regions without a part, and parts that share a region; of equal mappings, that with the fewest counts.
        parts: the regions of the former mapping, with their parts (none for a region without one).
    """

    unmatched: int
    most: int
    least: int
    untidy: int = 0
    parts: tuple[tuple[_Node, tuple[Part, ...], int], ...] = ()

    def then(self, other: "_Match") -> "_Match":
        """Join the mappings of neighboring regions."""
        sums = (a + b for a, b in zip(self[:4], other[:4]))
        return _Match(*sums, self.parts + other.parts)


class Counts(NamedTuple):
    """How often a kernel's bundles are executed.

    Attributes:
        times: executions of each bundle.
        regions: a row per region: name, bundles, times, spills, fills.
        exact: whether the counts are exact; an upper bound otherwise.
    """

    times: np.ndarray
    regions: list[dict[str, Any]]
    exact: bool


def count(text: str, usage: Usage, program: Part) -> Counts:
    """Count the executions of each bundle.

    Args:
        text: the final bundles of the kernel.
        usage: the slots that each bundle uses.
        program: the kernel, executed once, with its grid in it.

    Raises:
        NotImplementedError: the schedule has loops that the program does not have.
    """
    total, regions = vliw_schedule.regions(text)
    in_order = sorted(set(regions), key=lambda region: (region.start, -region.stop, region.loop))
    nodes = _tree(in_order, usage, vliw_schedule.transfer_starts(text))
    match = _matcher()(nodes, tuple(program.parts), program.count)
    if match is None:
        raise NotImplementedError("the schedule has loops that the traced program does not have")
    times = np.full(total, program.count)
    rows = []
    for node, parts, executions in match.parts:
        times[node.region.start : node.region.stop] = executions
        rows.append(_row(node, parts, executions, usage))
    covered = [part for _, parts, _ in match.parts for part in parts]
    exact = match.unmatched == 0 and match.most == match.least and all(part.known for part in covered)
    return Counts(times, rows, exact)


def _tree(regions: Sequence[Region], usage: Usage, transfers: Mapping[int, bool]) -> tuple[_Node, ...]:
    """Nest regions, which are in order of their start, outer ones first."""
    nodes = []
    rest = list(regions)
    while rest:
        outer = rest.pop(0)
        inside = [region for region in rest if region.inside(outer)]
        rest = rest[len(inside) :]
        inner = _tree(inside, usage, transfers)
        own = sorted(set(outer.bundles()).difference(*(node.region.bundles() for node in inner)))

        def uses(*units: str, own: Sequence[int] = own) -> bool:
            return any(usage[unit][at] for unit in units if unit in usage for at in own)

        has_matmul = uses(*MATRIX_UNITS) or any(node.has_matmul for node in inner)
        has_transcendental = uses("EUP") or any(node.has_transcendental for node in inner)
        copies = uses("VLOAD") and uses("VSTORE") and not (has_matmul or has_transcendental or uses("VALU", "XLU"))
        predicated = [transfers[at] for at in own if at in transfers]
        moves_block = copies or not all(predicated)
        guards_moves = not moves_block and (bool(predicated) or any(node.moves_block for node in inner))
        nodes.append(_Node(outer, len(own), has_matmul, has_transcendental, moves_block, guards_moves, inner))
    return tuple(nodes)


def _fits(node: _Node, parts: Sequence[Part]) -> bool:
    """Whether a region can be these parts, which libtpu may have merged."""
    if node.region.loop != parts[0].loop:
        return False
    if parts[0].is_transfer:
        return node.guards_moves if parts[0].parts else node.moves_block
    return all(
        any(getattr(part, name) is None for part in parts)
        or getattr(node, name) == any(getattr(part, name) for part in parts)
        for name in ("has_matmul", "has_transcendental")
    )


def _matcher() -> Any:
    """Return match(nodes, parts, executions), which finds the best mappings of neighbors, or None."""

    @functools.cache
    def match(nodes: tuple[_Node, ...], parts: tuple[Part, ...], executions: int) -> _Match | None:
        if not nodes:
            return _Match(0, 0, 0)
        first, rest = nodes[0], nodes[1:]
        found = []
        if parts:
            if not parts[0].has_region:
                found.append(match(nodes, (*parts[0].parts, *parts[1:]), executions))
            for merged in _mergeable(parts):
                if _fits(first, merged):
                    times = merged[0].count
                    inner = match(first.inner, tuple(part for each in merged for part in each.parts), times)
                    found.append(_join(first, merged, times, 0, inner, match(rest, parts[len(merged) :], executions)))
        if not first.region.loop:
            unmatched = first.own_size if executions > 1 else 0
            around = match((*first.inner, *rest), parts, executions)
            found.append(_join(first, (), executions, unmatched, around, _Match(0, 0, 0)))
        possible = [each for each in found if each is not None]
        if not possible:
            return None
        best = min(each.unmatched for each in possible)
        possible = [each for each in possible if each.unmatched == best]
        most = max(possible, key=lambda each: (each.most, -each.untidy))
        return most._replace(least=min(each.least for each in possible))

    return match


def _mergeable(parts: tuple[Part, ...]) -> list[tuple[Part, ...]]:
    """The first part, and with it the neighbors that are executed as often."""
    same = 1
    while same < len(parts) and not (parts[0].loop or parts[same].loop) and parts[same].count == parts[0].count:
        same += 1
    return [parts[: n + 1] for n in range(same)]


def _join(
    node: _Node, parts: tuple[Part, ...], times: int, unmatched: int, inner: _Match | None, after: _Match | None
) -> _Match | None:
    if inner is None or after is None:
        return None
    executed = times * node.own_size
    own = _Match(unmatched, executed, executed, abs(len(parts) - 1), ((node, parts, times),))
    return own.then(inner).then(after)


def _row(node: _Node, parts: Sequence[Part], times: int, usage: Usage) -> dict[str, Any]:
    """Describe a region; its bundles, spills and fills do not include those of the regions in it."""
    inside = {at for inner in node.inner for at in inner.region.bundles()}
    own = [at for at in node.region.bundles() if at not in inside]

    def total(unit: str) -> int:
        column = usage.get(unit, [])
        return sum(column[at] for at in own if at < len(column))

    name = " + ".join(dict.fromkeys(part.name for part in parts)) or "?"
    return {
        "name": name + " (loop)" * node.region.loop,
        "bundles": len(own),
        "times": times,
        "spills": total("VSTORE:SPILL"),
        "fills": total("VLOAD:FILL"),
    }
