"""The profiler: tables, a trace that TensorBoard shows with the scopes of the model, and invalid input."""

import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jax
import jax.numpy as jnp
import pytest

from bench import profile
from dantinox.training import profile_report
from dantinox.training.profile_report import Scope, Span
from tests.helpers.tensorboard_server import tensorboard

TINY = """--n-layers 2 --dim 32 --n-heads 2 --n-kv-heads 1 --window 8 --seq-len 16 --max-context 64 --batch-size 4
--n-experts 4 --tokenizer char""".split()


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """Two training steps of a tiny sparse model, traced: (the folder of the traces, what was printed)."""
    folder = tmp_path_factory.mktemp("profile")
    (folder / "text.txt").write_text("Nel mezzo del cammin di nostra vita mi ritrovai per una selva oscura.\n" * 40)
    words = ["--preset", "nano", "--steps", "2", *TINY, "--data", str(folder / "text.txt")]
    words += ["--out", str(folder / "traces")]
    done = subprocess.run(
        [sys.executable, "-m", "bench.profile", *words],
        cwd=Path(__file__).parents[2],  # bench is not installed
        env=os.environ | {"DANTINOX_CACHE": str(folder / "cache"), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return folder / "traces", done.stdout


PARTS = {"embed", "logits", "loss", "optimizer", "block/moe/router", "block/moe/experts"} | {
    f"block/attention/{part}" for part in ("norm", "qkv", "rope", "attend", "out")
}


@pytest.mark.slow
def test_tables_name_the_parts_of_the_model(traced):
    folder, out = traced
    (path,) = folder.glob("plugins/profile/*/top.json")
    result = json.loads(path.read_text())
    assert result["steps"] == 2 and result["jax"] == jax.__version__ and result["device"]
    parts = {row["name"]: row for row in result["parts"]}
    assert parts.keys() >= PARTS
    assert sum(row["share"] for row in parts.values()) == pytest.approx(1)
    assert parts.get(profile_report.NO_SCOPE, {"share": 0})["share"] < 0.2
    for name in ("block/attention/attend", "block/moe/experts", "logits"):
        assert 0 < parts[name]["backward_ms"] < parts[name]["self_ms"]
    assert parts["optimizer"]["backward_ms"] == 0
    assert sum(row["self_ms"] for row in result["operations"]) <= 1.01 * result["step_ms"] * result["steps"]
    for word in ("training nano", "2 steps", "block/attention/attend", f"make tensorboard LOGDIR={folder}"):
        assert word in out


@pytest.mark.skipif(
    platform.machine() == "aarch64",
    reason="TensorBoard's profile plugin has no build for ARM Linux",
)
@pytest.mark.slow
def test_tensorboard_shows_the_trace_with_model_scopes(traced):
    with tensorboard(traced[0]) as board:
        (run,) = board.profile("runs")
        assert "trace_viewer@" in board.profile(f"run_tools?run={quote(run, safe='')}")
        events = board.trace(run)
    planes = {event["pid"]: event["args"]["name"] for event in events if event.get("name") == "process_name"}
    (ours,) = (pid for pid, name in planes.items() if name.endswith("named scopes"))
    drawn = {event["name"] for event in events if event["pid"] == ours and event["ph"] == "X"}
    assert drawn >= {"block0/attention/attend", "block1/moe/experts (backward)", "logits", "optimizer"}
    steps = {event["name"]: event for event in events if re.fullmatch(r"train \d+", event.get("name", ""))}
    assert set(steps) == {"train 0", "train 1"}
    for name in ("block0/attention/attend", "optimizer"):  # the parts lie inside the steps, on the same clock
        for event in (e for e in events if e["pid"] == ours and e.get("name") == name):
            assert any(s["ts"] <= event["ts"] <= s["ts"] + s["dur"] for s in steps.values())


@pytest.mark.filterwarnings("ignore:builtin type event_stats")  # jaxlib's own
@pytest.mark.parametrize(
    ("op", "name", "backward"),
    [("attention", "7 of 129, window", ["--backward"]), ("moe_mlp", "top 2", []), ("decode_attention", "grouped", [])],
)
def test_profile_of_one_operation(op, name, backward, tmp_path, capsys):
    target = tmp_path / "deep" / "top.json"
    words = ["--op", op, "--spec", name, "--implementation", "xla", "--steps", "2", *backward]
    profile.main([*words, "--out", str(tmp_path), "--json", str(target)])
    result = json.loads(target.read_text())
    (part,) = (row for row in result["parts"] if row["name"] == op)
    assert part["self_ms"] > 0 and (part["backward_ms"] > 0) == bool(backward)
    assert repr(name) in capsys.readouterr().out


WRONG = {
    "--op attentoin --spec nano": r"op is 'attentoin'; allowed: attention, decode_attention, grouped_matmul, linear",
    "--op attention --spec nan": r"attention has no spec 'nan'; allowed: .*nano",
    "--op attention": r"attention has no spec ''; allowed: .*nano",
    "--op attention --spec nano --implementation cuda": r"implementation is 'cuda'; allowed: auto, reference",
    "--op attention --spec nano --preset dante": r"--preset is about training and --op about one operation",
    "--op decode_attention --spec grouped --backward": r"decode_attention has no backward pass",
    "--spec nano": r"--spec is about one operation; add --op",
    "--preset nanno": r"preset is 'nanno'.*nano",
    "--steps 0": r"steps is 0",
    "--top 0": r"top is 0; allowed: 1 or more",
    "--attn cuda": r"attn is 'cuda'; allowed: auto, reference",
}


@pytest.mark.parametrize("words", WRONG)
def test_invalid_input_prints_one_line(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        profile.main(words.split())
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.count("\n") == 1 and re.search(WRONG[words], err), err
    assert os.listdir(tmp_path) == []


# --- reading traces: fabricated ones, in the shape of jax.profiler.ProfileData ---


@dataclass
class Event:
    name: str
    start_ns: float
    duration_ns: float
    stats: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.stats = self.stats.items()


@dataclass
class Line:
    name: str
    events: list[Event]


@dataclass
class Plane:
    name: str
    lines: list[Line]


@dataclass
class Data:
    planes: list[Plane]


def kernel(name, start, duration, op=None):
    return Event(name, start, duration, {"hlo_op": op, "hlo_module": "jit_step"} if op else {})


GPU = Data(
    [
        Plane("/host:CPU", [Line("python", [Event("fusion", 0, 9e6, {"hlo_op": "fusion"})])]),
        Plane(
            "/device:GPU:0",
            [
                Line(
                    "Stream #7(Compute)",
                    [
                        kernel("attention_forward", 0, 6e6, "custom-call.3"),
                        kernel("loop_add_fusion_2", 6e6, 1e6),
                        kernel("attention_forward", 8e6, 6e6, "custom-call.3"),
                    ],
                ),
                Line("Stream #8(MemcpyD2D)", [kernel("MemcpyD2D", 12e6, 2e6, "copy.1")]),
                Line("XLA Modules", [Event("jit_step", 0, 14e6)]),
            ],
        ),
    ]
)
HLO = """\
HloModule jit_step

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8] parameter(0)
  ROOT %add.1 = f32[8] add(%p, %p), metadata={op_name="jit(step)/optimizer/add" stack_frame_id=3}
}

%body (p: f32[8]) -> f32[8] {
  %p.1 = f32[8] parameter(0)
  ROOT %copy.4 = f32[8] copy(%p.1)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8] parameter(0), metadata={op_name="x"}
  %while.9 = f32[8] while(%x), condition=%c, body=%body, metadata={op_name="jit(step)/jvp(embed)/while"}
  %custom-call.3 = f32[8] custom-call(%x), metadata={op_name="jit(step)/jvp(block1)/attention/attend/pallas_call"}
  ROOT %loop_add_fusion.2 = f32[8] fusion(%custom-call.3), kind=kLoop, calls=%fused
}
"""


def test_gpu_kernels_are_grouped_by_name():
    first, copy, add = profile_report.time_by_kernel(GPU)
    assert (first.name, first.count, first.total_ms, first.self_ms) == ("attention_forward", 2, 12.0, 11.0)
    assert (copy.name, copy.count, copy.total_ms, copy.self_ms) == ("MemcpyD2D", 1, 2.0, 1.0)  # beside the kernel
    assert (add.name, add.share) == ("loop_add_fusion_2", pytest.approx(1 / 13))


def test_gpu_operations_are_read_from_the_gpu_plane_with_their_part():
    spans, names = profile_report.collect_spans(GPU), profile_report.op_names(HLO)
    assert [span.op for span in spans] == ["custom-call.3", "loop_add_fusion_2", "custom-call.3", "copy.1"]
    assert profile_report.busy_ms(spans) == 13.0
    assert profile_report.parse_scope(names["copy_4"]) == Scope("embed", False)  # inside a loop that has a name
    parts = {row.name: row.self_ms for row in profile_report.time_by_scope(spans, names)}
    assert parts == {"block/attention/attend": 11.0, "optimizer": 1.0, profile_report.NO_SCOPE: 1.0}
    assert [row.part for row in profile_report.time_by_operation(spans, names)] == [
        "block1/attention/attend",
        profile_report.NO_SCOPE,
        "optimizer",
    ]


def test_tpu_operations_are_read_from_the_xla_line():
    ops = Line("XLA Ops", [Event("%fusion.1 = f32[8] fusion(%x)", 0, 2e6, {"tf_op": "jit(f)/norm/mul:"})])
    data = Data([Plane("/device:TPU:0", [Line("Steps", [Event("0", 0, 9e6)]), ops])])
    (span,) = profile_report.collect_spans(data)
    assert span.op == "fusion.1" and profile_report.scope_of(span, {}) == Scope("norm", False)
    assert profile_report.time_by_kernel(data) == []


def test_cpu_operation_ends_when_all_threads_end():
    threads = [
        Line("a", [Event("dot.1", 0, 1e6, {"hlo_op": "dot.1", "_p": 5}), Event("Execute", 0, 9e6)]),
        Line("b", [Event("end: dot.1", 4e6, 0, {"_c": 5}), Event("add.2", 2e6, 4e6, {"hlo_op": "add.2"})]),
        Line("c", [Event("while.3", 0, 9e6, {"hlo_op": "while.3"})]),
    ]
    rows = {
        row.name: row
        for row in profile_report.time_by_operation(
            profile_report.collect_spans(Data([Plane("/host:CPU", threads)])), {}
        )
    }
    assert rows.keys() == {"dot.1", "add.2"}  # what a loop runs is there already
    assert (rows["dot.1"].total_ms, rows["dot.1"].self_ms) == (4.0, 3.0)
    assert (rows["add.2"].total_ms, rows["add.2"].self_ms) == (4.0, 3.0)


def test_empty_trace_gives_empty_tables():
    assert (
        profile_report.collect_spans(Data([]))
        == profile_report.time_by_kernel(Data([]))
        == profile_report.time_by_operation([], {})
        == []
    )
    assert profile_report.busy_ms([]) == 0


STACKS = {
    "jit(step)/jvp(block0)/attention/qkv/NM,MF->NF/dot_general": Scope("block0/attention/qkv", False),
    "jit(step)/transpose(jvp(block0))/mlp/jit(_where)/select_n": Scope("block0/mlp", True),
    "jit(step)/while/body/closed_call/transpose(jvp(loss))/mul": Scope("loss", True),
    "jit(f)/while/body/eval_jaxpr/transpose(jvp(block1))/jvp(block1)/checkpoint/moe/mul": Scope("block1/moe", True),
    "jit(f)/jvp(block1)/checkpoint/rematted_computation/mlp/mul": Scope("block1/mlp", True),
    "jit(step)/(transpose(jvp(norm))/sum:transpose(jvp(mlp))/dot)": Scope(profile_report.SEVERAL, True),
    "jit(step)/(transpose(jvp(mlp))/mul:jvp(mlp)/dot)": Scope("mlp", False),
    "jit(step)/add": Scope(profile_report.NO_SCOPE, False),
    "state.params['blocks.0.mlp.up']": Scope(profile_report.NO_SCOPE, False),
}


@pytest.mark.parametrize("stack", STACKS)
def test_scope_is_parsed_from_the_name_stack(stack):
    assert profile_report.parse_scope(stack) == STACKS[stack]


def test_scopes_are_found_in_a_compiled_program():
    def f(x):
        with jax.named_scope("square"):
            return jnp.sum(jnp.dot(x, x))

    names = profile_report.op_names(jax.jit(jax.grad(f)).lower(jnp.ones((64, 64))).compile().as_text())
    assert Scope("square", True) in {profile_report.parse_scope(name) for name in names.values()}


def lanes_of(spans, names):
    data = jax.profiler.ProfileData.from_serialized_xspace(profile_report.scopes_plane(spans, names))
    (plane,) = data.planes
    assert plane.name == "/device:CUSTOM:named scopes"
    return {line.name: [(e.name, e.start_ns, e.duration_ns) for e in line.events] for line in plane.lines}


def test_each_part_of_the_model_is_one_lane():
    names = {"a": "jit(f)/block0/norm/mul", "b": "jit(f)/transpose(jvp(block0))/mlp/mul", "c": "jit(f)/block1/norm/mul"}
    spans = [
        Span("a", "", "cpu:0", 0, 10),
        Span("a", "", "cpu:0", 12, 20),  # close: one event
        Span("b", "", "cpu:0", 15, 30),
        Span("c", "", "cpu:0", 40, 50),
        Span("a", "", "cpu:0", 60, 70),  # after another block's: an event of its own
    ]
    assert lanes_of(spans, names) == {
        "block/norm": [("block0/norm", 0, 20), ("block1/norm", 40, 10), ("block0/norm", 60, 10)],
        "block/mlp": [("block0/mlp (backward)", 15, 15)],
    }


def test_lanes_are_in_the_order_of_the_forward_pass():
    names = {name: f"jit(f)/{name}/mul" for name in ("embed", "norm", "optimizer")}
    names |= {"mask": "jit(f)/optimizer/mask", "g": "jit(f)/transpose(jvp(embed))/mul"}
    order = ("mask", "embed", "norm", "g", "optimizer", "optimizer")  # the compiler schedules the mask first
    spans = [Span(op, "", "cpu:0", 10 * i, 10 * i + 5) for i, op in enumerate(order)]
    assert list(lanes_of(spans, names)) == ["embed", "norm", "optimizer"]


def test_overlapping_events_of_a_part_and_several_devices_have_lanes_of_their_own():
    names = {"a": "jit(f)/block0/norm/mul", "c": "jit(f)/block1/norm/mul"}
    overlapping = [Span("a", "", "gpu:0", 0, 10), Span("c", "", "gpu:0", 5, 15), Span("a", "", "gpu:0", 8, 12)]
    assert lanes_of(overlapping, names) == {
        "block/norm": [("block0/norm", 0, 12)],
        "block/norm (2)": [("block1/norm", 5, 10)],
    }
    devices = [Span("a", "", "gpu:0", 0, 10), Span("a", "", "gpu:1", 0, 10)]
    assert lanes_of(devices, names).keys() == {"block/norm on gpu:0", "block/norm on gpu:1"}
