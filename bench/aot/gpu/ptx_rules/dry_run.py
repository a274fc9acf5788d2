"""Run the integer part of a kernel: one block, its warpgroups in turns, with barriers, copies and wgmmas as events.

Floating point is not computed. What the host passes is made up: global memory holds small numbers, the same wherever
they are read. An arrival or a wait lets another warpgroup run, in an order that a seed decides; copies arrive as late
as they can, or at any time.
"""

import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.aot.gpu.ptx_rules import events, values
from bench.aot.gpu.ptx_rules.finding import Finding
from bench.aot.gpu.ptx_rules.launch import Launch, TensorMap
from bench.aot.gpu.ptx_rules.program import Instruction, Kernel
from bench.aot.gpu.ptx_rules.smem import Box, SharedMemory
from bench.aot.gpu.ptx_rules.state import WARPGROUP, Barrier, UnresolvedError, Warpgroup
from bench.aot.gpu.ptx_rules.values import Value

PARAM_SHIFT = 40  # parameter n, or what it points to, is at address (n + 1) << 40
LIMITS = ((1,), (4, 64, 512, 4096), (8,), (16, 256))  # by seed: each number in global memory is below one of them


class StoppedError(Exception):
    """After a finding that makes the rest of the run meaningless."""


class DryRun:
    """A run of one block.

    Args:
        kernel: the kernel.
        launch: how the host launches it.
        block: its index in the grid.
        seed: of the schedule and of the numbers in global memory.
        max_steps: instructions of a warpgroup, after which the run stops.
    """

    Stopped = StoppedError

    def __init__(self, kernel: Kernel, launch: Launch, block: tuple[int, int, int], seed: int, max_steps: int) -> None:
        self.kernel, self.launch, self.block, self.seed = kernel, launch, block, seed
        self.max_steps = max_steps
        self.random = random.Random(seed)
        threads = np.arange(launch.threads, dtype=np.int64)
        groups = [threads[i : i + WARPGROUP] for i in range(0, len(threads), WARPGROUP)]
        self.warpgroups = [Warpgroup(i, group) for i, group in enumerate(groups)]
        self.findings: dict[tuple[str, int], Finding] = {}
        self.smem = SharedMemory(launch.smem_bytes, len(groups), self.report)
        self.stored: dict[int, Value] = {}  # 32-bit words in shared memory, by address
        self.barriers: dict[int, Barrier] = {}
        self.barriers_fenced = False
        self.copies: list[tuple[Box, int, int]] = []  # in flight: box, address of the barrier, line
        self.executed = bytearray(len(kernel.instructions))
        self.finished = False
        self.params = {name: (i + 1) << PARAM_SHIFT for i, name in enumerate(kernel.params)}
        self._operands: dict[str, Any] = {}
        self.code = [self._decode(instruction) for instruction in kernel.instructions]

    def report(self, rule: str, line: int, message: str) -> None:
        """Keep the first finding of a rule at a line."""
        self.findings.setdefault((rule, line), Finding(rule, line, message))

    @property
    def steps(self) -> int:
        """Instructions that all warpgroups have run."""
        return sum(warpgroup.steps for warpgroup in self.warpgroups)

    # The schedule.

    def run(self) -> list[Finding]:
        """Run the block until it ends, stops or has run long enough."""
        try:
            while not all(warpgroup.done for warpgroup in self.warpgroups):
                ready = [w for w in self.warpgroups if not (w.done or self._waits(w))]
                if self.copies and (not ready or (self.seed and self.random.random() < 0.2)):
                    self._arrive(self.copies.pop(self.random.randrange(len(self.copies)) if self.seed else 0))
                elif ready:
                    self._run_until_event(self.random.choice(ready))
                else:
                    self._report_deadlock()
                    break
                if any(w.steps > self.max_steps for w in self.warpgroups):
                    break
            else:
                self.finished = True
                self._check_end()
        except UnresolvedError as error:
            self.report("unresolved", *error.args)
        except StoppedError:
            pass
        return [*self.findings.values()]

    def _waits(self, warpgroup: Warpgroup) -> bool:
        if warpgroup.barrier_wait is None:
            return warpgroup.named_wait is not None
        address, parity, _ = warpgroup.barrier_wait
        return self.barriers[address].phase & 1 == parity

    def _run_until_event(self, warpgroup: Warpgroup) -> None:
        warpgroup.barrier_wait = None
        while not warpgroup.done and warpgroup.steps <= self.max_steps:
            position = warpgroup.next
            warpgroup.next += 1
            warpgroup.steps += 1
            self.executed[position] = 1
            if self.code[position](warpgroup):
                return

    def _arrive(self, copy: tuple[Box, int, int]) -> None:
        box, address, _ = copy
        box.arrived = True
        self.barriers[address].bytes -= box.span.end - box.span.start
        self.barriers[address].complete()

    def _report_deadlock(self) -> None:
        """Report the barriers where something is missing; those where everything is may only wait for them."""
        waits = [(*w.barrier_wait, self.barriers[w.barrier_wait[0]]) for w in self.warpgroups if w.barrier_wait]
        begun = [wait for wait in waits if wait[-1].bytes or wait[-1].pending < wait[-1].count]
        for address, _, line, barrier in begun or waits:
            if barrier.bytes:
                self._report_bytes(address, barrier)
            else:
                count = f"{barrier.count - barrier.pending} of {barrier.count}"
                where = f"byte {address}, initialized in line {barrier.line}"
                self.report("barriers", line, f"waits for the barrier at {where}, where {count} arrive")
        for number, line in (w.named_wait for w in self.warpgroups if w.named_wait):
            self.report("barriers", line, f"waits at bar.sync {number} for threads that do not come")

    def _report_bytes(self, address: int, barrier: Barrier) -> None:
        less = "fewer" if barrier.bytes > 0 else "more"
        text = f"copies bring {abs(barrier.bytes)} bytes {less} than the barrier at byte {address} expects"
        self.report("expect_tx", barrier.expect_line or barrier.arrival_line or barrier.line, text)

    def _check_end(self) -> None:
        for box, _, line in self.copies:
            self.report("barriers", line, f"the block may end before its load of byte {box.span.start} arrives")
        for address, barrier in self.barriers.items():
            if barrier.bytes and not self.copies:
                self._report_bytes(address, barrier)
            elif barrier.pending != barrier.count and not barrier.bytes:
                count = f"{barrier.count - barrier.pending} of {barrier.count}"
                text = f"only {count} arrive in the last phase of the barrier at byte {address}"
                self.report("barriers", barrier.arrival_line, text)
        for groups in self.smem.stores:
            for span in groups.spans():
                self.report("bulk_stores", span.line, "the block may end before this store has read its bytes")

    # Instructions as functions of a warpgroup that return whether another one may run next.

    def _decode(self, instruction: Instruction) -> Callable[[Warpgroup], bool | None]:
        if event := events.find(instruction.opcode):
            return lambda warpgroup: event(self, warpgroup, instruction)
        function, writes = values.operation(instruction.opcode), instruction.writes
        if function is None or len(writes) != 1 or any(text.startswith("{") for text in instruction.operands):
            return lambda warpgroup: self.forget(warpgroup, writes)
        sources = [self._operand(text) for text in instruction.operands[1:]]
        (destination,) = writes

        def evaluate(warpgroup: Warpgroup) -> None:
            registers = warpgroup.registers
            registers[destination] = function(*[registers.get(s) if type(s) is str else s for s in sources])

        def evaluate_slowly(warpgroup: Warpgroup) -> None:
            result = function(*[self.value(warpgroup, text) for text in instruction.operands[1:]])
            if instruction.guard:
                before = warpgroup.registers.get(destination)
                result = values.choose(self.active(warpgroup, instruction), result, before)
            warpgroup.registers[destination] = result

        return evaluate_slowly if instruction.guard or any(map(callable, sources)) else evaluate

    def _operand(self, text: str) -> Any:
        """Return a register's name, a constant, or a function of the warpgroup."""
        name, _, axis = text.partition(".")
        sizes = {"%ctaid": self.block, "%nctaid": self.launch.grid, "%ntid": (self.launch.threads, 1, 1)}
        if name == "%tid":
            return 0 if axis != "x" else lambda warpgroup: warpgroup.thread
        if name in sizes:
            return sizes[name]["xyz".index(axis)]
        if text.startswith("%") or re.fullmatch(r"p|P\d*", text):
            return text
        if re.fullmatch(r"-?(?:0x[0-9a-fA-F]+|\d+)U?", text):
            return int(text.rstrip("U"), 0)
        if text.startswith("__dynamic_shmem"):
            return 0
        return self.params.get(text, lambda _: None)

    def value(self, warpgroup: Warpgroup, text: str) -> Value:
        """Return the value of an operand."""
        operand = self._operands.get(text)
        if operand is None:
            operand = self._operands[text] = self._operand(text)
        if isinstance(operand, str):
            return warpgroup.registers.get(operand)
        return operand(warpgroup) if callable(operand) else operand

    def address(self, warpgroup: Warpgroup, instruction: Instruction, text: str) -> Value:
        """Return the value of an address in brackets.

        Raises:
            UnresolvedError: it is not known.
        """
        terms = [self.value(warpgroup, term.split(",")[0].strip()) for term in text.strip("[] ").split("+")]
        if any(term is None for term in terms):
            raise UnresolvedError(instruction.line, f"the address of {instruction.opcode} is not known")
        total: Value = sum(terms)
        return values.wrap(total, 64) if isinstance(total, int) else total

    def per_thread(self, warpgroup: Warpgroup, instruction: Instruction, address: Value) -> np.ndarray:
        """Return an address as an array, of the threads that run the instruction."""
        addresses = np.broadcast_to(np.asarray(address, np.int64), warpgroup.thread.shape)
        active = self.active(warpgroup, instruction)
        return addresses[active != 0] if isinstance(active, np.ndarray) else addresses

    def uniform(self, instruction: Instruction, value: Value) -> int:
        """Return a value that all threads of a warpgroup share.

        Raises:
            UnresolvedError: it is not known, or they do not.
        """
        if isinstance(value, np.ndarray) and (value == value[0]).all():
            return int(value[0])
        if not isinstance(value, int):
            raise events.unresolved(instruction, value)
        return value

    def active(self, warpgroup: Warpgroup, instruction: Instruction) -> Value:
        """Return which threads run an instruction: 1, 0, an array of these, or None."""
        if not instruction.guard:
            return 1
        value = warpgroup.registers.get(instruction.guard)
        return None if value is None else 1 - value if instruction.negated else value

    def lanes(self, warpgroup: Warpgroup, instruction: Instruction) -> int:
        """Return how many threads run an instruction."""
        active = self.active(warpgroup, instruction)
        if active is None:
            raise events.unresolved(instruction, None)
        return int(active.sum()) if isinstance(active, np.ndarray) else active * len(warpgroup.thread)

    def forget(self, warpgroup: Warpgroup, registers: tuple[str, ...]) -> None:
        """Mark registers as not known."""
        for name in registers:
            warpgroup.registers[name] = None

    def in_smem(self, address: Value) -> bool:
        """Whether an address is in shared memory."""
        return bool(np.max(address) < 1 << PARAM_SHIFT)

    def global_word(self, address: int) -> int:
        """Return the 32-bit word at an address of global memory."""
        draw = random.Random(address * 1009 + self.seed)
        return draw.randrange(draw.choice(LIMITS[self.seed % len(LIMITS)]))

    def tensor_map(self, warpgroup: Warpgroup, instruction: Instruction, text: str) -> TensorMap:
        """Return the tensor map of a copy.

        Raises:
            UnresolvedError: the launch does not have it.
        """
        address = self.uniform(instruction, self.address(warpgroup, instruction, text))
        offset = address & ((1 << PARAM_SHIFT) - 1)
        if offset not in self.launch.tensor_maps:
            raise UnresolvedError(instruction.line, f"the launch has no tensor map at byte {offset}")
        return self.launch.tensor_maps[offset]
