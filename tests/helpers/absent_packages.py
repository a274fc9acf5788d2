"""Environments in which some packages cannot be imported."""

import os
from pathlib import Path

OPTIONAL_PACKAGES = (
    "hypothesis",
    "tyro",
    "docstring_parser",
    "typeguard",
    "tokamax",
    "jax_triton",
    "xdist",
    "pytest_benchmark",
)
"""Packages that a machine with JAX and pytest may lack."""

# Python runs this file before any other, in child processes too. `find_spec` returns None, as for a missing package.
STARTUP = """
from importlib.machinery import PathFinder

absent, find_spec = {names!r}, PathFinder.find_spec


class Finder:
    @classmethod
    def find_spec(cls, name, *where):
        return None if name.partition(".")[0] in absent else find_spec(name, *where)


PathFinder.find_spec = Finder.find_spec
"""


def environment_without(folder: Path, *names: str) -> dict[str, str]:
    """Make environment variables for a program that cannot import these packages.

    Pytest loads no plugins in it, whose entry points would still be found.

    Args:
        folder: receives a file that must exist while the program runs.
        names: the packages.
    """
    (folder / "sitecustomize.py").write_text(STARTUP.format(names=names))
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    return variables | {"PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
