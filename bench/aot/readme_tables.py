"""The tables of profiles/aot/README.md, from the profiles: bundles on TPUs; spills and the steady state on Hopper."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import hardware
from bench.aot import attention_bundles, baselines, gmm_bundles, profile, tables
from bench.aot.tables import TPUS
from dantinox.kernels import workloads
from dantinox.kernels.ops.grouped_matmul.pallas_sm90 import block_sizes, gmm, tgmm

FILE = "README.md"
MARKS = ("<!-- bundles: written by `make aot`, from the profiles -->\n", "<!-- end of bundles -->")
HOPPER_MARKS = ("<!-- hopper: written by `make aot`, from the profile -->\n", "<!-- end of hopper -->")
HOPPER = "h100"
GPU_KERNELS = ("pallas", "tokamax", "jax_mgpu")
COLUMNS = {"pallas": ("pallas",), "splash": attention_bundles.SPLASH, "tokamax": ("tokamax",)}
PARTS = ("forward", "dq", "dkv")
STEADY = tuple(f"aot d{D} causal" for D in (64, 128, 256))
TENSOR_RATE, EXPONENTIAL_RATE = 2048, 4  # multiply-adds a cycle of an SM's tensor cores; exponentials of a scheduler
GROUPED = ("pallas", "tokamax_512", "megablox")
PRODUCTS = {"y": "forward", "dx": "both", "dw": "both"}  # the programs that they are read from
EXPERTS = {"up": "forward", "down": "forward", "dh": "both", "dx": "both", "dw_up": "both", "dw_down": "both"}
Row = dict[str, Any]


def rows() -> list[workloads.Attention]:
    """The rows of the tables."""
    found = [spec for spec in workloads.select("attention", "aot", "tpu") if spec.name.startswith("aot tpu ")]
    return sorted(found, key=lambda spec: (spec.S, spec.D, spec.window or 0))


def load(folder: Path) -> dict[str, dict[str, Row]]:
    """TPU -> the rows of its profile."""
    found = {name: profile.load(profile.path(folder, name)) for name in TPUS}
    return {name: each["rows"] for name, each in found.items() if each is not None}


def load_hopper(folder: Path) -> dict[str, Row]:
    """The rows of the H100's profile; none where there is none."""
    found = profile.load(profile.path(folder, HOPPER))
    return {} if found is None else found["rows"]


def kernels_of(held: Mapping[str, Row], spec: str, implementation: str, direction: str) -> tuple[Row, list[Row]]:
    """(row, its kernels of that direction); an empty row where nothing was compiled."""
    program = "forward" if direction == "forward" else "both"
    row = held.get(f"attention / {spec} / {implementation} / bfloat16 / {program}", {})
    return row, [each for each in row.get("kernels", []) if attention_bundles.direction_of(each["name"]) == direction]


def cell(held: Mapping[str, Row], spec: str, implementations: Sequence[str], direction: str) -> str:
    """Bundles for 1000 pairs, the spills in the schedule, and which splash is the best; of nothing, why."""
    found, why = [], ""
    for name in implementations:
        row, kernels = kernels_of(held, spec, name, direction)
        if per_pair := row.get("bundles_per_pair", {}).get(direction):
            bound = "≤ " if any(each.get("upper_bound") for each in kernels) else ""
            which = "".join(f", {each['tile'][1]}" for each in kernels[:1] if name in attention_bundles.SPLASH)
            which += " fused" * (name == "splash_fused" and direction == "backward")
            found.append((per_pair, f"{bound}{1e3 * per_pair:.2f} ({sum(each['spills'] for each in kernels)}{which})"))
        elif name == implementations[0]:
            why = row.get("status", "")
    return min(found)[1] if found else why


def table(held: Mapping[str, Mapping[str, Row]]) -> str:
    """Bundles for 1000 visible pairs."""
    names = [f"{name} {direction}" for name in COLUMNS for direction in attention_bundles.DIRECTIONS]
    lines = _head(["TPU", "D", "window", "S", "our tile", *names])
    for target in held:
        for spec in rows():
            ways = [(each, way) for each in COLUMNS.values() for way in attention_bundles.DIRECTIONS]
            cells = [cell(held[target], spec.name, each, way) for each, way in ways]
            if not any(cells):
                continue
            _, kernels = kernels_of(held[target], spec.name, "pallas", "forward")
            tile = next((_times(each["tile"]) for each in kernels if "tile" in each), "")
            lines.append(_line([target, spec.D, spec.window or "", spec.S, tile, *cells]))
    return "\n".join(lines)


def tiles(held: Mapping[str, Mapping[str, Row]]) -> str:
    """MXU slots for 1024 x 1024 scores, and bundles of a tile, at D = 128 and S = 4096 without a window."""
    lines = _head(["TPU", "kernel", "tile", "spills", "MXU slots", "MXU share", "interior tile", "masked tile"])
    for target in held:
        for spec in rows():
            if (spec.D, spec.S, spec.window) != (128, 4096, None):
                continue
            for name in COLUMNS:
                for direction in attention_bundles.DIRECTIONS:
                    for each in kernels_of(held[target], spec.name, name, direction)[1]:
                        title = f"{name} {_short(each['name'])}"
                        cells = [target, title, _times(each["tile"]), each["spills"]]
                        cells += [each["mxu_per_1024x1024"], f"{each['mxu_share']:.0%}", *each["tile_bundles"]]
                        lines.append(_line(cells))
    return "\n".join(lines)


def grouped(held: Mapping[str, Mapping[str, Row]]) -> str:
    """Share of MXU slots, bundles executed and spills of the products of a grouped matmul."""
    lines = _head(["TPU", "row", "kernel", *PRODUCTS])
    for target in held:
        for spec in workloads.select("grouped_matmul", "aot", "tpu"):
            for name in GROUPED if not spec.name.startswith("aot") else ():
                cells = [product(held[target], spec, name, *how) for how in PRODUCTS.items()]
                if any(cells):
                    lines.append(_line([target, spec.name, name, *cells]))
    return "\n".join(lines)


def kernel_of(
    held: Mapping[str, Row], spec: workloads.Workload, implementation: str, product_: str, program: str
) -> tuple[Row, Row]:
    """(row, its only kernel that computes the product); empty where there is none."""
    row = held.get(f"{spec.op} / {spec.name} / {implementation} / bfloat16 / {program}", {})
    found = [each for each in row.get("kernels", []) if tables.product_of(spec.op, each["name"]) == product_]
    return row, found[0] if len(found) == 1 else {}


def product(
    held: Mapping[str, Row], spec: workloads.GroupedMatmul, implementation: str, product_: str, program: str
) -> str:
    """One cell."""
    row, kernel = kernel_of(held, spec, implementation, product_, program)
    if not kernel:
        return "" if row.get("status") in (None, "compiled") else row["status"]
    executed_ = kernel.get("executed", {}).values()
    counts = " / ".join(f"{count * 2**30 / (spec.N * spec.M * spec.F):.0f}" for count in executed_) or "?"
    return f"{kernel['mxu_share']:.0%}, {counts} ({kernel['spills']})"


def moved(held: Mapping[str, Mapping[str, Row]]) -> str:
    """Bytes moved over those that must be: of grouped matmul's products, a mixture's kernels and a step of decoding."""
    of = {"grouped_matmul": (GROUPED, PRODUCTS), "moe_mlp": (("pallas",), EXPERTS)}
    of["decode_attention"] = (("pallas",), {"o": "forward"})
    return "\n\n".join(_moved(held, op, *how) for op, how in of.items())


def _moved(held: Mapping[str, Mapping[str, Row]], op: str, names: Sequence[str], products: Mapping[str, str]) -> str:
    lines = _head(["TPU", op.replace("_", " "), "kernel", *products])
    for target in held:
        for spec in workloads.select(op, "aot", "tpu"):
            for name in names if not spec.name.startswith("aot") else ():
                cells = []
                for product_, program in products.items():
                    _, kernel = kernel_of(held[target], spec, name, product_, program)
                    counts = kernel.get("moved", {}).items()
                    floors = {skew: tables.floor(each, product_) for skew, each in tables.spreads(spec).items()}
                    cells.append(" / ".join(f"{count / floors[how]:.2f}" for how, count in counts))
                if any(cells):
                    lines.append(_line([target, spec.name, name, *cells]))
    return "\n".join(lines)


def mixture(held: Mapping[str, Mapping[str, Row]]) -> str:
    """The same of our mixture's kernels, and the bundles of each schedule."""
    lines = _head(["TPU", "row", "kernel", "MXU share", "bundles", "executed", "spills"])
    for target in held:
        for spec in workloads.select("moe_mlp", "aot", "tpu"):
            for part, operands in gmm_bundles.EXPERTS.items():
                _, kernel = kernel_of(held[target], spec, "pallas", part, "both")
                if not kernel:
                    continue
                wanted = spec.N * spec.k * spec.M * spec.F * operands.num_w
                counts = [f"{count * 2**30 / wanted:.0f}" for count in kernel.get("executed", {}).values()]
                cells = [f"{kernel['mxu_share']:.0%}", kernel["bundles"], " / ".join(counts) or "?", kernel["spills"]]
                lines.append(_line([target, spec.name, part, *cells]))
    return "\n".join(lines)


def rewritten(text: str, held: Mapping[str, Mapping[str, Row]]) -> str:
    """The text with new tables between its marks.

    Raises:
        ValueError: the marks are not there once each.
    """
    return _between(text, MARKS, "\n\n".join(each(held) for each in (table, tiles, grouped, mixture, moved)) + "\n")


def on_hopper(text: str, held: Mapping[str, Row]) -> str:
    """The text with new tables of Hopper.

    Args:
        held: the rows of the H100's profile.

    Raises:
        ValueError: the marks are not there once each.
    """
    return _between(text, HOPPER_MARKS, hopper(held) + "\n")


def hopper(held: Mapping[str, Row]) -> str:
    """Spilled bytes and shared memory of the kernels of each implementation; then what their steady states issue."""
    kernels_of = [_of_hopper(op, held) for op in ("attention", "grouped_matmul", "moe_mlp")]
    return "\n\n".join([*kernels_of, steady(held), loops(held)])


def loops(held: Mapping[str, Row]) -> str:
    """The steady-state loops of a grouped matmul's y and dw on Hopper, at the tile that they were compiled for."""
    lines = _head(
        ["row", "product", "kernel", "tile", "stages", "registers", "SMEM KiB", "wgmma", "loop", "for 64x256x16"]
    )
    programs: dict[tuple, workloads.GroupedMatmul] = {}  # skew makes no other program
    for spec in workloads.select("grouped_matmul", "aot", HOPPER):
        programs.setdefault((spec.N, spec.M, spec.F, spec.E), spec)
    for spec in programs.values():
        for wanted, program in (("y", "forward"), ("dw", "both")):
            for name in GPU_KERNELS:
                row = held.get(f"grouped_matmul / {spec.name} / {name} / bfloat16 / {program}", {})
                found = [each for each in row.get("kernels", []) if wanted == "y" or _sums_rows(each)]
                for each in found if len(found) == 1 and "steady" in found[0] else ():
                    lines.append(_line([spec.name, wanted, name, *_loop(each, _tile(spec, wanted, name, each))]))
    return "\n".join(lines)


def _sums_rows(kernel: Row) -> bool:
    """Whether it is a kernel of dw: by its name, or jax's, which have one, by the operand that it transposes."""
    transposed = kernel.get("steady", {}).get("transposed", "")
    return "_dw" in kernel["name"] or "contracting" in kernel["name"] or "A" in transposed


def _loop(kernel: Row, tile: Sequence[Any]) -> list[str]:
    """What the table says of a kernel; its loop last: instructions a wgmma, and for 64 x 256 x 16 products."""
    at = kernel["steady"]
    *sides, stages = tile
    cells = [_times(sides), str(stages), str(kernel["registers"]), f"{kernel['smem_bytes'] / 1024:.0f}", at["shape"]]
    whole = at["instructions"] * 64 * 256 * 16 / at["multiply_adds"]
    return [*cells, f"{at['instructions']} / {at['wgmma']}", f"{whole:.1f}"]


def _tile(spec: workloads.GroupedMatmul, product_: str, implementation: str, kernel: Row) -> tuple[Any, ...]:
    """(rows, columns, of the contraction, stages)."""
    if implementation == "jax_mgpu":
        return baselines.RAGGED_TILE
    if implementation == "tokamax":
        return baselines.TOKAMAX_RAGGED_TILES.get(kernel["smem_bytes"] // 1024, ("?", "?"))
    cores = hardware.get(HOPPER).cores
    if product_ == "dw":
        tile = block_sizes.tgmm_block_sizes(spec.N, spec.E, spec.M, spec.F, cores, widths=tgmm.TILE_WIDTHS)
    else:
        tile = block_sizes.gmm_block_sizes(spec.N, spec.E, spec.M, spec.F, cores, widths=gmm.TILE_WIDTHS)
    return block_sizes.BLOCK_M, tile.block_n, block_sizes.BLOCK_K, tile.stages


def steady(held: Mapping[str, Row]) -> str:
    """What each attention kernel issues for a tile, and in which share of the time that its products take."""
    names = ("wgmma", "exponential", "float", "memory")
    lines = _head(["D", "kernel", "instructions", *names, "other", "multiply-adds", "issue", "exponentials"])
    for spec in (workloads.get("attention", name) for name in STEADY):
        found = []
        for implementation in GPU_KERNELS:
            dtype = "float16" if implementation == "jax_mgpu" else "bfloat16"
            for end, parts in (("forward", PARTS[:1]), ("both", PARTS[1:])):
                row = held.get(f"attention / {spec.name} / {implementation} / {dtype} / {end}", {})
                named = ((_part(kernel, spec.D), kernel) for kernel in row.get("kernels", []) if "steady" in kernel)
                found += [(part, implementation, kernel["steady"]) for part, kernel in named if part in parts]
        for part, implementation, at in sorted(found, key=lambda each: PARTS.index(each[0])):
            other = at["instructions"] - sum(at[name] for name in names)
            cycles = at["multiply_adds"] / TENSOR_RATE
            shares = at["instructions"] / cycles, at["exponential"] * 32 / EXPONENTIAL_RATE / cycles
            cells = [at["instructions"], *(at[name] for name in names), other, f"{at['multiply_adds'] / 2**20:g} Mi"]
            lines.append(_line([spec.D, f"{implementation} {part}", *cells, *(f"{x:.0%}" for x in shares)]))
    return "\n".join(lines)


def _part(kernel: Row, D: int) -> str | None:
    """Which part of attention a kernel computes: by its name, or by its products for each exponential.

    Kernels without a name are tokamax's: dk and dv take 4 products, and exponentials also of what a column has once.
    """
    names = {"forward": "forward", "flash": "forward", "entry": "forward", "dkv": "dkv", "dq": "dq"}
    if (named := next((part for word, part in names.items() if word in kernel["name"]), None)) is not None:
        return named
    at = kernel["steady"]
    scores = 128 * at["exponential"]  # one of each thread of a warpgroup
    return {3.0: "dq", 2.7: "dkv", 4.0: "dkv"}.get(round(at["multiply_adds"] / (scores * D), 1) if scores else 0.0)


def _of_hopper(op: str, held: Mapping[str, Row]) -> str:
    lines = _head([op.replace("_", " "), "dtype", "direction", *GPU_KERNELS])
    for spec in workloads.select(op, "aot", HOPPER):
        for dtype in spec.dtypes:
            for direction, title in (("forward", "forward"), ("both", "forward, backward")):
                key = lambda name, row=spec.name, end=f"{dtype} / {direction}": f"{op} / {row} / {name} / {end}"
                cells = [_gpu_cell(held.get(key(name), {})) for name in GPU_KERNELS]
                if any(cells):
                    lines.append(_line([spec.name, dtype, title, *cells]))
    return "\n".join(lines)


def _gpu_cell(row: Row) -> str:
    """Spilled bytes, and in parentheses KiB of shared memory of each kernel; of nothing, why."""
    if row.get("status") != "compiled":
        return row.get("status", "")
    kernels = row["kernels"]
    sizes = ", ".join(f"{each['smem_bytes'] / 1024:.0f}" for each in kernels)
    other = "" if not sum(each["mma"] for each in kernels) else ", not all by wgmma"
    return f"{sum(each['spill_bytes'] for each in kernels)} ({sizes}{other})"


def _between(text: str, marks: tuple[str, str], new: str) -> str:
    begin, end = marks
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{FILE} has not one {begin.strip()} and one {end}")
    return text[: text.index(begin) + len(begin)] + new + text[text.index(end) :]


def write(folder: Path) -> None:
    """Writes the tables anew, where the folder has a page for them."""
    if (page := folder / FILE).exists():
        text = rewritten(page.read_text(), load(folder))
        page.write_text(on_hopper(text, load_hopper(folder)))


def _short(kernel: str) -> str:
    found = next(word for word in ("dkv", "dq", "backward", "forward", "fwd") if word in kernel)
    return "forward" if found == "fwd" else found


def _times(tile: Sequence[int]) -> str:
    return " x ".join(map(str, tile))


def _head(names: Sequence[str]) -> list[str]:
    return [_line(names), "|" + "---:|" * len(names)]


def _line(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"
