"""Run checks of Triton kernels in Triton's interpreter, in this environment or in that of `make aot`."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OTHER = ROOT / ".venv-aot" / "bin" / "python"
PYTHON = sys.executable if importlib.util.find_spec("jax_triton") else str(OTHER) if OTHER.exists() else None
needs_triton = pytest.mark.skipif(PYTHON is None, reason="no Python here has jax-triton; `make aot` installs it")


def run(*words: str, timeout: float = 3000) -> subprocess.CompletedProcess[str]:
    """Run a module with its arguments."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    command = [str(PYTHON), "-m", *words]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)


def assert_checks_hold(module: str, checks: Sequence[str], timeout: float = 3000) -> None:
    """Run the checks of a module of `tests.helpers`; a number may follow a name, as in random_shapes=10."""
    done = run(f"tests.helpers.{module}", *checks, timeout=timeout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert done.stdout.splitlines() == [f"{check}: right" for check in checks]


def assert_judge_finds_nothing_wrong(op: str, cases: Sequence[str], found: str = "Triton ") -> None:
    """Judge the Triton kernel of an operation in some of its cases, or in all."""
    chosen = ["--case", *cases] if cases else ["--seconds", "2500"]
    done = run("bench.judge", op, "triton", "--no-bench", "--no-compile", *chosen)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"nothing wrong found: {found}" in done.stdout, done.stdout[-3000:]
