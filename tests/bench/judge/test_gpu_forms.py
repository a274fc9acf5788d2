"""Kernels for GPUs, judged without one: Hopper's in JAX's simulator, Triton's in its interpreter."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.judge import outcomes, presence, subject

ROOT = Path(__file__).parents[3]
GUIDES = ROOT / "docs" / "guides"
OTHER = ROOT / ".venv-aot" / "bin" / "python"
WITH_TRITON = sys.executable if importlib.util.find_spec("jax_triton") else str(OTHER) if OTHER.exists() else None


def test_hopper_attention_of_the_guide_is_right_and_refuses_segments():
    name = subject.load("attention", str(GUIDES / "my_attention_hopper.py"))
    found, absent = presence.forms_of("attention", name)
    assert "Hopper" in found and "TPU" in absent
    _, full, segments, _ = presence.simulated_cases("attention")
    for case, state in ((full, outcomes.OK), (segments, outcomes.REFUSED)):
        (outcome,) = outcomes.judge("attention", name, ("Hopper",), case)
        assert set(outcome.states.values()) == {state}, outcome.lines


@pytest.mark.slow
@pytest.mark.skipif(WITH_TRITON is None, reason="no Python here has jax-triton; EXTRAS=triton brings it")
@pytest.mark.parametrize(("old", "new", "code"), [("", "", 0), ("key[None, :] < WINDOW", "key[None, :] <= WINDOW", 1)])
def test_triton_attention_of_the_guide_is_judged(tmp_path, old, new, code):
    source = (GUIDES / "my_attention_triton.py").read_text("utf-8")
    assert not old or source.count(old) == 1
    (tmp_path / "mine.py").write_text(source.replace(old, new) if old else source)
    words = ["attention", str(tmp_path / "mine.py"), "--no-bench", "--no-compile"]
    words += ["--case", *(case.id for case in presence.simulated_cases("attention"))]
    done = subprocess.run(
        [str(WITH_TRITON), "-m", "bench.judge", *words],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Triton" in done.stdout.splitlines()[2]
    assert code == 0 or "Triton: window" in done.stdout
