"""The check of what the compilers made of the Triton linear cross-entropy."""

import pytest

from bench.aot import __main__ as program
from bench.aot import hardware
from bench.aot.gpu import triton_loss_cases
from bench.aot.gpu.triton_cases import Kernel

RIGHT = Kernel("forward", registers=255, spill_bytes=0, smem_bytes=99 * 1024, tensor_core_instructions=1)
MADE = [RIGHT._replace(name=name) for name in triton_loss_cases.KERNELS]


@pytest.mark.parametrize(
    ("change", "dtype", "expected"),
    [
        ({}, "bfloat16", []),
        ({"spill_bytes": 8}, "bfloat16", ["8 bytes spilled"]),
        ({"spill_bytes": 8}, "float16", ["8 bytes spilled"]),
        ({"spill_bytes": 8}, "float32", []),
        ({"smem_bytes": 99 * 1024 + 1}, "float32", ["101377 bytes of shared memory of 101376"]),
        ({"tensor_core_instructions": 0}, "float32", ["its product does not run on the tensor cores"]),
    ],
)
def test_problems_of_a_kernel(change, dtype, expected):
    assert triton_loss_cases.problems(hardware.get("rtx4090"), dtype, RIGHT._replace(**change)) == expected


def test_problem_or_error_of_a_row_does_not_stop_the_next(monkeypatch):
    answers = iter([[RIGHT._replace(spill_bytes=4)], ValueError("ptxas: too\n  old"), MADE])

    def answer(*_):
        made = next(answers)
        if isinstance(made, Exception):
            raise made
        return made

    monkeypatch.setattr(triton_loss_cases, "compile_loss", answer)
    found = triton_loss_cases.compile_rows("a100", triton_loss_cases.ROWS[:3])
    expected = [["forward: 4 bytes spilled"], ["ValueError: ptxas: too old"], []]
    assert [row for row, _, _ in found] == list(triton_loss_cases.ROWS[:3])
    assert [wrong for _, _, wrong in found] == expected


def test_table_shows_the_worst_kernel_and_keeps_the_rows_of_other_cards():
    made = [kernel._replace(spill_bytes=spilled) for kernel in MADE for spilled in (0, 9)]
    old = "| h100 | old |\n| a100 | old |\n| rtx5090 | old |\n"
    text = triton_loss_cases.table({("a100", ("float32", "plain")): made}, old)
    row = "| a100 | float32 | plain | 255, 255 | 9, 9 | 99, 99 | 1, 1 |"
    assert text.splitlines()[-3:] == ["| h100 | old |", row, "| rtx5090 | old |"]


def test_unknown_card_is_named(capsys):
    with pytest.raises(SystemExit):
        triton_loss_cases.main(["v6e"])
    assert "'v6e'" in capsys.readouterr().err


@pytest.mark.parametrize("failing", [None, "triton_cases", "triton_loss_cases"])
def test_check_compiles_the_kernels_of_both_operations(monkeypatch, failing):
    called = []
    monkeypatch.setattr(program, "fails", lambda *words: called.append(words) or words[0].endswith(f".{failing}"))
    assert program.compile_triton_cases(["a100"]) == (failing is not None)
    assert called == [(f"bench.aot.gpu.{name}", "a100") for name in ("triton_cases", "triton_loss_cases")]
