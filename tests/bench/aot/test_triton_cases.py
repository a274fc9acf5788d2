"""The check of what the compilers made of the Triton attention."""

import pytest

from bench.aot import hardware
from bench.aot.gpu import triton_cases
from bench.aot.gpu.triton_cases import Kernel

RIGHT = Kernel("dq", registers=255, spill_bytes=0, smem_bytes=99 * 1024, tensor_core_instructions=3)


@pytest.mark.parametrize(
    ("change", "dtype", "D", "expected"),
    [
        ({}, "bfloat16", 128, []),
        ({"spill_bytes": 8}, "bfloat16", 128, ["8 bytes spilled"]),
        ({"spill_bytes": 8}, "bfloat16", 192, []),
        ({"spill_bytes": 8}, "float32", 64, []),
        ({"smem_bytes": 99 * 1024 + 1}, "float32", 64, ["101377 bytes of shared memory of 101376"]),
        ({"tensor_core_instructions": 2}, "float32", 64, ["2 tensor core instructions for 3 products"]),
    ],
)
def test_problems_of_a_kernel(change, dtype, D, expected):
    target = hardware.get("rtx4090")
    assert triton_cases.problems(target, dtype, D, RIGHT._replace(**change)) == expected


def test_rows_have_every_feature_dtype_and_head_dim_and_fail_the_program(monkeypatch, capsys):
    made = {name: RIGHT._replace(name=name, tensor_core_instructions=4) for name in triton_cases.PRODUCTS}
    monkeypatch.setattr(triton_cases, "compile_attention", lambda *_: list(made.values()))
    assert triton_cases.main(["a100", "rtx5090"]) == 0
    number = 2 * len(triton_cases.HEAD_DIMS) * len(triton_cases.DTYPES) * len(triton_cases.FEATURES) * len(made)
    assert f"{number} kernels compiled, 0 problems" in capsys.readouterr().out
    made["dq"] = made["dq"]._replace(spill_bytes=4)
    assert triton_cases.main(["a100", "--short"]) == 1
    assert "a100, bfloat16, D 64, all, soft cap: dq: 4 bytes spilled" in capsys.readouterr().out

    def refuse(*_):
        raise ValueError("ptxas: too old")

    monkeypatch.setattr(triton_cases, "compile_attention", refuse)
    assert triton_cases.main(["a100", "--short"]) == 1
    assert "ValueError: ptxas: too old" in capsys.readouterr().out


def test_table_shows_the_worst_kernel_of_a_dtype_and_head_dim():
    results = {
        ("a100", "float32", 64): [RIGHT._replace(name=n, spill_bytes=s) for n in triton_cases.PRODUCTS for s in (0, 9)]
    }
    assert "| a100 | float32 | 64 | 255, 255, 255 | 9, 9, 9 | 99, 99, 99 |" in triton_cases.table(results)
