"""Implementations, and those that come from other packages.

A package of your own adds an implementation to an operation in one of two ways:

    dantinox.kernels.register("attention", "mine", attention)    in this process

    [project.entry-points."dantinox.kernels.attention"]          in every program, where the package is installed
    mine = "mypkg.attn:attention"

Both put its name beside the built-in ones; "auto" never chooses it. Its module is imported when it is called or asked
about, so an error in it reaches only what names it. A grouped matmul is an implementation of `moe_mlp` too, by
`compose_moe_mlp`, unless `moe_mlp` has one of that name.
"""

import dataclasses
import functools
import importlib
import importlib.metadata
import keyword
import logging
import re
from collections.abc import Callable
from typing import Any

import jax

log = logging.getLogger("dantinox.kernels")


def never(*_: Any) -> None:
    """Rule nothing out: the default of the checks of an `Implementation`."""


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One implementation of an operation.

    Attributes:
        name: the value of `implementation` that selects it.
        function: takes the operation's arguments after their checks. It imports its backend when it is called, so that
            a backend's modules load only where they serve.
        unsupported_device: returns why the current device cannot run it, or None.
        unsupported_inputs: returns why it does not take these inputs, or None; its arguments are those that the
            operation passes to `Operation.select`.
        not_auto: returns why "auto" does not take it although it can run, or None; same arguments.
    """

    name: str
    function: Callable[..., Any]
    unsupported_device: Callable[[], str | None] = never
    unsupported_inputs: Callable[..., str | None] = never
    not_auto: Callable[..., str | None] = never

    @classmethod
    def missing(cls, name: str, reason: str) -> "Implementation":
        """Return an implementation that does not exist yet, so that asking for it gives the reason."""

        def unreachable(*_: Any, **__: Any) -> Any:
            raise NotImplementedError(reason)

        return cls(name, unreachable, unsupported_device=lambda: reason)


def lazy(path: str) -> Callable[..., Any]:
    """Return a function that imports and calls the function at "package.module:function"."""

    def import_and_call(*args: Any, **options: Any) -> Any:
        return _import(path)(*args, **options)

    return import_and_call


def _import(path: str) -> Any:
    module, _, attribute = path.partition(":")
    return functools.reduce(getattr, attribute.split("."), _import_module(module))


def _import_module(module: str) -> Any:
    # The first call may be traced, or compiled for another machine: the arrays that a module makes must be real ones.
    with jax.ensure_compile_time_eval(), jax.default_device(None):
        return importlib.import_module(module)


def _import_problem(path: str) -> str | None:
    """Return why the function at a path cannot be imported, in one line, or None."""
    module, _, attribute = path.partition(":")
    try:
        _import_module(module)
    except (Exception, SystemExit) as error:  # the code of a stranger may raise anything
        first_line = str(error).strip().partition("\n")[0]
        return f"{module} cannot be imported: " + ": ".join(filter(None, (type(error).__name__, first_line)))
    try:
        function = _import(path)
    except AttributeError:
        return f"{module} has no {attribute!r}"
    return None if callable(function) else f"{path} is not a function"


def _from_path(name: str, path: str) -> Implementation:
    return Implementation(name, lazy(path), unsupported_device=functools.partial(_import_problem, path))


def _from_function(name: str, f: Callable[..., Any]) -> Implementation:
    # A new function per registration: jit's cache, whose keys are functions, has no entry for it.
    def call(*args: Any, **options: Any) -> Any:
        return f(*args, **options)

    return Implementation(name, call)


_registered: dict[str, dict[str, Implementation]] = {}  # by operation and name


def register(op: str, name: str, f: Callable[..., Any] | str, built_in: tuple[str, ...]) -> None:
    """See `dantinox.kernels.register`; `op` is an operation, and `built_in` names its own implementations."""
    if reason := _name_problem(name, built_in):
        raise ValueError(f"name is {name!r}; {reason}")
    if isinstance(f, str):
        if not re.fullmatch(r"\w+(\.\w+)*:\w+(\.\w+)*", f):
            raise ValueError(f"f is {f!r}; allowed: a function, or its path as 'package.module:function'")
    elif not callable(f):
        raise ValueError(f"f is {f!r}; allowed: a function, or its path as 'package.module:function'")
    replaces = any(i.name == name for i in custom_implementations(op, built_in))
    make = _from_path if isinstance(f, str) else _from_function
    _registered.setdefault(op, {})[name] = make(name, f)
    if replaces:
        jax.clear_caches()  # programs that were traced with the old function


def _name_problem(name: Any, built_in: tuple[str, ...]) -> str | None:
    """Return which names are allowed if an implementation from elsewhere may not have this one, or None."""
    taken = ("auto", *built_in)
    if name in taken:
        return f"allowed: any other than {', '.join(taken)}"
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        return "allowed: a word of letters, digits and _, such as 'my_attention'"
    return None


def custom_implementations(op: str, built_in: tuple[str, ...]) -> tuple[Implementation, ...]:
    """Return the implementations of an operation that are not built in; imports none of them.

    Args:
        op: the operation.
        built_in: the names of its built-in implementations.
    """
    custom = _entry_points(op, built_in) | _registered.get(op, {})
    if op == "moe_mlp":
        composed = {i.name: _compose(i) for i in custom_implementations("grouped_matmul", built_in)}
        custom = composed | custom
    return tuple(custom.values())


@functools.cache
def _entry_points(op: str, built_in: tuple[str, ...]) -> dict[str, Implementation]:
    found: dict[str, Implementation] = {}
    for point in importlib.metadata.entry_points(group=f"dantinox.kernels.{op}"):
        reason = _name_problem(point.name, built_in)
        if point.name in found:
            reason = "another package has one of this name"
        elif not point.pattern.match(point.value) or not point.attr:
            reason = "allowed: a value of the form package.module:function"
        if reason:
            log.warning("entry point %s = %s of %s is ignored: %s", point.name, point.value, point.group, reason)
        else:
            found[point.name] = _from_path(point.name, f"{point.module}:{point.attr}")
    return found


@functools.cache
def _compose(grouped_matmul: Implementation) -> Implementation:
    def moe_mlp(*args: Any, **options: Any) -> Any:
        from dantinox.kernels.ops.moe.compose import compose_moe_mlp

        return compose_moe_mlp(grouped_matmul.function)(*args, **options)

    return dataclasses.replace(grouped_matmul, function=moe_mlp)
