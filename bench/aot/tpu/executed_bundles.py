"""Count the bundles that any Pallas kernel executes on a TPU: its grid from the traced program, its code from libtpu.

`grid_steps` runs the grid, and `bundle_counts` maps what it finds onto the schedule. The count leaves out waits for
memory.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.aot.cases import Case
from bench.aot.hardware import Target
from bench.aot.tpu import (
    attention_bundles,
    block_transfers,
    bundle_counts,
    grid_steps,
    products,
    traced_kernels,
    vliw_schedule,
)
from bench.aot.tpu.block_transfers import KernelCall
from bench.aot.tpu.grid_steps import Part
from dantinox.kernels import cost, workloads

Row = dict[str, Any]
Shapes = tuple[Sequence[str], Sequence[str]]  # of a kernel's operands, and of its results


def add(row: Row, case: Case, target: Target, dumps: Path) -> None:
    """Add the executed bundles, the regions of the schedule and the bytes moved to a compiled row and its kernels.

    A kernel of which nothing is known gets the reason, as `uncounted`. Counts by name that are in the row stay where
    these are upper bounds only.

    Args:
        row: a row of a profile; it is changed.
        case: the program of the row.
        target: the accelerator that it was compiled for.
        dumps: folder of libtpu's dumps.
    """
    if target.platform != "tpu" or not row["kernels"]:
        return
    workload = workloads.get(case.op, case.spec)
    directions = {kernel["name"]: attention_bundles.direction_of(kernel["name"]) for kernel in row["kernels"]}
    try:
        calls_by_skew = traced_kernels.calls_by_skew(case, target)
    except Exception as error:  # anyone's code; tokamax looks for a TPU
        calls_by_skew, reason = {}, f"not traced: {_first_line(error)}"
    texts = {name: vliw_schedule.read_final_bundles(dumps, name) for name in directions}
    shapes = {name: vliw_schedule.operand_shapes(text) for name, text in texts.items()}
    counts: dict[str, dict[str, Executed]] = {name: {} for name in directions}
    reasons: dict[str, str] = {}
    for skew, calls in calls_by_skew.items():
        reason = "no call of the traced program has its name and shapes"
        for name, position in match_calls(row["kernels"], calls, shapes).items():
            call = calls[position]
            directions[name] = "backward" if "transpose(" in call.name else "forward"
            try:
                counts[name][skew] = count(texts[name], vliw_schedule.read_usage(dumps, name), call)
            except Exception as error:  # anyone's kernel: the other figures of the row stay
                reasons[name] = _first_line(error)
    for kernel in row["kernels"]:
        name = kernel["name"]
        if counts[name]:
            _add_counts(kernel, counts[name], by_skew=case.op != "attention")
        if "executed" not in kernel:
            kernel["uncounted"] = reasons.get(name, reason)
    add_ratios(row, workload, case.direction, directions)


def _first_line(error: Exception) -> str:
    kind = "" if isinstance(error, NotImplementedError) else f"{type(error).__name__}: "
    return kind + str(error).partition("\n")[0]


def _add_counts(kernel: Row, counts: Mapping[str, "Executed"], *, by_skew: bool) -> None:
    """Add the counts of one kernel, unless they are upper bounds of counts that it has."""
    executed = {skew: count.bundles for skew, count in counts.items()}
    mxu = {skew: count.mxu for skew, count in counts.items()}
    moved = {skew: count.bytes_moved for skew, count in counts.items() if count.bytes_moved is not None}
    first, exact = next(iter(counts.values())), all(count.exact for count in counts.values())
    if exact or "executed" not in kernel or kernel.get("upper_bound"):
        kernel.pop("upper_bound", None)
        kernel |= {} if exact else {"upper_bound": True}
        kernel |= {"executed": executed if by_skew else first.bundles, "mxu_executed": mxu if by_skew else first.mxu}
        kernel |= {"steps": first.steps, "regions": first.regions}
    if moved:
        kernel["moved"] = moved


def add_ratios(row: Row, workload: Any, direction: str, directions: Mapping[str, str]) -> None:
    """Add what the kernels of a row execute per visible pair, or per 2^30 multiply-adds, where all are counted.

    Args:
        row: the row; it is changed.
        workload: its workload.
        direction: "forward", or "both".
        directions: the direction of each kernel.
    """
    kernels = row["kernels"]
    if not all("executed" in kernel for kernel in kernels):
        return
    if workload.op == "attention" and workload.segments is None:
        num_pairs = visible_pairs(workload)
        sums: dict[str, int] = {}
        for kernel in kernels:
            kernel["bundles_per_pair"] = round(kernel["executed"] / num_pairs, 6)
            way = directions[kernel["name"]]
            sums[way] = sums.get(way, 0) + kernel["executed"]
        row["bundles_per_pair"] = {way: round(total / num_pairs, 6) for way, total in sums.items()}
    elif workload.op in ("grouped_matmul", "moe_mlp"):
        flops = workload.cost().flops + (workload.cost(backward=True).flops if direction == "both" else 0)
        skews = set.intersection(*(set(kernel["executed"]) for kernel in kernels))
        totals = {skew: sum(kernel["executed"][skew] for kernel in kernels) for skew in products.SKEWS if skew in skews}
        row["bundles_per_2_30"] = {skew: round(total * 2**30 / (flops / 2)) for skew, total in totals.items()}


def visible_pairs(workload: workloads.Attention) -> int:
    """Pairs of a query and a key that it sees, over all heads, without segments."""
    per_head = cost.visible_pairs(workload.T, workload.S, causal=workload.causal, window=workload.window)
    return workload.B * workload.H * per_head


class Executed(NamedTuple):
    """What a kernel executes over all steps of its grid.

    Attributes:
        steps: steps of the grid.
        bundles: executed bundles.
        mxu: slots of the matrix unit in them.
        exact: whether the counts are exact; upper bounds otherwise.
        regions: a row per region of the schedule; see `bundle_counts.Counts`.
        bytes_moved: bytes of its blocks; None for a kernel with DMAs of its own.
    """

    steps: int
    bundles: int
    mxu: int
    exact: bool
    regions: list[Row]
    bytes_moved: int | None


def count(text: str, usage: bundle_counts.Usage, call: KernelCall) -> Executed:
    """Count what a compiled kernel executes.

    Args:
        text: its final bundles.
        usage: the slots that each bundle uses.
        call: its call in the traced program.

    Raises:
        NotImplementedError: loaded data decides how often a loop runs, or the schedule has loops of libtpu's own.
    """
    body = grid_steps.run_grid(call)
    steps = body.count
    program = with_transfers(call, body, pipelined=vliw_schedule.is_pipelined(text))
    counts = bundle_counts.count(text, usage, program)
    mxu = np.array(usage.get(vliw_schedule.matrix_unit(usage), np.zeros(len(counts.times), int)))
    return Executed(
        steps,
        int(counts.times.sum()),
        int(mxu @ counts.times),
        counts.exact,
        counts.regions,
        block_transfers.bytes_moved(call),
    )


def with_transfers(call: KernelCall, body: Part, *, pipelined: bool) -> Part:
    """Put a kernel's body into the loop over its grid, with the copies of blocks around it.

    Blocks of several pieces have regions of their own, where the others have one instruction in every step.
    """
    steps = body.count
    blocks = [block for block in block_transfers.moved_blocks(call) if steps and block.is_strided]
    loads, stores = (
        [Part(f"{verb} a block", count=block.moves, is_transfer=True) for block in blocks if block.is_output == output]
        for verb, output in (("load", False), ("store", True))
    )
    body.parts += stores
    if loads:
        loads = [Part("load blocks", count=steps, is_transfer=True, parts=loads)]
    parts = [*loads, *([body] if pipelined else body.parts)]
    if steps != 1:
        parts = [Part("grid", loop=True, count=steps, has_region=True, parts=parts)]
    return Part("program", count=1, parts=parts)


def match_calls(
    kernels: Sequence[Row], calls: Sequence[KernelCall], operand_shapes: Mapping[str, Shapes]
) -> dict[str, int]:
    """Find the call of each compiled kernel, by its name and shapes; of its results only, where XLA fused operands.

    Args:
        kernels: the kernels of a compiled row.
        calls: the calls of the traced program.
        operand_shapes: the shapes of each kernel, as in `vliw_schedule.operand_shapes`.

    Returns:
        Kernel -> position of its call; without the kernels that no call or several different ones fit.
    """
    found: dict[str, int] = {}
    names = sorted((kernel["name"] for kernel in kernels), key=_number)
    call_shapes = [_call_shapes(call) for call in calls]
    for of_results in (False, True):
        by_key: dict[Any, tuple[list[str], list[int]]] = {}
        for name in names:
            if name not in found:
                shapes = tuple(map(_sides, operand_shapes[name]))
                by_key.setdefault((_stem(name), shapes[of_results:]), ([], []))[0].append(name)
        for n, call in enumerate(calls):
            key = (_stem(call.name.rpartition("/")[2]), call_shapes[n][of_results:])
            if n not in found.values() and key in by_key:
                by_key[key][1].append(n)
        for fitting_names, fitting in by_key.values():
            if len(fitting) == len(fitting_names) or len({_fingerprint(calls[n]) for n in fitting}) == 1:
                found |= {name: fitting[min(n, len(fitting) - 1)] for n, name in enumerate(fitting_names)}
    return found


def _stem(name: str) -> str:
    """The name that a kernel has in the program: libtpu's has a number, and the names of fused operands."""
    return re.sub(r"[^\w]", "_", re.sub(r"\.\d+(\..*)?$", "", name))


def _number(name: str) -> tuple[str, int]:
    number = re.search(r"\.(\d+)", name)
    return _stem(name), int(number[1]) if number else 0


def _sides(shapes: Sequence[str]) -> tuple[str, ...]:
    """Sides of the arrays, without the scalars: a dynamic grid has some."""
    sides = [shape[shape.index("[") + 1 : -1] for shape in shapes]
    return tuple(side for side in sides if side)


def _call_shapes(call: KernelCall) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Sides of the operands and of the results of a call."""
    num_inputs = call.grid_mapping.num_inputs
    arrays = [mapping.array_aval.shape for mapping in call.grid_mapping.block_mappings]
    inputs, outputs = [*(table.shape for table in call.tables), *arrays[:num_inputs]], arrays[num_inputs:]
    sides = [tuple(",".join(map(str, shape)) for shape in shapes if shape) for shapes in (inputs, outputs)]
    return sides[0], sides[1]


def _fingerprint(call: KernelCall) -> str:
    """Text that is equal for calls of the same kernel on the same grid."""
    tables = [np.asarray(table).tobytes() for table in call.tables]
    return f"{call.grid} {tables} {call.body}"
