"""What does each idea bring? `python -m bench.tutorial`: the kernels of kernels/tutorial, rung by rung.

On this machine: parity, time in turns with what else there is, memory, pairs of queries and keys that are visited. For
TPU v6e, which need not be there: what the compiler made of each. The tables of README.md and of the ladder's own are
printed from the file that this leaves.
"""

import datetime
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from bench.aot import hardware, worker_pool
from bench.aot.cases import Case
from bench.aot.tpu import vliw_schedule
from bench.operations import baselines, runner
from bench.operations.roofline import Ceilings
from bench.operations.timer import clock
from bench.report import results
from bench.report.console_table import duration, size
from dantinox import cli
from dantinox.kernels import tutorial, workloads
from dantinox.kernels.tutorial import common, step4_tile_skipping
from dantinox.system import malloc

PROG = "bench.tutorial"
ROW = workloads.get("attention", "ladder")
MASK = common.Mask(ROW.T, ROW.S, ROW.causal, ROW.window)
OPTIONS = {"causal": ROW.causal, "window": ROW.window, "scale": ROW.scale}
NEW = dict(
    zip(
        tutorial.RUNGS,
        (
            "one program a head, all scores on the chip",
            "a tile of the queries at a time",
            "a tile of the keys at a time, softmax carried along",
            "the grid is the list of visible tiles",
            "the heads of a group in one tile, the gate at its end",
        ),
        strict=True,
    )
)
RIVALS = {  # what the rungs take turns with
    "xla": "`dantinox.kernels.attention`, plain XLA",
    "pallas": "`dantinox.kernels.attention`, Pallas",
    "jax.nn xla": "`jax.nn.dot_product_attention`",
}
TARGET = hardware.get("v6e")
ALLOWED = 1e-5  # error over the largest value, in float32
FILE = "ladder.json"
READMES = {"README.md": True, "kernels/tutorial/README.md": False}  # name: whether its table is the short one
MARKS = "<!-- ladder: printed by bench/tutorial.py -->\n", "<!-- end of ladder -->"
Row = dict[str, Any]


@dataclass(frozen=True)
class Arguments:
    """How long, with what, where to."""

    budget: float = 10.0
    """Seconds of timing, shared by all that take turns."""
    compile: bool = True
    """Compile for TPU v6e too."""
    compiler: str = ".venv-aot/bin/python"
    """The Python that has libtpu; `make ladder` builds it."""
    out: str = "profiles"
    """Folder for <device>/ladder.json; with the default one the tables of both README.md are written anew."""


def main(argv: Sequence[str] | None = None) -> int:
    """Judge, time, compile, write, print; 1 where a rung is wrong."""
    arguments = cli.parse(Arguments, argv, default=Arguments(), prog=PROG, description=__doc__.split("\n")[0])
    malloc.tune_glibc_malloc()
    with cli.one_line_errors(PROG):
        if not arguments.budget > 0:
            raise ValueError(f"--budget is {arguments.budget}; allowed: seconds above 0")
        compiler = results.ROOT / arguments.compiler
        if arguments.compile and not compiler.exists():
            raise ValueError(f"--compiler {compiler} is not there; `make ladder` builds it, --no-compile goes without")
        common.interpret()  # refuses a GPU, in words
        rows = timed(arguments.budget)
        if arguments.compile:
            for name, row in compiled(compiler).items():
                rows[name] |= row
        folder = Path(arguments.out) / results.device_folder(jax.default_backend(), jax.devices()[0].device_kind)
        folder.mkdir(parents=True, exist_ok=True)
        head = {"date": str(datetime.date.today()), "device": jax.devices()[0].device_kind, "jax": jax.__version__}
        document = head | {"sizes": ROW.label(), "dtype": ROW.dtypes[0], "visible_pairs": visible(), "rows": rows}
        (folder / FILE).write_text(json.dumps(document, indent=1) + "\n")
        Console(width=200).print(table(document), markup=False, highlight=False)
        if folder.resolve() == results.ROOT / "profiles" / "cpu":
            for name, short in READMES.items():
                path = results.ROOT / name
                path.write_text(rewritten(path.read_text(), document, short))
    wrong = [name for name, row in rows.items() if not row.get("error", 0) <= ALLOWED]
    for name in wrong:
        print(f"{PROG}: {name}: error {rows[name]['error']:.1e}, allowed {ALLOWED:.0e}")
    return 1 if wrong else 0


def visible() -> int:
    """Pairs that no implementation can leave out."""
    return ROW.cost().flops // (4 * ROW.D)


def timed(budget: float) -> dict[str, Row]:
    """Each rung and rival: seconds, spread, bytes of memory, error; of the rungs what they visit as well."""
    guests: dict[str, baselines.Choice] = {name: guest(name) for name in tutorial.RUNGS}
    only = (*tutorial.RUNGS, *RIVALS)
    outcome = runner.hold(runner.Contest(ROW), Ceilings(clock()), budget=budget, only=only, guests=guests)
    rows: dict[str, Row] = {}
    for name in only:
        result = outcome.results[name]
        if result.refused is not None:
            rows[name] = {"refused": result.refused}
            continue
        low, middle, high = np.percentile(result.seconds, [25, 50, 75])
        rows[name] = {"seconds": middle, "spread": (high - low) / middle, "temp_bytes": result.temp_bytes}
        rows[name] = {key: float(f"{value:.4g}") for key, value in rows[name].items()}
        rows[name]["error"] = float(f"{result.error:.2g}")
        if name in guests:
            rows[name] |= visited(name)
    return rows


def guest(name: str) -> baselines.Forward:
    """How a rung is called."""
    run = tutorial.rung(name)
    return lambda inputs, state, aux: (run(**inputs, **aux, **OPTIONS), state)


def call(name: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """(grid, tile of the queries, tile of the keys) of a rung, read from the call that it makes."""
    inputs = [jax.ShapeDtypeStruct(shape, jnp.dtype(ROW.dtypes[0])) for shape in ROW.shapes().values()]
    run = tutorial.rung(name)
    made = jax.make_jaxpr(lambda q, k, v: run(q, k, v, **OPTIONS))(*inputs)
    (kernel,) = [equation for equation in made.eqns if equation.primitive.name == "pallas_call"]
    grid = kernel.params["grid_mapping"]
    queries, keys, *_ = (block.transformed_block_aval.shape for block in grid.block_mappings)
    return grid.grid, queries, keys


def visited(name: str) -> Row:
    """Steps of a rung's grid, the pairs in the tiles of all of them, and the bytes of k and v that come in bfloat16."""
    grid, queries, keys = call(name)
    pairs = math.prod(grid) * math.prod(queries[:-1]) * math.prod(keys[:-1])
    return {"steps": math.prod(grid), "pairs": pairs, "kv_bytes": fetches(name) * 2 * math.prod(keys) * 2}


def fetches(name: str) -> int:
    """How often a tile of k comes from memory: whenever another one is asked for than by the step before."""
    grid, queries, keys = call(name)
    if len(grid) == 4:
        tiles = [*range(grid[3])] * grid[2]
    elif name in ("naive", "tiled"):
        tiles = [0] * math.prod(grid[2:])
    else:
        tiles = step4_tile_skipping.visible_tiles(MASK, queries[-2], keys[-2])[1]
    group = grid[1] // ROW.K
    asked = [(b, h // group, j) for b in range(grid[0]) for h in range(grid[1]) for j in tiles]
    return 1 + sum(one != other for one, other in pairwise(asked))


def compiled(compiler: Path) -> dict[str, Row]:
    """Each rung for the TPU, in bfloat16: bundles of the kernel and of all its steps, spills, VMEM; or why none."""
    rows: dict[str, Row] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        worker_pool.Worker(TARGET, 240, Path(folder), str(compiler)) as worker,
    ):
        for name in tutorial.RUNGS:
            case = Case("attention", ROW.name, name, "bfloat16", "forward")
            answer = worker.ask(case)
            if answer["status"] != "compiled":
                rows[name] = {"not_compiled": answer["reason"]}
                continue
            (kernel,) = answer["kernels"]
            text = vliw_schedule.final(worker_pool.kept(Path(folder), TARGET, case), kernel["name"])
            rows[name] = {key: kernel[key] for key in ("bundles", "spills", "fills", "mxu_share", "vmem_bytes")}
            rows[name]["bundles_of_all_steps"] = executed(name, kernel["bundles"], vliw_schedule.branches(text))
    return rows


def executed(name: str, static: int, branches: Sequence[int]) -> int | None:
    """Bundles over all steps of the grid, where a `pl.when` counts in the steps that take it; None where unclear."""
    taken = times_taken(name)
    if len(taken) > len(branches):  # another compiler, another form of program
        return None
    branches = branches[: len(taken)]  # what comes after copies the output: in every step, say
    always = math.prod(call(name)[0]) * (static - sum(branches))
    return always + sum(times * length for times, length in zip(taken, branches, strict=True))


def times_taken(name: str) -> list[int]:
    """How often each `pl.when` of a rung is taken, in their order."""
    grid, (*_, q_tile, _), (*_, k_tile, _) = call(name)
    heads = math.prod(grid[:2])
    if name in ("naive", "tiled"):
        return []
    if name == "online_softmax":
        return [heads * grid[2]] * 2
    flags = step4_tile_skipping.visible_tiles(MASK, q_tile, k_tile)[2]
    count = lambda flag: heads * int(np.count_nonzero(flags & flag))
    masked = count(step4_tile_skipping.MASKED)
    return [count(step4_tile_skipping.FIRST), masked, heads * len(flags) - masked, count(step4_tile_skipping.LAST)]


def table(document: Mapping[str, Any], short: bool = False) -> str:
    """Markdown; the short one is for README.md."""
    rows, pairs = document["rows"], document["visible_pairs"]
    heads = ["", "new", "pairs computed / visible", "time, CPU"]
    heads += [] if short else ["temp, CPU", "error", "steps"]
    heads += ["v6e: bundles, all steps", "k and v fetched", "VMEM"]
    heads += [] if short else ["bundles of the program", "spills", "MXU slots"]
    lines = ["| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for number, (name, row) in enumerate(rows.items(), 1):
        rung = name in NEW
        title = f"{number} `{name}`" if rung else f"`{name}`"
        if "refused" in row:
            lines.append(f"| {title} | {row['refused']} |" + " |" * (len(heads) - 2))
            continue
        cells = [title, NEW.get(name, RIVALS.get(name, ""))]
        cells += [f"{row['pairs'] / pairs:.1f}" if rung else "", duration(row["seconds"])]
        bundles_ = f"{row['bundles_of_all_steps'] / 1e3:.0f}k" if row.get("bundles_of_all_steps") else ""
        cells += (
            []
            if short
            else [size(row["temp_bytes"]), f"{row['error']:.0e}" if row["error"] else "0", str(row.get("steps", ""))]
        )
        cells += [bundles_, *(size(row[name]) if name in row else "" for name in ("kv_bytes", "vmem_bytes"))]
        if not short:
            known = "bundles" in row
            cells += [str(row["bundles"]), str(row["spills"])] if known else [row.get("not_compiled", ""), ""]
            cells += [f"{row['mxu_share']:.0%}"] if known else [""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rewritten(text: str, document: Mapping[str, Any], short: bool) -> str:
    """The text with a new table between its marks.

    Raises:
        ValueError: the marks are not there once each.
    """
    begin, end = MARKS
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"README has not one {begin.strip()} and one {end}")
    return text[: text.index(begin) + len(begin)] + table(document, short) + "\n" + text[text.index(end) :]


def held() -> dict[str, Any]:
    """What was measured last on a CPU, as it is kept in profiles/."""
    return json.loads((results.ROOT / "profiles" / "cpu" / FILE).read_text())


if __name__ == "__main__":
    cli.run_main(main)
