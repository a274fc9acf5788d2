"""Summarize a profiler trace: time by operation, by part of the model and by GPU kernel.

Pure functions of `jax.profiler.ProfileData` (or a structure like it: planes of lines of events). A GPU has a plane of
its own, with one line per stream and one event per kernel. The operations of a CPU are events on the threads of the
host's plane, marked by the statistic `hlo_op`.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean
from typing import Any

from jax.profiler import ProfileData

NO_SCOPE = "(no scope)"
SEVERAL = "(several parts)"
MAX_GAP_NS = 20_000  # longest gap between operations of one part that are drawn as one event

# Operations that contain other operations, which have events of their own.
_CONTAINER = re.compile(r"(while|call|conditional)(\.\d+)?$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = ")
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_CALLED = re.compile(r"\b(?:calls|body|condition|to_apply)=%?([\w.-]+)")
_WRAPPED = re.compile(r"(\w+)\((.*)\)$")
# Names that transformations and loops of JAX insert between the scopes of a program.
_STRUCTURE = set("while body cond scan checkpoint rematted_computation closed_call eval_jaxpr remat remat2".split())


@dataclass(frozen=True)
class Span:
    """One execution of an operation, in nanoseconds since the start of the trace; `track` is its device or host."""

    op: str
    program: str
    track: str
    start: float
    end: float
    op_name: str = ""


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        total_ms: time from start to end, summed over all executions; concurrent operations count twice.
        self_ms: time divided evenly among concurrent operations, so that the rows add up to the busy time.
        share: self_ms over the sum of all rows.
        backward_ms: the part of self_ms in the backward pass.
        part: the part of the model that an operation belongs to.
    """

    name: str
    count: int
    total_ms: float
    self_ms: float
    share: float
    backward_ms: float = 0.0
    part: str = ""


@dataclass(frozen=True)
class Scope:
    """The named scopes of an operation, and whether it belongs to the backward pass."""

    part: str
    backward: bool


def collect_spans(data: Any) -> list[Span]:
    """Return every execution of every XLA operation, on the accelerators if the trace has any, else on the host."""
    spans = [span for plane in _device_planes(data) for span in _device_spans(plane)]
    if not spans:
        spans = [span for plane in data.planes if plane.name == "/host:CPU" for span in _host_spans(plane)]
    return sorted((span for span in spans if not _CONTAINER.match(span.op)), key=lambda span: span.start)


def time_by_operation(spans: Sequence[Span], names: Mapping[str, str]) -> list[Row]:
    """Return the time by operation, largest first; `names` as from `op_names`."""
    scopes = {span.op: scope_of(span, names) for span in spans}
    rows = _time_rows(spans, [span.op for span in spans], [scopes[span.op].backward for span in spans])
    return [replace(row, part=scopes[row.name].part) for row in rows]


def time_by_scope(spans: Sequence[Span], names: Mapping[str, str]) -> list[Row]:
    """Return the time by part of the model, largest first; equal parts of all blocks are added up.

    A fused operation counts for the part of its last instruction.
    """
    scopes = [scope_of(span, names) for span in spans]
    parts = [merge_blocks(scope.part) for scope in scopes]
    return _time_rows(spans, parts, [scope.backward for scope in scopes])


def time_by_kernel(data: Any) -> list[Row]:
    """Return the time by kernel or copy over the streams of all GPUs, largest first; empty without a GPU."""
    planes = [plane for plane in _device_planes(data) if plane.name.startswith("/device:GPU:")]
    spans = [
        Span(event.name, "", plane.name, event.start_ns, event.start_ns + event.duration_ns)
        for plane in planes
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    ]
    return _time_rows(spans, [span.op for span in spans])


def busy_ms(spans: Sequence[Span]) -> float:
    """Return the time in which any operation ran, summed over the devices."""
    return sum(_self_times_ns(spans)) / 1e6


def op_names(hlo: str) -> dict[str, str]:
    """Return the name stack of each instruction in the text of a compiled program (`compiled.as_text()`).

    Instructions that the compiler inserted have none: a fusion has that of its last instruction, a copy in a loop that
    of the loop.
    """
    names: dict[str, str] = {}
    last_name: dict[str, str] = {}  # computation -> name of its last instruction with a name
    caller: dict[str, str] = {}  # computation -> the instruction that calls it
    nameless: list[tuple[str, str, list[str]]] = []
    computation = ""
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            computation = header[1]
        elif instruction := _INSTRUCTION.match(line):
            op, callees = _key(instruction[1]), _CALLED.findall(line)
            caller |= dict.fromkeys(callees, op)
            if name := _OP_NAME.search(line):
                names[op] = last_name[computation] = name[1].split(";")[0]
            else:
                nameless.append((op, computation, callees))
    for op, computation, callees in reversed(nameless):  # a computation comes before its caller
        callee_names = [last_name[callee] for callee in callees if callee in last_name]
        if name := callee_names[0] if callee_names else names.get(caller.get(computation, "")):
            names[op] = name
    return names


def parse_scope(op_name: str) -> Scope:
    """Return the named scopes of a name stack such as jit(step)/transpose(jvp(block0))/attention/qkv/dot_general."""
    if merged := re.fullmatch(r"\w+\(\w+\)/\((.*)\)", op_name):  # jit(step)/(A:B:C): merged collectives
        scopes = [parse_scope(name) for name in merged[1].split(":")]
        part = scopes[0].part if len({scope.part for scope in scopes}) == 1 else SEVERAL
        return Scope(part, all(scope.backward for scope in scopes))
    parts, backward = [], False
    for word in op_name.split("/")[:-1]:
        backward |= word == "rematted_computation"  # recomputed in the backward pass
        while wrapped := _WRAPPED.match(word):
            backward |= wrapped[1] == "transpose"
            word = "" if wrapped[1] in ("jit", "pjit") else wrapped[2]
        if re.fullmatch(r"[A-Za-z_][\w. -]*", word) and word not in _STRUCTURE and not word.startswith("branch_"):
            if word in parts:  # transpose(jvp(block0))/jvp(block0): recomputation repeats the scope
                del parts[parts.index(word) :]
            parts.append(word)
    return Scope("/".join(parts) or NO_SCOPE, backward)


def merge_blocks(part: str) -> str:
    """Return the name that a part has in all blocks together: block/mlp of block3/mlp."""
    return re.sub(r"\bblock\d+", "block", part)


def scope_of(span: Span, names: Mapping[str, str]) -> Scope:
    """Return the scope of one execution."""
    op_name = names.get(_key(span.op)) or span.op_name
    return parse_scope(op_name) if op_name else Scope(NO_SCOPE, False)


def scopes_plane(spans: Sequence[Span], names: Mapping[str, str]) -> bytes:
    """Return a serialized trace with one plane, "named scopes": the parts of the model over time.

    Appended to a trace file it becomes part of that trace, because Protocol Buffers merge concatenated messages. Trace
    viewers name the operations of a CPU after the compiler's fusions; this plane has the names of the model: one lane
    per part, in the order of the forward pass, whose events name the block and the pass. Operations of one part at most
    `MAX_GAP_NS` apart are one event. Where two events of a part overlap, as those of two blocks can, the part has a
    second lane.
    """
    several = len({span.track for span in spans}) > 1
    parts: dict[tuple[str, str], list[list[tuple[str, float, float]]]] = {}  # (track, part) -> lanes of events
    forward: dict[tuple[str, str], list[float]] = {}  # when the operations of the forward pass started
    for span in spans:
        scope = scope_of(span, names)
        key = span.track, merge_blocks(scope.part)
        _draw(parts.setdefault(key, []), scope.part + (" (backward)" if scope.backward else ""), span.start, span.end)
        forward.setdefault(key, []).extend([] if scope.backward else [span.start])
    order = sorted(parts, key=lambda key: (key[0], fmean(forward[key] or [math.inf])))
    lanes = [
        (part + (f" on {track}" if several else "") + (f" ({i})" if i > 1 else ""), lane)
        for track, part in order
        for i, lane in enumerate(parts[track, part], 1)
    ]
    ids = {name: i for i, name in enumerate(sorted({name for _, lane in lanes for name, _, _ in lane}), 1)}
    lines = [
        f'lines {{ id: {i} name: "{title}" {" ".join(_event(ids[name], a, b) for name, a, b in lane)} }}'
        for i, (title, lane) in enumerate(lanes, 1)
    ]
    meta = [f'event_metadata {{ key: {i} value {{ id: {i} name: "{name}" }} }}' for name, i in ids.items()]
    text = f'planes {{ id: 4096 name: "/device:CUSTOM:named scopes" {" ".join(lines + meta)} }}'
    return ProfileData.text_proto_to_serialized_xspace(text)


def _draw(lanes: list[list[tuple[str, float, float]]], name: str, start: float, end: float) -> None:
    """Extend the last event of a lane if it has this name and is close, else append an event to the first free lane."""
    for lane in lanes:
        last, begin, until = lane[-1]
        if last == name and start - until <= MAX_GAP_NS:
            lane[-1] = (name, begin, max(until, end))
            return
    for lane in lanes:
        if lane[-1][2] <= start:
            lane.append((name, start, end))
            return
    lanes.append([(name, start, end)])


def _event(metadata: int, start: float, end: float) -> str:
    offset, duration = round(start * 1e3), round((end - start) * 1e3)
    return f"events {{ metadata_id: {metadata} offset_ps: {offset} duration_ps: {duration} }}"


def _key(op: str) -> str:
    # The kernel of the instruction loop_add_fusion.3 is called loop_add_fusion_3.
    return re.sub(r"[.-]", "_", op)


def _device_planes(data: Any) -> list[Any]:
    return [plane for plane in data.planes if re.match(r"/device:(GPU|TPU):", plane.name)]


def _device_spans(plane: Any) -> Iterator[Span]:
    lines = list(plane.lines)
    op_lines = [line for line in lines if line.name == "XLA Ops"]
    for line in op_lines or [line for line in lines if line.name.startswith("Stream")]:
        for event in line.events:
            stats = dict(event.stats)
            op = str(stats.get("hlo_op") or event.name.split(" = ")[0].lstrip("%"))
            op_name = str(stats.get("tf_op", "")).removesuffix(":")
            program, end = str(stats.get("hlo_module", "")), event.start_ns + event.duration_ns
            yield Span(op, program, plane.name, event.start_ns, end, op_name)


def _host_spans(plane: Any) -> list[Span]:
    """Return the operations on the threads of the host.

    An operation may pass its work to other threads and return at once; then a second event, "end: NAME", marks the end
    of the work. `_p` of the first event is `_c` of the second.
    """
    started: list[tuple[Any, dict[str, Any]]] = []
    ended: dict[Any, float] = {}
    for line in plane.lines:
        for event in line.events:
            if event.name.startswith("end: "):
                ended[dict(event.stats).get("_c")] = event.start_ns
            elif (stats := dict(event.stats)).get("hlo_op"):
                started.append((event, stats))
    spans = []
    for event, stats in started:
        end = max(event.start_ns + event.duration_ns, ended.get(stats.get("_p", object()), 0.0))
        track = f"cpu:{stats.get('device_ordinal', 0)}"  # several if devices are simulated
        spans.append(Span(str(stats["hlo_op"]), str(stats.get("hlo_module", "")), track, event.start_ns, end))
    return spans


def _self_times_ns(spans: Sequence[Span]) -> list[float]:
    """Return the nanoseconds of each span, with time divided evenly among the concurrent spans of a track."""
    shares = [0.0] * len(spans)
    for track in {span.track for span in spans}:
        edges = sorted(
            edge
            for i, span in enumerate(spans)
            if span.track == track
            for edge in ((span.start, 1, i), (span.end, 0, i))
        )
        running: set[int] = set()
        for (start, is_start, i), (end, _, _) in pairwise([*edges, (0.0, 0, -1)]):
            running.add(i) if is_start else running.discard(i)
            for j in running:
                shares[j] += (end - start) / len(running)
    return shares


def _time_rows(spans: Sequence[Span], names: Sequence[str], backward: Sequence[bool] | None = None) -> list[Row]:
    shares = _self_times_ns(spans)
    total_self_ns = sum(shares) or 1.0
    sums: dict[str, list[float]] = {}
    for span, name, self_ns, back in zip(spans, names, shares, backward or [False] * len(spans), strict=True):
        row = sums.setdefault(name, [0, 0.0, 0.0, 0.0])
        for i, value in enumerate((1, span.end - span.start, self_ns, self_ns * back)):
            row[i] += value
    rows = [
        Row(name, int(n), total / 1e6, self_ns / 1e6, self_ns / total_self_ns, back / 1e6)
        for name, (n, total, self_ns, back) in sums.items()
    ]
    return sorted(rows, key=lambda row: (-row.self_ms, row.name))
