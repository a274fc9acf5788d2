"""Count the bundles that known attention kernels execute on a TPU, by their names, per visible pair of query and key.

It gives what the traced program does not say: the size of a tile, and the bundles of an interior and of a masked one.
`executed_bundles` counts all steps of any kernel that can be traced without a TPU; tokamax's cannot.

A schedule lists every bundle once. How often each one is issued depends on the grid: a `pl.when` counts in the steps
that take it, a loop as often as it runs, and the rest of the grid's loop in every step. The steps are those of our
block schedule, of splash's MaskInfo and of tokamax's. The count leaves out waits for memory and XLA's own kernels:
copies to another layout, and the sum over the parts of dq that tokamax writes.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.aot.cases import Case
from bench.aot.hardware import Target
from bench.aot.tpu import vliw_schedule
from bench.aot.tpu.vliw_schedule import Region
from dantinox.kernels import cost, workloads
from dantinox.kernels.dispatch import Device
from dantinox.kernels.ops.attention.block_schedule import (
    FIRST_KV_BLOCK,
    LAST_KV_BLOCK,
    NEEDS_MASK,
    BlockSchedule,
    make_block_schedule,
)
from dantinox.kernels.ops.attention.common import AttentionConfig
from dantinox.kernels.ops.attention.pallas_tpu import block_sizes, common

SPLASH = ("splash", "splash_512", "splash_fused")
TOKAMAX_BLOCK = 128  # tokamax's heuristics take it on every TPU
DIRECTIONS = ("forward", "backward")
Row = dict[str, Any]


@dataclass(frozen=True)
class KernelSteps:
    """How often a kernel runs each part of its body.

    Attributes:
        steps: steps of its grid.
        taken: the number of steps that take each `pl.when` of the body, in order.
        interior, masked: indices of the `pl.when`s that an interior and a masked block take.
        tile: queries of all heads of a block, and keys.
        trips: iterations of each loop in a `pl.when`.
        copies: how often the body repeats the code of a block.
        block_changes: steps that load or store blocks whose transfer has a region of its own.
    """

    steps: int
    taken: tuple[int, ...]
    interior: tuple[int, ...]
    masked: tuple[int, ...]
    tile: tuple[int, int]
    trips: int = 1
    copies: int = 1
    block_changes: int = 0


def add(row: Row, case: Case, target: Target, dumps: Path) -> None:
    """Add the executed bundles to a compiled row and to its kernels, where they are known.

    Args:
        row: a row of a profile; it is changed.
        case: the program of the row.
        target: the accelerator that it was compiled for.
        dumps: folder of libtpu's dumps.
    """
    if case.op != "attention" or target.platform != "tpu":
        return
    workload = workloads.get(case.op, case.spec)
    if workload.segments is not None:  # which blocks overlap in a segment is known only at run time
        return
    num_pairs = cost.visible_pairs(workload.T, workload.S, causal=workload.causal, window=workload.window)
    num_pairs *= workload.B * workload.H
    executed: dict[str, int] = {}
    for kernel in row["kernels"]:
        text = vliw_schedule.read_final_bundles(dumps, kernel["name"])
        steps = kernel_steps(workload, case, target, kernel["name"], text)
        if steps is None:
            return
        counts = count_bundles(text, steps)
        kernel |= counts | {
            "steps": steps.steps,
            "bundles_per_pair": round(counts["executed"] / num_pairs, 6),
            "mxu_per_1024x1024": round(kernel["mxu"] / steps.copies / math.prod(steps.tile) * 2**20),
            "tile": list(steps.tile),
        }
        direction = direction_of(kernel["name"])
        executed[direction] = executed.get(direction, 0) + counts["executed"]
    if executed:
        row["bundles_per_pair"] = {direction: round(n / num_pairs, 6) for direction, n in executed.items()}


def direction_of(kernel: str) -> str:
    """Tell by its name whether a kernel belongs to the forward or to the backward pass."""
    return "backward" if any(word in kernel for word in ("backward", "dkv", "dq")) else "forward"


def count_bundles(text: str, kernel: KernelSteps) -> Row:
    """Count the bundles executed, and those of an interior and of a masked block.

    Args:
        text: the final bundles of the kernel.
        kernel: how often its parts run.

    Returns:
        "executed" and "tile_bundles" (interior, masked). If the schedule does not have as many `pl.when`s as `kernel`,
        every bundle counts in every step and "upper_bound" is True.
    """
    total, regions = vliw_schedule.regions(text)
    grid = max((region for region in regions if region.loop), key=Region.size, default=Region(0, total, True))
    inner = [region for region in regions if region != grid and region.inside(grid)]
    loops = [region for region in inner if region.loop]
    body = max((region for region in inner if not region.loop), key=Region.size, default=grid)
    whens = [region for region in inner if not region.loop and region != body and region.inside(body)]
    whens = [when for when in whens if not any(when.inside(other) for other in whens if other != when)]
    transfers: list[Region] = []
    if kernel.block_changes:  # regions around the body load blocks of several pieces, and regions at its end store them
        starts = vliw_schedule.strided_transfers(text)
        loads = [each for each in inner if not body.inside(each) and any(at in each.bundles() for at in starts)]
        transfers = [each for each in loads if not any(each != other and other.inside(each) for other in loads)]
        whens = [when for when in whens if when not in transfers]
        num_whens = len(kernel.taken)
        transfers, whens = transfers + whens[num_whens:], whens[:num_whens]

    def repeated(region: Region) -> int:
        """Count the bundles of a region's loops in all iterations but the first."""
        return (kernel.trips - 1) * sum(loop.size() for loop in loops if loop.inside(region))

    outside = total - grid.size()
    if len(whens) != len(kernel.taken):
        step = grid.size() + repeated(grid)
        return {"executed": outside + kernel.steps * step, "tile_bundles": [step, step], "upper_bound": True}
    when_bundles = [when.size() + repeated(when) for when in whens]
    transfer_bundles = sum(each.size() for each in transfers)
    always = grid.size() - sum(when.size() for when in whens) - transfer_bundles
    executed = outside + kernel.steps * always + sum(n * size for n, size in zip(kernel.taken, when_bundles))
    executed += kernel.block_changes * transfer_bundles
    block_bundles = [always + sum(when_bundles[i] for i in taken) for taken in (kernel.interior, kernel.masked)]
    return {"executed": executed, "tile_bundles": block_bundles}


def kernel_steps(
    workload: workloads.Attention, case: Case, target: Target, kernel: str, text: str
) -> KernelSteps | None:
    """How often one kernel of a program runs its parts; None where the steps of its grid are not known."""
    if case.implementation in SPLASH:
        return splash(workload, kernel, case.implementation)
    if case.implementation == "tokamax":
        return tokamax(workload, kernel)
    has_unseen_keys = workload.window is not None and workload.T + workload.window - 1 < workload.S
    if case.implementation != "pallas" or has_unseen_keys:
        return None
    config, grid_heads = pallas_config(workload, target)
    if direction_of(kernel) == "forward":
        return pallas_forward(config.block_schedule(), config, grid_heads)
    # The kernels of all spans of keys have one name; the length of the schedule tells them apart.
    length = vliw_schedule.first_table_length(text)
    schedules = [span.schedule for span in common.kv_spans(config)]
    return next((pallas_backward(each, config, grid_heads) for each in schedules if len(each) == length), None)


def pallas_config(
    workload: workloads.Attention, target: Target
) -> tuple[AttentionConfig[block_sizes.TpuBlockSizes], int]:
    """The configuration of our kernels when they are traced for the target, and the size of the grid's first axis."""
    G = workload.H // workload.K
    sizes = block_sizes.heuristic_block_sizes(
        Device(target.platform, target.kind),
        G=G,
        T=workload.T,
        S=workload.S,
        D=workload.D,
        causal=workload.causal,
        window=workload.window,
        itemsize=workload.itemsize,
    )
    config = AttentionConfig(workload.T, workload.S, G, workload.causal, workload.window, 1.0, workload.softcap, sizes)
    return config, workload.B * workload.K


def pallas_forward(
    schedule: BlockSchedule, config: AttentionConfig[block_sizes.TpuBlockSizes], grid_heads: int
) -> KernelSteps:
    """Steps of our forward kernel: init, scores, mask, softmax, product, epilogue."""
    steps, first, masked, last = _count_flags(schedule, grid_heads)
    taken = (first, steps, masked, steps, steps, last)
    return replace(
        _pallas_steps(config), steps=steps, taken=taken, interior=(1, 3, 4), masked=(1, 2, 3, 4), block_changes=first
    )


def pallas_backward(
    schedule: BlockSchedule, config: AttentionConfig[block_sizes.TpuBlockSizes], grid_heads: int
) -> KernelSteps:
    """Steps of our backward kernel, for one span of keys."""
    steps, first, masked, last = _count_flags(schedule, grid_heads)
    taken = (grid_heads, first, steps, masked, steps, steps, steps, steps, last, grid_heads)
    base = _pallas_steps(config)
    interior, masked_block = (2, 4, 5, 6, 7), (2, 3, 4, 5, 6, 7)
    return replace(base, steps=steps, taken=taken, interior=interior, masked=masked_block, block_changes=first)


def _count_flags(schedule: BlockSchedule, grid_heads: int) -> tuple[int, int, int, int]:
    """(all steps, steps of a first block of keys, steps that mask, steps of a last block of keys)."""
    flags = (FIRST_KV_BLOCK, NEEDS_MASK, LAST_KV_BLOCK)
    first, masked, last = (grid_heads * int(((schedule.flags & flag) != 0).sum()) for flag in flags)
    return grid_heads * len(schedule), first, masked, last


def _pallas_steps(config: AttentionConfig[block_sizes.TpuBlockSizes]) -> KernelSteps:
    num_q_subtiles, num_kv_subtiles = config.num_subtiles
    tile = (config.G * config.block_sizes.block_q, config.block_sizes.block_kv)
    return KernelSteps(0, (), (), (), tile, trips=num_q_subtiles * num_kv_subtiles)


def splash(workload: workloads.Attention, kernel: str, implementation: str) -> KernelSteps:
    """Steps of jax's splash attention: init, block, epilogue.

    Every row of its grid has as many blocks as the fullest one; the grid of the fused backward pass has all blocks.
    """
    small = implementation == "splash_512" or (implementation == "splash_fused" and workload.window is not None)
    block_q, block_kv = (min(512 if small else 1024, size) for size in (workload.T, workload.S))
    schedule = make_block_schedule(
        workload.T, workload.S, block_q, block_kv, causal=workload.causal, window=workload.window
    )
    num_q_blocks, num_kv_blocks = -(-workload.T // block_q), -(-workload.S // block_kv)
    heads, kv_heads = workload.B * workload.H, workload.B * workload.K
    if "dkv" in kernel:
        longest = num_q_blocks if implementation == "splash_fused" else int(np.bincount(schedule.kv).max())
        steps, ends = heads * num_kv_blocks * longest, kv_heads * num_kv_blocks
    else:
        longest = int(np.bincount(schedule.q).max())
        steps, ends = heads * num_q_blocks * longest, heads * num_q_blocks
    return KernelSteps(steps, (ends, heads * len(schedule), ends), (1,), (1,), (block_q, block_kv))


def tokamax(workload: workloads.Attention, kernel: str) -> KernelSteps:
    """Steps of tokamax's splash: init, interior block, masked block, epilogue; its backward grid has all blocks."""
    size = TOKAMAX_BLOCK
    schedule = make_block_schedule(workload.T, workload.S, size, size, causal=workload.causal, window=workload.window)
    heads, kv_heads = workload.B * workload.H, workload.B * workload.K
    num_q_blocks, num_kv_blocks = -(-workload.T // size), -(-workload.S // size)
    visible, _, masked, _ = _count_flags(schedule, heads)
    if "dkv" in kernel:
        steps, ends = heads * num_q_blocks * num_kv_blocks, kv_heads * num_kv_blocks
    else:
        steps, ends = visible, heads * num_q_blocks
    return KernelSteps(steps, (ends, visible - masked, masked, ends), (1,), (2,), (size, size), copies=2)
