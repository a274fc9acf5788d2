"""The check of what the compilers made of the Triton attention."""

import contextlib

import pytest

from bench.aot import hardware
from bench.aot.gpu import train_steps, triton_cases
from bench.aot.gpu.triton_cases import Kernel

GPUS = [target.name for target in hardware.TARGETS.values() if isinstance(target, hardware.Gpu)]
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


def test_rows_have_every_feature_dtype_and_head_dim(monkeypatch):
    made = [RIGHT._replace(name=name, tensor_core_instructions=4) for name in triton_cases.PRODUCTS]
    monkeypatch.setattr(triton_cases, "compile_attention", lambda *_: made)
    found = triton_cases.compile_rows("a100", list(triton_cases.rows(short=False)))
    number = len(triton_cases.HEAD_DIMS) * len(triton_cases.DTYPES) * len(triton_cases.FEATURES)
    assert len({row for row, _, _ in found}) == number and not any(wrong for _, _, wrong in found)


def test_problem_or_error_of_a_row_does_not_stop_the_next(monkeypatch):
    answers = iter([[RIGHT._replace(spill_bytes=4)], ValueError("ptxas: too\n  old")])

    def answer(*_):
        made = next(answers)
        if isinstance(made, Exception):
            raise made
        return made

    monkeypatch.setattr(triton_cases, "compile_attention", answer)
    wrong = [wrong for _, _, wrong in triton_cases.compile_rows("a100", triton_cases.SHORT)]
    assert wrong == [["dq: 4 bytes spilled"], ["ValueError: ptxas: too old"]]


def test_a_problem_fails_the_program(monkeypatch, capsys):
    class Now:
        def __init__(self, *_): ...
        def __enter__(self):
            return self

        def __exit__(self, *_): ...
        def submit(self, f, *args):
            return type("Done", (), {"result": lambda _: f(*args)})()

    monkeypatch.setattr(triton_cases, "ProcessPoolExecutor", Now)
    row = "bfloat16", 64, "causal"
    monkeypatch.setattr(
        triton_cases, "compile_rows", lambda name, rows: [(row, [RIGHT], ["too big"] * (name == "b200"))]
    )
    assert triton_cases.main(["a100", "h100"]) == 0
    assert "2 kernels compiled, 0 problems" in capsys.readouterr().out
    assert triton_cases.main(["a100", "b200"]) == 1
    assert "b200, bfloat16, D 64, causal: too big" in capsys.readouterr().out
    assert triton_cases.main([]) == 1
    assert f"{len(GPUS)} kernels compiled, 1 problems" in capsys.readouterr().out


@pytest.mark.parametrize("main", [triton_cases.main, train_steps.main])
def test_unknown_card_is_named(main, capsys):
    with pytest.raises(SystemExit):
        main(["v6e"])
    assert "'v6e'" in capsys.readouterr().err


def test_train_steps_compile_for_every_card_by_default(monkeypatch, capsys):
    monkeypatch.setattr(train_steps, "compiler_environment", contextlib.nullcontext)
    monkeypatch.setattr(train_steps, "temp_bytes", lambda *_: 2**20)
    assert train_steps.main(["--preset", "nano"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{name}, nano, attn triton: 1 MiB" in printed for name in GPUS)


def test_table_of_train_steps_keeps_other_rows(monkeypatch, tmp_path):
    monkeypatch.setattr(train_steps, "compiler_environment", contextlib.nullcontext)
    monkeypatch.setattr(train_steps, "FILE", tmp_path / "steps.md")
    monkeypatch.setattr(train_steps, "temp_bytes", lambda target, preset, attn, dtype: 2**20 * (4 - (attn == "triton")))
    assert train_steps.main(["h100", "--preset", "nano", "--write"]) == 0
    assert train_steps.main(["a100", "--preset", "nano", "dante", "--write"]) == 0
    rows = [line for line in (tmp_path / "steps.md").read_text("utf-8").splitlines() if "0.75" in line]
    assert rows == [f"| {row} | 4 | 3 | 0.75 |" for row in ("h100 | nano", "a100 | dante", "a100 | nano")]


def test_table_shows_the_worst_kernel_and_keeps_the_rows_of_other_cards():
    made = [RIGHT._replace(name=name, spill_bytes=spilled) for name in triton_cases.PRODUCTS for spilled in (0, 9)]
    old = "| h100 | old |\n| a100 | old |\n| rtx5090 | old |\n"
    text = triton_cases.table({("a100", "float32", 64): made}, old)
    row = "| a100 | float32 | 64 | 255, 255, 255 | 9, 9, 9 | 99, 99, 99 |"
    assert text.splitlines()[-3:] == ["| h100 | old |", row, "| rtx5090 | old |"]
