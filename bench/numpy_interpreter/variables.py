"""Keep the values of a kernel's variables, by the names that its source assigns them.

    with watch(("s", "p"), (3, 2)) as watched:
        run(f, *args)
    watched.values["forward", "s"]    what s of the kernel "forward" held in the step whose last indices are 3, 2

An equation of a jaxpr knows the lines of the source that it comes from. The last one of an assignment is its value.
"""

import ast
import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from jax._src import source_info_util

Running = list[tuple[tuple[int, ...], tuple[int, ...], str]]
_watches: list["Watch"] = []


class Watch:
    """What to keep, and what was found.

    Attributes:
        names: variables to keep.
        place: the last indices of the step to look at; (): the first one.
        values: the arrays by names of the kernel and of the variable.
        place_of: the whole place in the grid at which each was found.
        assigned: all names that the kernels' source assigns, to tell what exists.
        grids: the sizes of the grids that ran.
    """

    def __init__(self, names: tuple[str, ...], place: tuple[int, ...]) -> None:
        self.names, self.place = names, place
        self.values: dict[tuple[str, str], np.ndarray] = {}
        self.place_of: dict[tuple[str, str], tuple[int, ...]] = {}
        self.assigned: dict[str, None] = {}
        self.grids: dict[tuple[int, ...], None] = {}

    def record(self, name: str, value: Any, place: tuple[int, ...], sizes: tuple[int, ...], kernel: str) -> None:
        """Keep a value of the first step that fits; later assignments of the same step replace it."""
        self.grids[sizes] = None
        if self.place and place[-len(self.place) :] != self.place:
            return
        if self.place_of.setdefault((kernel, name), place) == place:
            self.values[kernel, name] = np.array(value)


@contextlib.contextmanager
def watch(names: tuple[str, ...], place: tuple[int, ...] = ()) -> Iterator[Watch]:
    """Keep the values of variables of the kernels that are read and run in this context."""
    _watches.append(Watch(names, place))
    # While JAX differentiates, it gives the equations of a kernel the line of the call that it differentiates.
    with mock.patch.object(source_info_util, "user_context", lambda *_, **__: contextlib.nullcontext()):
        try:
            yield _watches[-1]
        finally:
            _watches.pop()


@contextlib.contextmanager
def not_watching() -> Iterator[None]:
    """Read programs that JAX may share between callers, whose lines are those of the first one."""
    kept, _watches[:] = list(_watches), []
    try:
        yield
    finally:
        _watches[:] = kept


def watched(step: Callable[..., Any], equation: Any, running: Running) -> Callable[..., Any]:
    """Return a step of a program that records its result if it belongs to a variable that is watched."""
    if not _watches or len(equation.outvars) != 1:
        return step
    current = _watches[-1]
    assigned = _assigned_names(equation)
    current.assigned |= dict.fromkeys(assigned)
    names = [name for name in assigned if name in current.names]
    if not names:
        return step

    def recording(*operands: Any) -> Any:
        result = step(*operands)
        if running:
            value = result[0] if type(result) in (tuple, list) else result
            for name in names:
                current.record(name, value, *running[-1])
        return result

    return recording


def _assigned_names(equation: Any) -> list[str]:
    found: dict[str, None] = {}
    for frame in source_info_util.user_frames(equation.source_info.traceback):
        for first, last, names in _assignments(frame.file_name):
            if first <= frame.start_line <= last:
                found |= dict.fromkeys(names)
    return list(found)


@functools.cache
def _assignments(path: str) -> list[tuple[int, int, tuple[str, ...]]]:
    """(first line, last line, names) of the assignments of one value to plain names in a file's functions."""
    try:
        tree = ast.parse(Path(path).read_text("utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return []
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    found = {}
    for function in functions:
        for node in ast.walk(function):
            if isinstance(node, ast.Assign):
                names = tuple(target.id for target in node.targets if isinstance(target, ast.Name))
                if names:
                    found[node.lineno, node.end_lineno or node.lineno, names] = None
    return list(found)
