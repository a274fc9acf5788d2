"""The sweep over tile widths of the Hopper grouped kernels: cases, fitted constants, and failures."""

import io
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from bench import tune_block_sizes as sweep
from dantinox.kernels import workloads
from dantinox.kernels.ops.grouped_matmul.pallas_sm90 import block_sizes
from dantinox.kernels.ops.grouped_matmul.pallas_sm90.warp_specialized import Sm90GmmConfig

NUM_SMS = 132


@pytest.mark.parametrize("row", sweep.KERNELS, ids=" ".join)
@pytest.mark.sampled(2)
def test_row_traces_a_kernel_with_the_flops_of_its_workload(row):
    kernel = sweep.kernel_of(*row)
    cost = workloads.get(*row[1:]).cost(backward=False)
    assert kernel.flops * {"up": 1.5, "dh": 3}.get(kernel.kind, 1) == cost.flops
    arrays = [jax.ShapeDtypeStruct(*shape) for shape in kernel.shapes()]
    sizes = jax.ShapeDtypeStruct((len(kernel.sizes),), jnp.int32)
    width = kernel.chosen_width(NUM_SMS)
    assert width in sweep.WIDTHS[kernel.kind]
    out = jax.tree.leaves(jax.eval_shape(kernel.run(Sm90GmmConfig(NUM_SMS, None, width)), sizes, *arrays))
    assert out[0].shape == ((len(kernel.sizes), kernel.K, kernel.J) if kernel.kind == "dw" else (kernel.N, kernel.J))


def made_up(ghz: float, start: float, column: float, l2: float = block_sizes.L2_BYTES) -> list[sweep.Row]:
    """What would be measured on a chip that the model describes."""
    rows = []
    for names in sweep.KERNELS:
        kernel = sweep.kernel_of(*names)
        for width in sweep.WIDTHS[kernel.kind]:
            tile = block_sizes.block_sizes_of_width(width, kernel.matrices)
            seconds = (
                block_sizes.estimate_cycles(
                    kernel.work(),
                    tile,
                    kernel.matrices,
                    NUM_SMS,
                    tile_overhead=start,
                    store_per_column=column,
                    l2_bytes=l2,
                )
                / ghz
                / 1e9
            )
            row = {
                "kernel": kernel.kind,
                "row": kernel.name,
                "width": width,
                "chosen": width == kernel.chosen_width(NUM_SMS),
            }
            row |= {"N": kernel.N, "K": kernel.K, "J": kernel.J, "E": len(kernel.sizes)}
            row |= dict(zip(("clocks", "starts", "columns"), sweep.model_terms(kernel, width, NUM_SMS)))
            rows.append(row | {"seconds": seconds, "flops_per_second": kernel.flops / seconds, "difference": 0.0})
    return rows


def test_fit_recovers_and_prints_the_constants():
    rows = made_up(1.6, 900, 3, l2=44)
    constants = sweep.fit(rows, NUM_SMS)
    assert constants["L2_BYTES"] == 44
    assert (
        constants["clock_ghz"],
        constants["TILE_OVERHEAD_CYCLES"],
        constants["STORE_CYCLES_PER_COLUMN"],
    ) == pytest.approx((1.6, 900, 3), rel=1e-6)
    assert constants["worst"] < 1e-6
    too_little = sweep.fit(rows[:3], NUM_SMS), sweep.fit([rows[0]] * 9, NUM_SMS)
    assert too_little == (None, None), "nothing tells the constants apart"
    console = Console(width=140, record=True, file=io.StringIO())
    sweep.show(
        [*rows, {"kernel": "y", "row": "a", "width": 64, "chosen": True, "why": "no memory"}], constants, console
    )
    text = console.export_text()
    assert (
        "TILE_OVERHEAD_CYCLES = 900 and STORE_CYCLES_PER_COLUMN = 3.0 cycles at 1.60 GHz and L2_BYTES = 44 per cycle"
        in text
        and "no memory" in text
    )


def test_chosen_width_is_near_the_fastest():
    rows = made_up(1.755, block_sizes.TILE_OVERHEAD_CYCLES, block_sizes.STORE_CYCLES_PER_COLUMN)
    for key in {(row["kernel"], row["row"]) for row in rows}:
        widths = [row for row in rows if (row["kernel"], row["row"]) == key]
        (chosen,) = [row["seconds"] for row in widths if row["chosen"]]
        assert chosen <= block_sizes.MIN_SPEEDUP * min(row["seconds"] for row in widths)


def test_failed_width_or_row_does_not_affect_the_others(tmp_path, monkeypatch):
    class Broken(sweep.GroupedKernel):
        def run(self, config: Sm90GmmConfig):
            if config.width == 128:
                raise RuntimeError("no such tile\nand more")
            return lambda sizes, x, w: x @ w[0] + (config.width == 64)

        def shapes(self):
            if self.kind == "dw":
                raise MemoryError("too large")
            return super().shapes()

    base = sweep.GroupedKernel("y", "tiny", 40, 64, 128, (30, 10))
    broken = [Broken(**{**vars(base), "kind": kind}) for kind in ("dw", "y")]
    monkeypatch.setattr(sweep, "tiny_kernels", lambda: broken)
    files = ("--json", str(tmp_path / "all.json"), "--lines", str(tmp_path / "lines.jsonl"))
    assert sweep.main(["--tiny", "--rounds", "1", *files]) == 1
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert lines == json.loads((tmp_path / "all.json").read_text())["rows"]
    assert lines[0]["why"] == "MemoryError: too large"
    by_width = {row["width"]: row for row in lines[1:]}
    assert by_width[128]["why"] == "RuntimeError: no such tile"
    assert by_width[256]["seconds"] > 0 and by_width[256]["difference"] == 0
    assert by_width[64]["difference"] > 1e-2, "another result is seen"


def test_missing_gpu_prints_one_line():
    command = [sys.executable, "-m", "bench.tune_block_sizes"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "--tiny rehearses it" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_rehearsal_runs_every_kernel_at_every_width(tmp_path):
    command = [
        sys.executable,
        "-m",
        "bench.tune_block_sizes",
        "--tiny",
        "--rounds",
        "1",
        "--json",
        str(tmp_path / "all.json"),
    ]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "all.json").read_text())["rows"]
    assert {(row["kernel"], row["width"]) for row in rows} == {(k, w) for k, ws in sweep.WIDTHS.items() for w in ws}
