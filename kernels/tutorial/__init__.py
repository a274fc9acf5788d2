"""Tutorials: an operation in a few kernels, each with one new idea; README.md in each folder is the guide.

A tutorial is a package named after its operation. It has STEPS, the names of its steps in order, and `load_step`, which
returns the function of a step; that function has the operation's signature. Adding a tutorial: its package here, a
module of the same name in `bench/tutorial/` that measures it, and its name in TUTORIALS.
"""

import importlib
from collections.abc import Callable
from typing import Any

TUTORIALS = ("attention", "grouped_matmul", "linear_cross_entropy", "decode_attention", "hopper")  # in reading order


def steps(tutorial: str) -> tuple[str, ...]:
    """Return the names of the steps of a tutorial, in order; none if there is no such tutorial."""
    return _package(tutorial).STEPS if tutorial in TUTORIALS else ()


def load_step(tutorial: str, name: str) -> Callable[..., Any]:
    """Import a step of a tutorial and return its function."""
    return _package(tutorial).load_step(name)


def _package(tutorial: str) -> Any:
    return importlib.import_module(f"dantinox.kernels.tutorial.{tutorial}")
