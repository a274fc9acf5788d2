"""The instructions of a dry run that are more than arithmetic: branches, memory, barriers, copies, wgmma.

Each is a function of the run, a warpgroup and an instruction; it returns whether another warpgroup may run next.
"""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from bench.aot.gpu.ptx_rules import values
from bench.aot.gpu.ptx_rules.program import Instruction
from bench.aot.gpu.ptx_rules.state import Barrier, UnresolvedError, Warpgroup
from bench.aot.gpu.ptx_rules.values import Value

if TYPE_CHECKING:
    from bench.aot.gpu.ptx_rules.dry_run import DryRun

_SHAPE = re.compile(r"\.m64n(\d+)k\d+\.")
_SWIZZLES = (0, 128, 64, 32)  # bytes, by the two highest bits of a descriptor
_ROWS = 64  # of a wgmma


def _branch(run: "DryRun", warpgroup: Warpgroup, instruction: Instruction) -> None:
    active = run.active(warpgroup, instruction)
    if run.uniform(instruction, active):
        warpgroup.next = run.kernel.labels[instruction.operands[0]]


def _return(run: "DryRun", warpgroup: Warpgroup, instruction: Instruction) -> bool:
    warpgroup.done = bool(run.uniform(instruction, run.active(warpgroup, instruction)))
    return True


def _elect(run: "DryRun", warpgroup: Warpgroup, instruction: Instruction) -> None:
    leader, elected = instruction.operands[0].split("|")
    warpgroup.registers[leader] = 0
    warpgroup.registers[elected] = (warpgroup.thread % values.WARP == 0).astype(np.int64)


def _shuffle(run: "DryRun", warpgroup: Warpgroup, instruction: Instruction) -> None:
    _, source, lane, *_ = (run.value(warpgroup, text) for text in instruction.operands)
    mode = instruction.opcode.split(".")[2]
    run.forget(warpgroup, instruction.writes)
    warpgroup.registers[instruction.writes[0]] = values.shuffle(mode, source, lane)


# Memory that threads access.


def _words(instruction: Instruction) -> tuple[int, int]:
    """Return how many words each thread accesses, and the bytes of each."""
    *modifiers, kind = instruction.opcode.split(".")
    count = next((int(part[1:]) for part in modifiers if re.fullmatch(r"[vx]\d", part)), 1)
    return count, values.width_of(kind) // 8


def _load(run: "DryRun", warpgroup: Warpgroup, instruction: Instruction) -> None:
    run.forget(warpgroup, instruction.writes)
    text = instruction.operands[1]
    if ".param" in instruction.opcode:
        name = text.strip("[]").split("+")[0]
        warpgroup.registers[instruction.writes[0]] = run.params[name]
        return
    count, size = _words(instruction)
    address = run.address(warpgroup, instruction, text)
    if run.in_smem(address):
        run.smem.read(run.per_thread(warpgroup, instruction, address), count * size, instruction.line)
    if isinstance(address, int) and size == 4:
        for i, name in enumerate(instruction.writes):
            word = address + i * size
            warpgroup.registers[name] = run.stored.get(word) if run.in_smem(word) else run.global_word(word)


def _store(run: "DryRun", warpgroup: Warpgroup, instruction: Instruction) -> None:
    address = run.address(warpgroup, instruction, instruction.operands[0])
    if not run.in_smem(address) or not run.lanes(warpgroup, instruction):
        return
    count, size = _words(instruction)
    addresses = run.per_thread(warpgroup, instruction, address)
    run.smem.write(warpgroup.index, addresses, count * size, instruction.line)
    if count == 1 and size == 4 and isinstance(address, int):
        run.stored[address] = run.value(warpgroup, instruction.operands[1])
    else:
        for word in [word for word in run.stored if (addresses == word).any()]:
            del run.stored[word]


def _matrix_rows(run: "DryRun", warpgroup: Warpgroup, instruction: Instruction, text: str) -> np.ndarray:
    """Return the addresses of the rows, 16 bytes each, that ldmatrix and stmatrix take from the threads."""
    addresses = run.per_thread(warpgroup, instruction, run.address(warpgroup, instruction, text))
    matrices = int(re.search(r"\.x(\d)\.", instruction.opcode)[1])
    return addresses[warpgroup.thread % values.WARP < 8 * matrices]


def _store_matrix(run: "DryRun", warpgroup: Warpgroup, instruction: Instruction) -> None:
    rows = _matrix_rows(run, warpgroup, instruction, instruction.operands[0])
    run.smem.write(warpgroup.index, rows, 16, instruction.line)


def _load_matrix(run: "DryRun", warpgroup: Warpgroup, instruction: Instruction) -> None:
    run.forget(warpgroup, instruction.writes)
    run.smem.read(_matrix_rows(run, warpgroup, instruction, instruction.operands[1]), 16, instruction.line)


# Barriers.


def _init(run: "DryRun", warpgroup: Warpgroup, instruction: Instruction) -> None:
    lanes = run.lanes(warpgroup, instruction)
    if not lanes:
        return
    address = run.uniform(instruction, run.address(warpgroup, instruction, instruction.operands[0]))
    count = run.uniform(instruction, run.value(warpgroup, instruction.operands[1]))
    if lanes > 1 or address in run.barriers:
        again = f", first in line {run.barriers[address].line}" if address in run.barriers else f" by {lanes} threads"
        run.report("barriers", instruction.line, f"initializes the barrier at byte {address} again{again}")
    run.barriers[address] = Barrier(count, count, instruction.line)


def _barrier_at(run: "DryRun", warpgroup: Warpgroup, instruction: Instruction, text: str) -> tuple[int, Barrier]:
    address = run.uniform(instruction, run.address(warpgroup, instruction, text))
    barrier = run.barriers.get(address)
    if barrier is None:
        run.report("barriers", instruction.line, f"uses byte {address} as a barrier, which none initializes")
        raise run.Stopped
    if not barrier.visible:
        run.report("barriers", instruction.line, f"no fence and bar.sync follow the initialization of byte {address}")
    return address, barrier


def _arrive(run: "DryRun", warpgroup: Warpgroup, instruction: Instruction) -> bool:
    lanes = run.lanes(warpgroup, instruction)
    if not lanes:
        return False
    _, text, *rest = instruction.operands
    address, barrier = _barrier_at(run, warpgroup, instruction, text)
    number = run.uniform(instruction, run.value(warpgroup, rest[0])) if rest else 1
    if "expect_tx" in instruction.opcode:
        barrier.bytes += lanes * number
        barrier.expect_line, number = instruction.line, 1
    barrier.arrival_line = instruction.line
    barrier.pending -= lanes * number
    if barrier.pending < 0:
        more = f"{barrier.count - barrier.pending} of {barrier.count}"
        run.report(
            "barriers", instruction.line, f"arrives as number {more} in a phase of the barrier at byte {address}"
        )
        raise run.Stopped
    barrier.complete()
    return True


def _try_wait(run: "DryRun", warpgroup: Warpgroup, instruction: Instruction) -> bool:
    address, barrier = _barrier_at(run, warpgroup, instruction, instruction.operands[1])
    parity = run.uniform(instruction, run.value(warpgroup, instruction.operands[2]))
    warpgroup.registers[instruction.writes[0]] = 1
    if barrier.phase & 1 != parity & 1:
        return False
    warpgroup.barrier_wait = (address, parity & 1, instruction.line)
    return True


def _sync(run: "DryRun", warpgroup: Warpgroup, instruction: Instruction) -> bool:
    number, *rest = (run.uniform(instruction, run.value(warpgroup, text)) for text in instruction.operands)
    expected = rest[0] if rest else run.launch.threads
    warpgroup.named_wait = (number, instruction.line)
    waiting = [other for other in run.warpgroups if other.named_wait and other.named_wait[0] == number]
    threads = sum(len(other.thread) for other in waiting)
    if threads < expected:
        return True
    if threads > expected:
        run.report("barriers", instruction.line, f"bar.sync {number} expects {expected} threads, {threads} come")
    for other in waiting:
        other.named_wait = None
        run.smem.barrier(other.index)
    if expected == run.launch.threads and run.barriers_fenced:
        for barrier in run.barriers.values():
            barrier.visible = True
    return False


def _fence_init(run: "DryRun", warpgroup: Warpgroup, instruction: Instruction) -> None:
    run.barriers_fenced |= bool(run.barriers)


def _fence_proxy(run: "DryRun", warpgroup: Warpgroup, instruction: Instruction) -> None:
    if run.lanes(warpgroup, instruction) == len(warpgroup.thread):
        run.smem.fence(warpgroup.index)
    run.barriers_fenced |= bool(run.barriers)


# Copies.


def _copy(run: "DryRun", warpgroup: Warpgroup, instruction: Instruction) -> None:
    lanes = run.lanes(warpgroup, instruction)
    if not lanes:
        return
    if lanes > 1:
        run.report("barriers", instruction.line, f"{lanes} threads start the same copy")
    operands, opcode = instruction.operands, instruction.opcode
    if ".shared::cluster.global" in opcode:
        target = run.uniform(instruction, run.address(warpgroup, instruction, operands[0]))
        tensor_map = run.tensor_map(warpgroup, instruction, operands[1])
        address, _ = _barrier_at(run, warpgroup, instruction, operands[2])
        run.copies.append((run.smem.load_box(target, tensor_map, instruction.line), address, instruction.line))
        return
    source = run.uniform(instruction, run.address(warpgroup, instruction, operands[1]))
    if ".tensor." in opcode:
        size = run.tensor_map(warpgroup, instruction, operands[0]).bytes
    else:
        size = run.value(warpgroup, operands[2])
        size = run.uniform(instruction, 0 if size is None else size)
    run.smem.store(warpgroup.index, source, size, instruction.line)


def _commit_stores(run: "DryRun", warpgroup: Warpgroup, instruction: Instruction) -> bool:
    run.smem.stores[warpgroup.index].commit()
    return True


def _wait_stores(run: "DryRun", warpgroup: Warpgroup, instruction: Instruction) -> None:
    run.smem.stores[warpgroup.index].wait(int(instruction.operands[0]))


# Tensor cores and registers.


def _multiply(run: "DryRun", warpgroup: Warpgroup, instruction: Instruction) -> None:
    run.forget(warpgroup, instruction.writes)
    opcode, (_, a, b, *flags) = instruction.opcode, instruction.operands
    columns = int(_SHAPE.search(opcode)[1])
    in_smem = not a.startswith("{")
    transposed = [*flags[3:], "0", "0"]  # after the predicate and two signs
    operands = [(a, _ROWS, transposed[0])] * in_smem + [(b, columns, transposed[int(in_smem)])]
    for text, rows, is_transposed in operands:
        descriptor = run.uniform(instruction, run.value(warpgroup, text))
        start, end, swizzle = _extent(descriptor, rows, is_transposed == "1")
        run.smem.multiply(warpgroup.index, start, end, swizzle, instruction.line)


def _extent(descriptor: int, rows: int, transposed: bool) -> tuple[int, int, int]:
    """Return the bytes [start, end) that a descriptor covers at most, and its swizzle.

    Along the contraction a wgmma reads 32 bytes, or 16 rows where the operand is transposed.
    """
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    swizzle = _SWIZZLES[descriptor >> 62]
    row = swizzle or 16
    if not transposed:
        return start, start + (rows // 8 - 1) * stride + 7 * row + 32, swizzle
    chunks = max(rows * 2 // row, 1)
    return start, start + (chunks - 1) * leading + stride + 8 * row, swizzle


def _commit_multiplies(run: "DryRun", warpgroup: Warpgroup, instruction: Instruction) -> bool:
    run.smem.wgmmas[warpgroup.index].commit()
    return True


def _wait_multiplies(run: "DryRun", warpgroup: Warpgroup, instruction: Instruction) -> None:
    run.smem.wgmmas[warpgroup.index].wait(int(instruction.operands[0]))


def _set_max_registers(run: "DryRun", warpgroup: Warpgroup, instruction: Instruction) -> None:
    warpgroup.max_registers = instruction


def _nothing(run: "DryRun", warpgroup: Warpgroup, instruction: Instruction) -> None:
    """Orders or prefetches something that a dry run does not model."""


Event = Callable[["DryRun", Warpgroup, Instruction], bool | None]
EVENTS: dict[str, Event] = {
    "bra": _branch,
    "ret": _return,
    "elect.sync": _elect,
    "shfl.sync": _shuffle,
    "ldmatrix": _load_matrix,
    "ld.": _load,
    "stmatrix": _store_matrix,
    "st.": _store,
    "mbarrier.init": _init,
    "mbarrier.arrive": _arrive,
    "mbarrier.try_wait": _try_wait,
    "bar.sync": _sync,
    "fence.mbarrier_init": _fence_init,
    "fence.proxy.async": _fence_proxy,
    "cp.async.bulk.commit_group": _commit_stores,
    "cp.async.bulk.wait_group": _wait_stores,
    "cp.async.bulk.prefetch": _nothing,
    "cp.async.bulk.": _copy,
    "wgmma.mma_async": _multiply,
    "wgmma.commit_group": _commit_multiplies,
    "wgmma.wait_group": _wait_multiplies,
    "wgmma.fence": _nothing,
    "setmaxnreg": _set_max_registers,
    "prefetch": _nothing,
}


def find(opcode: str) -> Event | None:
    """Return the event of an opcode, or None for arithmetic."""
    return next((event for prefix, event in EVENTS.items() if opcode.startswith(prefix)), None)


def unresolved(instruction: Instruction, value: Value) -> UnresolvedError:
    """Return the error for a value that is not one number."""
    reason = "is not known" if value is None else "differs within a warpgroup"
    return UnresolvedError(instruction.line, f"a value of {instruction.opcode} {reason}")
