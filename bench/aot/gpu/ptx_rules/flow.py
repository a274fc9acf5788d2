"""Rules on the order of instructions, on every path through a kernel, whatever the values are.

A forward analysis keeps, for each instruction, what may be outstanding before it on some path. Paths that no values
take count too.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from bench.aot.gpu.ptx_rules.finding import Finding
from bench.aot.gpu.ptx_rules.program import Instruction, Kernel

MAX_GROUPS = 8  # wgmma groups that a state distinguishes; older ones count as one
UNFENCED, FENCED = 1, 2  # shared memory was written; then a proxy fence came, and no barrier yet
OPEN, COMMITTED = 4, 8  # a bulk store was started; its group was committed, and no wait has covered it
Report = Callable[[str, str], None]  # called with a rule and a message
NEVER_FENCED = 1  # the lowest bit of `WgmmaState.written`


class WgmmaState(NamedTuple):
    """Sets of registers, as bits.

    Attributes:
        groups: accumulators of wgmmas that may run: those not committed, then of each group from the last one on.
        inputs: in the same way, registers that these wgmmas read.
        written: registers written since the last wgmma.fence; `NEVER_FENCED` if there may have been none.
    """

    groups: tuple[int, ...] = (0,)
    inputs: tuple[int, ...] = (0,)
    written: int = NEVER_FENCED

    def join(self, other: "WgmmaState") -> "WgmmaState":
        """Return what may be outstanding on either path."""
        groups, inputs = _union(self.groups, other.groups), _union(self.inputs, other.inputs)
        return WgmmaState(groups, inputs, self.written | other.written)


def _union(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    return (*(x | y for x, y in zip(longer, shorter)), *longer[len(shorter) :])


def _any_of(masks: tuple[int, ...]) -> int:
    total = 0
    for mask in masks:
        total |= mask
    return total


class WgmmaRule:
    """Accumulators are read after a wait, registers are fenced before they enter a wgmma, and groups are committed."""

    def __init__(self, kernel: Kernel) -> None:
        self.bits: dict[str, int] = {}
        for instruction in kernel.instructions:
            if instruction.opcode.startswith("wgmma.mma_async"):
                for name in (*instruction.writes, *_fragment(instruction)):
                    self.bits.setdefault(name, 2 << len(self.bits))

    def mask(self, registers: tuple[str, ...]) -> int:
        """Return registers as bits."""
        total = 0
        for name in registers:
            total |= self.bits.get(name, 0)
        return total

    def name(self, mask: int) -> str:
        """Return the name of one of the registers."""
        return next(name for name, bit in self.bits.items() if bit & mask)

    def step(self, state: WgmmaState, instruction: Instruction, report: Callable[[str], None]) -> WgmmaState:
        """Return the state after an instruction; report what is wrong with it."""
        groups, inputs, written = state
        opcode = instruction.opcode
        if opcode.startswith("wgmma.mma_async"):
            accumulators, fragment = self.mask(instruction.writes), self.mask(_fragment(instruction))
            if fragment & _any_of(groups):
                report(f"reads {self.name(fragment & _any_of(groups))} before a wgmma.wait_group covers it")
            if written & NEVER_FENCED:
                report("no wgmma.fence comes before it")
            elif written & (accumulators | fragment):
                report(f"no wgmma.fence since {self.name(written & (accumulators | fragment))} was written")
            groups = (groups[0] | accumulators, *groups[1:])
            return WgmmaState(groups, (inputs[0] | fragment, *inputs[1:]), written)
        if opcode.startswith("wgmma.fence"):
            return WgmmaState(groups, inputs, 0)
        if opcode.startswith("wgmma.commit_group"):
            return WgmmaState(_committed(groups), _committed(inputs), written)
        if opcode.startswith("wgmma.wait_group"):
            if groups[0]:
                report("waits with a wgmma that no wgmma.commit_group follows")
            kept = 1 + int(instruction.operands[0])
            return WgmmaState(groups[:kept], inputs[:kept], written)
        if opcode == "ret" and groups[0]:
            report("the kernel may end with a wgmma that no wgmma.commit_group follows")
        reads, writes = self.mask(instruction.reads), self.mask(instruction.writes)
        if reads & _any_of(groups):
            report(f"reads {self.name(reads & _any_of(groups))} before a wgmma.wait_group covers it")
        if writes & (_any_of(groups) | _any_of(inputs)):
            report(f"writes {self.name(writes & (_any_of(groups) | _any_of(inputs)))}, which a wgmma may still use")
        return WgmmaState(groups, inputs, written | writes) if writes else state


def _fragment(instruction: Instruction) -> tuple[str, ...]:
    """Return the registers of an operand in registers."""
    operand = instruction.operands[1]
    return tuple(name.strip() for name in operand.strip("{}").split(",")) if operand.startswith("{") else ()


def _committed(groups: tuple[int, ...]) -> tuple[int, ...]:
    moved = (0, *groups)
    return moved if len(moved) <= MAX_GROUPS else (*moved[: MAX_GROUPS - 1], moved[-2] | moved[-1])


class StoreState(int):
    """What may be outstanding of the writes to shared memory and the bulk stores, as bits."""

    def join(self, other: "StoreState") -> "StoreState":
        """Return what may be outstanding on either path."""
        return StoreState(self | other)


def store_step(state: StoreState, instruction: Instruction, report: Report) -> StoreState:
    """Return the state after an instruction; report what is wrong with it, by rule."""
    bits, opcode = int(state), instruction.opcode
    if opcode.startswith(("st.shared", "stmatrix")):
        bits |= UNFENCED
    elif opcode.startswith("fence.proxy.async"):
        bits = bits & ~UNFENCED | (FENCED if bits & UNFENCED else 0)
    elif opcode.startswith("bar.sync"):
        bits &= ~FENCED
    elif opcode.startswith("cp.async.bulk") and ".global.shared" in opcode:
        if bits & (UNFENCED | FENCED):
            missing = "fence.proxy.async" if bits & UNFENCED else "barrier after fence.proxy.async"
            report("proxy_fence", f"a write to shared memory comes before this store with no {missing} between")
        bits |= OPEN
    elif opcode.startswith("cp.async.bulk.commit_group"):
        bits = bits & ~OPEN | (COMMITTED if bits & OPEN else 0)
    elif opcode.startswith("cp.async.bulk.wait_group"):
        bits = bits & ~COMMITTED if instruction.operands == ("0",) else bits
    elif opcode == "ret" and bits & (OPEN | COMMITTED):
        missing = "commit_group" if bits & OPEN else "wait_group"
        report("bulk_stores", f"the kernel may end with a bulk store that no cp.async.bulk.{missing} follows")
    return StoreState(bits)


def check(kernel: Kernel) -> list[Finding]:
    """Run the rules on a kernel."""
    wgmma = WgmmaRule(kernel)

    def wgmma_step(state: WgmmaState, instruction: Instruction, report: Report) -> WgmmaState:
        return wgmma.step(state, instruction, lambda message: report("wgmma", message))

    return [*_analyze(kernel, WgmmaState(), wgmma_step), *_analyze(kernel, StoreState(0), store_step)]


def _analyze[State: (WgmmaState, StoreState)](
    kernel: Kernel, initial: State, step: Callable[[State, Instruction, Report], State]
) -> Iterator[Finding]:
    """Iterate over the basic blocks until no state changes, then report."""
    instructions, successors = kernel.instructions, kernel.successors
    leaders = {0, *kernel.labels.values()}
    leaders |= {n for i, following in enumerate(successors) if following != (i + 1,) for n in (*following, i + 1)}
    before, pending = {0: initial}, [0]
    found: dict[Finding, None] = {}

    def run_block(i: int, keep: bool) -> tuple[int, State]:
        state = before[i]
        while True:

            def report(rule: str, message: str, line: int = instructions[i].line) -> None:
                if keep:
                    found[Finding(rule, line, message)] = None

            state = step(state, instructions[i], report)
            if i + 1 in leaders or i + 1 >= len(instructions):
                return i, state
            i += 1

    while pending:
        last, state = run_block(pending.pop(), keep=False)
        for following in successors[last]:
            joined = state if following not in before else before[following].join(state)
            if before.get(following) != joined:
                before[following] = joined
                pending.append(following)
    for leader in sorted(before):
        run_block(leader, keep=True)
    yield from found
