"""Count the bundles that known grouped matmuls execute on a TPU over all their rows, by their names.

`executed_bundles` counts any kernel that can be traced without a TPU; tokamax's cannot.

A schedule has each bundle once, rarely taken branches included. Which of them run depends on how the rows are spread
over groups: the kernel visits a tile that two groups share twice. Our kernel multiplies only the chunks of a tile in
which the group has rows; tokamax's and megablox's multiply the full tile each time. The count leaves out waits for
memory.
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
from bench.aot.tpu.vliw_schedule import Region
from dantinox.kernels import workloads
from dantinox.kernels.dispatch import Device
from dantinox.kernels.ops.grouped_matmul.pallas_tpu import block_sizes
from dantinox.kernels.workloads import types as workload_types

LARGE = 100  # bundles: smaller parts of another library's schedule copy blocks
Row = dict[str, Any]


class Branch(NamedTuple):
    """A part of a step that a jump may skip.

    Attributes:
        taken: the number of steps that take it.
        trips: iterations over all steps of each loop in it, the outermost loop first.
        inner: the branches in it, in order.
    """

    taken: int
    trips: Sequence[int] = ()
    inner: Sequence["Branch"] = ()


class KernelSteps(NamedTuple):
    """How often a kernel runs each part of its body.

    Attributes:
        steps: steps of its grid.
        branches: the branches of a step, in order.
        min_bundles: bundles that a branch has at least; smaller ones copy blocks.
    """

    steps: int
    branches: Sequence[Branch]
    min_bundles: int = 0


class TileVisit(NamedTuple):
    """One visit of a tile by a group: the tile's first row, and the first and end of the group's rows."""

    tile_start: int
    row_start: int
    row_end: int


def add(row: Row, case: Case, target: Target, dumps: Path) -> None:
    """Add `executed`, bundles by skew, to the kernels of a compiled grouped matmul, where they can be counted.

    Args:
        row: a row of a profile; it is changed.
        case: the program of the row.
        target: the accelerator that it was compiled for.
        dumps: folder of libtpu's dumps.
    """
    if case.op != "grouped_matmul" or target.platform != "tpu":
        return
    workload = workloads.get(case.op, case.spec)
    for kernel in row["kernels"]:
        text = vliw_schedule.read_final_bundles(dumps, kernel["name"])
        executed = {}
        for skew in products.SKEWS:
            sizes = workload_types.spread(workload.N, workload.E, skew)
            candidates = gmm_candidates(workload, case.implementation, kernel["name"], target, sizes)
            counts = [count for steps in candidates if (count := count_bundles(text, steps)) is not None]
            if len(counts) == 1:
                executed[skew] = counts[0]
        if executed:
            kernel["executed"] = executed


def count_bundles(text: str, kernel: KernelSteps) -> int | None:
    """Count the bundles executed; None if the schedule does not have the branches of `kernel`.

    Args:
        text: the final bundles of the kernel.
        kernel: how often its parts run.
    """
    total, regions = vliw_schedule.regions(text)
    grid = max((region for region in regions if region.loop), key=Region.size, default=None)
    if grid is None:
        return None
    branches = _outermost([region for region in _within(grid, regions) if not region.loop])
    body = max(branches, key=Region.size, default=grid)
    in_body = [region for region in _within(body, regions) if not region.loop]
    if any(region.size() >= LARGE for region in in_body):
        branches = _outermost(in_body)
    branches = [branch for branch in branches if branch.size() >= kernel.min_bundles]
    if len(branches) != len(kernel.branches):
        return None
    always = grid.size() - sum(branch.size() for branch in branches)
    counts = [_count_branch(*pair, regions) for pair in zip(branches, kernel.branches, strict=True)]
    return None if None in counts else total - grid.size() + kernel.steps * always + sum(counts)


def _count_branch(region: Region, branch: Branch, regions: Sequence[Region]) -> int | None:
    """Count the bundles of one branch over all steps; None if the region does not have its branches and loops."""
    within = _within(region, regions)
    if branch.inner:
        inner = _outermost([each for each in within if not each.loop])
        if len(inner) != len(branch.inner):
            return None
        counts = [_count_branch(*pair, regions) for pair in zip(inner, branch.inner, strict=True)]
        always = region.size() - sum(each.size() for each in inner)
        return None if None in counts else branch.taken * always + sum(counts)
    loops = sorted((each for each in within if each.loop), key=Region.size, reverse=True)
    nested = all(inner.inside(outer) for outer, inner in itertools.pairwise(loops))
    if not nested or len(loops) != len(branch.trips) or len(loops) != len(within):
        return None
    sizes, trips = [region.size(), *(loop.size() for loop in loops), 0], [branch.taken, *branch.trips]
    return sum(n * (outer - inner) for n, outer, inner in zip(trips, sizes, sizes[1:]))


def gmm_candidates(
    workload: workloads.GroupedMatmul, implementation: str, kernel: str, target: Target, sizes: Any
) -> list[KernelSteps]:
    """List the possible steps and branches of a grouped matmul's kernel; its schedule has the branches of one of them.

    Args:
        workload: the grouped matmul.
        implementation: pallas or a baseline.
        kernel: name of the kernel, which tells the product.
        target: the TPU.
        sizes: rows of each group [E].

    Returns:
        The candidates; empty if the kernel is not known.
    """
    product = products.product_of("grouped_matmul", kernel)
    K, J = (workload.F, workload.M) if product == "dx" else (workload.M, workload.F)
    if implementation == "pallas":
        return pallas_candidates(product, Device(target.platform, target.kind), workload, K, J, sizes, Operands())
    if implementation not in baselines.GROUPED_TILES:
        return []
    block_m, *sides = baselines.grouped_tile(workload, implementation)
    if 0 in (block_m, *sides):
        return []
    block_k, block_n = reversed(sides) if product == "dx" else sides
    num_n_blocks, num_k_blocks = J // block_n, K // block_k
    num_visits = len(_tile_visits(sizes, block_m))
    steps = num_n_blocks * num_k_blocks * num_visits
    if product == "dw":
        ends = num_n_blocks * num_k_blocks * int((sizes > 0).sum())
        return [KernelSteps(steps, [Branch(ends), Branch(steps), Branch(ends)], LARGE)]
    candidates = [KernelSteps(steps, branches, LARGE) for branches in ([], [Branch(steps)])]
    if num_k_blocks == 1:
        return candidates
    ends = num_n_blocks * num_visits
    accumulate = [Branch(ends), Branch(ends), Branch(steps - ends)]
    return [*candidates, KernelSteps(steps, accumulate, LARGE)]


class Operands(NamedTuple):
    """What a product reads and writes, in the terms of `block_sizes.gmm_block_sizes`.

    Attributes:
        row_sums: whether it has outputs [1, N] too.
    """

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


def pallas_candidates(
    product: str,
    device: Device,
    workload: workloads.GroupedMatmul,
    K: int,
    J: int,
    sizes: Any,
    operands: Operands,
) -> list[KernelSteps]:
    """List the one thing that our kernel does: [N, K] times [E, K, J], or [N, K]^T [N, J] for dw; or nothing."""
    options = {"itemsize": workload.itemsize}
    if product == "dw":
        blocks = block_sizes.tgmm_block_sizes(device, workload.N, workload.E, K, J, num_dy=operands.num_w, **options)
        num_blocks = -(-K // blocks.block_k) * -(-J // blocks.block_n)
        visited = Branch(num_blocks * len(_tile_visits(sizes, blocks.block_m)))
        empty = num_blocks * int((sizes == 0).sum())
        zeroed = Branch(empty, (empty * blocks.block_k // 64,))
        return [KernelSteps(visited.taken + empty, [visited, visited, zeroed])]
    options |= operands._asdict() | {"transposed": product == "dx"}
    options.pop("row_sums")
    blocks = block_sizes.gmm_block_sizes(device, workload.N, workload.E, K, J, **options)
    if blocks.block_k < K:
        return []
    num_n_blocks, num_strips = -(-J // blocks.block_n), blocks.block_n // blocks.block_n_sub
    visits, num_chunks = _tile_visits(sizes, blocks.block_m), blocks.block_m // blocks.block_m_sub
    partial = [visit for visit in visits if num_chunks == 1 or not _covers_tile(visit, blocks)]
    overwrites = num_n_blocks * sum(visit.row_start > visit.tile_start for visit in partial)
    saved = Branch(overwrites, (overwrites * blocks.block_m // 64,))

    def strips(times: int) -> tuple[int, ...]:
        return (times * num_strips,) if num_strips > 1 else ()  # one strip needs no loop

    remaining = [sum(_chunks_with_rows(visit, blocks.block_m, blocks.block_m_sub)) for visit in partial]
    branches = []
    for size in range(blocks.max_chunks, 0, -1):
        trips = [chunks // size for chunks in remaining]
        remaining = [chunks % size for chunks in remaining]
        taken, times = num_n_blocks * sum(map(bool, trips)), num_n_blocks * sum(trips)
        branches.append(Branch(taken, (times, *strips(times))))
    branches = [saved, *branches, saved] + [Branch(0)] * operands.row_sums  # the last: unassigned rows
    if num_chunks > 1:
        taken = num_n_blocks * (len(visits) - len(partial))
        branches = [Branch(taken, strips(taken)), Branch(num_n_blocks * len(partial), inner=branches)]
    return [KernelSteps(num_n_blocks * len(visits), branches)]


def _covers_tile(visit: TileVisit, blocks: block_sizes.GmmBlockSizes) -> bool:
    """Whether the group's rows start at or before the tile and reach into its last chunk."""
    last_chunk = visit.tile_start + blocks.block_m - blocks.block_m_sub
    return visit.row_start <= visit.tile_start and last_chunk < visit.row_end


def _tile_visits(sizes: Any, block_m: int) -> list[TileVisit]:
    """List the visits of tiles by groups, in order."""
    visits = []
    for start, end in _row_ranges(sizes):
        visits += [TileVisit(row, start, end) for row in range(start // block_m * block_m, end, block_m)]
    return visits


def _chunks_with_rows(visit: TileVisit, block_m: int, chunk: int) -> list[bool]:
    """Which chunks of its tile have rows of the visiting group."""
    starts = range(visit.tile_start, visit.tile_start + block_m, chunk)
    return [visit.row_start < start + chunk and start < visit.row_end for start in starts]


def _row_ranges(sizes: Any) -> list[tuple[int, int]]:
    """First and end of the rows of each group that has some."""
    ends = np.cumsum(sizes)
    return [(int(end - size), int(end)) for end, size in zip(ends, sizes, strict=True) if size]


def _within(outer: Region, regions: Sequence[Region]) -> list[Region]:
    return [region for region in regions if region != outer and region.inside(outer)]


def _outermost(regions: Sequence[Region]) -> list[Region]:
    return [region for region in regions if not any(other != region and region.inside(other) for other in regions)]
