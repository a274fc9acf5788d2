"""Bundles that a grouped matmul executes on a TPU, over all its rows: how often each part of its schedule runs.

A schedule has each bundle once, rare ones included. Which of them run depends on how the rows are spread over groups: a
tile that two groups share is visited twice. Our kernel multiplies the chunks that a visit has rows of; tokamax's and
megablox's multiply the whole tile each time. Waits for memory are not counted.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.aot import baselines
from bench.aot.cases import Case
from bench.aot.hardware import Target
from bench.aot.tpu import products, vliw_schedule
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
        text = vliw_schedule.final(dumps, kernel["name"])
        found = {}
        for skew in products.SKEWS:
            if isinstance(spec, workloads.MoE):
                works = experts_candidates(spec, kernel["name"], target, skew, save_residuals=case.direction == "both")
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
    total, found = vliw_schedule.parts(text)
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


def _executed(part: vliw_schedule.Part, how: Part, found: list[vliw_schedule.Part]) -> int | None:
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
    product = products.product_of("grouped_matmul", kernel)
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
    """What a product reads and writes, as `block_sizes.gmm_block_sizes` counts it; `row_sums`: outputs [1, N] too."""

    num_x: int = 1
    num_w: int = 1
    num_matrices: int = 1
    transposed: bool = False
    has_epilogue: bool = False
    row_sums: bool = False


EXPERTS = {
    "up": Operands(num_w=2, has_epilogue=True),
    "down": Operands(has_epilogue=True),
    "dh": Operands(num_matrices=5, transposed=True, has_epilogue=True, row_sums=True),
    "dx": Operands(num_x=2, num_w=2, transposed=True),
    "dw_up": Operands(num_w=2),
    "dw_down": Operands(),
}


def experts_candidates(
    spec: workloads.MoE, kernel: str, target: Target, skew: str, *, save_residuals: bool
) -> list[Work]:
    """What a kernel of our mixture of experts may do; `save_residuals`: up_proj writes gate and up too."""
    if not (part := products.product_of(spec.op, kernel)):
        return []
    rows = spec.N * spec.k
    K, J = (spec.M, spec.F) if part in ("up", "dh", "dw_up") else (spec.F, spec.M)
    given = {name: getattr(spec, name) for name in ("name", "suites", "devices", "dtypes", "E")}
    grouped = workloads.GroupedMatmul(N=rows, M=K, F=J, **given)
    product = "dw" if part.startswith("dw") else "dx" if EXPERTS[part].transposed else "y"
    operands = EXPERTS[part]._replace(num_matrices=3) if part == "up" and save_residuals else EXPERTS[part]
    sizes = workload_types.spread(rows, spec.E, skew)
    return _ours(product, Device(target.platform, target.kind), grouped, K, J, sizes, operands)


def _ours(
    product: str,
    device: Device,
    spec: workloads.GroupedMatmul,
    K: int,
    J: int,
    sizes: Any,
    operands: Operands,
) -> list[Work]:
    options = {"itemsize": spec.itemsize}
    if product == "dw":
        blocks = block_sizes.tgmm_block_sizes(device, spec.N, spec.E, K, J, num_dy=operands.num_w, **options)
        steps = -(-K // blocks.block_k) * -(-J // blocks.block_n)
        visits, empty = steps * len(_visits(sizes, blocks.block_m)), steps * int((sizes == 0).sum())
        busy = Part(visits)
        return [Work(visits + empty, [busy, busy, Part(empty, (empty * blocks.block_k // 64,))])]
    transposed = product == "dx"
    options |= operands._asdict() | {"transposed": transposed}
    options.pop("row_sums")
    blocks = block_sizes.gmm_block_sizes(device, spec.N, spec.E, K, J, **options)
    if blocks.block_k < K:
        return []
    across, strips = -(-J // blocks.block_n), blocks.block_n // blocks.block_n_sub
    visits, num_chunks = _visits(sizes, blocks.block_m), blocks.block_m // blocks.block_m_sub
    rest = [visit for visit in visits if num_chunks == 1 or not _covers_tile(visit, blocks)]
    overwrites = across * sum(low > row for row, low, _ in rest)
    saved = Part(overwrites, (overwrites * blocks.block_m // 64,))
    of_strips = lambda times: (times * strips,) if strips > 1 else ()  # one strip is no loop
    left, parts = [sum(_chunks(visit, blocks.block_m, blocks.block_m_sub)) for visit in rest], []
    for size in range(blocks.max_chunks, 0, -1):
        trips = [chunks // size for chunks in left]
        left = [chunks % size for chunks in left]
        taken, times = across * sum(map(bool, trips)), across * sum(trips)
        parts.append(Part(taken, (times, *of_strips(times))))
    parts = [saved, *parts, saved] + [Part(0)] * operands.row_sums  # unassigned rows
    if num_chunks > 1:
        taken = across * (len(visits) - len(rest))
        parts = [Part(taken, of_strips(taken)), Part(across * len(rest), inner=parts)]
    return [Work(across * len(visits), parts)]


def _covers_tile(visit: tuple[int, int, int], blocks: block_sizes.GmmBlockSizes) -> bool:
    """Whether a visit starts with its tile, or before, and has rows of its last chunk."""
    row, low, high = visit
    return low <= row and row + blocks.block_m - blocks.block_m_sub < high


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


def _outermost(parts: list[vliw_schedule.Part]) -> list[vliw_schedule.Part]:
    return [part for part in parts if not any(other != part and part.inside(other) for other in parts)]
