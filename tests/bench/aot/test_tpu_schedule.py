"""TPU schedules: parsers of libtpu's output, the steps of each attention kernel, and the tables made from them."""

from pathlib import Path

import numpy as np
import pytest

from bench.aot import hardware, profile, worker_pool
from bench.aot.cases import Case
from bench.aot.report import readme, sm90_tables, tpu_tables
from bench.aot.tpu import attention_bundles, vliw_schedule, xla_cycles
from dantinox.kernels import workloads
from dantinox.kernels.ops.attention.pallas_tpu import common

ROOT = Path(__file__).parents[3]
PYTHON = ROOT / ".venv-aot/bin/python"
V6E = hardware.get("v6e")

UTILISATION = """\
== CAPACTIY:
MATPUSH, MATMUL, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    2     2     2     4     2     1     3     3     2     2     2
== UTILIZATION:
0 0 0 0 0 0 0 0 0 0 2
1 2 0 3 0 0 1 1 0 0 1
2 1 0 0 0 0 2 2 1 1 0
0 0 0 0 0 0 0 0 0 0 0
"""

VMEM = """<html><script>
        // --- 1. THE DATA SOURCE ---
        const DATA ={"global_info": {"module_name": "jit_f", "vmem_capacity": 134217728},
  "instructions": {"splash.1": {"blocks": [{"allocations": [{"size": 4, "tag": "a {b}"}], "block_size": 7}],
     "total_size": 983040}, "copy": {"blocks": [], "total_size": 4096}}};
        const other = {};
</script></html>"""

FINAL = """\
= control target key end
     0   :  { %s0 = inlined_call_operand.vmem [shape: s32[36], index: 0, kind: input] ;; [shape: s32[7], index: 1] }
   0x1 LB: > { %s1 = sadd.s32 1, %s0 } /* Start region 9 */
   0x2   : > { %5 = sbr.rel (%p1) target = $region8 }
   0x3   : > { %6 = sbr.rel (%p2) target = $region1 }
   0x6 PF: > { %s2 = sadd.s32 1, %s1 } /* Start/End empty region 1 :: Start region 12 */
   0x7   : > { %7 = sbr.rel (%p3) target = $region2 }
   0x9 LB: >> { %s3 = sadd.s32 1, %s2 } /* Start region 3 :: Start region 4 */
   0xb   : >> { %8 = sbr.rel (!%p4) target = $region3 }
   0xd PF: > { %s4 = sadd.s32 1, %s1 } /* Start/End empty region 2 */
  0x10 PF: > { %s5 = sadd.s32 1, %s1 } /* Start/End empty region 8 */
  0x12   :  { %9 = sbr.rel (!%p5) target = $region9 }
  0x14   :  { %s6 = smov 0 }
"""


def test_utilization_table_is_parsed():
    schedule = vliw_schedule.utilisation(UTILISATION)
    assert schedule == vliw_schedule.Schedule(bundles=4, mxu=3, mxu_slots=8, spills=1, fills=3)
    assert schedule.mxu_share == 3 / 8
    older = UTILISATION.replace("MATPUSH, MATMUL", "MXU, OTHER")
    assert vliw_schedule.utilisation(older).mxu == 3  # the first column now
    with pytest.raises(ValueError, match="unknown format"):
        vliw_schedule.utilisation("nothing of the kind")
    with pytest.raises(ValueError, match="more or fewer"):
        vliw_schedule.utilisation(UTILISATION + "0 0\n")


def test_schedule_header_and_file_names_are_parsed():
    head = "Schedule analysis:\n\ttotal scheduled bundles:    615\n\tempty scheduled bundles:    13\n"
    assert vliw_schedule.empty_bundles(head) == 13
    assert vliw_schedule.empty_bundles("") is None
    name = "1795354836-splash_mha_fwd.1-70-final_hlo-static-per-bundle-utilization.txt"
    assert vliw_schedule.kernel_of(name) == ("utilisation", "splash_mha_fwd.1")
    assert vliw_schedule.kernel_of("17-a-b-71-schedule-analysis_final_bundles.txt") == ("schedule", "a-b")
    assert vliw_schedule.kernel_of("17-TLP-70-final_hlo-static-per-bundle-utilization.txt") is None
    assert vliw_schedule.kernel_of("17-<late-x>-70-final_hlo-static-per-bundle-utilization.txt") is None
    assert vliw_schedule.kernel_of("17-a-72-final_bundles.txt") is None


def test_vmem_report_and_custom_calls_are_parsed():
    assert vliw_schedule.vmem_bytes(VMEM) == {"splash.1": 983040, "copy": 4096}
    assert vliw_schedule.vmem_bytes("<html></html>") == {}
    hlo = (
        '  %splash.1 = (f32[8]) custom-call(%q), custom_call_target="tpu_custom_call"\n'
        '  ROOT %other = f32[8] custom-call(%q), custom_call_target="Sharding"\n'
    )
    assert vliw_schedule.custom_calls(hlo) == {"splash.1"}


HLO = """\
HloModule jit_f
%fused_computation (param_0: f32[8,128]) -> f32[8,128] {
  ROOT %multiply.1 = f32[8,128]{1,0} multiply(%param_0, %param_0)
}
ENTRY %main (x: f32[8,128]) -> f32[8,128] {
  %copy.1 = f32[8,128]{0,1} copy(%x), backend_config={"window_config":{},"estimated_cycles":"1200","iteration":1}
  %k.1 = f32[8,128] custom-call(%copy.1), custom_call_target="tpu_custom_call", backend_config={"estimated_cycles":"9"}
  %bitcast.1 = f32[8,128]{1,0} bitcast(%k.1)
  %copy.2 = f32[8,128]{0,1} copy(%x), backend_config={"estimated_cycles":"18446744073709551615"}
  %copy.3 = f32[8,128]{0,1} copy(%x), backend_config={"estimated_cycles":"9223372036854775807"}
  ROOT %fusion = f32[8,128]{1,0} fusion(%bitcast.1), calls=%fused_computation, backend_config={"estimated_cycles":"34"}
}
"""


def test_cycles_of_xla_are_those_outside_of_kernels():
    assert xla_cycles.count(HLO) == 1200 + 34
    assert xla_cycles.count("") == 0


def test_cycles_cell_has_the_smallest_sum():
    def row(xla, *executed):
        return {"kernels": [{"executed": n} for n in executed], "xla_cycles": xla}

    rows = {
        "attention / x / splash / bfloat16 / both": row(300_000, 1_000_000, 500_000),
        "attention / x / splash_512 / bfloat16 / both": row(400_000, 1_200_000, 100_000),
        "attention / x / pallas / bfloat16 / both": {
            "kernels": [{"executed": 1}]
        },  # compiled before these were counted
    }
    assert tpu_tables.cycles_cell(rows, "x", ("splash", "splash_512"), "both") == "1300 + 400 = 1700"
    assert tpu_tables.cycles_cell(rows, "x", ("pallas",), "both") == ""
    workload = workloads.get("attention", "aot tpu d128 4k causal")
    ours = {f"attention / {workload.name} / pallas / bfloat16 / forward": row(200_000, 100_400)}
    (*_, line) = tpu_tables.cycles_table({"v6e": ours, "v5e": {}}).splitlines()
    assert line == "| v6e | 128 |  | 4096 | 100 + 200 = 300 |  |  |  |"
    assert tpu_tables.cycles_table({"v6e": rows}) == ""


def test_transfers_in_pieces_count_when_their_block_changes():
    # In front of the body, a region of one bundle starts a load in pieces.
    region = (
        "   0x2   : > { %5 = sbr.rel (%p1) target = $region7 }\n   0x3   : > { %6 = dma.general (%p2), %s1 }\n"
        "   0x4 PF: > { %7 = sadd.s32 1, %s1 } /* Start/End empty region 7 */\n   0x4   : >"
    )
    text = FINAL.replace("   0x2   : >", region).replace("   0x3   : > { %6 = sbr", "   0x5   : > { %6 = sbr")
    text = text.replace("0x6 PF", "0x8 PF").replace("0x7   : >", "0x9   : >").replace("0x9 LB", "0xa LB")
    assert vliw_schedule.strided_transfers(text) == [3]
    steps = attention_bundles.KernelSteps(
        steps=10, taken=(2, 4), interior=(), masked=(1,), tile=(8, 8), trips=3, block_changes=5
    )
    with_transfer = attention_bundles.count_bundles(text, steps)
    without = attention_bundles.count_bundles(text.replace("dma.general", "dma.simple"), steps)
    assert without["executed"] - with_transfer["executed"] == (10 - 5) * 1


def test_kernel_parts_and_executed_bundles_are_counted():
    assert vliw_schedule.regions(FINAL) == (
        0x15,
        [
            vliw_schedule.Region(0x1, 0x13, True),
            vliw_schedule.Region(0x3, 0x10, False),
            vliw_schedule.Region(0x4, 0x6, False),
            vliw_schedule.Region(0x8, 0xD, False),
            vliw_schedule.Region(0x9, 0xC, True),
        ],
    )
    assert vliw_schedule.branch_sizes(FINAL) == [2, 5]
    assert (vliw_schedule.first_table_length(FINAL), vliw_schedule.first_table_length("")) == (36, None)
    steps = attention_bundles.KernelSteps(steps=10, taken=(2, 4), interior=(), masked=(1,), tile=(8, 8), trips=3)
    # 3 outside of the grid's loop; 18 in it, 7 of them in the two parts, 3 of these in a loop that runs three times.
    always, second = 18 - 7, 5 + 2 * 3
    assert attention_bundles.count_bundles(FINAL, steps) == {
        "executed": 3 + 10 * always + 2 * 2 + 4 * second,
        "tile_bundles": [always, always + second],
    }
    other_form = attention_bundles.KernelSteps(
        steps=10, taken=(2, 4, 1), interior=(), masked=(1,), tile=(8, 8), trips=3
    )
    bound = attention_bundles.count_bundles(FINAL, other_form)
    assert bound == {"executed": 3 + 10 * (18 + 6), "tile_bundles": [24, 24], "upper_bound": True}


@pytest.mark.parametrize(("name", "block"), [("causal", 1024), ("window 1024", 1024), ("window 1024", 512)])
def test_splash_steps_match_its_mask(name, block):
    info = pytest.importorskip("jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info")
    masks = pytest.importorskip("jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask")
    workload = workloads.get("attention", f"aot tpu d128 4k {name}")
    shape = (workload.T, workload.S)
    head_mask = masks.LocalMask(shape, (workload.window - 1, 0), 0) if workload.window else masks.CausalMask(shape, 0)
    mask, shards = masks.MultiHeadMask([head_mask] * 4), {"head_shards": 1, "q_seq_shards": 1}
    for kernel, process in (("splash_mqa_dq", info.process_mask), ("splash_mqa_dkv", info.process_mask_dkv)):
        mask_info, _ = process(mask, (block, block), **shards)
        steps = attention_bundles.splash(workload, kernel, "splash" if block == 1024 else "splash_512")
        assert steps.steps == 8 * mask_info.data_next.size
        assert steps.taken[1] == 8 * np.count_nonzero(mask_info.block_mask)
        assert steps.taken[0] == steps.taken[2] == (2 if "dkv" in kernel else 8) * (workload.S // block)


def test_fused_backward_grid_has_every_block():
    workload = workloads.get("attention", "aot tpu d128 4k window 1024")
    steps = attention_bundles.splash(workload, "splash_mqa_dkv", "splash_fused")
    assert (steps.steps, steps.taken, steps.tile) == (8 * 8 * 8, (2 * 8, 8 * (8 + 7 + 6), 2 * 8), (512, 512))
    causal = workloads.get("attention", "aot tpu d128 4k causal")
    assert attention_bundles.splash(causal, "splash_mqa_dkv", "splash_fused").tile == (1024, 1024)


def test_tokamax_and_dantinox_steps_match_the_visible_blocks():
    workload = workloads.get("attention", "aot tpu d128 4k causal")
    visible, all_blocks = 8 * 32 * 33 // 2, 8 * 32 * 32
    assert attention_bundles.tokamax(workload, "splash_mha_fwd").taken == (8 * 32, visible - 8 * 32, 8 * 32, 8 * 32)
    assert attention_bundles.tokamax(workload, "splash_mha_fwd").steps == visible
    dkv = attention_bundles.tokamax(workload, "splash_mha_dkv")
    assert (dkv.steps, dkv.taken) == (all_blocks, (2 * 32, visible - 8 * 32, 8 * 32, 2 * 32))

    config, heads = attention_bundles.pallas_config(workload, V6E)
    n = workload.T // config.block_sizes.block_q
    assert heads == 2 and config.block_sizes.block_q == config.block_sizes.block_kv
    kernel = attention_bundles.pallas_forward(config.block_schedule(), config, heads)
    steps = 2 * n * (n + 1) // 2
    assert (kernel.steps, kernel.taken) == (steps, (2 * n, steps, 2 * n, steps, steps, 2 * n))
    assert (
        kernel.trips * config.block_sizes.block_q_compute * config.block_sizes.block_kv_compute
        == kernel.tile[0] * kernel.tile[1]
    )
    kernel = attention_bundles.pallas_backward(config.block_schedule(), config, heads)
    assert kernel.taken == (2, 2 * n, steps, 2 * n, steps, steps, steps, steps, 2 * n, 2)


def test_kernel_of_a_span_is_identified_by_its_steps():
    workload = workloads.get("attention", "aot tpu d256 32k causal")
    case = Case("attention", workload.name, "pallas", "bfloat16", "both")
    config, heads = attention_bundles.pallas_config(workload, V6E)
    lengths = [len(span.schedule) for span in common.kv_spans(config)]
    assert len(lengths) == len(set(lengths)) > 1
    kernels = [
        attention_bundles.kernel_steps(workload, case, V6E, "t_backward.1", f"[shape: s32[{n}], index: 0]")
        for n in lengths
    ]
    assert [kernel.steps for kernel in kernels] == [heads * n for n in lengths]
    assert attention_bundles.kernel_steps(workload, case, V6E, "t_backward.1", "[shape: s32[1], index: 0]") is None
    assert (
        attention_bundles.kernel_steps(
            workload, Case("attention", workload.name, "mine", "bfloat16", "both"), V6E, "k", ""
        )
        is None
    )


def test_compiled_row_gets_its_bundles(tmp_path):
    (tmp_path / "17-attention_forward.1-02-final_bundles.txt").write_text(FINAL)
    workload = workloads.get("attention", "aot tpu d128 4k causal")
    case = Case("attention", workload.name, "pallas", "bfloat16", "forward")
    kernel = {"name": "attention_forward.1", "mxu": 100}
    row = {"kernels": [dict(kernel)]}
    attention_bundles.add(row, case, V6E, tmp_path)
    config, _ = attention_bundles.pallas_config(workload, V6E)
    (counted,) = row["kernels"]
    pairs = 8 * 4096 * 4097 // 2
    assert counted["upper_bound"] and counted["steps"] == 2 * len(config.block_schedule())
    assert row["bundles_per_pair"] == {"forward": round(counted["executed"] / pairs, 6)}
    assert counted["mxu_per_1024x1024"] == round(
        100 * 2**20 / (4 * config.block_sizes.block_q * config.block_sizes.block_kv)
    )
    for target in (hardware.get("h100"), None):  # a GPU, and a row with segments
        row = {"kernels": [dict(kernel)]}
        with_segments = Case("attention", "aot odd lengths", "pallas", "bfloat16", "forward")
        attention_bundles.add(row, case if target else with_segments, target or V6E, tmp_path)
        assert row == {"kernels": [kernel]}


def test_tables_match_the_committed_profiles():
    folder = ROOT / "profiles/aot"
    text = (folder / readme.FILE).read_text()
    assert tpu_tables.update(text, tpu_tables.load(folder)) == text, "`make aot` updates it"
    assert sm90_tables.update(text, sm90_tables.load(folder)) == text, "`make aot` updates it"
    with pytest.raises(ValueError, match="has not one"):
        tpu_tables.update("nothing", {})


def test_table_cell_shows_best_block_spills_or_reason():
    def row(value, spills, **kernel):
        kernels = [{"name": "fwd", "spills": spills, "tile": [512, 512]} | kernel]
        return {"status": "compiled", "kernels": kernels, "bundles_per_pair": {"forward": value}}

    rows = {
        "attention / x / splash / bfloat16 / forward": row(0.004, 7, tile=[1024, 1024]),
        "attention / x / splash_512 / bfloat16 / forward": row(0.003, 5),
        "attention / x / pallas / bfloat16 / forward": row(0.002, 0, upper_bound=True),
        "attention / x / tokamax / bfloat16 / forward": {"status": "refused", "reason": "no window"},
    }
    cells = [tpu_tables.bundles_cell(rows, "x", names, "forward") for names in tpu_tables.COLUMNS.values()]
    assert cells == ["≤ 2.00 (0)", "3.00 (5, 512)", "refused"]
    assert tpu_tables.bundles_cell(rows, "x", ("pallas",), "backward") == ""


@pytest.mark.skipif(not PYTHON.exists(), reason="needs the aot extra: make aot")
@pytest.mark.slow
def test_tpu_attention_compiles_without_spills():
    case = Case("attention", "aot d128 causal", "pallas", "bfloat16", "both")
    with worker_pool.Worker(V6E, 240, python=str(PYTHON)) as worker:
        row = worker.ask(case)
    assert row["status"] == "compiled", row["reason"]
    assert sorted(attention_bundles.direction_of(kernel["name"]) for kernel in row["kernels"]) == [
        "backward",
        "forward",
    ]
    assert not any(kernel["spills"] or kernel["fills"] or "upper_bound" in kernel for kernel in row["kernels"])
    committed = profile.load(profile.path(ROOT / "profiles/aot", "v6e"))
    if committed["versions"] == worker.versions:
        before = committed["rows"][case.key]
        assert all(
            row["bundles_per_pair"][way] <= before["bundles_per_pair"][way] * profile.BUNDLE_GROWTH
            for way in before["bundles_per_pair"]
        )
        assert profile.regressions({case.key: before}, {case.key: row}) == []


def test_each_moe_kernel_has_a_line():
    kernel = {"mxu_share": 0.5, "bundles": 700, "spills": 3}
    kernels = [
        kernel | {"name": "experts_dw_up.1"},
        kernel | {"name": "experts_up.1", "executed": {"uniform": 1 << 30}},
    ]
    profiles = {"v6e": {"moe_mlp / aot top 2 of 8 / pallas / bfloat16 / both": {"kernels": kernels}}}
    lines = tpu_tables.experts_table(profiles).splitlines()[2:]
    # 2048 rows, 512 x 1024, two matrices: 2^31 multiply-adds.
    assert lines == [
        "| v6e | aot top 2 of 8 | up | 50% | 700 | 536870912 | 3 |",
        "| v6e | aot top 2 of 8 | dw_up | 50% | 700 | ? | 3 |",
    ]
