"""The check of what the compilers made of the Triton linear cross-entropy and grouped matmul."""

import pytest

from bench.aot import __main__ as program
from bench.aot import hardware
from bench.aot.gpu import triton_gmm_cases, triton_loss_cases, triton_rows
from bench.aot.gpu.triton_cases import Kernel

LOSS, GMM = triton_loss_cases.SUITE, triton_gmm_cases.SUITE
RIGHT = Kernel("forward", registers=255, spill_bytes=0, smem_bytes=99 * 1024, tensor_core_instructions=1)
MADE = [RIGHT._replace(name=name) for name in LOSS.products]


@pytest.mark.parametrize(
    ("change", "dtype", "expected"),
    [
        ({}, "bfloat16", []),
        ({"spill_bytes": 8}, "bfloat16", ["8 bytes spilled"]),
        ({"spill_bytes": 8}, "float16", ["8 bytes spilled"]),
        ({"spill_bytes": 8}, "float32", []),
        ({"smem_bytes": 99 * 1024 + 1}, "float32", ["101377 bytes of shared memory of 101376"]),
        ({"tensor_core_instructions": 0}, "float32", ["0 tensor core instructions for 1 products"]),
    ],
)
def test_problems_of_a_kernel(change, dtype, expected):
    assert triton_rows.problems(LOSS, hardware.get("rtx4090"), dtype, RIGHT._replace(**change)) == expected


def test_kernel_of_two_products_has_two():
    found = triton_rows.problems(GMM, hardware.get("h100"), "float32", RIGHT._replace(name="up_proj"))
    assert found == ["1 tensor core instructions for 2 products"]


def test_problem_or_error_of_a_row_does_not_stop_the_next():
    answers = iter([[RIGHT._replace(spill_bytes=4)], ValueError("ptxas: too\n  old"), MADE])

    def answer(*_):
        made = next(answers)
        if isinstance(made, Exception):
            raise made
        return made

    found = triton_rows.compile_rows(LOSS._replace(compile=answer), "a100", LOSS.rows[:3])
    expected = [["forward: 4 bytes spilled"], ["ValueError: ptxas: too old"], []]
    assert [row for row, _, _ in found] == list(LOSS.rows[:3])
    assert [wrong for _, _, wrong in found] == expected


def test_table_shows_the_worst_kernel_and_keeps_the_rows_of_other_cards():
    made = [kernel._replace(spill_bytes=spilled) for kernel in MADE for spilled in (0, 9)]
    old = "| h100 | old |\n| a100 | old |\n| rtx5090 | old |\n"
    results = {("a100", ("float32", "plain")): made}
    text = triton_rows.table(LOSS, triton_loss_cases.HEADS, results, old)
    row = "| a100 | float32 | plain | 255, 255 | 9, 9 | 99, 99 | 1, 1 |"
    assert text.splitlines()[-3:] == ["| h100 | old |", row, "| rtx5090 | old |"]


def test_table_leaves_out_kernels_that_a_row_does_not_have():
    made = [RIGHT._replace(name=name) for name in ("tgmm", "gmm")]
    results = {("a100", ("grouped_matmul", "float16", "plain")): made}
    text = triton_rows.table(GMM, triton_gmm_cases.HEADS, results)
    assert text.splitlines()[-1] == "| a100 | grouped_matmul | float16 | plain | 255, 255 | 0, 0 | 99, 99 | 1, 1 |"


@pytest.mark.parametrize("suite", [LOSS, GMM], ids=lambda suite: suite.name)
def test_unknown_card_is_named(suite, capsys):
    with pytest.raises(SystemExit):
        triton_rows.main(suite, (), ["v6e"])
    assert "'v6e'" in capsys.readouterr().err


@pytest.mark.parametrize("suite", [LOSS, GMM], ids=lambda suite: suite.name)
def test_committed_table_has_every_row_of_every_card(suite):
    lines = suite.file.read_text("utf-8").splitlines()
    cards = [target.name for target in hardware.TARGETS.values() if isinstance(target, hardware.Gpu)]
    missing = [
        (card, row) for card in cards for row in suite.rows
        if not any(line.startswith(f"| {' | '.join((card, *row))} |") for line in lines)
    ]  # fmt: skip
    assert not missing


MODULES = ("triton_cases", "triton_loss_cases", "triton_gmm_cases", "triton_decode_cases")


@pytest.mark.parametrize("failing", [None, *MODULES])
def test_check_compiles_the_kernels_of_every_operation(monkeypatch, failing):
    called = []
    monkeypatch.setattr(program, "fails", lambda *words: called.append(words) or words[0].endswith(f".{failing}"))
    assert program.compile_triton_cases(["a100"]) == (failing is not None)
    assert called == [(f"bench.aot.gpu.{name}", "a100") for name in MODULES]
