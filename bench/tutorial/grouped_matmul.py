"""The grouped matmul tutorial: what its steps compute and fetch, how fast they are, what libtpu makes of them."""

import dataclasses
import inspect
import tempfile
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bench.aot import worker_pool
from bench.aot.cases import Case
from bench.aot.tpu import gmm_bundles, vliw_schedule
from bench.aot.tpu.gmm_bundles import Branch, KernelSteps
from bench.operations import runner
from bench.operations.baselines import Candidate
from bench.report import markdown
from bench.report.console_table import duration, size
from bench.tutorial import common
from dantinox import reference
from dantinox.kernels import workloads
from dantinox.kernels.dispatch import Device
from dantinox.kernels.ops.grouped_matmul.pallas_tpu import block_sizes
from dantinox.kernels.tutorial import grouped_matmul as steps
from dantinox.kernels.tutorial.grouped_matmul import common as kernel_common
from dantinox.kernels.tutorial.grouped_matmul.step3_group_metadata import pad_groups
from dantinox.kernels.tutorial.grouped_matmul.step4_masked_edges import list_tasks

README = "kernels/tutorial/grouped_matmul/README.md"
MARKS = ("<!-- tutorial: printed by bench/tutorial/grouped_matmul.py -->\n", "<!-- end of tutorial -->")
WORKLOAD = workloads.get("grouped_matmul", "tutorial")
SIZES = WORKLOAD.integer_inputs()["group_sizes"]
BFLOAT16_WORKLOAD = dataclasses.replace(WORKLOAD, dtypes=("bfloat16",))
ITEMSIZE = BFLOAT16_WORKLOAD.itemsize
DEVICE = Device(common.TARGET.platform, common.TARGET.kind)
IDEAS = {
    "dense": "every row times the weights of every group",
    "row_tiles": "a tile of rows, with the groups that have rows in it",
    "group_metadata": "groups padded to full tiles, a table of their groups",
    "masked_edges": "no padding: two groups share a tile",
    "swiglu": "two weights, silu(gate) * up in the epilogue",
}
TWICE = "masked_edges, twice"  # the product of `swiglu` without its epilogue
BASELINES = {
    TWICE: "step 4 for gate, step 4 for up, then XLA: beside step 5",
    "xla": "`dantinox.kernels.grouped_matmul`, plain XLA",
    "pallas": "`dantinox.kernels.grouped_matmul`, Pallas",
    "lax.ragged_dot": "`jax.lax.ragged_dot`",
}
EXPERTS_UP = "experts_up"  # only compiled
COMPILED = {EXPERTS_UP: "the kernel of `dantinox.kernels.moe_mlp` that step 5 leads to"}
OURS = {"pallas": gmm_bundles.Operands(), EXPERTS_UP: gmm_bundles.EXPERTS["up"]}
WITH_TWO_WEIGHTS = ("swiglu", TWICE)
Row = common.Row
Product = Callable[..., jax.Array]


def measure(budget: float, compiler: Path | None) -> dict[str, Any]:
    """Check, time and compile every step; see `bench.tutorial`."""
    kernel_common.call_options()  # raises on a GPU
    rows = time_rows(budget)
    for name in (*steps.STEPS, TWICE):
        if "refused" not in rows[name]:
            rows[name] |= count_work(name)
    if compiler is not None:
        for name, row in compile_rows(compiler).items():
            rows[name] = rows.get(name, {}) | row
    return common.head(WORKLOAD) | {"rows": rows}


def wrong(document: Mapping[str, Any]) -> list[str]:
    """Names of the rows whose error is above the bound."""
    return common.wrong(document)


# --- on this machine ---


def time_rows(budget: float) -> dict[str, Row]:
    """Check and time every step and baseline in turns; those with two weights have their own reference."""
    w_up = runner.random_arguments(WORKLOAD, seed=99)[0]["w"]
    candidates = [Candidate(name, _forward(name, w_up)) for name in (*steps.STEPS, TWICE)]
    rows = common.time_candidates(WORKLOAD, candidates, [name for name in BASELINES if name != TWICE], budget)
    for name in WITH_TWO_WEIGHTS:
        if "refused" not in rows[name]:
            rows[name]["error"] = float(f"{_swiglu_error(name, w_up):.2g}")
    return rows


def _forward(name: str, w_up: jax.Array) -> runner.Forward:
    product = _product(name)

    def forward(inputs: runner.Tree, state: runner.Tree, aux: runner.Tree) -> tuple[jax.Array, runner.Tree]:
        weights = {"w_up": w_up} if name in WITH_TWO_WEIGHTS else {}
        return product(**inputs, **aux, **weights), state

    return forward


def _product(name: str) -> Product:
    if name != TWICE:
        return steps.load_step(name)
    one_product = steps.load_step("masked_edges")

    def two_products(x: jax.Array, w: jax.Array, group_sizes: jax.Array, w_up: jax.Array) -> jax.Array:
        return jax.nn.silu(one_product(x, w, group_sizes)) * one_product(x, w_up, group_sizes)

    return two_products


def _swiglu_error(name: str, w_up: jax.Array) -> float:
    """Largest difference from the reference over the largest value."""
    x, w = (runner.random_arguments(WORKLOAD)[0][key] for key in ("x", "w"))
    with jax.default_matmul_precision("highest"):
        gate, up = (reference.grouped_matmul(x, weight, jnp.asarray(SIZES)) for weight in (w, w_up))
    exact = jax.nn.silu(gate) * up
    result = jax.jit(_product(name))(x=x, w=w, group_sizes=jnp.asarray(SIZES), w_up=w_up)
    return float(jnp.max(jnp.abs(result - exact)) / jnp.max(jnp.abs(exact)))


class GridStep(NamedTuple):
    """One grid step: the group whose weights it needs, and whether it multiplies."""

    group: int
    multiplies: bool


def grid_steps(name: str) -> list[GridStep]:
    """List the grid steps of a step of the tutorial, in order."""
    N, E = WORKLOAD.N, WORKLOAD.E
    if name == "dense":
        return [GridStep(e, True) for e in range(E)]
    ends, tile = np.cumsum(SIZES), row_tile(name)
    if name == "row_tiles":
        return [
            GridStep(e, bool(SIZES[e] > 0 and ends[e] - SIZES[e] < first + tile and first < ends[e]))
            for first in range(0, N, tile)
            for e in range(E)
        ]
    if name == "group_metadata":
        layout = pad_groups(jnp.asarray(SIZES), N, tile)
        return [GridStep(e, True) for e in layout.group[: int(layout.count)].tolist()]
    count, tasks = list_tasks(jnp.asarray(SIZES), N, tile)
    return [GridStep(min(e, E - 1), e < E) for e in tasks.group[: int(count)].tolist()]


def row_tile(name: str) -> int:
    """Rows of a tile; step 1 has one tile."""
    parameters = inspect.signature(steps.load_step(name)).parameters
    return parameters["row_tile"].default if "row_tile" in parameters else WORKLOAD.N


def count_work(name: str) -> Row:
    """Count grid steps, pairs of a row and a weight matrix over those needed, and the bytes fetched from memory."""
    step = "masked_edges" if name == TWICE else name
    grid, num_weights = grid_steps(step), 2 if name in WITH_TWO_WEIGHTS else 1
    pairs = row_tile(step) * sum(each.multiplies for each in grid)
    fetches = 1 + sum(before.group != after.group for before, after in pairwise(grid))
    return {
        "steps": len(grid) * (2 if name == TWICE else 1),
        "pairs_ratio": round(pairs / int(SIZES.sum()), 3),
        "weight_bytes": fetches * num_weights * WORKLOAD.M * WORKLOAD.F * ITEMSIZE,
        "row_bytes": count_row_elements(name) * ITEMSIZE,
    }


def count_row_elements(name: str) -> int:
    """Count the elements of x, y and their copies that are read from memory or written to it."""
    N, M, F = WORKLOAD.N, WORKLOAD.M, WORKLOAD.F
    if name == "group_metadata":
        layout, tile = pad_groups(jnp.asarray(SIZES), N, row_tile(name)), row_tile(name)
        padded, computed = layout.source.size, int(layout.count) * tile
        return (2 * padded + computed) * M + (computed + 2 * N) * F
    if name == TWICE:  # x twice; gate and up are written and read, y is written
        return 2 * N * M + 5 * N * F
    return N * M + N * F


# --- for a TPU ---


def compile_rows(compiler: Path) -> dict[str, Row]:
    """Compile the steps and our kernel for the TPU, in bfloat16.

    Returns:
        Row -> bundles of the kernel and of all grid steps, spills, VMEM; or why it was not compiled.
    """
    rows: dict[str, Row] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        worker_pool.Worker(common.TARGET, common.COMPILE_SECONDS, Path(folder), str(compiler)) as worker,
    ):
        for name in (*steps.STEPS, *OURS):
            case = Case("grouped_matmul", WORKLOAD.name, name, "bfloat16", "forward")
            answer = worker.ask(case)
            if answer["status"] != "compiled":
                rows[name] = {"not_compiled": answer["reason"]}
                continue
            (kernel,) = answer["kernels"]
            text = vliw_schedule.read_final_bundles(
                worker_pool.dumps_folder(Path(folder), common.TARGET, case), kernel["name"]
            )
            rows[name] = {key: kernel[key] for key in ("bundles", "spills", "fills", "mxu_share", "vmem_bytes")}
            rows[name]["bundles_of_all_steps"] = executed_bundles(name, text)
    for name, operands in OURS.items():
        rows[name] |= count_pallas_work(operands)
    if rows["masked_edges"].get("bundles_of_all_steps"):
        rows[TWICE] = {"bundles_of_all_steps": 2 * rows["masked_edges"]["bundles_of_all_steps"]}
    return rows


def count_pallas_work(operands: gmm_bundles.Operands) -> Row:
    """Count for a TPU kernel of ours what `count_work` counts for a step. It multiplies chunks of a tile."""
    N, M, F = WORKLOAD.N, WORKLOAD.M, WORKLOAD.F
    options = operands._asdict()
    options.pop("row_sums")
    blocks = block_sizes.gmm_block_sizes(DEVICE, N, WORKLOAD.E, M, F, itemsize=ITEMSIZE, **options)
    num_visits, num_chunks = (
        int(list_tasks(jnp.asarray(SIZES), N, rows)[0]) for rows in (blocks.block_m, blocks.block_m_sub)
    )
    column_blocks = -(-F // blocks.block_n)
    if blocks.block_k < M:  # the weights would be read in several steps
        return {}
    return {
        "steps": column_blocks * num_visits,
        "pairs_ratio": round(num_chunks * blocks.block_m_sub / int(SIZES.sum()), 3),
        "weight_bytes": int(np.count_nonzero(SIZES)) * operands.num_w * M * F * ITEMSIZE,
        "row_bytes": (column_blocks * N * M + N * F) * ITEMSIZE,
    }


def executed_bundles(name: str, text: str) -> int | None:
    """Count the bundles over all grid steps; a `pl.when` counts in the steps that take it.

    Args:
        name: the row.
        text: the final bundles of the kernel.
    """
    if name in OURS:
        sizes = (WORKLOAD.M, WORKLOAD.F, SIZES)
        candidates = gmm_bundles.pallas_candidates("y", DEVICE, BFLOAT16_WORKLOAD, *sizes, OURS[name])
    else:
        candidates = [KernelSteps(len(grid_steps(name)), [Branch(taken) for taken in times_taken(name)])]
    counts = [count for steps in candidates if (count := gmm_bundles.count_bundles(text, steps)) is not None]
    return counts[0] if len(counts) == 1 else None


def times_taken(name: str) -> list[int]:
    """Count how often each `pl.when` of a step is taken, in order; a step without one has one branch, its body."""
    grid, tile = grid_steps(name), row_tile(name)
    multiplying = sum(each.multiplies for each in grid)
    if name == "dense":
        return [1]
    if name == "row_tiles":
        return [len(grid) // WORKLOAD.E, multiplying]
    if name == "group_metadata":
        return [len(grid)]
    count, tasks = list_tasks(jnp.asarray(SIZES), WORKLOAD.N, tile)
    first, start, end = (np.asarray(table)[: int(count)] for table in (tasks.tile * tile, tasks.start, tasks.end))
    interior = int(
        np.sum((start <= first) & (first + tile <= end) & (np.asarray(tasks.group)[: int(count)] < WORKLOAD.E))
    )
    return [interior, multiplying - interior, len(grid) - multiplying]


# --- table ---


def table(document: Mapping[str, Any]) -> str:
    """Format the results as Markdown."""
    columns = ["", "new", "pairs computed / needed", "time, CPU", "error", "steps", "v6e: bundles, all steps"]
    columns += ["weights fetched", "x and y moved", "VMEM", "bundles of the program", "spills", "MXU slots"]
    lines = [markdown.row(columns), "|---|---|" + "---:|" * (len(columns) - 2)]
    for number, (name, row) in enumerate(document["rows"].items(), 1):
        title = f"{number} `{name}`" if name in IDEAS else f"`{name}`"
        if "refused" in row:
            lines.append(f"| {title} | {row['refused']} |" + " |" * (len(columns) - 2))
            continue
        lines.append(markdown.row([title, (IDEAS | BASELINES | COMPILED)[name], *_cells(row)]))
    return "\n".join(lines)


def _cells(row: Row) -> list[str]:
    def cell(key: str, form: Callable[[Any], str]) -> str:
        return "" if row.get(key) is None else form(row[key])

    error = cell("error", lambda error: f"{error:.0e}" if error else "0")
    cells = [cell("pairs_ratio", "{:.2f}".format), cell("seconds", duration), error, cell("steps", str)]
    cells += [cell("bundles_of_all_steps", lambda count: f"{count / 1e3:.1f}k")]
    cells += [cell(key, size) for key in ("weight_bytes", "row_bytes", "vmem_bytes")]
    if "not_compiled" in row:
        return [*cells, row["not_compiled"], "", ""]
    return [*cells, cell("bundles", str), cell("spills", str), cell("mxu_share", "{:.0%}".format)]
