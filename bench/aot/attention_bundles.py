"""Bundles executed: how often a TPU runs each part of an attention kernel's schedule, over the visible pairs.

A schedule lists every bundle once. What a core issues depends on the grid: each `pl.when` counts in the steps that take
it, a loop as often as it runs, and the rest of the grid's loop in every step. The steps are those of our block
schedule, of splash's MaskInfo and of tokamax's. Waits for memory are not counted, nor are XLA's own kernels: copies to
another layout, and the sum over the parts of dq that tokamax leaves behind.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.aot import tpu_schedule
from bench.aot.cases import Case
from bench.hardware import Target
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
TOKAMAX = 128  # what its heuristics take on every TPU
DIRECTIONS = ("forward", "backward")
Row = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """How often a kernel runs what.

    Attributes:
        steps: of its grid. taken: those that take each `pl.when` of its body, in order. trips: of a loop in one.
        interior, masked: which of them such a tile takes. tile: queries of all its heads, keys. copies: of its code.
    """

    steps: int
    taken: tuple[int, ...]
    interior: tuple[int, ...]
    masked: tuple[int, ...]
    tile: tuple[int, int]
    trips: int = 1
    copies: int = 1


def add(row: Row, case: Case, target: Target, dumps: Path) -> None:
    """Writes what was executed into a compiled row and its kernels, where it is known."""
    if case.op != "attention" or target.platform != "tpu":
        return
    spec = workloads.get(case.op, case.spec)
    if spec.segments is not None:  # which tiles share one is not known before the run
        return
    pairs = spec.B * spec.H * cost.visible_pairs(spec.T, spec.S, causal=spec.causal, window=spec.window)
    sums: dict[str, int] = {}
    for kernel in row["kernels"]:
        text = tpu_schedule.final(dumps, kernel["name"])
        work = of_kernel(spec, case, target, kernel["name"], text)
        if work is None:
            return
        found = count(text, work)
        kernel |= found | {
            "steps": work.steps,
            "bundles_per_pair": round(found["executed"] / pairs, 6),
            "mxu_per_1024x1024": round(kernel["mxu"] / work.copies / math.prod(work.tile) * 2**20),
            "tile": list(work.tile),
        }
        direction = direction_of(kernel["name"])
        sums[direction] = sums.get(direction, 0) + found["executed"]
    if sums:
        row["bundles_per_pair"] = {name: round(each / pairs, 6) for name, each in sums.items()}


def direction_of(kernel: str) -> str:
    """The direction that a kernel belongs to, by its name."""
    return "backward" if any(word in kernel for word in ("backward", "dkv", "dq")) else "forward"


def count(text: str, work: Work) -> Row:
    """Bundles executed, and those of an interior and of a masked tile.

    Where the schedule has another form than the work, every bundle counts in every step: `upper_bound` says so.
    """
    total, parts = tpu_schedule.parts(text)
    size = lambda part: part.stop - part.start
    grid = max((part for part in parts if part.loop), key=size, default=tpu_schedule.Part(0, total, True))
    inner = [part for part in parts if part != grid and part.inside(grid)]
    loops = [part for part in inner if part.loop]
    body = max((part for part in inner if not part.loop), key=size, default=grid)
    whens = [part for part in inner if not part.loop and part != body and part.inside(body)]
    whens = [part for part in whens if not any(part.inside(other) for other in whens if other != part)]
    again = lambda part: (work.trips - 1) * sum(size(loop) for loop in loops if loop.inside(part))
    if len(whens) != len(work.taken):
        step = size(grid) + again(grid)
        return {"executed": total - size(grid) + work.steps * step, "tile_bundles": [step, step], "upper_bound": True}
    whole = [size(part) + again(part) for part in whens]
    always = size(grid) - sum(map(size, whens))
    executed = total - size(grid) + work.steps * always + sum(n * each for n, each in zip(work.taken, whole))
    tile = [always + sum(whole[i] for i in which) for which in (work.interior, work.masked)]
    return {"executed": executed, "tile_bundles": tile}


def of_kernel(spec: workloads.Attention, case: Case, target: Target, kernel: str, text: str) -> Work | None:
    """The work of one kernel of a program; None where nobody has counted it."""
    if case.implementation in SPLASH:
        return splash(spec, kernel, case.implementation)
    if case.implementation == "tokamax":
        return tokamax(spec, kernel)
    if case.implementation != "pallas" or (spec.window is not None and spec.T + spec.window - 1 < spec.S):
        return None
    config, heads = ours(spec, target)
    if direction_of(kernel) == "forward":
        return forward(config.block_schedule(), config, heads)
    plans = [config.block_schedule(span) for span in common.kv_spans(config)]
    steps = tpu_schedule.first_operand(text)  # which span it is: the kernels of all have one name
    return next((backward(each, config, heads) for each in plans if len(each) == steps), None)


def ours(spec: workloads.Attention, target: Target) -> tuple[AttentionConfig[block_sizes.TpuBlockSizes], int]:
    """(what `dantinox.kernels.ops.attention.pallas` knows when it is traced for the target, entries of the
    grid's first axis)."""
    G = spec.H // spec.K
    sizes = block_sizes.heuristic_block_sizes(
        Device(target.platform, target.kind),
        G=G,
        T=spec.T,
        S=spec.S,
        D=spec.D,
        causal=spec.causal,
        window=spec.window,
        itemsize=spec.itemsize,
    )
    config = AttentionConfig(spec.T, spec.S, G, spec.causal, spec.window, 1.0, spec.softcap, sizes)
    return config, spec.B * spec.K


def forward(schedule: BlockSchedule, config: AttentionConfig[block_sizes.TpuBlockSizes], heads: int) -> Work:
    """Of our forward kernel: start, scores, mask, softmax, product, end."""
    steps, first, masked, last = _flags(schedule, heads)
    taken = (first, steps, masked, steps, steps, last)
    return replace(_ours(config), steps=steps, taken=taken, interior=(1, 3, 4), masked=(1, 2, 3, 4))


def backward(schedule: BlockSchedule, config: AttentionConfig[block_sizes.TpuBlockSizes], heads: int) -> Work:
    """Of our backward kernel, for one span of keys."""
    steps, first, masked, last = _flags(schedule, heads)
    taken = (heads, first, steps, masked, steps, steps, steps, steps, last, heads)
    return replace(_ours(config), steps=steps, taken=taken, interior=(2, 4, 5, 6, 7), masked=(2, 3, 4, 5, 6, 7))


def _flags(schedule: BlockSchedule, heads: int) -> tuple[int, int, int, int]:
    return (
        heads * len(schedule),
        *(heads * int(((schedule.flags & flag) != 0).sum()) for flag in (FIRST_KV_BLOCK, NEEDS_MASK, LAST_KV_BLOCK)),
    )


def _ours(config: AttentionConfig[block_sizes.TpuBlockSizes]) -> Work:
    num_q_subtiles, num_kv_subtiles = config.num_subtiles
    tile = (config.G * config.block_sizes.block_q, config.block_sizes.block_kv)
    return Work(0, (), (), (), tile, trips=num_q_subtiles * num_kv_subtiles)


def splash(spec: workloads.Attention, kernel: str, name: str) -> Work:
    """Of jax's splash attention: start, tile, end.

    Its grid has as many blocks a row as the fullest row; that of the fused backward pass has every block.
    """
    small = name == "splash_512" or (name == "splash_fused" and spec.window is not None)
    q, k = (min(512 if small else 1024, size) for size in (spec.T, spec.S))
    schedule = make_block_schedule(spec.T, spec.S, q, k, causal=spec.causal, window=spec.window)
    rows, columns = -(-spec.T // q), -(-spec.S // k)
    heads, groups = spec.B * spec.H, spec.B * spec.K
    if "dkv" in kernel:
        most = rows if name == "splash_fused" else int(np.bincount(schedule.kv).max())
        steps, ends = heads * columns * most, groups * columns
    else:
        steps, ends = heads * rows * int(np.bincount(schedule.q).max()), heads * rows
    return Work(steps, (ends, heads * len(schedule), ends), (1,), (1,), (q, k))


def tokamax(spec: workloads.Attention, kernel: str) -> Work:
    """Of tokamax's splash: start, interior tile, masked tile, end; its backward grid has every block."""
    schedule = make_block_schedule(spec.T, spec.S, TOKAMAX, TOKAMAX, causal=spec.causal, window=spec.window)
    heads, groups, rows, columns = spec.B * spec.H, spec.B * spec.K, -(-spec.T // TOKAMAX), -(-spec.S // TOKAMAX)
    run, _, masked, _ = _flags(schedule, heads)
    backward_ = "dkv" in kernel
    ends = groups * columns if backward_ else heads * rows
    steps = heads * rows * columns if backward_ else run
    return Work(steps, (ends, run - masked, masked, ends), (1,), (2,), (TOKAMAX, TOKAMAX), copies=2)
