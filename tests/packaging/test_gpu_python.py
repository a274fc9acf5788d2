"""scripts/gpu_python.sh: the Python that it chooses on a GPU machine, with and without a network."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAKE_PYTHON = """#!/bin/sh
echo "$*" >>'{log}'
case "$1 $2" in
    "-m pip") exit {pip} ;;
    "-c import jax") exit {jax} ;;
esac
"""
FAKE_SETUP = """echo "setup $*" >>'{log}'; echo building; exit {setup}"""


def chosen(folder: Path, *, pip: int, jax: int, setup: int = 0, built: bool = False) -> tuple[int, str, str, str]:
    """(exit status, what it chose, what it said, what it called); 0 is success of each of them."""
    (folder / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/gpu_python.sh", folder / "scripts")
    log, python = folder / "log", folder / "python3"
    python.write_text(FAKE_PYTHON.format(log=log, pip=pip, jax=jax))
    python.chmod(0o755)
    (folder / "scripts/setup.sh").write_text(FAKE_SETUP.format(log=log, setup=setup))
    if built:
        (folder / ".venv").mkdir()
        (folder / ".venv/.dantinox").touch()
    env = os.environ | {"PYTHON": str(python)}
    done = subprocess.run(["sh", str(folder / "scripts/gpu_python.sh")], env=env, capture_output=True, text=True)
    return done.returncode, done.stdout.strip(), done.stderr, log.read_text()


def test_network_available_builds_an_environment(tmp_path):
    code, python, said, called = chosen(tmp_path, pip=0, jax=0)
    assert (code, python) == (0, ".venv/bin/python")
    assert "setup dev triton peers" in called and "building" in said


def test_existing_environment_needs_no_network(tmp_path):
    code, python, _, called = chosen(tmp_path, pip=1, jax=0, built=True)
    assert (code, python) == (0, ".venv/bin/python") and "pip" not in called


@pytest.mark.parametrize(("pip", "setup"), [(1, 0), (0, 1)], ids=["no network", "the install fails"])
def test_falls_back_to_installed_python_when_install_fails(tmp_path, pip, setup):
    code, python, said, _ = chosen(tmp_path, pip=pip, jax=0, setup=setup)
    assert (code, python) == (0, str(tmp_path / "python3"))
    assert "no package can be installed here" in said


def test_missing_jax_prints_one_line(tmp_path):
    code, python, said, _ = chosen(tmp_path, pip=1, jax=1)
    assert (code, python) == (1, "") and "has no jax; set PYTHON" in said and len(said.splitlines()) == 1
