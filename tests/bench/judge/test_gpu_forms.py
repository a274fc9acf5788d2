"""Kernels for GPUs, judged without one: Hopper's in JAX's simulator, Triton's in its interpreter."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.judge import cases, outcomes, presence, runner, subject

ROOT = Path(__file__).parents[3]
GUIDES = ROOT / "docs" / "guides"
OTHER = ROOT / ".venv-aot" / "bin" / "python"
WITH_TRITON = sys.executable if importlib.util.find_spec("jax_triton") else str(OTHER) if OTHER.exists() else None


def test_hopper_attention_of_the_guide_is_right_and_refuses_segments():
    name = subject.load("attention", str(GUIDES / "my_attention_hopper.py"))
    found, absent = presence.forms_of("attention", name)
    assert "Hopper" in found and "TPU" in absent
    _, full, segments, _, sinks = presence.simulated_cases("attention")
    for case, state in ((full, outcomes.OK), (sinks, outcomes.OK), (segments, outcomes.REFUSED)):
        (outcome,) = outcomes.judge("attention", name, ("Hopper",), case)
        assert set(outcome.states.values()) == {state}, outcome.lines


SIMULATED = [
    pytest.param(op, case, id=f"{op}-{case.id}", marks=[pytest.mark.slow] * (number != 1))  # 1: poisoned, with a window
    for op in ("grouped_matmul", "decode_attention")
    for number, case in enumerate(presence.simulated_cases(op))
]


@pytest.mark.parametrize(("op", "case"), SIMULATED)
def test_hopper_kernels_of_the_guides_are_right(op, case):
    name = subject.load(op, str(GUIDES / f"my_{op}_hopper.py"))
    (outcome,) = outcomes.judge(op, name, ("Hopper",), case)
    assert set(outcome.states.values()) == {outcomes.OK}, outcome.lines


@pytest.mark.parametrize("op", cases.FEATURES)
def test_cheapest_case_of_each_feature_comes_first(op):
    every = cases.cases(op)
    found = runner._each_feature_first(every)
    assert {case.id for case in found} == {case.id for case in every} and len(found) == len(every)
    assert frozenset().union(*(case.features() for case in found[:20])) >= {*cases.FEATURES[op], *cases.DTYPES}


# Operation -> (what a fault replaces, by what, what the report says)
TRITON_FAULTS = {
    "attention": ("key[None, :] < WINDOW", "key[None, :] <= WINDOW", "Triton: window"),
    "grouped_matmul": ("in_group = n < tl.load(end + t)", "in_group = n >= 0", "elements outside of its arrays"),
    "decode_attention": ("oldest < 0, oldest + C", "oldest < 0, 0", "Triton: wrapped ring"),
}


@pytest.mark.slow
@pytest.mark.skipif(WITH_TRITON is None, reason="no Python here has jax-triton; EXTRAS=triton brings it")
@pytest.mark.parametrize("faulty", [False, True])
@pytest.mark.parametrize("op", TRITON_FAULTS)
def test_triton_kernels_of_the_guides_are_judged(tmp_path, op, faulty):
    source = (GUIDES / f"my_{op}_triton.py").read_text("utf-8")
    old, new, said = TRITON_FAULTS[op]
    assert source.count(old) == 1
    (tmp_path / "mine.py").write_text(source.replace(old, new) if faulty else source)
    words = [op, str(tmp_path / "mine.py"), "--no-bench", "--no-compile"]
    words += ["--case", *(case.id for case in presence.simulated_cases(op))]
    done = run(WITH_TRITON, "bench.judge", *words)
    assert done.returncode == int(faulty), done.stdout[-3000:] + done.stderr[-3000:]
    assert "Triton" in done.stdout.splitlines()[2]
    assert not faulty or said in done.stdout, done.stdout[-3000:]


@pytest.mark.slow
@pytest.mark.skipif(not OTHER.exists(), reason="no .venv-aot here; make aot builds one")
@pytest.mark.parametrize("form", ["triton", "hopper"])
@pytest.mark.parametrize("op", TRITON_FAULTS)
def test_kernels_of_the_guides_compile_for_an_h100(op, form):
    done = run(OTHER, "bench.judge.compile_row", op, str(GUIDES / f"my_{op}_{form}.py"), "h100")
    assert done.returncode == 0, done.stderr[-3000:]
    (row,) = json.loads(done.stdout.splitlines()[-1])["directions"].values()
    assert row["kernels"] and all(kernel["spill_bytes"] == 0 for kernel in row["kernels"]), row
    assert op != "decode_attention" or row["temp_bytes"] < 2**20  # of a cache of 4 MiB


def run(python, module: str, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [str(python), "-m", module, *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
