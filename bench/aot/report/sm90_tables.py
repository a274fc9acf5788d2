"""The tables of profiles/aot/README.md about Hopper: spills, shared memory, and the steady state of each kernel."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.aot import baselines, hardware, profile
from bench.report import markdown
from dantinox.kernels import workloads
from dantinox.kernels.ops.grouped_matmul.pallas_sm90 import block_sizes, gmm, tgmm

MARKS = ("<!-- hopper: written by `make aot`, from the profile -->\n", "<!-- end of hopper -->")
TARGET = "h100"
IMPLEMENTATIONS = ("pallas", "tokamax", "jax_mgpu")
OPERATIONS = ("attention", "grouped_matmul", "moe_mlp", "linear_cross_entropy")
ATTENTION_KERNELS = ("forward", "dq", "dkv")
STEADY_STATE_WORKLOADS = tuple(f"aot d{D} causal" for D in (64, 128, 256))
TENSOR_CORE_RATE = 2048  # multiply-adds per cycle of an SM's tensor cores
EXPONENTIAL_RATE = 4  # exponentials per cycle of a scheduler
LOOP_COLUMNS = "row product kernel tile stages registers SMEM_KiB wgmma loop for_64x256x16".split()
INSTRUCTION_KINDS = ("wgmma", "exponential", "float", "memory")
Row = dict[str, Any]
Rows = Mapping[str, Row]  # a program's key -> its row of the profile


def load(folder: Path) -> dict[str, Row]:
    """Load the rows of the H100's profile; none where there is no profile."""
    document = profile.load(profile.path(folder, TARGET))
    return {} if document is None else document["rows"]


def update(text: str, rows: Rows) -> str:
    """Replace the tables between the marks.

    Raises:
        ValueError: one of the marks does not occur exactly once.
    """
    tables = [*(spills_table(op, rows) for op in OPERATIONS), steady_state_table(rows), gmm_loops_table(rows)]
    return markdown.replace_between(text, MARKS, "\n\n".join(tables) + "\n")


def spills_table(op: str, rows: Rows) -> str:
    """Tabulate spilled bytes and shared memory of the kernels of each implementation."""
    lines = markdown.header([op.replace("_", " "), "dtype", "direction", *IMPLEMENTATIONS])
    for workload in workloads.select(op, "aot", TARGET):
        for dtype in workload.dtypes:
            for direction, title in (("forward", "forward"), ("both", "forward, backward")):
                keys = [f"{op} / {workload.name} / {name} / {dtype} / {direction}" for name in IMPLEMENTATIONS]
                cells = [_spills_cell(rows.get(key, {})) for key in keys]
                if any(cells):
                    lines.append(markdown.row([workload.name, dtype, title, *cells]))
    return "\n".join(lines)


def _spills_cell(row: Row) -> str:
    """Format spilled bytes and, in parentheses, KiB of shared memory of each kernel; else why nothing was compiled."""
    if row.get("status") != "compiled":
        return row.get("status", "")
    kernels = row["kernels"]
    sizes = ", ".join(f"{kernel['smem_bytes'] / 1024:.0f}" for kernel in kernels)
    note = ", not all by wgmma" if sum(kernel["mma"] for kernel in kernels) else ""
    return f"{sum(kernel['spill_bytes'] for kernel in kernels)} ({sizes}{note})"


def steady_state_table(rows: Rows) -> str:
    """Tabulate what each attention kernel issues per block, and its share of the time that its products take."""
    lines = markdown.header(
        ["D", "kernel", "instructions", *INSTRUCTION_KINDS, "other", "multiply-adds", "issue", "exponentials"]
    )
    for workload in (workloads.get("attention", name) for name in STEADY_STATE_WORKLOADS):
        kernels = sorted(_steady_kernels(rows, workload), key=lambda entry: ATTENTION_KERNELS.index(entry[0]))
        for kind, implementation, steady in kernels:
            other = steady["instructions"] - sum(steady[name] for name in INSTRUCTION_KINDS)
            cycles = steady["multiply_adds"] / TENSOR_CORE_RATE
            shares = steady["instructions"] / cycles, steady["exponential"] * 32 / EXPONENTIAL_RATE / cycles
            cells = [steady["instructions"], *(steady[name] for name in INSTRUCTION_KINDS), other]
            cells += [f"{steady['multiply_adds'] / 2**20:g} Mi", *(f"{share:.0%}" for share in shares)]
            lines.append(markdown.row([workload.D, f"{implementation} {kind}", *cells]))
    return "\n".join(lines)


def _steady_kernels(rows: Rows, workload: workloads.Attention) -> Iterator[tuple[str, str, Row]]:
    """Yield (kind, implementation, steady state) of each attention kernel that has a steady state."""
    for implementation in IMPLEMENTATIONS:
        dtype = "float16" if implementation == "jax_mgpu" else "bfloat16"
        for direction, kinds in (("forward", ATTENTION_KERNELS[:1]), ("both", ATTENTION_KERNELS[1:])):
            row = rows.get(f"attention / {workload.name} / {implementation} / {dtype} / {direction}", {})
            for kernel in row.get("kernels", []):
                if "steady" in kernel and (kind := attention_kernel_kind(kernel, workload.D)) in kinds:
                    yield kind, implementation, kernel["steady"]


def attention_kernel_kind(kernel: Row, D: int) -> str | None:
    """Tell forward, dq and dkv kernels apart by their names, or by their products per exponential.

    Kernels without a name are tokamax's. Its dkv has 4 products, and exponentials for the sum of each column too.
    """
    kinds = {"forward": "forward", "flash": "forward", "entry": "forward", "dkv": "dkv", "dq": "dq"}
    if (kind := next((kind for word, kind in kinds.items() if word in kernel["name"]), None)) is not None:
        return kind
    steady = kernel["steady"]
    scores = 128 * steady["exponential"]  # a warpgroup has 128 threads, and the count is that of one
    return {3.0: "dq", 2.7: "dkv", 4.0: "dkv"}.get(round(steady["multiply_adds"] / (scores * D), 1) if scores else 0.0)


def gmm_loops_table(rows: Rows) -> str:
    """Tabulate the steady-state loops of a grouped matmul's y and dw, at the tile that they were compiled for."""
    lines = markdown.header([name.replace("_", " ") for name in LOOP_COLUMNS])
    programs: dict[tuple[int, ...], workloads.GroupedMatmul] = {}  # another skew is the same program
    for workload in workloads.select("grouped_matmul", "aot", TARGET):
        programs.setdefault((workload.N, workload.M, workload.F, workload.E), workload)
    for workload in programs.values():
        for product, program in (("y", "forward"), ("dw", "both")):
            for name in IMPLEMENTATIONS:
                row = rows.get(f"grouped_matmul / {workload.name} / {name} / bfloat16 / {program}", {})
                kernels = [kernel for kernel in row.get("kernels", []) if product == "y" or _computes_dw(kernel)]
                if len(kernels) == 1 and "steady" in kernels[0]:
                    tile = _gmm_tile(workload, product, name, kernels[0])
                    lines.append(markdown.row([workload.name, product, name, *_loop_cells(kernels[0], tile)]))
    return "\n".join(lines)


def _computes_dw(kernel: Row) -> bool:
    """Whether a kernel computes dw: by its name or, where all of jax's have one name, by its transposed operand."""
    transposed = kernel.get("steady", {}).get("transposed", "")
    return "_dw" in kernel["name"] or "contracting" in kernel["name"] or "A" in transposed


def _loop_cells(kernel: Row, tile: Sequence[Any]) -> list[str]:
    """Format tile, stages, registers, shared memory, wgmma shape; instructions per wgmma and per 64 x 256 x 16."""
    steady = kernel["steady"]
    *sides, stages = tile
    smem = f"{kernel['smem_bytes'] / 1024:.0f}"
    cells = [" x ".join(map(str, sides)), str(stages), str(kernel["registers"]), smem, steady["shape"]]
    per_product = steady["instructions"] * 64 * 256 * 16 / steady["multiply_adds"]
    return [*cells, f"{steady['instructions']} / {steady['wgmma']}", f"{per_product:.1f}"]


def _gmm_tile(workload: workloads.GroupedMatmul, product: str, implementation: str, kernel: Row) -> tuple[Any, ...]:
    """(rows, columns, contraction, stages) of a kernel's tile."""
    if implementation == "jax_mgpu":
        return baselines.RAGGED_TILE
    if implementation == "tokamax":
        return baselines.TOKAMAX_RAGGED_TILES.get(kernel["smem_bytes"] // 1024, ("?", "?"))
    num_sms = hardware.get(TARGET).num_sms
    N, E, M, F = workload.N, workload.E, workload.M, workload.F
    if product == "dw":
        tile = block_sizes.tgmm_block_sizes(N, E, M, F, num_sms, widths=tgmm.TILE_WIDTHS)
    else:
        tile = block_sizes.gmm_block_sizes(N, E, M, F, num_sms, widths=gmm.TILE_WIDTHS)
    return block_sizes.BLOCK_M, tile.block_n, block_sizes.BLOCK_K, tile.stages
