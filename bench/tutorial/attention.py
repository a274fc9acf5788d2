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
from bench.aot.tpu import attention_bundles
from bench.operations import runner
from bench.operations.baselines import Candidate
from bench.report import markdown
from bench.report.console_table import duration, size
from bench.tutorial import common
from dantinox.kernels import workloads
from dantinox.kernels.tutorial import attention as steps
from dantinox.kernels.tutorial.attention import common as kernel_common
from dantinox.kernels.tutorial.attention import step4_tile_skipping, step7_backward

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
    "log_sum_exp": "saves what a backward pass needs, which is plain jnp",
    "backward": "kernels for dq and for dk, dv",
    "phases": "a tile in phases, with scratch memory between them",
}
WITH_GRADIENTS = ("log_sum_exp", "backward", "phases")
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
    differentiable = [candidate for candidate in candidates if candidate.name in WITH_GRADIENTS]
    rows = common.time_candidates(WORKLOAD, candidates, tuple(BASELINES), budget / 2)
    gradients = common.time_candidates(WORKLOAD, differentiable, tuple(BASELINES), budget / 2, backward=True)
    for name in steps.STEPS:
        if "refused" not in rows[name]:
            rows[name] |= count_visited(name)
    if compiler is not None:
        cases = {name: _case(name, "forward") for name in (*steps.STEPS, "pallas")}
        for name, row in common.compile_cases(cases, compiler, executed_bundles).items():
            rows[name] |= row
        for name, row in compile_gradients(compiler).items():
            gradients[name] |= row
    return common.head(WORKLOAD) | {"visible_pairs": num_visible_pairs(), "rows": rows, "gradients": gradients}


def wrong(document: Mapping[str, Any]) -> list[str]:
    """Names of the rows whose error, of the output or of a gradient, is above the bound."""
    names = (*common.wrong(document), *common.wrong({"rows": document["gradients"]}))
    return list(dict.fromkeys(names))


def _case(name: str, direction: str) -> Case:
    return Case("attention", WORKLOAD.name, name, "bfloat16", direction)


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
    (kernel,) = _pallas_calls(jaxpr.jaxpr)
    mapping = kernel.params["grid_mapping"]
    q_block, kv_block, *_ = (block.transformed_block_aval.shape for block in mapping.block_mappings)
    return StepGrid(mapping.grid, q_block, kv_block)


def _pallas_calls(jaxpr: Any) -> list[Any]:
    """List the Pallas calls of a program, also those of functions that it calls."""
    calls = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            calls.append(equation)
            continue
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            calls += _pallas_calls(inner) if hasattr(inner, "eqns") else []
    return calls


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
    first, masked, interior, last = _count_flags(flags, heads)
    if name == "phases":
        every = heads * len(flags)
        return [first, every, masked, every, every, last]
    return [first, masked, interior, last, *([last] if name in WITH_GRADIENTS else [])]


def _count_flags(flags: np.ndarray, heads: int) -> list[int]:
    """Count the grid steps that are the first of a sum, masked, not masked, and the last of a sum."""
    first, masked, last = (
        heads * int(np.count_nonzero(flags & flag))
        for flag in (step4_tile_skipping.FIRST, step4_tile_skipping.MASKED, step4_tile_skipping.LAST)
    )
    return [first, masked, heads * len(flags) - masked, last]


def compile_gradients(compiler: Path) -> dict[str, Row]:
    """Compile forward and backward pass of the steps that have one, and of the real kernels, for the TPU.

    Returns:
        Name -> bundles of all grid steps, forward and backward, spills of all kernels, and bytes that the program
        allocates beside arguments and results; or why it was not compiled.
    """
    rows: dict[str, Row] = {}
    cases = {name: _case(name, "both") for name in (*WITH_GRADIENTS, "pallas")}
    for name, (answer, branches) in common.compile_programs(cases, compiler).items():
        if answer["status"] != "compiled":
            rows[name] = {"not_compiled": answer["reason"]}
            continue
        totals: dict[str, int | None] = {"forward": 0}
        for kernel in answer["kernels"]:
            direction = attention_bundles.direction_of(kernel["name"])
            count = common.exact_count(kernel) or _bundles_with_gradients(name, kernel, branches[kernel["name"]])
            before = totals.get(direction, 0)
            totals[direction] = None if count is None or before is None else before + count
        rows[name] = {f"{direction}_bundles": total for direction, total in totals.items()}
        rows[name]["kernel_spills"] = sum(kernel["spills"] for kernel in answer["kernels"])
        rows[name]["device_temp_bytes"] = answer["temp_bytes"]
    return rows


def _bundles_with_gradients(name: str, kernel: Row, branches: Sequence[int]) -> int | None:
    """Count the bundles over all grid steps of one kernel of a step's forward and backward pass."""
    if attention_bundles.direction_of(kernel["name"]) == "forward":
        return executed_bundles(name, kernel["bundles"], branches)
    _, (*_, q_tile, _), (*_, k_tile, _) = step_grid(name)
    problem = kernel_common.Problem(MASK, 1.0, q_tile, k_tile)
    by_key = "dkv" in kernel["name"]
    tiles = step7_backward.tiles_by_key(problem) if by_key else step4_tile_skipping.visible_tiles(MASK, q_tile, k_tile)
    heads = WORKLOAD.B * WORKLOAD.K
    return common.executed_bundles(kernel["bundles"], branches, heads * len(tiles[2]), _count_flags(tiles[2], heads))


# --- table ---


def table(document: Mapping[str, Any]) -> str:
    """Format the results as two Markdown tables: forward, and forward with backward."""
    return f"{_forward_table(document)}\n\nForward and backward:\n\n{_gradient_table(document['gradients'])}"


def _gradient_table(rows: Mapping[str, Row]) -> str:
    columns = ["", "time, CPU", "temp, CPU", "error", "v6e: bundles, forward", "bundles, backward", "spills", "temp"]
    lines = [markdown.row(columns), "|---|" + "---:|" * (len(columns) - 1)]
    for name, row in rows.items():
        title = f"{steps.STEPS.index(name) + 1} `{name}`" if name in IDEAS else f"`{name}`"
        if "refused" in row:
            lines.append(f"| {title} | {row['refused']} |" + " |" * (len(columns) - 2))
            continue
        cells = [title, duration(row["seconds"]), size(row["temp_bytes"]), _error(row)]
        cells += [f"{row[key] / 1e3:.0f}k" if row.get(key) else "" for key in ("forward_bundles", "backward_bundles")]
        temp = size(row["device_temp_bytes"]) if "device_temp_bytes" in row else ""
        lines.append(markdown.row([*cells, str(row.get("kernel_spills", row.get("not_compiled", ""))), temp]))
    return "\n".join(lines)


def _error(row: Row) -> str:
    return f"{row['error']:.0e}" if row["error"] else "0"


def _forward_table(document: Mapping[str, Any]) -> str:
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
    cells += [size(row["temp_bytes"]), _error(row), str(row.get("steps", ""))]
    cells.append(f"{row['bundles_of_all_steps'] / 1e3:.0f}k" if row.get("bundles_of_all_steps") else "")
    cells += [size(row[key]) if key in row else "" for key in ("kv_bytes", "vmem_bytes")]
    if "bundles" not in row:
        return [*cells, row.get("not_compiled", ""), "", ""]
    return [*cells, str(row["bundles"]), str(row["spills"]), f"{row['mxu_share']:.0%}"]
