"""The Triton kernels in Triton's interpreter, in the environment with Triton that `make aot` builds."""

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from dantinox import kernels
from dantinox.kernels.dispatch import target_device

ROOT = Path(__file__).parents[3]
PYTHON = ROOT / ".venv-aot/bin/python"
needs_triton = pytest.mark.skipif(not PYTHON.exists(), reason="`make aot` builds the environment that has Triton")


def interpreted(folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    command = [str(PYTHON), "-m", "tests.helpers.triton_interpreter"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@needs_triton
def test_triton_kernels_match_numpy():
    done = interpreted(ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "of what is allowed" in done.stdout


FAULTS = {
    "permute takes the slot for the token": ("(routed_row // K)", "(routed_row % K)"),
    "permute forgets the weight": ("s[:, None]).to", "1).to"),
    "one choice k times": ("+ n * K + j, mask=n < TOKENS, other=0).to(tl.int64)\n        value",
                           "+ n * K, mask=n < TOKENS, other=0).to(tl.int64)\n        value"),
    "combine leaves the last columns": ("m[None, :], total.to(out", "m[None, :] % 256, total.to(out"),
    "router weights' gradients of the first columns": ("in range(0, WIDTH, TILE", "in range(0, TILE_COLUMNS, TILE"),
    "dx of a row is not added up": (
        "call_combine(drows, inverse_permutation, ones", "call_combine(drows, inverse_permutation * 0, ones"),
    "the weights have no gradient": ("return drows, dweights, None", "return drows, 0 * dweights, None"),
}  # fmt: skip


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_triton_interpreter_detects_planted_fault(tmp_path, fault):
    for name in ("dantinox", "kernels", "reference", "tests"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(tmp_path)], check=True)
    file, (old, new) = tmp_path / "kernels/ops/moe/triton.py", FAULTS[fault]
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))
    done = interpreted(tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stdout[-2000:] + done.stderr[-2000:]


def test_triton_without_nvidia_gpu_raises_with_the_reason():
    x, w, ids = jnp.ones((2, 4)), jnp.ones((2, 4, 4)), jnp.zeros((2, 1), int)
    for platform, kind in (("cpu", "cpu"), ("tpu", "TPU v6 lite"), ("gpu", "AMD Instinct MI300X")):
        with target_device(platform, kind), pytest.raises(NotImplementedError, match="NVIDIA"):
            kernels.moe_mlp(x, w, w, w, ids, jnp.ones((2, 1)), implementation="triton")


def test_missing_jax_triton_raises_with_install_hint(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with target_device("gpu", "NVIDIA A100-SXM4-80GB"), pytest.raises(NotImplementedError, match="EXTRAS=triton"):
        kernels.moe_mlp(
            jnp.ones((2, 4)), *[jnp.ones((2, 4, 4))] * 3, jnp.zeros((2, 1), int), jnp.ones((2, 1)),
            implementation="triton",
        )  # fmt: skip
