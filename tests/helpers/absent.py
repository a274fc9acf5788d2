"""Programs started as on a machine where some packages are not installed."""

import os
from pathlib import Path

FEW = ("hypothesis", "tyro", "docstring_parser", "typeguard", "tokamax", "jax_triton", "xdist", "pytest_benchmark")
"""What a machine with JAX and pytest may lack."""

# Python runs this file before any other: those that a program starts lack the packages too. `find_spec` says None, as
# it does where a package is missing.
STARTUP = """
from importlib.machinery import PathFinder

absent, find_spec = {names!r}, PathFinder.find_spec


class Finder:
    @classmethod
    def find_spec(cls, name, *where):
        return None if name.partition(".")[0] in absent else find_spec(name, *where)


PathFinder.find_spec = Finder.find_spec
"""


def environment(folder: Path, *names: str) -> dict[str, str]:
    """The variables for a program that does not find these packages; `folder` is kept for it as long as it runs.

    Pytest takes no plugin by itself: their entry points are still there.
    """
    (folder / "sitecustomize.py").write_text(STARTUP.format(names=names))
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    kept = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    return kept | {"PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
