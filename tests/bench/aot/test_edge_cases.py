"""The programs that are compiled at the sizes that break kernels, and how their outcomes are reported."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.aot.tpu import edge_cases
from dantinox.kernels import workloads

ROOT = Path(__file__).parents[3]


def test_every_parity_workload_is_compiled_in_every_dtype():
    cases = list(edge_cases.parity_cases(("parity",)))
    for op in edge_cases.OPERATIONS:
        rows = workloads.select(op, "parity")
        found = {
            (case.workload.name, case.dtype, getattr(case.workload, "kv_dtype", None), case.direction)
            for case in cases
            if case.workload.op == op
        }
        per_row = 7 if op == "decode_attention" else 6  # with caches of 8 bits, or forward and with gradients
        assert rows and len(found) == per_row * len(rows)
    assert len({str(case) for case in cases}) == len(cases)


def test_random_programs_are_valid_and_repeatable():
    cases = list(edge_cases.random_cases(50, seed=3))
    assert [str(case) for case in cases] == [str(case) for case in edge_cases.random_cases(50, seed=3)]
    assert {case.workload.op for case in cases} == set(edge_cases.OPERATIONS)
    assert all(case.workload.shapes() and case.workload.out_shape() for case in cases)


def fake_compiler(outcome):
    def compile_(case, implementation):
        answer = outcome(case, implementation)
        if isinstance(answer, BaseException):
            raise answer
        return SimpleNamespace(memory_analysis=lambda: SimpleNamespace(temp_size_in_bytes=answer))

    return compile_


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (lambda case, name: 0, ("compiled", "")),
        (lambda case, name: ValueError("Bad lhs\ntype"), ("failed", "ValueError: Bad lhs type")),
        (
            lambda case, name: NotImplementedError("no float16") if name == "pallas" else 0,
            ("refused", "NotImplementedError: no float16"),
        ),
        (lambda case, name: NotImplementedError("no"), ("failed", "auto: NotImplementedError: no")),
        (
            lambda case, name: 2 * 8 * 8 * 16384 * 32 * 2 // 10,
            ("failed", "temporary memory is 10.0% of the KV cache; allowed: 2%"),
        ),
    ],
    ids=["compiles", "fails", "refused", "auto fails too", "copies the cache"],
)
def test_outcome_of_a_program(outcome, expected, capsys):
    case = next(case for case in edge_cases.in_place_cases() if case.workload.D == 32)
    assert edge_cases.check(case, fake_compiler(outcome)) == expected
    assert edge_cases.run("v6e", [case], fake_compiler(outcome)) == (expected[0] == "failed")
    assert (expected[1] in capsys.readouterr().out) == (expected[0] in ("failed", "compiled"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [["edge_cases", chip, "--long"] for chip in ("v5e", "v6e", "tpu7x")] + [["mesh_cases"]],
    ids=["v5e", "v6e", "tpu7x", "four chips"],
)
def test_every_edge_case_compiles_or_is_refused(words):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs the aot extra: make aot")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", f"bench.aot.tpu.{words[0]}", *words[1:]]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
