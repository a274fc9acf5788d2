"""`pl.pallas_call` as a TPU runs it: a grid in order, blocks loaded a step ahead and written back on leaving."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import pallas as pl

from bench.numpy_interpreter.evaluate import RUNNING, Program, rule
from bench.numpy_interpreter.primitives import ELEMENTWISE, reading_kernel

Array = np.ndarray
ARITHMETIC = {*ELEMENTWISE, "select_n", "convert_element_type"} - {"clamp"}


def garbage(shape: Sequence[int], dtype: Any) -> Array:
    """Return the contents of unwritten memory: NaN, or the lowest integer."""
    dtype = np.dtype(dtype)
    return np.full(shape, np.iinfo(dtype).min if dtype.kind == "i" else 1 if dtype.kind in "ub" else np.nan, dtype)


class _Leaf(NamedTuple):
    """A dynamic part of an index: which operand of the equation."""

    n: int


def _indexing(params: dict[str, Any], operands: int) -> Callable[[Array, Sequence[Any]], tuple[Any, ...]]:
    """(ref, leaves) -> the NumPy index that the transforms make of them; outside of a ref is an error, not clamped."""
    transforms = jax.tree.unflatten(params["tree"], [_Leaf(n) for n in range(operands)])
    if not transforms:
        return lambda ref, leaves: ()
    (indexer,) = transforms
    whole = tuple(slice(0, n) for n in indexer.shape)
    recipe: list[tuple[Any, ...]] = []
    for axis, (index, size) in enumerate(zip(indexer.indices, indexer.shape, strict=True)):
        if not hasattr(index, "stride"):
            recipe.append((axis, index, None, 1, size))
        elif index.stride != 1 or not (index.start == 0 and index.size == size):
            recipe.append((axis, index.start, index.size, index.stride, size))

    def place(ref: Array, leaves: Sequence[Any]) -> tuple[Any, ...]:
        at: list[Any] = list(whole)
        for axis, start, count, stride, size in recipe:
            first = leaves[start.n] if type(start) is _Leaf else start
            if count is None and np.ndim(first):
                at[axis] = np.asarray(first)
                continue
            first = int(first)
            last = first if count is None else first + (count - 1) * stride
            if not 0 <= first <= last < size:
                raise IndexError(f"[{first}:{last + 1}] lies outside a ref's {size}")
            at[axis] = first if count is None else slice(first, last + 1, stride)
        return tuple(at)

    return place


@rule("get")
def _get(params: dict[str, Any], e: Any) -> Callable[..., Any]:
    place = _indexing(params, len(e.invars) - 1)
    return lambda ref, *leaves: np.array(ref[place(ref, leaves)])


@rule("swap")
def _swap(params: dict[str, Any], e: Any) -> Callable[..., Any]:
    place, unused = _indexing(params, len(e.invars) - 2), type(e.outvars[0]).__name__ == "DropVar"

    def swap(ref: Array, value: Array, *leaves: Any) -> Array | None:
        at = place(ref, leaves)
        old = None if unused else np.array(ref[at])
        ref[at] = value
        return old

    return swap


@rule("addupdate")
def _addupdate(params: dict[str, Any], e: Any) -> Callable[..., Any]:
    place = _indexing(params, len(e.invars) - 2)

    def add(ref: Array, value: Array, *leaves: Any) -> tuple[()]:
        ref[place(ref, leaves)] += value
        return ()

    return add


@rule("program_id")
def _program_id(params: dict[str, Any], e: Any) -> Callable[..., Any]:
    return lambda: np.int32(RUNNING[-1][0][params["axis"]])


@rule("num_programs")
def _num_programs(params: dict[str, Any], e: Any) -> Callable[..., Any]:
    return lambda: np.int32(RUNNING[-1][1][params["axis"]])


class _Block:
    """An operand or a result: the array in main memory, and the block of it that lies on the chip."""

    def __init__(self, mapping: Any, array: Array, loads: bool) -> None:
        self.mapping, self.array, self.loads = mapping, array, loads
        self.sizes = [1 if isinstance(d, pl.Squeezed) else d.block_size for d in mapping.block_shape]
        self.kept = [n for n, d in zip(self.sizes, mapping.block_shape) if not isinstance(d, pl.Squeezed)]
        self.steps = [n if isinstance(d, pl.Blocked) else 1 for n, d in zip(self.sizes, mapping.block_shape)]
        self.index = Program(mapping.index_map_jaxpr)
        self.elementwise = _is_elementwise(mapping.index_map_jaxpr.jaxpr)
        self.found: dict[tuple[int, ...], tuple[int, ...]] = {}
        self.at: tuple[int, ...] | None = None
        self.chip = garbage(self.kept, array.dtype)
        self.ahead: tuple[tuple[int, ...], Array] | None = None

    def find(self, place: tuple[int, ...], tables: Sequence[Array]) -> tuple[int, ...]:
        """The block's first element at a step."""
        found = self.found.get(place) or self.index(*map(np.int32, place), *tables)
        at = tuple(int(i) * n for i, n in zip(found, self.steps, strict=True))
        for i, size in zip(at, self.array.shape):
            if not 0 <= i < max(size, 1):
                raise IndexError(f"a block of {self.mapping.origin} begins at {at}, outside {self.array.shape}")
        return at

    def find_all(self, sizes: Sequence[int], tables: Sequence[Array]) -> None:
        """Evaluate the index map for all steps at once, where it has arithmetic only."""
        if self.elementwise and 0 < np.prod(sizes) < 1 << 20:
            places = np.indices(sizes, np.int32).reshape(len(sizes), -1)
            found = [np.broadcast_to(x, places[0].shape) for x in self.index(*places, *tables)]
            self.found = dict(zip(zip(*places.tolist()), zip(*(x.tolist() for x in found)), strict=True))

    def window(self, at: tuple[int, ...]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """What of the array and of the block is the same elements; a last block hangs over the end."""
        inside = [min(n, size - i) for i, n, size in zip(at, self.sizes, self.array.shape)]
        return tuple(slice(i, i + n) for i, n in zip(at, inside)), tuple(slice(n) for n in inside)

    def prefetch(self, at: tuple[int, ...]) -> None:
        """Loads the block of the next step, where it is another one."""
        if at == self.at:
            self.ahead = (at, self.chip)
            return
        block = garbage(self.sizes, self.array.dtype)
        if self.loads:
            whole, part = self.window(at)
            block[part] = self.array[whole]
        self.ahead = (at, block.reshape(self.kept))

    def turn(self) -> Array:
        """The step of what was loaded ahead begins."""
        self.at, self.chip = self.ahead
        return self.chip

    def leave(self) -> None:
        """Writes a result's block back, where the next step's is another one, or none."""
        if self.ahead is None or self.ahead[0] != self.at:
            whole, part = self.window(self.at)
            self.array[whole] = self.chip.reshape(self.sizes)[part]


def _is_elementwise(jaxpr: Any) -> bool:
    """Whether a jaxpr works on arrays as on scalars."""
    inner = lambda e: next((e.params[name] for name in ("jaxpr", "call_jaxpr") if name in e.params), None)
    return all(
        e.primitive.name in ARITHMETIC
        or (e.primitive.name in ("jit", "pjit") and _is_elementwise(getattr(inner(e), "jaxpr", inner(e))))
        for e in jaxpr.eqns
    )


@rule("pallas_call")
def _pallas_call(params: dict[str, Any], e: Any) -> Callable[..., Any]:
    grids = params["grid_mapping"]
    with reading_kernel(tpu=not params["interpret"]):
        kernel = Program(params["jaxpr"])
    scratch = [(ref.shape, ref.dtype) for ref in grids.scratch_avals]
    name = params["name_and_src_info"].name if "name_and_src_info" in params else str(params.get("name"))
    n_tables, n_ins = grids.num_index_operands, grids.num_inputs
    aliases = dict(params["input_output_aliases"])

    def call(*operands: Array) -> list[Array]:
        sizes, rest = [], list(operands)
        for size in grids.grid:
            sizes.append(int(size) if isinstance(size, int | np.integer) else int(rest.pop(0)))
        tables, ins = rest[:n_tables], [np.array(x) for x in rest[n_tables:]]
        outs = [garbage(v.aval.shape, v.aval.dtype) for v in e.outvars]
        for operand, result in aliases.items():
            outs[result] = ins[operand - n_tables]  # one place in main memory
        arrays = [*ins, *outs]
        # On a TPU an output's block comes empty; JAX's interpreter, for which the CPU's form is made, loads it.
        kept = bool(params["interpret"])
        blocks = [
            _Block(m, x, kept or i < n_ins) for i, (m, x) in enumerate(zip(grids.block_mappings, arrays, strict=True))
        ]
        for block in blocks:
            block.find_all(sizes, tables)
        chip = [garbage(*s) for s in scratch]
        places = itertools.product(*map(range, sizes))
        place = next(places, None)
        for block in blocks if place is not None else ():
            block.prefetch(block.find(place, tables))
        while place is not None:
            current = [block.turn() for block in blocks]
            after = next(places, None)
            for block in blocks:
                block.ahead = None
                if after is not None:
                    block.prefetch(block.find(after, tables))
            RUNNING.append((place, tuple(sizes), name))
            try:
                kernel(*tables, *current, *chip)
            finally:
                RUNNING.pop()
            for block in blocks[n_ins:]:
                block.leave()
            place = after
        return outs

    return call


@rule("debug_print")
def _debug_print(params: dict[str, Any], e: Any) -> Callable[..., Any]:
    """`pl.debug_print`: a breakpoint() in here stops a kernel with its values at hand."""

    def show(*values: Any) -> tuple[()]:
        text, place = params["fmt"], "program " + ", ".join(map(str, RUNNING[-1][0]))
        print(f"{place}: {text.format(*values) if '{' in text else ' '.join([text, *map(str, values)])}")
        return ()

    return show
