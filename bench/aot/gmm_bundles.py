"""Bundles that a grouped matmul executes on a TPU, over all its rows: how often each part of its schedule is run.

A schedule has each bundle once, the rare ones too. Which are run depends on how the rows are spread over groups: a tile
that two groups share is visited twice. Ours multiplies the chunks that a visit has rows of; tokamax's and megablox's
multiply the whole tile each time. Waits for memory are not in it.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.aot import baselines, tables, tpu_schedule
from bench.aot.cases import Case
from bench.hardware import Target
from dantinox.kernels import workloads
from dantinox.kernels.dispatch import Device
from dantinox.kernels.ops.grouped_matmul.pallas_tpu import block_sizes
from dantinox.kernels.workloads import types as workload_types

LARGE = 100  # bundles: what is smaller in a peer's schedule copies blocks
Row = dict[str, Any]


class Part(NamedTuple):
    """One part of a step that a branch leaves out: how often it is taken; of loops in it, the outermost first, all
    their trips; or of branches in it what each does, in order."""

    taken: int
    trips: Sequence[int] = ()
    inner: Sequence["Part"] = ()


class Work(NamedTuple):
    """Steps of the grid, and the parts of a step in order; `least`: bundles that a part has at least."""

    steps: int
    parts: Sequence[Part]
    least: int = 0


def add(row: Row, case: Case, target: Target, dumps: Path) -> None:
    """Writes `executed` by skew into the kernels of a compiled grouped matmul, where their form is known."""
    if case.op not in ("grouped_matmul", "moe_mlp") or target.platform != "tpu":
        return
    spec = workloads.get(case.op, case.spec)
    for kernel in row["kernels"]:
        text = tpu_schedule.final(dumps, kernel["name"])
        found = {}
        for skew in tables.SKEWS:
            if isinstance(spec, workloads.MoE):
                works = mixture(spec, kernel["name"], target, skew, keep=case.direction == "both")
            else:
                sizes = workload_types.spread(spec.N, spec.E, skew)
                works = candidates(spec, case.implementation, kernel["name"], target, sizes)
            counted = [count for work in works if (count := executed(text, work)) is not None]
            if len(counted) == 1:
                found[skew] = counted[0]
        if found:
            kernel["executed"] = found


def executed(text: str, work: Work) -> int | None:
    """Bundles of a kernel's final schedule that are executed; None where its parts are others than the work's."""
    total, found = tpu_schedule.parts(text)
    size = lambda part: part.stop - part.start
    grid = max((part for part in found if part.loop), key=size, default=None)
    if grid is None:
        return None
    within = lambda part: [each for each in found if each != part and each.inside(part)]
    tops = _outermost([part for part in within(grid) if not part.loop])
    body = max(tops, key=size, default=grid)
    if any(size(part) >= LARGE for part in within(body) if not part.loop):
        tops = _outermost([part for part in within(body) if not part.loop])
    tops = [part for part in tops if size(part) >= work.least]
    if len(tops) != len(work.parts):
        return None
    always = size(grid) - sum(map(size, tops))
    count = total - size(grid) + work.steps * always
    of_parts = [_executed(part, how, found) for part, how in zip(tops, work.parts, strict=True)]
    return None if None in of_parts else count + sum(of_parts)


def _executed(part: tpu_schedule.Part, how: Part, found: list[tpu_schedule.Part]) -> int | None:
    """Bundles of one part over all steps; None where its form is another."""
    size = lambda each: each.stop - each.start
    within = [each for each in found if each != part and each.inside(part)]
    if how.inner:
        branches = _outermost([each for each in within if not each.loop])
        if len(branches) != len(how.inner):
            return None
        of_branches = [_executed(*pair, found) for pair in zip(branches, how.inner, strict=True)]
        return None if None in of_branches else how.taken * (size(part) - sum(map(size, branches))) + sum(of_branches)
    loops = sorted((each for each in within if each.loop), key=size, reverse=True)
    nested = all(inner.inside(outer) for outer, inner in itertools.pairwise(loops))
    if not nested or len(loops) != len(how.trips) or len(loops) != len(within):
        return None
    sizes, times = [size(part), *map(size, loops), 0], [how.taken, *how.trips]
    return sum(n * (outer - inner) for n, outer, inner in zip(times, sizes, sizes[1:]))


def candidates(
    spec: workloads.GroupedMatmul, implementation: str, kernel: str, target: Target, sizes: Any
) -> list[Work]:
    """What a kernel may do, by its name: one of them has the parts of its schedule."""
    product = tables.product_of("grouped_matmul", kernel)
    K, J = (spec.F, spec.M) if product == "dx" else (spec.M, spec.F)
    if implementation == "pallas":
        return _ours(product, Device(target.platform, target.kind), spec, K, J, sizes, Operands())
    if implementation not in baselines.GROUPED_TILES:
        return []
    rows, *sides = baselines.grouped_tile(spec, implementation)
    if 0 in (rows, *sides):
        return []
    inner, columns = reversed(sides) if product == "dx" else sides
    across, deep = J // columns, K // inner
    visits = sum(-(-stop // rows) - start // rows for start, stop in _spans(sizes))
    if product == "dw":
        steps, ends = across * deep * visits, across * deep * int((sizes > 0).sum())
        return [Work(steps, [Part(ends), Part(steps), Part(ends)], LARGE)]
    steps = across * deep * visits
    accumulates = [Part(across * visits), Part(across * visits), Part(steps - across * visits)]
    found = [Work(steps, parts, LARGE) for parts in ([], [Part(steps)])]
    return found if deep == 1 else [*found, Work(steps, accumulates, LARGE)]


class Operands(NamedTuple):
    """What a product multiplies: rows and matrices, arrays [rows, J] beside them.

    Attributes:
        plain: it has no epilogue. thin: sums over columns leave too.
    """

    xs: int = 1
    ws: int = 1
    wide: int = 1
    transposed: bool = False
    plain: bool = True
    thin: bool = False


MIXTURE = {
    "up": Operands(ws=2, plain=False),
    "down": Operands(plain=False),
    "dh": Operands(wide=5, transposed=True, plain=False, thin=True),
    "dx": Operands(xs=2, ws=2, transposed=True),
    "dw_up": Operands(ws=2),
    "dw_down": Operands(),
}


def mixture(spec: workloads.MoE, kernel: str, target: Target, skew: str, *, keep: bool) -> list[Work]:
    """What a kernel of our mixture may do; `keep`: its way up writes what gradients need."""
    if not (part := tables.product_of(spec.op, kernel)):
        return []
    rows = spec.N * spec.k
    K, J = (spec.M, spec.F) if part in ("up", "dh", "dw_up") else (spec.F, spec.M)
    given = {name: getattr(spec, name) for name in ("name", "suites", "devices", "dtypes", "E")}
    of = workloads.GroupedMatmul(N=rows, M=K, F=J, **given)
    product = "dw" if part.startswith("dw") else "dx" if MIXTURE[part].transposed else "y"
    operands = MIXTURE[part]._replace(wide=3) if part == "up" and keep else MIXTURE[part]
    sizes = workload_types.spread(rows, spec.E, skew)
    return _ours(product, Device(target.platform, target.kind), of, K, J, sizes, operands)


def _ours(
    product: str,
    here: Device,
    spec: workloads.GroupedMatmul,
    K: int,
    J: int,
    sizes: Any,
    operands: Operands,
) -> list[Work]:
    options = {"itemsize": spec.itemsize}
    if product == "dw":
        tile = block_sizes.summed(here, spec.N, spec.E, K, J, dys=operands.ws, **options)
        each = -(-K // tile.inner) * -(-J // tile.columns)
        visits, empty = each * len(_visits(sizes, tile.rows)), each * int((sizes == 0).sum())
        busy = Part(visits)
        return [Work(visits + empty, [busy, busy, Part(empty, (empty * tile.inner // 64,))])]
    transposed = product == "dx"
    options |= operands._asdict() | {"transposed": transposed}
    options.pop("thin")
    tile = block_sizes.product(here, spec.N, spec.E, K, J, **options)
    if tile.inner < K:
        return []
    across, strips = -(-J // tile.columns), tile.columns // tile.strip
    visits, every = _visits(sizes, tile.rows), tile.rows // tile.chunk
    rest = [visit for visit in visits if every == 1 or not _whole(visit, tile)]
    spoils = across * sum(low > row for row, low, _ in rest)
    saved = Part(spoils, (spoils * tile.rows // 64,))
    of_strips = lambda times: (times * strips,) if strips > 1 else ()  # one strip is no loop
    left, parts = [sum(_chunks(visit, tile.rows, tile.chunk)) for visit in rest], []
    for size in range(tile.chunks, 0, -1):
        trips = [each // size for each in left]
        left = [each % size for each in left]
        taken, times = across * sum(map(bool, trips)), across * sum(trips)
        parts.append(Part(taken, (times, *of_strips(times))))
    parts = [saved, *parts, saved] + [Part(0)] * operands.thin  # where rows are nobody's
    if every > 1:
        taken = across * (len(visits) - len(rest))
        parts = [Part(taken, of_strips(taken)), Part(across * len(rest), inner=parts)]
    return [Work(across * len(visits), parts)]


def _whole(visit: tuple[int, int, int], tile: block_sizes.Tiles) -> bool:
    """Whether a visit begins with its tile, or before, and has rows of its last chunk."""
    row, low, high = visit
    return low <= row and row + tile.rows - tile.chunk < high


def _visits(sizes: Any, rows: int) -> list[tuple[int, int, int]]:
    """(first row of the tile, first and end of the group's rows) of each visit."""
    firsts = lambda start, stop: range(start // rows * rows, stop, rows)
    return [(row, start, stop) for start, stop in _spans(sizes) for row in firsts(start, stop)]


def _chunks(visit: tuple[int, int, int], rows: int, chunk: int) -> list[bool]:
    """Which chunks of its tile a visit has rows of."""
    row, low, high = visit
    return [low < at + chunk and at < high for at in range(row, row + rows, chunk)]


def _spans(sizes: Any) -> list[tuple[int, int]]:
    """First and end of the rows of each group that has some."""
    ends = np.cumsum(sizes)
    return [(int(end - size), int(end)) for end, size in zip(ends, sizes, strict=True) if size]


def _outermost(parts: list[tpu_schedule.Part]) -> list[tpu_schedule.Part]:
    return [part for part in parts if not any(other != part and part.inside(other) for other in parts)]
