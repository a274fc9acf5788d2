"""scripts/setup.sh, run with fake Pythons on a PATH of the test: nothing is downloaded or installed."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = "sh cat cksum cp dirname flock grep head mkdir mv rm sleep tr".split()

FAKE_PYTHON = """#!/bin/sh
case "$1 $2" in
    "-IS -c") exec '{real}' -IS -c 'import sys; sys.version_info = {version}; exec(sys.argv[1])' "$3" ;;
    "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip")
        [ "$3" != --version ] || exit 0
        echo "pip $*" >>'{log}'
        [ ! -e '{log}.slow' ] || exec sleep "$(cat '{log}.slow')"
        [ ! -e '{log}.fail' ] ;;
    -c*) ;; # the first imports
    *) exit 2 ;;
esac
"""
SHIM = '#!/bin/sh\necho "pyenv: $0: command not found" >&2\nexit 127\n'
FAKE_UV = """#!/bin/sh
case "$1 $2" in
    "python find") echo '{python}' ;;
    "venv --quiet") '{python}' -m venv "$6" ;;
    "pip install") echo "uv $*" >>'{log}' ;;
esac
"""
FAKE_NVIDIA_SMI = """#!/bin/sh
case "$1" in
    -L) echo 'GPU 0: NVIDIA H100 80GB HBM3' ;;
    *) echo {driver} ;;
esac
"""


class Sandbox:
    """A checkout in a folder with spaces, and a PATH that holds a few tools and what a test adds."""

    def __init__(self, folder):
        self.root = folder / "a checkout"
        self.bin = folder / "bin dir"
        self.home = folder / "home"
        self.log = folder / "installs.log"
        (self.root / "scripts").mkdir(parents=True)
        self.bin.mkdir()
        self.home.mkdir()
        for name in ("scripts/setup.sh", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.root / name)
        for name in TOOLS:
            if found := shutil.which(name):
                (self.bin / name).symlink_to(found)

    def script(self, path, text):
        path = self.bin / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def python(self, path, version):
        numbers = tuple(int(part) for part in version.split("."))
        return self.script(path, FAKE_PYTHON.format(real=sys.executable, version=numbers, log=self.log))

    def start(self, *extras, **env):
        env = {"PATH": str(self.bin), "HOME": str(self.home), **env}
        command = ["sh", str(self.root / "scripts/setup.sh"), *extras]
        return subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def setup(self, *extras, code=0, **env):
        """Runs the script to its end and returns what it said."""
        process = self.start(*extras, **env)
        said = process.communicate(timeout=30)[1]
        assert process.returncode == code, said
        return said

    @property
    def installs(self):
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def box(tmp_path):
    return Sandbox(tmp_path)


def test_setup_selects_supported_python(box):
    box.script("python3.13", SHIM)
    box.python("python3.12", "3.12.4")
    box.python("python3", "3.11.2")
    assert "with Python 3.12.4 (" in box.setup()
    assert len(box.installs) == 1
    assert "-c constraints.txt -e ." in box.installs[0]


def test_setup_searches_path_past_a_shim(box):
    box.script("python3", SHIM)
    later = box.python(box.home / "bin" / "python3", "3.14.0")
    assert f"3.14.0 ({later})" in box.setup(PATH=f"{box.bin}:{later.parent}")


@pytest.mark.parametrize("variable", ["", "PYENV_ROOT"])
def test_setup_finds_python_of_pyenv(box, variable):
    root = box.home / (variable or ".pyenv")
    box.script("python3.12", SHIM)
    box.python("python3", "3.11.7")
    box.python(root / "versions/3.9.18/bin/python", "3.9.18")
    box.python(root / "versions/3.12.1/bin/python", "3.12.1")
    assert "with Python 3.12.1 (" in box.setup(**({variable: str(root)} if variable else {}))


@pytest.mark.parametrize(
    ("pythons", "reason"), [({}, ""), ({"python3.14": "3.15.0", "python3": "3.11.7"}, "only 3.15.0, 3.11.7")]
)
def test_setup_prints_one_line_without_supported_python(box, pythons, reason):
    box.script("python3.12", SHIM)
    for name, version in pythons.items():
        box.python(name, version)
    said = box.setup(code=1)
    assert len(said.splitlines()) == 1
    assert "no Python 3.12, 3.13 or 3.14" in said and reason in said and "install" in said
    assert not (box.root / ".venv").exists()


def test_named_python_is_used_or_rejected(box):
    box.python("python3", "3.12.1")
    named = box.python(box.home / "py", "3.13.0")
    assert "Python 3.12.1" in box.setup()
    assert "Python 3.13.0" in box.setup(PYTHON=str(named))
    assert box.setup() == ""
    old = box.python(box.home / "old", "3.10.1")
    assert "3.10.1" in box.setup(PYTHON=str(old), code=1)


def test_second_setup_is_a_no_op(box):
    box.python("python3", "3.13.0")
    box.setup("dev")
    assert box.setup("dev") == "" and box.setup() == ""
    assert len(box.installs) == 1


def test_new_extra_only_adds_packages(box):
    box.python("python3", "3.13.0")
    box.setup("dev")
    assert "Creating" not in box.setup("triton")
    assert box.installs[1].endswith(".[dev,triton]")
    assert "no extra is named dve" in box.setup("dve", code=1)


def test_changed_requirements_reinstall(box):
    box.python("python3", "3.13.0")
    box.setup()
    with (box.root / "constraints.txt").open("a") as file:
        file.write("more==1.0\n")
    assert "Creating" not in box.setup()
    assert len(box.installs) == 2


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_install_is_repaired(box, how):
    box.python("python3", "3.13.0")
    slow = Path(f"{box.log}.slow")
    slow.write_text("30")
    process = box.start()
    while not box.installs:
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, how)
    process.communicate(timeout=60)
    assert process.returncode != 0
    slow.unlink()
    assert "cut short" in box.setup()
    assert box.setup() == ""
    assert len(box.installs) == 2


def test_failed_install_is_retried(box):
    box.python("python3", "3.13.0")
    fail = Path(f"{box.log}.fail")
    fail.touch()
    assert "install failed" in box.setup(code=1)
    fail.unlink()
    box.setup()
    assert box.setup() == ""
    assert len(box.installs) == 2


def test_broken_environment_is_rebuilt(box):
    box.python("python3", "3.13.0")
    box.setup()
    (box.root / ".venv/bin/python").unlink()
    assert "Creating" in box.setup()
    assert len(box.installs) == 2


@pytest.mark.parametrize("lock", ["flock", "mkdir"])
def test_concurrent_setups_install_once(box, lock):
    if lock == "mkdir":
        (box.bin / "flock").unlink(missing_ok=True)
    box.python("python3", "3.13.0")
    Path(f"{box.log}.slow").write_text("0.3")
    for process in [box.start(), box.start()]:
        said = process.communicate(timeout=30)[1]
        assert process.returncode == 0, said
    assert len(box.installs) == 1


def test_uv_is_used_when_available(box):
    python = box.python(box.home / "py", "3.13.0")
    box.script("uv", FAKE_UV.format(python=python, log=box.log))
    box.setup("dev")
    assert box.setup("dev") == ""
    [install] = box.installs
    assert install.startswith("uv pip install") and install.endswith("-c constraints.txt -e .[dev]")


@pytest.mark.parametrize(
    ("driver", "env", "package"),
    [("580.65", {}, ".[cuda]"), ("550.54", {}, ".[cuda12]"), ("580.65", {"ACCEL": "cpu"}, ".")],
)
def test_nvidia_gpu_selects_cuda_extra(box, driver, env, package):
    box.python("python3", "3.13.0")
    box.script("nvidia-smi", FAKE_NVIDIA_SMI.format(driver=driver))
    box.setup(**env)
    assert box.installs[0].endswith(f"-e {package}")
    assert box.setup(**env) == ""


def pci(box, vendor, model):
    """A PCI device of the machine."""
    folder = box.home / "sys/bus/pci/devices" / f"0000:00:{len(list(box.home.rglob('vendor'))):02}.0"
    folder.mkdir(parents=True)
    (folder / "vendor").write_text(f"{vendor}\n")
    (folder / "device").write_text(f"{model}\n")


@pytest.mark.parametrize(
    ("files", "devices", "env", "package"),
    [
        (["accel0", "accel1"], [], {}, ".[tpu]"),  # v4
        (["vfio/vfio", "vfio/0"], [("0x8086", "0x1237"), ("0x1ae0", "0x0063")], {}, ".[tpu]"),  # v5e
        (["vfio/vfio", "vfio/0"], [], {"TPU_WORKER_ID": "0"}, ".[tpu]"),  # in a container
        (["vfio/vfio", "vfio/0"], [], {"TPU_WORKER_ID": "0", "ACCEL": "cpu"}, "."),
        (["vfio/vfio", "vfio/0"], [("0x10de", "0x2330"), ("0x1ae0", "0x0042")], {}, "."),  # a GPU, a network card
        (["vfio/vfio", "accel/accel0"], [], {"TPU_WORKER_ID": "0"}, "."),  # of another vendor
        ([], [("0x1ae0", "0x0063")], {"TPU_WORKER_ID": "0"}, "."),
    ],
)
def test_tpu_selects_tpu_extra(box, files, devices, env, package):
    box.python("python3", "3.13.0")
    for file in files:
        path = box.home / "dev" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for vendor, model in devices:
        pci(box, vendor, model)
    env = {"SYSTEM_ROOT": str(box.home), **env}
    box.setup(**env)
    assert box.installs[0].endswith(f"-e {package}")
    assert box.setup(**env) == ""


@pytest.mark.parametrize("extra", ["cuda", "cuda12", "triton"])
def test_extras_of_gpus_bring_triton(extra):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"jax-triton", "triton"} <= {canonical(each) for each in extras[extra]}


def test_unknown_accelerator_is_rejected(box):
    assert "ACCEL=npu is not known; use cpu, cuda or tpu" in box.setup(ACCEL="npu", code=1)


def canonical(requirement):
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def test_constraints_hold_only_names_and_versions():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("# ")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", pin) for pin in pins)
    for name in ("constraints.txt", "pyproject.toml"):
        assert "://" not in (ROOT / name).read_text()

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = project["dependencies"] + [each for name in extras for each in extras[name]]
    assert {canonical(each) for each in asked} <= {pin.split("==")[0] for pin in pins}
