"""What a profiler's trace says: time by operation, by part of the model and by GPU kernel.

Pure functions of `jax.profiler.ProfileData` (or anything of its shape: planes of lines of events). A GPU has a plane
of its own, with a line for each stream and an event for each kernel. A CPU has none: its operations are events on the
threads of the host's plane, marked by the statistic `hlo_op`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from jax.profiler import ProfileData

NO_SCOPE = "(no scope)"
SEVERAL = "(several parts)"
GAP = 20_000  # ns between two operations of one part that are still drawn as one stretch

# These run other operations, which are events of their own.
_CONTAINER = re.compile(r"(while|call|conditional)(\.\d+)?$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = ")
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_RUNS = re.compile(r"\b(?:calls|body|condition|to_apply)=%?([\w.-]+)")
_WRAPPED = re.compile(r"(\w+)\((.*)\)$")
# What JAX's own transformations and loops write between the names that a program gives.
_STRUCTURE = set("while body cond scan checkpoint rematted_computation closed_call eval_jaxpr remat remat2".split())


@dataclass(frozen=True)
class Span:
    """One run of one operation, in nanoseconds since the trace began; `track` is the device (or host) it ran on."""

    op: str
    program: str
    track: str
    start: float
    end: float
    op_name: str = ""


@dataclass(frozen=True)
class Row:
    """A line of a table.

    Attributes:
        total_ms: from start to end, summed over all runs; operations that run at once count twice.
        self_ms: every instant shared evenly among the operations that run in it: the rows add up to the busy time.
        share: of self_ms in that sum.
        backward_ms: what of self_ms belongs to the backward pass.
        part: the part of the model that an operation comes from.
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
    """Where an operation comes from: the named scopes around it, and the pass it belongs to."""

    part: str
    backward: bool


def spans(data: Any) -> list[Span]:
    """Every run of every XLA operation: on the accelerators where the trace has any, else on the host."""
    found = [span for plane in _device_planes(data) for span in _device_spans(plane)]
    if not found:
        found = [span for plane in data.planes if plane.name == "/host:CPU" for span in _host_spans(plane)]
    return sorted((span for span in found if not _CONTAINER.match(span.op)), key=lambda span: span.start)


def operations(found: Sequence[Span], names: Mapping[str, str]) -> list[Row]:
    """Time by operation, the largest first; `names` are those of `op_names`."""
    places = {span.op: scope_of(span, names) for span in found}
    rows = _rows(found, [span.op for span in found], [places[span.op].backward for span in found])
    return [replace(row, part=places[row.name].part) for row in rows]


def by_scope(found: Sequence[Span], names: Mapping[str, str]) -> list[Row]:
    """Time by part of the model, the same part of all blocks taken together, the largest first.

    A fused operation counts for the part that its last instruction comes from.
    """
    places = [scope_of(span, names) for span in found]
    parts = [re.sub(r"\bblock\d+", "block", place.part) for place in places]
    return _rows(found, parts, [place.backward for place in places])


def device_kernels(data: Any) -> list[Row]:
    """Time by kernel (copies too) over the streams of all GPUs, the largest first; empty for a trace without a GPU."""
    planes = [plane for plane in _device_planes(data) if plane.name.startswith("/device:GPU:")]
    found = [
        Span(event.name, "", plane.name, event.start_ns, event.start_ns + event.duration_ns)
        for plane in planes
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    ]
    return _rows(found, [span.op for span in found])


def busy_ms(found: Sequence[Span]) -> float:
    """Time in which some operation ran, summed over the devices."""
    return sum(_shared(found)) / 1e6


def op_names(hlo: str) -> dict[str, str]:
    """Instruction -> the name stack it was traced under, from a compiled program's text (`compiled.as_text()`).

    What the compiler put in by itself has none: a fusion takes the last one in it, a copy in a loop that of the loop.
    """
    names: dict[str, str] = {}
    last_in: dict[str, str] = {}  # the name of a computation's last instruction that has one
    owner: dict[str, str] = {}  # the instruction that runs a computation
    nameless: list[tuple[str, str, list[str]]] = []
    computation = ""
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            computation = header[1]
        elif instruction := _INSTRUCTION.match(line):
            op, runs = _key(instruction[1]), _RUNS.findall(line)
            owner |= dict.fromkeys(runs, op)
            if name := _OP_NAME.search(line):
                names[op] = last_in[computation] = name[1].split(";")[0]
            else:
                nameless.append((op, computation, runs))
    for op, around, runs in reversed(nameless):  # a computation stands before the one that runs it
        inside = [last_in[run] for run in runs if run in last_in]
        if name := inside[0] if inside else names.get(owner.get(around, "")):
            names[op] = name
    return names


def scope(op_name: str) -> Scope:
    """The named scopes in a name stack such as jit(step)/transpose(jvp(block0))/attention/qkv/dot_general."""
    if merged := re.fullmatch(r"\w+\(\w+\)/\((.*)\)", op_name):  # jit(step)/(A:B:C): collectives made one
        places = [scope(name) for name in merged[1].split(":")]
        part = places[0].part if len({place.part for place in places}) == 1 else SEVERAL
        return Scope(part, all(place.backward for place in places))
    kept, backward = [], False
    for word in op_name.split("/")[:-1]:
        backward |= word == "rematted_computation"  # what the backward pass computes again
        while wrapped := _WRAPPED.match(word):
            backward |= wrapped[1] == "transpose"
            word = "" if wrapped[1] in ("jit", "pjit") else wrapped[2]
        if re.fullmatch(r"[A-Za-z_][\w. -]*", word) and word not in _STRUCTURE and not word.startswith("branch_"):
            if word in kept:  # transpose(jvp(block0))/jvp(block0): what is recomputed names its scope twice
                del kept[kept.index(word) :]
            kept.append(word)
    return Scope("/".join(kept) or NO_SCOPE, backward)


def scope_of(span: Span, names: Mapping[str, str]) -> Scope:
    """The scope of one run."""
    op_name = names.get(_key(span.op)) or span.op_name
    return scope(op_name) if op_name else Scope(NO_SCOPE, False)


def scopes_plane(found: Sequence[Span], names: Mapping[str, str]) -> bytes:
    """A serialized trace that holds one plane, "named scopes": which part of the model ran when.

    Appended to a trace file it becomes part of that trace, because Protocol Buffers read two messages in a row as one
    with both their planes. Trace viewers name a CPU's operations after the compiler's fusions, and this is where they
    show the model's names. Parts that run at once lie on lines below each other.
    """
    lanes: list[list[tuple[str, float, float]]] = []
    for span in found:
        place = scope_of(span, names)
        name = place.part + (" (backward)" if place.backward else "")
        same = (lane for lane in lanes if lane[-1][0] == name and 0 <= span.start - lane[-1][2] <= GAP)
        free = (lane for lane in lanes if lane[-1][2] <= span.start)
        if lane := next(same, None):
            lane[-1] = (name, lane[-1][1], span.end)
        elif lane := next(free, None):
            lane.append((name, span.start, span.end))
        else:
            lanes.append([(name, span.start, span.end)])
    ids = {name: i for i, name in enumerate(sorted({name for lane in lanes for name, _, _ in lane}), 1)}
    lines = [
        f'lines {{ id: {i} name: "part {i}" {" ".join(_event(ids[name], a, b) for name, a, b in lane)} }}'
        for i, lane in enumerate(lanes, 1)
    ]
    meta = [f'event_metadata {{ key: {i} value {{ id: {i} name: "{name}" }} }}' for name, i in ids.items()]
    text = f'planes {{ id: 4096 name: "/device:CUSTOM:named scopes" {" ".join(lines + meta)} }}'
    return ProfileData.text_proto_to_serialized_xspace(text)


def _event(metadata: int, start: float, end: float) -> str:
    offset, duration = round(start * 1e3), round((end - start) * 1e3)
    return f"events {{ metadata_id: {metadata} offset_ps: {offset} duration_ps: {duration} }}"


def _key(op: str) -> str:
    # A GPU kernel is called loop_add_fusion_3 where the instruction is loop_add_fusion.3.
    return re.sub(r"[.-]", "_", op)


def _device_planes(data: Any) -> list[Any]:
    return [plane for plane in data.planes if re.match(r"/device:(GPU|TPU):", plane.name)]


def _device_spans(plane: Any) -> Iterator[Span]:
    lines = list(plane.lines)
    wanted = [line for line in lines if line.name == "XLA Ops"]
    for line in wanted or [line for line in lines if line.name.startswith("Stream")]:
        for event in line.events:
            stats = dict(event.stats)
            op = str(stats.get("hlo_op") or event.name.split(" = ")[0].lstrip("%"))
            op_name = str(stats.get("tf_op", "")).removesuffix(":")
            program, end = str(stats.get("hlo_module", "")), event.start_ns + event.duration_ns
            yield Span(op, program, plane.name, event.start_ns, end, op_name)


def _host_spans(plane: Any) -> list[Span]:
    """Operations on the host's threads.

    An operation may hand its work to other threads and return at once; then a second event, "end: NAME", says when the
    work was done. `_p` of the first is `_c` of the second.
    """
    started: list[tuple[Any, dict[str, Any]]] = []
    ended: dict[Any, float] = {}
    for line in plane.lines:
        for event in line.events:
            if event.name.startswith("end: "):
                ended[dict(event.stats).get("_c")] = event.start_ns
            elif (stats := dict(event.stats)).get("hlo_op"):
                started.append((event, stats))
    found = []
    for event, stats in started:
        end = max(event.start_ns + event.duration_ns, ended.get(stats.get("_p", object()), 0.0))
        track = f"cpu:{stats.get('device_ordinal', 0)}"  # several where devices are simulated
        found.append(Span(str(stats["hlo_op"]), str(stats.get("hlo_module", "")), track, event.start_ns, end))
    return found


def _shared(found: Sequence[Span]) -> list[float]:
    """Nanoseconds of each span, every instant of a track shared evenly among the spans that run in it."""
    shares = [0.0] * len(found)
    for track in {span.track for span in found}:
        edges = sorted(
            edge
            for i, span in enumerate(found)
            if span.track == track
            for edge in ((span.start, 1, i), (span.end, 0, i))
        )
        running: set[int] = set()
        for (now, begins, i), (then, _, _) in pairwise([*edges, (0.0, 0, -1)]):
            running.add(i) if begins else running.discard(i)
            for j in running:
                shares[j] += (then - now) / len(running)
    return shares


def _rows(found: Sequence[Span], names: Sequence[str], backward: Sequence[bool] | None = None) -> list[Row]:
    shares = _shared(found)
    whole = sum(shares) or 1.0
    sums: dict[str, list[float]] = {}
    for span, name, own, back in zip(found, names, shares, backward or [False] * len(found), strict=True):
        row = sums.setdefault(name, [0, 0.0, 0.0, 0.0])
        for i, value in enumerate((1, span.end - span.start, own, own * back)):
            row[i] += value
    rows = [
        Row(name, int(n), total / 1e6, own / 1e6, own / whole, back / 1e6)
        for name, (n, total, own, back) in sums.items()
    ]
    return sorted(rows, key=lambda row: (-row.self_ms, row.name))
