"""Shared memory in a dry run: who may still read or write which bytes, and which proxy sees what was written.

Kept per warpgroup, as if all its threads were one: the copies of the elected thread and the `wgmma`s of all of them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from bench.aot.gpu.ptx_rules.launch import TensorMap

GRANULE = 4  # bytes, the smallest store
UNFENCED, FENCED = 1, 2  # written by a thread; since then that thread has run a proxy fence, but no barrier followed
Report = Callable[[str, int, str], None]  # rule, line, message


class Span(NamedTuple):
    """Bytes [start, end) and the line that uses them."""

    start: int
    end: int
    line: int

    def overlaps(self, other: "Span") -> bool:
        """Whether a byte is in both."""
        return self.start < other.end and other.start < self.end


@dataclass
class Box:
    """A box that TMA loads: its bytes, the pattern in which they lie, whether they have arrived."""

    span: Span
    swizzle: int
    arrived: bool = False


@dataclass
class AsyncGroups:
    """Asynchronous operations of a warpgroup, in the groups in which it waits for them."""

    open: list[Span] = field(default_factory=list)
    committed: list[list[Span]] = field(default_factory=list)

    def commit(self) -> None:
        """Close the group."""
        self.committed.append(self.open)
        self.open = []

    def wait(self, pending: int) -> None:
        """Drop all but the last groups."""
        del self.committed[: max(len(self.committed) - pending, 0)]

    def spans(self) -> Iterator[Span]:
        """Yield what no wait has covered."""
        for group in (*self.committed, self.open):
            yield from group


class SharedMemory:
    """The state of shared memory.

    Args:
        size: bytes that an address may reach.
        warpgroups: how many there are.
        report: called with each finding.
    """

    def __init__(self, size: int, warpgroups: int, report: Report) -> None:
        self.size, self.report = size, report
        self.boxes: list[Box] = []
        self.stores = [AsyncGroups() for _ in range(warpgroups)]
        self.wgmmas = [AsyncGroups() for _ in range(warpgroups)]
        self.proxy_state = np.zeros(-(-size // GRANULE), np.uint8)
        self._unfenced: list[list[np.ndarray]] = [[] for _ in range(warpgroups)]
        self._fenced: list[list[np.ndarray]] = [[] for _ in range(warpgroups)]

    def load_box(self, start: int, tensor_map: TensorMap, line: int) -> Box:
        """Start a TMA load."""
        span = Span(start, start + tensor_map.bytes, line)
        self._check_range(span)
        for reader, what in ((self.wgmmas, "wgmma"), (self.stores, "bulk store")):
            if other := next((s for groups in reader for s in groups.spans() if s.overlaps(span)), None):
                self.report("smem", line, f"loads over bytes that the {what} of line {other.line} may still read")
        if other := next((b for b in self.boxes if not b.arrived and b.span.overlaps(span)), None):
            self.report("smem", line, f"loads over bytes that the load of line {other.span.line} may still write")
        if tensor_map.swizzle and start % (8 * tensor_map.swizzle):
            self.report("descriptors", line, f"a box with swizzle {tensor_map.swizzle} starts at byte {start}")
        self._check_proxy(span, "overwrites")
        self.boxes = [box for box in self.boxes if not box.span.overlaps(span)]
        self.boxes.append(Box(span, tensor_map.swizzle))
        return self.boxes[-1]

    def write(self, warpgroup: int, addresses: np.ndarray, size: int, line: int) -> None:
        """Note that threads write `size` bytes at each address."""
        if self._outside(addresses, size, line):
            return
        for rule, readers, what in (("bulk_stores", self.stores, "bulk store"), ("smem", self.wgmmas, "wgmma")):
            for span in (span for groups in readers for span in groups.spans()):
                if _any_inside(addresses, size, span):
                    self.report(rule, line, f"writes bytes that the {what} of line {span.line} may still read")
        for box in self.boxes:
            if not box.arrived and _any_inside(addresses, size, box.span):
                self.report("smem", line, f"writes bytes that the load of line {box.span.line} may still write")
        granules = ((addresses[:, None] + np.arange(0, size, GRANULE)) // GRANULE).ravel()
        self.proxy_state[granules] = UNFENCED
        self._unfenced[warpgroup].append(granules)

    def read(self, addresses: np.ndarray, size: int, line: int) -> None:
        """Note that threads read `size` bytes at each address."""
        if not self._outside(addresses, size, line):
            for box in self.boxes:
                if not box.arrived and _any_inside(addresses, size, box.span):
                    self.report("smem", line, f"reads bytes before the load of line {box.span.line} has arrived")

    def fence(self, warpgroup: int) -> None:
        """Run `fence.proxy.async` in all threads of a warpgroup."""
        for granules in self._unfenced[warpgroup]:
            self.proxy_state[granules[self.proxy_state[granules] == UNFENCED]] = FENCED
        self._fenced[warpgroup] += self._unfenced[warpgroup]
        self._unfenced[warpgroup] = []

    def barrier(self, warpgroup: int) -> None:
        """Pass a barrier with all threads of a warpgroup."""
        for granules in self._fenced[warpgroup]:
            self.proxy_state[granules[self.proxy_state[granules] == FENCED]] = 0
        self._fenced[warpgroup] = []

    def store(self, warpgroup: int, start: int, size: int, line: int) -> None:
        """Start a bulk store to global memory."""
        span = Span(start, start + size, line)
        self._check_range(span)
        self._check_proxy(span, "reads")
        self.stores[warpgroup].open.append(span)

    def multiply(self, warpgroup: int, start: int, end: int, swizzle: int, line: int) -> None:
        """Start a wgmma that reads [start, end) as rows with this swizzle, in bytes."""
        span = Span(start, end, line)
        self._check_range(span)
        self._check_proxy(span, "reads")
        for box in self.boxes:
            if box.span.overlaps(span):
                if not box.arrived:
                    self.report("smem", line, f"reads bytes before the load of line {box.span.line} has arrived")
                if box.swizzle != swizzle:
                    written = f"{box.swizzle} of the tensor map of line {box.span.line}"
                    self.report("descriptors", line, f"the descriptor's swizzle is {swizzle}, not the {written}")
        self.wgmmas[warpgroup].open.append(span)

    def _check_proxy(self, span: Span, does: str) -> None:
        states = self.proxy_state[span.start // GRANULE : -(-span.end // GRANULE)]
        if (states == UNFENCED).any():
            self.report("proxy_fence", span.line, f"{does} what threads wrote with no fence.proxy.async since")
        elif states.any():
            self.report(
                "proxy_fence", span.line, f"{does} what threads wrote with no barrier since their fence.proxy.async"
            )

    def _check_range(self, span: Span) -> None:
        if not 0 <= span.start <= span.end <= self.size:
            self.report("smem", span.line, f"uses bytes {span.start} to {span.end} of {self.size}")

    def _outside(self, addresses: np.ndarray, size: int, line: int) -> bool:
        outside = bool(addresses.min() < 0 or addresses.max() + size > self.size)
        if outside:
            self.report("smem", line, f"uses byte {int(addresses.max())} of {self.size}")
        return outside


def _any_inside(addresses: np.ndarray, size: int, span: Span) -> bool:
    return bool(((addresses < span.end) & (addresses + size > span.start)).any())
