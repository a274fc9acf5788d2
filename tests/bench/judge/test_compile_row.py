"""What the compilers made of a kernel, as the judge shows it."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from bench.judge import __main__ as judge

ROOT = Path(__file__).parents[3]
PYTHON = ROOT / ".venv-aot" / "bin" / "python"


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-aot here; make aot builds one")
def test_judge_shows_the_function_of_a_tpu_kernel_that_spills():
    done = subprocess.run(
        [str(PYTHON), "-m", "bench.judge.compile_row", "grouped_matmul", "pallas", "v6e"],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    directions = json.loads(done.stdout.splitlines()[-1])["directions"]
    names = {way: [kernel["name"] for kernel in found["kernels"]] for way, found in directions.items()}
    assert names["forward"] == ["grouped_matmul.1"] and len(names["both"]) == 3, "each direction has its own kernels"
    line = judge._describe_kernel(directions["forward"]["kernels"][0])
    assert re.search(r"bundles, \d+ spills \(\d+ in multiply_chunks \(loop\)\), .* MiB of VMEM", line), line


def test_registers_of_a_gpu_kernel_are_shown():
    kernel = {"name": "dq", "registers": 255, "spill_bytes": 8, "smem_bytes": 2048}
    assert judge._describe_kernel(kernel) == "dq 255 registers, 8 bytes spilled, 2 KiB of shared memory"
