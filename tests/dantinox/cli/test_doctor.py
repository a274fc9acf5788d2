"""`python -m dantinox.doctor`: the report is complete on any machine."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from dantinox import kernels

ROOT = Path(__file__).parents[3]
BROKEN = """
def initialize():
    raise RuntimeError("no device of this kind")
"""


def doctor(folder: Path, **environment: str) -> str:
    """What it prints when run from `folder`; it must end with 0 and say nothing on stderr."""
    inherited = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    environment = {"PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(
        [sys.executable, "-m", "dantinox.doctor"],
        cwd=folder,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and "Traceback" not in done.stdout + done.stderr, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_doctor_lists_what_runs_and_reasons_for_the_rest(tmp_path):
    report = doctor(tmp_path, JAX_PLATFORMS="cpu")
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in report and jax.__version__ in report
    assert str(tmp_path / "runs") in report and "writable" in report and list(tmp_path.iterdir()) == []
    if jax.default_backend() == "cpu":
        rows = {tuple(line.split()[:2]): line for line in report.splitlines()}
        for op in ("attention", "grouped_matmul", "moe_mlp", "decode_attention", "linear_cross_entropy"):
            for name, why in kernels.implementations(op).items():
                assert rows[op, name].endswith("can run" if why is None else why)


@pytest.mark.parametrize("ask", ["", pytest.param("nonesuch", marks=pytest.mark.slow)])
def test_plugin_without_device_prints_no_traceback(tmp_path, ask):
    plugin = tmp_path / "site" / "jax_plugins" / "broken"
    plugin.mkdir(parents=True)
    (plugin / "__init__.py").write_text(BROKEN)
    path = f"{ROOT}{os.pathsep}{tmp_path / 'site'}"
    report = doctor(tmp_path, PYTHONPATH=path, **({"JAX_PLATFORMS": ask} if ask else {}))
    assert "backend" in report and "packages" in report
    if ask:
        assert "none (JAX_PLATFORMS=nonesuch)" in report


def test_unwritable_folder_is_reported(tmp_path):
    (tmp_path / "runs").write_text("a file, no folder")
    assert "not writable" in doctor(tmp_path, JAX_PLATFORMS="cpu")
