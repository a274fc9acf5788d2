"""Executed bundles: schedules written by hand, mapped onto the parts of a traced kernel."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from bench.aot import hardware, worker_pool
from bench.aot.cases import Case
from bench.aot.tpu import attention_bundles, block_transfers, bundle_counts, executed_bundles, traced_kernels
from bench.aot.tpu.grid_steps import Part
from dantinox.kernels import workloads
from tests.bench.aot.test_tpu_schedule import PYTHON

V6E = hardware.get("v6e")
COLUMNS = ("MXU", "EUP", "VALU", "VLOAD", "VSTORE", "VLOAD:FILL", "VSTORE:SPILL")


def schedule(total: int, *regions: tuple[int, int] | tuple[int, int, str], dma: tuple[int, ...] = ()) -> str:
    """The final bundles of a kernel with regions of bundles [start, stop) that jumps skip or, with "loop", repeat."""
    lines = {at: f"{at:#5x}   : > {{" for at in range(total + 1)}
    for number, (start, stop, *loop) in enumerate(regions):
        target, source = (start, stop - 1) if loop else (stop, start - 1)
        lines[source] += f" %{number} = sbr.rel (%p{number}) target = $region{number} "
        lines[target] += f" /* Start{'' if loop else '/End empty'} region {number} */"
    for at in dma:
        lines[at] += " %9 = dma.hbm_to_vmem [thread:$0] "
    return "\n".join(lines[at] for at in range(total))


def usage(total: int, **used: range) -> dict[str, list[int]]:
    """The slots that each bundle uses: one of a unit in the bundles that are given."""
    names = {"spills": "VSTORE:SPILL", "fills": "VLOAD:FILL"}
    columns = {unit: [0] * total for unit in COLUMNS}
    for unit, bundles in used.items():
        for at in bundles:
            columns[names.get(unit, unit)][at] = 1
    return columns


def branch(name: str, count: int, *, matmul: bool = False, exp: bool = False) -> Part:
    return Part(name, count=count, has_matmul=matmul, has_transcendental=exp)


def program(*parts: Part, steps: int = 10, pipelined: bool = False) -> Part:
    inner = [Part("body", count=steps, parts=list(parts))] if pipelined else list(parts)
    return Part("program", count=1, parts=[Part("grid", True, steps, has_region=True, parts=inner)])


def executed(counts: bundle_counts.Counts) -> tuple[int, bool]:
    return int(counts.times.sum()), counts.exact


def test_each_region_is_executed_as_often_as_its_part():
    # 100 bundles; the grid's loop has 90, its body 80, and in it 10 and 50 bundles; the latter has a loop of 40.
    text = schedule(100, (5, 95, "loop"), (8, 88), (10, 20), (25, 75), (30, 70, "loop"))
    units = usage(100, MXU=range(35, 40), spills=range(12, 14), fills=range(60, 65))
    loop = Part("tile", True, 24)
    parts = branch("init", 3), branch("add", 8, matmul=True)
    parts[1].parts = [loop]
    counts = bundle_counts.count(text, units, program(*parts, pipelined=True))
    assert executed(counts) == (10 + 10 * (90 - 60) + 3 * 10 + 8 * 10 + 24 * 40, True)
    assert counts.regions == [
        {"name": "grid (loop)", "bundles": 10, "times": 10, "spills": 0, "fills": 0},
        {"name": "body", "bundles": 20, "times": 10, "spills": 0, "fills": 0},
        {"name": "init", "bundles": 10, "times": 3, "spills": 2, "fills": 0},
        {"name": "add", "bundles": 10, "times": 8, "spills": 0, "fills": 0},
        {"name": "tile (loop)", "bundles": 40, "times": 24, "spills": 0, "fills": 5},
    ]


def test_units_tell_which_short_branches_libtpu_computes_in_every_step():
    parts = branch("init", 1), branch("add", 7, matmul=True), branch("write", 2)
    text, multiplies = schedule(60, (0, 60, "loop"), (10, 40)), usage(60, MXU=range(20, 22))
    assert executed(bundle_counts.count(text, multiplies, program(*parts))) == (10 * 30 + 7 * 30, True)
    counts = bundle_counts.count(text, usage(60), program(*parts))
    assert executed(counts) == (10 * 30 + 2 * 30, False), "init or write: the one that is taken more often counts"
    equal = branch("init", 2), *parts[1:]
    assert executed(bundle_counts.count(text, usage(60), program(*equal))) == (10 * 30 + 2 * 30, True)


def test_neighbors_with_one_condition_may_share_a_region():
    parts = branch("scores", 6, matmul=True), branch("exp", 6, exp=True)
    text = schedule(60, (0, 60, "loop"), (10, 40))
    units = usage(60, MXU=range(20, 22), EUP=range(30, 31))
    counts = bundle_counts.count(text, units, program(*parts))
    assert executed(counts) == (10 * 30 + 6 * 30, True)
    assert counts.regions[-1]["name"] == "scores + exp"


def test_region_that_no_part_explains_counts_in_every_step():
    text = schedule(60, (0, 60, "loop"), (10, 40))
    counts = bundle_counts.count(text, usage(60, MXU=range(20, 22)), program(branch("write", 2)))
    assert executed(counts) == (10 * 60, False)
    assert counts.regions[-1]["name"] == "?"
    unknown = Part("positive", count=10, known=False)
    assert executed(bundle_counts.count(text, usage(60), program(unknown))) == (10 * 60, False)


def test_unknown_loop_is_an_error_and_unrolled_loop_is_not():
    loop = Part("tile", True, 40)
    text = schedule(60, (0, 60, "loop"), (10, 40, "loop"))
    with pytest.raises(NotImplementedError, match="loops that the traced program does not have"):
        bundle_counts.count(text, usage(60), program(branch("write", 2)))
    assert executed(bundle_counts.count(text, usage(60), program(loop))) == (10 * 30 + 40 * 30, True)
    assert executed(bundle_counts.count(schedule(60, (0, 60, "loop")), usage(60), program(loop))) == (600, True)


def copy_rows(x, columns: int = 128):
    """Copy x [64, 256] in blocks of 8 rows, each of which stays for two steps of the grid."""

    def kernel(x_ref, o_ref):
        @pl.when(pl.program_id(0) % 2 == 0)
        def even():
            o_ref[...] = x_ref[...] + 1

    block = pl.BlockSpec((8, columns), lambda step: (step // 2, 0))
    shape = jax.ShapeDtypeStruct((64, columns), x.dtype)
    return pl.pallas_call(kernel, out_shape=shape, grid=(16,), in_specs=[block], out_specs=block, name="rows")(x)


def call_of(function, *shapes: tuple[int, ...]) -> block_transfers.KernelCall:
    traced = jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    (call,) = block_transfers.kernel_calls(traced, {})
    return call


def test_blocks_of_several_pieces_are_copied_when_they_change():
    # Bundles: a grid's loop of 100; the load of a block in a guard; the body with a branch, and the store of a block.
    text = schedule(120, (10, 110, "loop"), (15, 35), (20, 35), (40, 100), (50, 80), (85, 95), dma=(90,))
    text += "/* iteration index, stage = 1 */"
    units = usage(120, VLOAD=range(22, 30), VSTORE=range(22, 30), VALU=range(50, 60))
    counted = executed_bundles.count(text, units, call_of(copy_rows, (64, 256)))
    load, even, store = 15, 30, 10
    assert counted.bundles == 20 + 16 * (100 - load - even - store) + 8 * load + 8 * even + 16 * store
    assert not counted.exact, "the store's block is one piece, and has no part"
    assert counted.bytes_moved == 8 * (8 * 128 + 8 * 128) * 4


def test_calls_are_found_by_name_and_shapes():
    calls = [call_of(copy_rows, (64, 256)), call_of(lambda x: copy_rows(x, 256), (64, 256))]
    shapes = {
        "rows.3": (["f32[64,256]"], ["f32[64,256]"]),
        "rows.1": (["f32[64,256]"], ["f32[64,128]"]),
        "rows.2.x_ref": (["s32[7]", "f32[9,9]"], ["f32[64,128]"]),
        "other.1": (["f32[64,256]"], ["f32[64,128]"]),
    }
    match = lambda *names: executed_bundles.match_calls([{"name": name} for name in names], calls, shapes)
    assert match("rows.3", "rows.1", "other.1") == {"rows.1": 0, "rows.3": 1}
    assert match("rows.2.x_ref", "rows.3") == {"rows.2.x_ref": 0, "rows.3": 1}, "XLA fused its operand"


def test_compiled_row_of_any_implementation_gets_its_bundles(monkeypatch, tmp_path):
    spec = "aot d128 causal"
    table = "0 1 0 0 1 1 0 0\n" * 3
    head = f"== CAPACITY:\n{', '.join((*COLUMNS, 'SALU'))}\n1 1 1 1 1 1 1 1\n== UTILIZATION:\n"
    (tmp_path / "17-rows.1-01-final_hlo-static-per-bundle-utilization.txt").write_text(head + table)
    operands = "0 : { %s0 = inlined_call_operand.hbm [shape: f32[64,256], index: 0, kind: input] ;;"
    operands += " %s1 = inlined_call_operand.hbm [shape: f32[64,128], index: 1, kind: output] }\n"
    (tmp_path / "17-rows.1-02-final_bundles.txt").write_text(operands + schedule(3, (0, 3, "loop")))
    call = call_of(copy_rows, (64, 256))
    monkeypatch.setattr(traced_kernels, "calls_by_skew", lambda case, target: {"all": [call]})
    row = {"kernels": [{"name": "rows.1"}]}
    executed_bundles.add(row, Case("attention", spec, "mine", "bfloat16", "forward"), V6E, tmp_path)
    (kernel,) = row["kernels"]
    pairs = 4 * 1024 * 1025 // 2
    assert (kernel["executed"], kernel["steps"], kernel["moved"]) == (48, 16, {"all": 8 * 2 * 8 * 128 * 4})
    assert row["bundles_per_pair"] == {"forward": round(48 / pairs, 6)}

    def fail(case, target):
        raise NotImplementedError("data decide which kernels run")

    monkeypatch.setattr(traced_kernels, "calls_by_skew", fail)
    row = {"kernels": [{"name": "rows.1"}, {"name": "rows.1", "executed": 7}]}
    executed_bundles.add(row, Case("attention", spec, "mine", "bfloat16", "forward"), V6E, tmp_path)
    assert row == {
        "kernels": [
            {"name": "rows.1", "uncounted": "not traced: data decide which kernels run"},
            {"name": "rows.1", "executed": 7},  # counted by name
        ]
    }


@pytest.mark.skipif(not PYTHON.exists(), reason="needs the aot extra: make aot")
@pytest.mark.slow
def test_compiled_attention_is_counted_by_its_own_regions():
    case = Case("attention", "aot d128 causal", "pallas", "bfloat16", "forward")
    with worker_pool.Worker(V6E, 240, python=str(PYTHON)) as worker:
        (kernel,) = worker.ask(case)["kernels"]
    config, heads = attention_bundles.pallas_config(workloads.get(case.op, case.spec), V6E)
    by_name = attention_bundles.pallas_forward(config.block_schedule(), config, heads)
    assert "upper_bound" not in kernel
    times = {region["name"]: region["times"] for region in kernel["regions"]}
    names = "init_state", "compute_scores", "mask_all_subtiles", "compute_softmax", "accumulate_output", "epilogue"
    assert tuple(times[name] for name in names) == by_name.taken
    assert times["body"] == kernel["steps"] == by_name.steps
