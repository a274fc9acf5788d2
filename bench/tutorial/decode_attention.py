"""The decode attention tutorial: what its steps read, how fast they are here, and what libtpu makes of them for v6e."""

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from bench.aot import programs, worker_pool
from bench.aot.cases import Case
from bench.aot.tpu import block_transfers, vliw_schedule
from bench.aot.tpu.attention_bundles import KernelSteps, count_bundles
from bench.operations import runner
from bench.operations.baselines import Candidate
from bench.report import markdown
from bench.report.console_table import duration, size
from bench.tutorial import common
from dantinox import kernels
from dantinox.kernels import dispatch, workloads
from dantinox.kernels.tutorial import decode_attention as steps
from dantinox.kernels.tutorial.decode_attention import common as kernel_common

README = "kernels/tutorial/decode_attention/README.md"
MARKS = ("<!-- tutorial: printed by bench/tutorial/decode_attention.py -->\n", "<!-- end of tutorial -->")
WORKLOAD = workloads.get("decode_attention", "tutorial")
EIGHT_BITS = workloads.get("decode_attention", "tutorial, int8")
IDEAS = {
    "read_everything": "all slots of the cache; XLA appends before",
    "visible_blocks": "no block after the last token: lengths by scalar prefetch",
    "ring_buffer": "from the oldest visible block to the newest, across the end",
    "append_in_kernel": "the new token is inserted into its tile: the cache is aliased",
    "eight_bit_cache": "int8 values, and scales that multiply scores and weights",
}
BASELINES = {
    "xla": "`dantinox.kernels.decode_attention`, plain XLA",
    "pallas": "`dantinox.kernels.decode_attention`, Pallas",
    "xla, int8": "the same, on the cache of step 5",
    "pallas, int8": "the same, on the cache of step 5",
}
Row = common.Row


def measure(budget: float, compiler: Path | None) -> dict[str, Any]:
    """Check, time and compile every step; see `bench.tutorial`."""
    kernel_common.interpret()  # raises on a GPU
    measured: dict[str, Row] = {}
    for workload in (WORKLOAD, EIGHT_BITS):
        names = [name for name in steps.STEPS if workload_of(name) is workload]
        candidates = [Candidate(name, step_function(name)) for name in names]
        timed = common.time_candidates(workload, candidates, ("xla", "pallas"), budget / 2)
        suffix = ", int8" if workload is EIGHT_BITS else ""
        measured |= {name if name in IDEAS else name + suffix: row for name, row in timed.items()}
    rows = {name: measured[name] for name in (*IDEAS, *BASELINES)}
    for name in rows:
        rows[name] |= count_read(name)
    if compiler is not None:
        for name, row in compile_rows(compiler).items():
            rows[name] |= row
    return common.head(WORKLOAD) | {"visible_slots": num_visible_slots(), "rows": rows}


def wrong(document: Mapping[str, Any]) -> list[str]:
    """Names of the rows whose error is above the bound."""
    return common.wrong(document)


def workload_of(name: str) -> workloads.Decode:
    """The workload of a row; the cache of step 5 has 8 bits."""
    return EIGHT_BITS if name == "eight_bit_cache" or name.endswith(", int8") else WORKLOAD


def num_visible_slots() -> int:
    """Number of slots that every implementation must read, the new token's included."""
    return sum(min(length + 1, WORKLOAD.C, WORKLOAD.window or WORKLOAD.C) for length in WORKLOAD.lengths)


def step_function(name: str) -> runner.Forward:
    """Return a function that calls a step; the state is the cache."""
    step, options = steps.load_step(name), workload_of(name).options()

    def forward(inputs: runner.Tree, state: runner.Tree, aux: runner.Tree) -> tuple[jax.Array, runner.Tree]:
        o, cache = step(**inputs, cache=kernels.KVCache(**state, **aux), **options)
        return o, {key: getattr(cache, key) for key in state}

    return forward


# --- for a TPU ---


class CacheReads(NamedTuple):
    """What the TPU kernel of a row reads of the cache.

    Attributes:
        steps: steps of its grid.
        block: slots per block.
        slots: slots of k that are fetched, of all sequences.
        bytes: bytes of k, v and their scales that are fetched, with a model in bfloat16.
    """

    steps: int
    block: int
    slots: int
    bytes: int


def case_of(name: str) -> Case:
    """The program of a row for the TPU."""
    return Case("decode_attention", workload_of(name).name, name.removesuffix(", int8"), "bfloat16", "forward")


def cache_reads(name: str) -> CacheReads | None:
    """Trace the program of a row for the TPU and count what its kernel fetches; None if it has no kernel."""
    workload = workload_of(name)
    with dispatch.target_device(common.TARGET.platform, common.TARGET.kind):
        program = programs.build(case_of(name))
        jaxpr = jax.make_jaxpr(program.function)(*(jax.ShapeDtypeStruct(*shape) for shape in program.shapes))
    lengths = {len(program.shapes) - 1: np.int32(workload.lengths)}
    calls = block_transfers.kernel_calls(jaxpr, lengths)
    if not calls:
        return None
    (call,) = calls
    operands = block_transfers.bytes_by_operand(call)[: call.grid_mapping.num_inputs]
    ring_buffers = [(shape, count) for shape, count in operands if shape[:3] == workload.cache_shape()[:3]]
    shape, of_k = ring_buffers[0]
    itemsize = 1 if workload.kv_dtype else 2
    block = next(m.block_shape for m in call.grid_mapping.block_mappings if m.array_aval.shape == shape)[2].block_size
    slots = of_k // (itemsize * workload.K * workload.D)
    return CacheReads(math.prod(call.grid), block, slots, sum(count for _, count in ring_buffers))


def count_read(name: str) -> Row:
    """Count the grid steps, slots and bytes of the cache; plain XLA reads all slots in no kernel of ours."""
    reads = cache_reads(name)
    if reads is None:
        return {"slots": WORKLOAD.B * WORKLOAD.C}
    return {"steps": reads.steps, "slots": reads.slots, "cache_bytes": reads.bytes}


def compile_rows(compiler: Path) -> dict[str, Row]:
    """Compile every row for the TPU, in bfloat16, with the cache donated.

    Returns:
        Name -> kernels of the program, bytes that it allocates, and for the Pallas kernel its bundles and those of all
        grid steps, spills and VMEM; or why it was not compiled.
    """
    rows: dict[str, Row] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        worker_pool.Worker(common.TARGET, common.COMPILE_SECONDS, Path(folder), str(compiler)) as worker,
    ):
        for name in (*IDEAS, *BASELINES):
            answer = worker.ask(case_of(name))
            if answer["status"] != "compiled":
                rows[name] = {"not_compiled": answer["reason"]}
                continue
            rows[name] = {"kernels": answer["totals"]["kernels"], "tpu_temp_bytes": answer["temp_bytes"]}
            for kernel in answer["kernels"]:
                dumps = worker_pool.dumps_folder(Path(folder), common.TARGET, case_of(name))
                text = vliw_schedule.read_final_bundles(dumps, kernel["name"])
                rows[name] |= {key: kernel[key] for key in ("bundles", "spills", "fills", "vmem_bytes")}
                rows[name]["bundles_of_all_steps"] = executed_bundles(name, text)
    return rows


def executed_bundles(name: str, text: str) -> int | None:
    """Count the bundles over all grid steps; a `pl.when` counts in the steps that take it.

    Args:
        name: the row.
        text: the final bundles of its kernel.

    Returns:
        The count; None if the schedule does not have the branches of the kernel.
    """
    reads = cache_reads(name)
    trips = WORKLOAD.K if name.startswith("pallas") else 1  # its loop over the heads
    counts = count_bundles(text, KernelSteps(reads.steps, tuple(times_taken(name, reads)), (), (), (1, 1), trips))
    return None if "upper_bound" in counts else counts["executed"]


def times_taken(name: str, reads: CacheReads) -> list[int]:
    """Count how often each `pl.when` of a kernel is taken, in order."""
    B, C = WORKLOAD.B, WORKLOAD.C
    if name == "read_everything":
        return [B, B]
    if name == "visible_blocks":
        return [B, sum(min(length, C - 1) // reads.block + 1 for length in WORKLOAD.lengths), B]
    visible = visible_tokens_per_block(reads.block)
    if name == "ring_buffer":
        return [B, len(visible), B]
    if name in IDEAS:
        return [B, len(visible), B, B]
    full = sum(count == reads.block for count in visible.values())
    return [B, full, len(visible) - full, B, B]  # the kernel of `pallas` has one part for blocks without a mask


def visible_tokens_per_block(block: int) -> dict[tuple[int, int], int]:
    """(sequence, block) -> old visible tokens in it, for each block that holds one of them or the new token."""
    counts: dict[tuple[int, int], int] = {}
    for b, length in enumerate(WORKLOAD.lengths):
        first = max(0, length + 1 - min(WORKLOAD.C, WORKLOAD.window or WORKLOAD.C))
        for position in range(first, length + 1):
            key = b, position % WORKLOAD.C // block
            counts[key] = counts.get(key, 0) + (position < length)
    return counts


# --- table ---


def table(document: Mapping[str, Any]) -> str:
    """Format the results as Markdown."""
    columns = ["", "new", "slots read / visible", "temp, CPU", "time, CPU", "error", "v6e: temp", "kernels", "steps"]
    columns += ["bundles, all steps", "cache fetched", "VMEM", "bundles of the kernel", "spills"]
    lines = [markdown.row(columns), "|---|---|" + "---:|" * (len(columns) - 2)]
    for number, (name, row) in enumerate(document["rows"].items(), 1):
        title = f"{number} `{name}`" if name in IDEAS else f"`{name}`"
        if "refused" in row:
            lines.append(f"| {title} | {row['refused']} |" + " |" * (len(columns) - 2))
            continue
        cells = [title, IDEAS.get(name, BASELINES.get(name, "")), f"{row['slots'] / document['visible_slots']:.1f}"]
        lines.append(markdown.row([*cells, *_cells(row)]))
    return "\n".join(lines)


def _cells(row: Row) -> list[str]:
    cells = [size(row["temp_bytes"]), duration(row["seconds"]), f"{row['error']:.0e}" if row["error"] else "0"]
    cells += [size(row["tpu_temp_bytes"]) if "tpu_temp_bytes" in row else row.get("not_compiled", "")]
    cells += [str(row.get(key, "")) for key in ("kernels", "steps")]
    cells.append(f"{row['bundles_of_all_steps'] / 1e3:.1f}k" if row.get("bundles_of_all_steps") else "")
    cells += [size(row[key]) if key in row else "" for key in ("cache_bytes", "vmem_bytes")]
    return [*cells, *(str(row.get(key, "")) for key in ("bundles", "spills"))]
