"""The attention tutorial: what its steps visit, how fast they are here, and what libtpu makes of them for TPU v6e."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bench.aot.cases import Case
from bench.operations import runner
from bench.operations.baselines import Candidate
from bench.report import markdown
from bench.report.console_table import duration, size
from bench.tutorial import common
from dantinox.kernels import workloads
from dantinox.kernels.tutorial import attention as steps
from dantinox.kernels.tutorial.attention import common as kernel_common
from dantinox.kernels.tutorial.attention import step4_tile_skipping

README = "kernels/tutorial/attention/README.md"
MARKS = ("<!-- tutorial: printed by bench/tutorial/attention.py -->\n", "<!-- end of tutorial -->")
WORKLOAD = workloads.get("attention", "tutorial")
MASK = kernel_common.Mask(WORKLOAD.T, WORKLOAD.S, WORKLOAD.causal, WORKLOAD.window)
OPTIONS = {"causal": WORKLOAD.causal, "window": WORKLOAD.window, "scale": WORKLOAD.scale}
IDEAS = {
    "naive": "one program per head, all scores on the chip",
    "tiled": "one tile of queries at a time",
    "online_softmax": "one tile of keys at a time, with a running softmax",
    "tile_skipping": "the grid is the list of visible tiles",
    "packed_gqa_gate": "the heads of a group in one tile, the gate in its epilogue",
}
BASELINES = {
    "xla": "`dantinox.kernels.attention`, plain XLA",
    "pallas": "`dantinox.kernels.attention`, Pallas",
    "jax.nn xla": "`jax.nn.dot_product_attention`",
}
Row = common.Row


def measure(budget: float, compiler: Path | None) -> dict[str, Any]:
    """Check, time and compile every step; see `bench.tutorial`."""
    kernel_common.call_options()  # raises on a GPU
    candidates = [Candidate(name, step_function(name)) for name in steps.STEPS]
    rows = common.time_candidates(WORKLOAD, candidates, tuple(BASELINES), budget)
    for name in steps.STEPS:
        if "refused" not in rows[name]:
            rows[name] |= count_visited(name)
    if compiler is not None:
        cases = {name: Case("attention", WORKLOAD.name, name, "bfloat16", "forward") for name in steps.STEPS}
        for name, row in common.compile_cases(cases, compiler, executed_bundles).items():
            rows[name] |= row
    return common.head(WORKLOAD) | {"visible_pairs": num_visible_pairs(), "rows": rows}


def wrong(document: Mapping[str, Any]) -> list[str]:
    """Names of the rows whose error is above the bound."""
    return common.wrong(document)


def num_visible_pairs() -> int:
    """Number of pairs that every implementation must compute."""
    return WORKLOAD.cost().flops // (4 * WORKLOAD.D)


def step_function(name: str) -> runner.Forward:
    """Return a function that calls a step."""
    attention = steps.load_step(name)
    return lambda inputs, state, aux: (attention(**inputs, **aux, **OPTIONS), state)


class StepGrid(NamedTuple):
    """The grid of a step's kernel, and its blocks of queries and keys."""

    grid: tuple[int, ...]
    q_block: tuple[int, ...]
    kv_block: tuple[int, ...]


def step_grid(name: str) -> StepGrid:
    """Read the grid and the blocks of a step from its Pallas call."""
    inputs = [jax.ShapeDtypeStruct(shape, jnp.dtype(WORKLOAD.dtypes[0])) for shape in WORKLOAD.shapes().values()]
    attention = steps.load_step(name)
    jaxpr = jax.make_jaxpr(lambda q, k, v: attention(q, k, v, **OPTIONS))(*inputs)
    (kernel,) = [equation for equation in jaxpr.eqns if equation.primitive.name == "pallas_call"]
    mapping = kernel.params["grid_mapping"]
    q_block, kv_block, *_ = (block.transformed_block_aval.shape for block in mapping.block_mappings)
    return StepGrid(mapping.grid, q_block, kv_block)


def count_visited(name: str) -> Row:
    """Count the grid steps, the pairs in the tiles of all of them, and the bytes of k and v fetched in bfloat16."""
    grid, q_block, kv_block = step_grid(name)
    pairs = math.prod(grid) * math.prod(q_block[:-1]) * math.prod(kv_block[:-1])
    return {"steps": math.prod(grid), "pairs": pairs, "kv_bytes": num_kv_fetches(name) * 2 * math.prod(kv_block) * 2}


def num_kv_fetches(name: str) -> int:
    """Count how often a tile of k is fetched: whenever a grid step needs another one than the step before it."""
    grid, q_block, kv_block = step_grid(name)
    if len(grid) == 4:
        tiles = [*range(grid[3])] * grid[2]
    elif name in ("naive", "tiled"):
        tiles = [0] * math.prod(grid[2:])
    else:
        tiles = step4_tile_skipping.visible_tiles(MASK, q_block[-2], kv_block[-2])[1]
    heads_per_kv_head = grid[1] // WORKLOAD.K
    needed = [(b, h // heads_per_kv_head, j) for b in range(grid[0]) for h in range(grid[1]) for j in tiles]
    return 1 + sum(before != after for before, after in pairwise(needed))


# --- for a TPU ---


def executed_bundles(name: str, bundles: int, branches: Sequence[int]) -> int | None:
    """Count the bundles over all grid steps; a `pl.when` counts in the steps that take it.

    Args:
        name: the step of the tutorial.
        bundles: the length of the kernel's schedule.
        branches: the bundles of each branch in it.

    Returns:
        The count; None if the schedule does not have the branches of the kernel.
    """
    return common.executed_bundles(bundles, branches, math.prod(step_grid(name).grid), times_taken(name))


def times_taken(name: str) -> list[int]:
    """Count how often each `pl.when` of a step is taken, in order."""
    grid, (*_, q_tile, _), (*_, k_tile, _) = step_grid(name)
    heads = math.prod(grid[:2])
    if name in ("naive", "tiled"):
        return []
    if name == "online_softmax":
        return [heads * grid[2]] * 2
    flags = step4_tile_skipping.visible_tiles(MASK, q_tile, k_tile)[2]
    first, masked, last = (
        heads * int(np.count_nonzero(flags & flag))
        for flag in (step4_tile_skipping.FIRST, step4_tile_skipping.MASKED, step4_tile_skipping.LAST)
    )
    return [first, masked, heads * len(flags) - masked, last]


# --- table ---


def table(document: Mapping[str, Any]) -> str:
    """Format the results as Markdown."""
    columns = ["", "new", "pairs computed / visible", "time, CPU", "temp, CPU", "error", "steps"]
    columns += ["v6e: bundles, all steps", "k and v fetched", "VMEM", "bundles of the program", "spills", "MXU slots"]
    lines = [markdown.row(columns), "|---|---|" + "---:|" * (len(columns) - 2)]
    for number, (name, row) in enumerate(document["rows"].items(), 1):
        title = f"{number} `{name}`" if name in IDEAS else f"`{name}`"
        if "refused" in row:
            lines.append(f"| {title} | {row['refused']} |" + " |" * (len(columns) - 2))
            continue
        cells = [title, IDEAS.get(name, BASELINES.get(name, ""))]
        lines.append(markdown.row([*cells, *_cells(name, row, document["visible_pairs"])]))
    return "\n".join(lines)


def _cells(name: str, row: Row, visible_pairs: int) -> list[str]:
    cells = [f"{row['pairs'] / visible_pairs:.1f}" if name in IDEAS else "", duration(row["seconds"])]
    error = f"{row['error']:.0e}" if row["error"] else "0"
    cells += [size(row["temp_bytes"]), error, str(row.get("steps", ""))]
    cells.append(f"{row['bundles_of_all_steps'] / 1e3:.0f}k" if row.get("bundles_of_all_steps") else "")
    cells += [size(row[key]) if key in row else "" for key in ("kv_bytes", "vmem_bytes")]
    if "bundles" not in row:
        return [*cells, row.get("not_compiled", ""), "", ""]
    return [*cells, str(row["bundles"]), str(row["spills"]), f"{row['mxu_share']:.0%}"]
