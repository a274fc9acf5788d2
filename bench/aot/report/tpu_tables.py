"""The tables of profiles/aot/README.md about TPUs: bundles executed, MXU slots, spills and bytes moved."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.aot import profile
from bench.aot.tpu import attention_bundles, gmm_bundles, products
from bench.aot.tpu.products import TPUS
from bench.report import markdown
from dantinox.kernels import workloads

MARKS = ("<!-- bundles: written by `make aot`, from the profiles -->\n", "<!-- end of bundles -->")
COLUMNS = {"pallas": ("pallas",), "splash": attention_bundles.SPLASH, "tokamax": ("tokamax",)}
GMM_IMPLEMENTATIONS = ("pallas", "tokamax_512", "megablox")
# Product -> the direction of the program that it is read from.
GMM_PROGRAMS = {"y": "forward", "dx": "both", "dw": "both"}
EXPERTS_PROGRAMS = {"up": "forward", "down": "forward", "dh": "both", "dx": "both", "dw_up": "both", "dw_down": "both"}
Row = dict[str, Any]
Rows = Mapping[str, Row]  # one TPU's: a program's key -> its row of the profile


def load(folder: Path) -> dict[str, dict[str, Row]]:
    """Load the rows of every TPU's profile: target -> program's key -> row."""
    profiles = {name: profile.load(profile.path(folder, name)) for name in TPUS}
    return {name: document["rows"] for name, document in profiles.items() if document is not None}


def update(text: str, profiles: Mapping[str, Rows]) -> str:
    """Replace the tables between the marks.

    Args:
        text: the README.
        profiles: target -> program's key -> row.

    Raises:
        ValueError: one of the marks does not occur exactly once.
    """
    tables = (bundles_table, blocks_table, gmm_table, experts_table, bytes_moved_tables, cycles_table)
    written = [table(profiles) for table in tables]
    return markdown.replace_between(text, MARKS, "\n\n".join(filter(None, written)) + "\n")


# --- attention ---


def attention_workloads() -> list[workloads.Attention]:
    """List the workloads of the attention tables, in their order."""
    chosen = [row for row in workloads.select("attention", "aot", "tpu") if row.name.startswith("aot tpu ")]
    return sorted(chosen, key=lambda workload: (workload.S, workload.D, workload.window or 0))


def attention_kernels(rows: Rows, workload: str, implementation: str, direction: str) -> tuple[Row, list[Row]]:
    """Find an attention program's row and its kernels of one direction; an empty row where nothing was compiled."""
    program = "forward" if direction == "forward" else "both"
    row = rows.get(f"attention / {workload} / {implementation} / bfloat16 / {program}", {})
    kernels = row.get("kernels", [])
    return row, [kernel for kernel in kernels if attention_bundles.direction_of(kernel["name"]) == direction]


def bundles_cell(rows: Rows, workload: str, implementations: Sequence[str], direction: str) -> str:
    """Format the fewest bundles per 1000 pairs, with the spills in the schedule and the block of splash.

    Where no implementation was compiled, the cell says why.
    """
    candidates, status = [], ""
    for name in implementations:
        row, kernels = attention_kernels(rows, workload, name, direction)
        if per_pair := row.get("bundles_per_pair", {}).get(direction):
            bound = "≤ " if any(kernel.get("upper_bound") for kernel in kernels) else ""
            block = "".join(f", {kernel['tile'][1]}" for kernel in kernels[:1] if name in attention_bundles.SPLASH)
            block += " fused" * (name == "splash_fused" and direction == "backward")
            spills = sum(kernel["spills"] for kernel in kernels)
            candidates.append((per_pair, f"{bound}{1e3 * per_pair:.2f} ({spills}{block})"))
        elif name == implementations[0]:
            status = row.get("status", "")
    return min(candidates)[1] if candidates else status


def bundles_table(profiles: Mapping[str, Rows]) -> str:
    """Tabulate bundles executed per 1000 visible pairs."""
    names = [f"{name} {direction}" for name in COLUMNS for direction in attention_bundles.DIRECTIONS]
    lines = markdown.header(["TPU", "D", "window", "S", "our tile", *names])
    columns = [
        (implementations, direction)
        for implementations in COLUMNS.values()
        for direction in attention_bundles.DIRECTIONS
    ]
    for target, rows in profiles.items():
        for workload in attention_workloads():
            cells = [bundles_cell(rows, workload.name, *column) for column in columns]
            if not any(cells):
                continue
            _, kernels = attention_kernels(rows, workload.name, "pallas", "forward")
            block = next((_dimensions(kernel["tile"]) for kernel in kernels if "tile" in kernel), "")
            lines.append(markdown.row([target, workload.D, workload.window or "", workload.S, block, *cells]))
    return "\n".join(lines)


def cycles_table(profiles: Mapping[str, Rows]) -> str:
    """Tabulate thousands of cycles of our kernels and of splash, with XLA's operations around them; "" if unknown."""
    programs = {"forward": "forward", "both": "forward and backward"}
    columns = [(COLUMNS[name], program) for name in ("pallas", "splash") for program in programs]
    names = [f"{name} {text}" for name in ("pallas", "splash") for text in programs.values()]
    lines = []
    for target, rows in profiles.items():
        for workload in attention_workloads():
            cells = [cycles_cell(rows, workload.name, *column) for column in columns]
            if any(cells):
                lines.append(markdown.row([target, workload.D, workload.window or "", workload.S, *cells]))
    return "\n".join([*markdown.header(["TPU", "D", "window", "S", *names]), *lines]) if lines else ""


def cycles_cell(rows: Rows, workload: str, implementations: Sequence[str], program: str) -> str:
    """Format the fewest thousands of cycles of a program: kernels + XLA's operations = sum."""
    candidates = []
    for name in implementations:
        row = rows.get(f"attention / {workload} / {name} / bfloat16 / {program}", {})
        executed = [kernel.get("executed") for kernel in row.get("kernels", [])]
        if "xla_cycles" in row and executed and None not in executed:
            candidates.append((sum(executed) + row["xla_cycles"], sum(executed), row["xla_cycles"]))
    if not candidates:
        return ""
    total, kernels, xla = (round(cycles / 1e3) for cycles in min(candidates))
    return f"{kernels} + {xla} = {total}"


def blocks_table(profiles: Mapping[str, Rows]) -> str:
    """Tabulate MXU slots per 1024 x 1024 scores and bundles per block, at D = 128 and S = 4096 without a window."""
    lines = markdown.header(
        ["TPU", "kernel", "tile", "spills", "MXU slots", "MXU share", "interior tile", "masked tile"]
    )
    (workload,) = [row for row in attention_workloads() if (row.D, row.S, row.window) == (128, 4096, None)]
    for target, rows in profiles.items():
        for name in COLUMNS:
            for direction in attention_bundles.DIRECTIONS:
                for kernel in attention_kernels(rows, workload.name, name, direction)[1]:
                    title = f"{name} {_short_name(kernel['name'])}"
                    cells = [target, title, _dimensions(kernel["tile"]), kernel["spills"]]
                    cells += [kernel["mxu_per_1024x1024"], f"{kernel['mxu_share']:.0%}", *kernel["tile_bundles"]]
                    lines.append(markdown.row(cells))
    return "\n".join(lines)


def _short_name(kernel: str) -> str:
    name = next(word for word in ("dkv", "dq", "backward", "forward", "fwd") if word in kernel)
    return "forward" if name == "fwd" else name


def _dimensions(block: Sequence[int]) -> str:
    return " x ".join(map(str, block))


# --- grouped matmul, experts and decoding ---


def gmm_table(profiles: Mapping[str, Rows]) -> str:
    """Tabulate the share of MXU slots, bundles executed and spills of the products of a grouped matmul."""
    lines = markdown.header(["TPU", "row", "kernel", *GMM_PROGRAMS])
    for target, rows in profiles.items():
        for workload in model_workloads("grouped_matmul"):
            for name in GMM_IMPLEMENTATIONS:
                cells = [gmm_cell(rows, workload, name, *column) for column in GMM_PROGRAMS.items()]
                if any(cells):
                    lines.append(markdown.row([target, workload.name, name, *cells]))
    return "\n".join(lines)


def gmm_cell(rows: Rows, workload: workloads.GroupedMatmul, implementation: str, product: str, program: str) -> str:
    """Format one product: MXU share, bundles executed per 2^30 multiply-adds by skew, spills."""
    row, kernel = product_kernel(rows, workload, implementation, product, program)
    if not kernel:
        return "" if row.get("status") in (None, "compiled") else row["status"]
    multiply_adds = workload.N * workload.M * workload.F
    counts = " / ".join(f"{count * 2**30 / multiply_adds:.0f}" for count in kernel.get("executed", {}).values())
    return f"{kernel['mxu_share']:.0%}, {counts or '?'} ({kernel['spills']})"


def experts_table(profiles: Mapping[str, Rows]) -> str:
    """Tabulate the same of our mixture of experts, and the length of each schedule."""
    lines = markdown.header(["TPU", "row", "kernel", "MXU share", "bundles", "executed", "spills"])
    for target, rows in profiles.items():
        for workload in workloads.select("moe_mlp", "aot", "tpu"):
            for product, operands in gmm_bundles.EXPERTS.items():
                _, kernel = product_kernel(rows, workload, "pallas", product, "both")
                if not kernel:
                    continue
                multiply_adds = workload.N * workload.k * workload.M * workload.F * operands.num_w
                counts = [f"{count * 2**30 / multiply_adds:.0f}" for count in kernel.get("executed", {}).values()]
                cells = [f"{kernel['mxu_share']:.0%}", kernel["bundles"], " / ".join(counts) or "?", kernel["spills"]]
                lines.append(markdown.row([target, workload.name, product, *cells]))
    return "\n".join(lines)


def bytes_moved_tables(profiles: Mapping[str, Rows]) -> str:
    """Tabulate bytes moved over the bytes that must be moved, for each operation."""
    columns: dict[str, tuple[Sequence[str], Mapping[str, str]]] = {
        "grouped_matmul": (GMM_IMPLEMENTATIONS, GMM_PROGRAMS),
        "moe_mlp": (("pallas",), EXPERTS_PROGRAMS),
        "decode_attention": (("pallas",), {"o": "forward"}),
    }
    return "\n\n".join(_bytes_moved_table(profiles, op, *column) for op, column in columns.items())


def _bytes_moved_table(
    profiles: Mapping[str, Rows], op: str, implementations: Sequence[str], programs: Mapping[str, str]
) -> str:
    lines = markdown.header(["TPU", op.replace("_", " "), "kernel", *programs])
    for target, rows in profiles.items():
        for workload in model_workloads(op):
            for name in implementations:
                cells = [
                    _bytes_moved_cell(product_kernel(rows, workload, name, *column)[1], workload, column[0])
                    for column in programs.items()
                ]
                if any(cells):
                    lines.append(markdown.row([target, workload.name, name, *cells]))
    return "\n".join(lines)


def _bytes_moved_cell(kernel: Row, workload: workloads.Workload, product: str) -> str:
    skewed = products.with_skews(workload)
    counts = kernel.get("moved", {}).items()
    return " / ".join(f"{count / products.min_bytes(skewed[skew], product):.2f}" for skew, count in counts)


def model_workloads(op: str) -> list[Any]:
    """List the cross-compiled workloads that have the sizes of published models."""
    return [row for row in workloads.select(op, "aot", "tpu") if not row.name.startswith("aot")]


def product_kernel(
    rows: Rows, workload: workloads.Workload, implementation: str, product: str, program: str
) -> tuple[Row, Row]:
    """Find a program's row and its only kernel that computes a product; empty where there is none."""
    row = rows.get(f"{workload.op} / {workload.name} / {implementation} / bfloat16 / {program}", {})
    kernels = row.get("kernels", [])
    matches = [kernel for kernel in kernels if products.product_of(workload.op, kernel["name"]) == product]
    return row, matches[0] if len(matches) == 1 else {}
