"""What the terminal shows of compiled programs, when it shows it, and which programs are compiled by default."""

import io

import pytest

from bench.aot import __main__ as program
from bench.aot import cases as aot_cases
from bench.aot import hardware, worker_pool
from bench.aot.cases import Case
from bench.aot.report import console_table
from dantinox import kernels
from dantinox.kernels import registry
from dantinox.system.console import Console

V6E = hardware.get("v6e")
KERNEL = {"name": "k.1", "bundles": 300, "empty": 4, "mxu": 9, "mxu_share": 0.25, "vmem_bytes": 2048}
KERNEL |= {"spills": 7, "fills": 5}
TOTALS = {"kernels": 1, "bundles": 300, "empty": 4, "mxu": 9, "mxu_slots": 36, "spills": 7, "fills": 5}
ROW = {"status": "compiled", "argument_bytes": 2**20, "temp_bytes": 0, "totals": TOTALS, "seconds": 1.25}
REGIONS = [
    {"name": "init", "bundles": 20, "times": 3, "spills": 0, "fills": 0},
    {"name": "add_tile", "bundles": 200, "times": 36, "spills": 7, "fills": 5},
]


def printed(case: Case, *rows) -> str:
    out = io.StringIO()
    printer = console_table.Printer(V6E, Console(file=out, width=200))
    for row in rows:
        printer.add(case, row)
    return out.getvalue()


def words(text: str, start: str) -> list[str]:
    """The words of the only line that starts with this one."""
    (line,) = [line for line in text.splitlines() if line.strip().startswith(start)]
    return line.split()


def test_attention_is_shown_per_visible_pair_with_spills_by_function():
    pairs = 4 * 1024 * 1025 // 2
    kernel = KERNEL | {"executed": 3 * pairs // 100, "mxu_executed": 10 * pairs, "moved": {"all": 3 * 2**20}}
    row = ROW | {"kernels": [kernel | {"upper_bound": True, "regions": REGIONS}]}
    text = printed(Case("attention", "aot d128 causal", "mine", "bfloat16", "forward"), row, row)
    assert text.count("attention compiled for v6e") == text.count("roofline ms") == 1
    lines = [line.split() for line in text.splitlines()]
    (kernel_line, _) = [line for line in lines if line[:1] == ["k.1"]]
    assert kernel_line[1:] == ["300", "4", "25.0%", "2", "7", "5", "<=", "63", "<=", "30", f"{10 * 2**20}", "3"]
    assert ["add_tile", "200", "7", "5", "36", "times"] in lines
    assert not any(line[:1] == ["init"] for line in lines), "it spills nothing"


def test_grouped_matmul_is_shown_per_multiply_add_for_both_skews():
    multiply_adds = 2048 * 512 * 1024
    by_skew = {"uniform": multiply_adds // 2**18, "zipf": multiply_adds // 2**17}
    row = ROW | {
        "kernels": [KERNEL | {"executed": by_skew, "mxu_executed": by_skew, "moved": dict.fromkeys(by_skew, 0)}]
    }
    text = printed(Case("grouped_matmul", "aot E=8 uniform", "mine", "bfloat16", "forward"), row)
    assert words(text, "k.1")[-10:] == ["4.1", "/", "8.19", "4096", "/", "8192", "4096", "/", "8192", "0"]


def test_kernel_that_is_not_counted_says_why():
    row = ROW | {"kernels": [KERNEL | {"uncounted": "loaded data decides how often the loop chunk runs"}]}
    text = printed(Case("attention", "aot d128 causal", "mine", "bfloat16", "forward"), row)
    assert "k.1 is not counted: loaded data decides how often the loop chunk runs" in text


@pytest.fixture
def mine(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    kernels.register("attention", "mine", lambda q, k, v, **options: q)


@pytest.mark.parametrize("target", ["v6e", "h100"])
def test_kernel_of_your_own_is_compiled_at_the_main_workload(mine, target):
    def planned(*arguments: str) -> list[Case]:
        options = program.cli.parse(
            program.Arguments, arguments, default=program.Arguments(), prog="aot", description=""
        )
        (cases,) = program.plan(options).values()
        return cases

    named = ["--target", target, "--implementation", "mine"]
    main = [Case("attention", "aot d128 causal", "mine", "bfloat16", way) for way in aot_cases.DIRECTIONS]
    assert planned(*named) == main
    assert [case for case in planned(*named, "xla") if case.implementation == "mine"] == main
    every = [case for case in aot_cases.cases(hardware.get(target)) if case.implementation == "mine"]
    assert planned(*named, "--all") == planned(*named, "--check") == every
    assert {case.spec for case in planned(*named, "--spec", "aot d64 causal")} == {"aot d64 causal"}
    assert len(planned("--target", target)) == len(aot_cases.cases(hardware.get(target)))
    assert len({case.spec for case in planned("--target", target, "--implementation", "xla")}) > 4


@pytest.mark.parametrize("targets", [["v6e"], ["v6e", "v5e"]])
def test_rows_of_one_target_are_shown_when_they_are_compiled(mine, targets, monkeypatch, tmp_path, capsys):
    shown = []

    class Worker(worker_pool.Worker):
        def ask(self, case):
            self.versions = {"jax": "1"}
            shown.append(capsys.readouterr().out)
            return ROW | {"kernels": [KERNEL | {"name": f"{case.direction}_kernel"}]}

    monkeypatch.setattr(program, "check_compiler_installed", lambda target: None)
    monkeypatch.setattr(worker_pool, "Worker", Worker)
    arguments = ["--target", *targets, "--implementation", "mine", "--jobs", "1", "--out", str(tmp_path)]
    assert program.main(arguments) == 0
    shown.append(capsys.readouterr().out)
    assert "forward_kernel" not in shown[0]
    assert ("forward_kernel" in shown[1]) == (len(targets) == 1)
    assert "".join(shown).count("both_kernel") == len(targets)
