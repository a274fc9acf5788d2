"""The wheel: its contents, and that it coexists with Hugging Face's `kernels`."""

import importlib.util
import itertools
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("dantinox", "kernels", "reference", "pyproject.toml", "README.md", "LICENSE")
NAMES = {"kernels": "import kernels; kernels.get_kernel", "dantinox-lab": "import dantinox.kernels as k; k.attention"}
needs_setuptools = pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="needs setuptools")


def pip(*words: object, python: Path | None = None) -> subprocess.CompletedProcess[str]:
    of = ["--python", str(python)] if python else []
    command = [sys.executable, "-m", "pip", *of, "--disable-pip-version-check", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of this tree, so that no build folder is left in it."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / "source" / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(ROOT / name, folder / "source" / name)
    done = pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, folder / "source")
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = folder.glob("*.whl")
    return path


@needs_setuptools
def test_wheel_contains_only_the_package(wheel):
    assert wheel.name.startswith("dantinox_lab-")
    with zipfile.ZipFile(wheel) as file:
        names = {info.filename for info in file.infolist()}
        links = [info.filename for info in file.infolist() if (info.external_attr >> 28) == 0xA]
        scripts = file.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    assert links == []
    assert {name.split("/")[0] for name in names} == {"dantinox", f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"}
    for folder in ("kernels", "reference", "dantinox"):
        for path in (ROOT / folder).rglob("*.py"):
            relative = path.relative_to(ROOT)
            name = str(relative if folder == "dantinox" else Path("dantinox") / relative)
            assert name in names, f"{name} is missing: has its folder an __init__.py?"
    presets = {f"dantinox/presets/{path.name}" for path in (ROOT / "dantinox" / "presets").glob("*.yaml")}
    assert presets and presets <= names
    for line in scripts.splitlines():
        if "=" in line:
            module, _, function = line.partition("=")[2].strip().partition(":")
            assert f"{module.replace('.', '/')}.py" in names and function == "program", line


@pytest.fixture(scope="module")
def environments(tmp_path_factory):
    """Fresh environments that see the packages of this one, but neither of the two that are tested."""

    def fresh(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        venv.create(folder, with_pip=False, symlinks=True)
        python = folder / "bin" / "python"
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "seen.pth").write_text(sysconfig.get_path("purelib") + "\n")
        return python

    return fresh


def imports(python: Path, code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(python), "-c", code], cwd=folder, capture_output=True, text=True, timeout=300)


@needs_setuptools
@pytest.mark.slow
@pytest.mark.parametrize("order", itertools.permutations(NAMES), ids=" then ".join)
@pytest.mark.parametrize("removed", NAMES)
def test_wheel_coexists_with_hugging_face_kernels(wheel, environments, order, removed, tmp_path):
    python = environments("-".join(order))
    for name in order:
        done = pip("install", *(["--no-deps", wheel] if name == "dantinox-lab" else [name]), python=python)
        if name == "kernels" and done.returncode:
            pytest.skip(f"pip cannot fetch {name} here")
        assert done.returncode == 0, done.stderr[-2000:]
    for code in ("; ".join(NAMES[name] for name in order), *NAMES.values()):
        done = imports(python, code, tmp_path)
        assert done.returncode == 0, done.stderr
    (kept,) = set(NAMES) - {removed}
    listed = f"from importlib import metadata as m; print(*(f.locate() for f in m.files({kept!r})), sep='\\n')"
    files = [Path(line) for line in imports(python, listed, tmp_path).stdout.splitlines()]
    assert pip("uninstall", "-y", removed, python=python).returncode == 0
    assert len(files) > 5 and all(file.exists() for file in files)
    done = imports(python, NAMES[kept], tmp_path)
    assert done.returncode == 0, done.stderr
