"""The linear cross-entropy tutorial: what its steps fetch, how fast they are, what libtpu makes of them."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.aot.cases import Case
from bench.operations import runner
from bench.operations.baselines import Candidate
from bench.report import markdown
from bench.report.console_table import duration, size
from bench.tutorial import common
from dantinox import kernels
from dantinox.kernels import workloads
from dantinox.kernels.tutorial import linear_cross_entropy as steps
from dantinox.kernels.tutorial.linear_cross_entropy import common as kernel_common

README = "kernels/tutorial/linear_cross_entropy/README.md"
MARKS = ("<!-- tutorial: printed by bench/tutorial/linear_cross_entropy.py -->\n", "<!-- end of tutorial -->")
WORKLOAD = workloads.get("linear_cross_entropy", "tutorial")
TARGETS = WORKLOAD.integer_inputs()["targets"]
TILES = kernel_common.Tiles(256, 512)  # the defaults of every step
ITEMSIZE = 2  # bfloat16, as it is compiled
IDEAS = {
    "all_logits": "every logit in memory",
    "online_logsumexp": "one tile of the vocabulary at a time, with a running maximum and sum",
    "tile_skipping": "a mask in the last tile only; tiles of rows without targets are skipped",
    "backward": "kernels for dh and for dw, which compute the logits again",
    "three_products": "the gradients in the forward pass, scaled later",
}
WITH_GRADIENTS = ("backward", "three_products")
BASELINES = {
    "reference": "`dantinox.reference.linear_cross_entropy`, all logits",
    "xla": "`dantinox.kernels.linear_cross_entropy`, plain XLA",
    "pallas": "`dantinox.kernels.linear_cross_entropy`, Pallas",
}
MAX_TURNS = 12
Row = common.Row


def measure(budget: float, compiler: Path | None) -> dict[str, Any]:
    """Check, time and compile every step; see `bench.tutorial`."""
    kernel_common.call_options()  # raises on a GPU
    candidates = [Candidate(name, step_function(name)) for name in steps.STEPS]
    rows = common.time_candidates(WORKLOAD, candidates, tuple(BASELINES), budget / 2)
    for name in steps.STEPS:
        if "refused" not in rows[name]:
            rows[name] |= count_work(name)
    gradients = time_gradients(budget / 2)
    if compiler is not None:
        for name, row in compile_forward(compiler).items():
            rows[name] |= row
        for name, row in compile_gradients(compiler).items():
            gradients[name] |= row
    return common.head(WORKLOAD) | {"rows": rows, "gradients": gradients}


def wrong(document: Mapping[str, Any]) -> list[str]:
    """Names of the rows whose error, of the output or of a gradient, is above the bound."""
    names = (*common.wrong(document), *common.wrong({"rows": document["gradients"]}))
    return list(dict.fromkeys(names))


# --- on this machine ---


def step_function(name: str) -> runner.Forward:
    """Return a function that runs one step of the tutorial."""
    step = steps.load_step(name)
    return lambda inputs, state, aux: (step(**inputs, **aux), state)


def time_gradients(budget: float) -> dict[str, Row]:
    """Check and time value and gradients of the mean loss in turns: its cotangent is the same in every row.

    Args:
        budget: seconds of timing, shared by all.

    Returns:
        Name -> seconds, spread, temp_bytes and error.
    """
    inputs, _, _ = runner.random_arguments(WORKLOAD)
    names = (*WITH_GRADIENTS, *BASELINES)
    programs = {name: jax.jit(mean_loss_and_gradients(name)).lower(inputs, TARGETS).compile() for name in names}
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(mean_loss_and_gradients("reference"))(inputs, TARGETS)
    errors = {name: _largest_error(program(inputs, TARGETS), exact) for name, program in programs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    while len(seconds[names[0]]) < 3 or (time.perf_counter() - start < budget and len(seconds[names[0]]) < MAX_TURNS):
        for name, program in programs.items():
            begin = time.perf_counter()
            jax.block_until_ready(program(inputs, TARGETS))
            seconds[name].append(time.perf_counter() - begin)
    rows: dict[str, Row] = {}
    for name, program in programs.items():
        low, middle, high = np.percentile(seconds[name], [25, 50, 75])
        memory = program.memory_analysis()
        temp_bytes = int(memory.temp_size_in_bytes) if memory else 0
        rows[name] = {"seconds": float(f"{middle:.4g}"), "spread": float(f"{(high - low) / middle:.4g}")}
        rows[name] |= {"temp_bytes": temp_bytes, "error": float(f"{errors[name]:.2g}")}
    return rows


def mean_loss_and_gradients(name: str) -> Callable[..., Any]:
    """Return (inputs, targets) -> (the mean loss of the rows that take part, its gradients)."""
    operation = kernels.linear_cross_entropy
    function = functools.partial(operation, implementation=name) if name in BASELINES else steps.load_step(name)

    def mean_loss(inputs: runner.Tree, targets: jax.Array) -> jax.Array:
        return jnp.sum(function(**inputs, targets=targets)) / np.count_nonzero(TARGETS >= 0)

    return jax.value_and_grad(mean_loss)


def _largest_error(actual: Any, exact: Any) -> float:
    """Largest difference over the largest value, of the loss and both gradients."""
    errors = jax.tree.map(lambda a, e: jnp.max(jnp.abs(a - e)) / jnp.max(jnp.abs(e)), actual, exact)
    return float(np.max(jax.tree.leaves(errors)))


def num_tiles() -> tuple[int, int, int]:
    """Tiles of rows, those of them in which a row takes part, and tiles of the vocabulary."""
    active = np.asarray(kernel_common.active_tiles(jnp.asarray(TARGETS)[:, None], TILES.n))
    return active.size, int(active.sum()), -(-WORKLOAD.V // TILES.v)


def count_work(name: str) -> Row:
    """Count the grid steps of a step's forward kernel, the bytes of w that it fetches, and those of its logits."""
    all_n, active_n, num_v = num_tiles()
    fetching = all_n if name in ("all_logits", "online_logsumexp") else active_n
    logits = WORKLOAD.N * WORKLOAD.V * 4 if name == "all_logits" else 0
    w_bytes = fetching * num_v * TILES.v * WORKLOAD.M * ITEMSIZE
    return {"steps": all_n * num_v, "w_bytes": w_bytes, "logit_bytes": logits}


# --- for a TPU ---


def times_taken(kernel: str) -> list[int]:
    """Count how often each `pl.when` of a kernel is taken, in order."""
    all_n, active_n, num_v = num_tiles()
    if kernel == "all_logits":
        return []
    if kernel == "online_logsumexp":
        return [all_n]
    edge = int(WORKLOAD.V % TILES.v > 0)
    inside, masked = active_n * (num_v - edge), active_n * edge
    return {
        "tile_skipping": [all_n, inside, masked],
        "dh": [all_n, inside, masked, all_n],
        "dw": [num_v, active_n * num_v, num_v],
        "three_products": [all_n, inside, inside, masked, masked],
    }[kernel]


def executed_bundles(kernel: str, bundles: int, branches: Sequence[int]) -> int | None:
    """Count the bundles over all grid steps of a kernel; None if the schedule does not have its branches."""
    all_n, _, num_v = num_tiles()
    num_steps = all_n * num_v * (2 if kernel == "three_products" else 1)
    return common.executed_bundles(bundles, branches, num_steps, times_taken(kernel))


def compile_forward(compiler: Path) -> dict[str, Row]:
    """Compile the forward pass of the steps and of our kernel for the TPU, in bfloat16."""
    cases = {name: _case(name, "forward") for name in (*steps.STEPS, "pallas")}

    def count(name: str, bundles: int, branches: Sequence[int]) -> int | None:
        if name == "pallas":
            return None
        return executed_bundles("tile_skipping" if name in WITH_GRADIENTS else name, bundles, branches)

    rows = common.compile_cases(cases, compiler, count)
    if isinstance(counts := rows["pallas"].get("bundles_of_all_steps"), dict):  # per distribution of the inputs
        rows["pallas"]["bundles_of_all_steps"] = counts["all"]
    return rows


def compile_gradients(compiler: Path) -> dict[str, Row]:
    """Compile forward and backward pass for the TPU, in bfloat16.

    Returns:
        Name -> "kernels": the bundles over all grid steps of each kernel; spills of all kernels, and bytes that the
        program allocates beside arguments and results; or why it was not compiled.
    """
    rows: dict[str, Row] = {}
    cases = {name: _case(name, "both") for name in (*WITH_GRADIENTS, "pallas")}
    for name, (answer, branches) in common.compile_programs(cases, compiler).items():
        if answer["status"] != "compiled":
            rows[name] = {"not_compiled": answer["reason"]}
            continue
        counts: dict[str, int | None] = {}
        for kernel in answer["kernels"]:
            title = _kernel_title(kernel["name"])
            if name in WITH_GRADIENTS:
                counts[title] = executed_bundles(title, kernel["bundles"], branches[kernel["name"]])
            else:
                counts[title] = kernel["executed"]["all"]
        rows[name] = {"kernels": counts, "kernel_spills": sum(kernel["spills"] for kernel in answer["kernels"])}
        rows[name]["device_temp_bytes"] = answer["temp_bytes"]
    return rows


def _kernel_title(compiled: str) -> str:
    """The name that a kernel has in its `pallas_call`, of the compiler's name for it."""
    for name in ("tile_skipping", "three_products", "dh", "dw"):
        if name in compiled:
            return name
    return "forward"


def _case(name: str, direction: str) -> Case:
    return Case("linear_cross_entropy", WORKLOAD.name, name, "bfloat16", direction)


# --- tables ---


def table(document: Mapping[str, Any]) -> str:
    """Format the results as two Markdown tables: forward, and forward with backward."""
    gradients = _gradient_table(document["gradients"])
    return f"{_forward_table(document['rows'])}\n\nValue and gradients of the mean loss:\n\n{gradients}"


def _forward_table(rows: Mapping[str, Row]) -> str:
    columns = ["", "new", "time, CPU", "temp, CPU", "error", "steps", "v6e: bundles, all steps", "w fetched"]
    columns += ["logits written", "VMEM", "bundles of the program", "spills", "MXU slots"]
    lines = [markdown.row(columns), "|---|---|" + "---:|" * (len(columns) - 2)]
    for name, row in rows.items():
        if "refused" in row:
            lines.append(f"| {_title(name)} | {row['refused']} |" + " |" * (len(columns) - 2))
            continue
        cells = [_title(name), (IDEAS | BASELINES)[name], duration(row["seconds"]), size(row["temp_bytes"])]
        cells += [_error(row), str(row.get("steps", "")), _thousands(row.get("bundles_of_all_steps"))]
        cells += [size(row[key]) if row.get(key) else "" for key in ("w_bytes", "logit_bytes", "vmem_bytes")]
        share = f"{row['mxu_share']:.0%}" if "mxu_share" in row else ""
        bundles = str(row.get("bundles", row.get("not_compiled", "")))
        lines.append(markdown.row([*cells, bundles, str(row.get("spills", "")), share]))
    return "\n".join(lines)


def _gradient_table(rows: Mapping[str, Row]) -> str:
    columns = ["", "time, CPU", "temp, CPU", "error", "v6e: bundles of each kernel, all steps", "spills", "temp"]
    lines = [markdown.row(columns), "|---|" + "---:|" * (len(columns) - 1)]
    for name, row in rows.items():
        kernels = ", ".join(f"{kernel} {_thousands(count)}" for kernel, count in row.get("kernels", {}).items())
        cells = [_title(name), duration(row["seconds"]), size(row["temp_bytes"]), _error(row)]
        cells += [row.get("not_compiled", kernels), str(row.get("kernel_spills", ""))]
        lines.append(markdown.row([*cells, size(row["device_temp_bytes"]) if "device_temp_bytes" in row else ""]))
    return "\n".join(lines)


def _title(name: str) -> str:
    return f"{steps.STEPS.index(name) + 1} `{name}`" if name in IDEAS else f"`{name}`"


def _error(row: Row) -> str:
    return f"{row['error']:.0e}" if row["error"] else "0"


def _thousands(count: int | None) -> str:
    return f"{count / 1e3:.0f}k" if count else ""
