"""Check, time and compile the steps of tutorials (`python -m bench.tutorial attention`).

On this machine: accuracy, time in turns with other implementations, memory. For hardware that is not here: what the
compiler made of each kernel. The table of each tutorial's README is printed from the file that this program writes.
"""

import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from bench.report import results
from bench.tutorial import common
from dantinox import cli
from dantinox.kernels.tutorial import TUTORIALS
from dantinox.system import malloc
from dantinox.system.console import Console

PROG = "bench.tutorial"


@dataclass(frozen=True)
class Arguments:
    """Which, how long, with what, where to."""

    tutorial: tuple[str, ...] = TUTORIALS
    """Tutorials by name (default: all); the flag may be left out."""
    budget: float = 10.0
    """Seconds of timing of each tutorial, shared by all implementations."""
    compile: bool = True
    """Compile for other hardware as well."""
    compiler: str = ".venv-aot/bin/python"
    """The Python that has the compilers; `make tutorial` builds it."""
    out: str = "profiles"
    """Folder for <device>/tutorial-<name>.json; with the default, the table of each README is rewritten."""


def main(argv: Sequence[str] | None = None) -> int:
    """Check, time, compile, write and print; exit with 1 if a step is wrong."""
    argv = cli.positional_run(argv, "--tutorial")
    arguments = cli.parse(Arguments, argv, default=Arguments(), prog=PROG, description=__doc__.split("\n")[0])
    malloc.tune_glibc_malloc()
    with cli.one_line_errors(PROG):
        compiler = _check(arguments)
        folder = Path(arguments.out) / results.device_folder(jax.default_backend(), jax.devices()[0].device_kind)
        committed = folder.resolve() == common.COMMITTED
        wrong = 0
        for name in arguments.tutorial:
            wrong += _run(name, arguments.budget, compiler, folder, committed)
    return 1 if wrong else 0


def _check(arguments: Arguments) -> Path | None:
    """Return the compiler's Python, or None; raise ValueError for arguments that are out of range."""
    for name in arguments.tutorial:
        if name not in TUTORIALS:
            raise ValueError(f"--tutorial is {name!r}; allowed: {', '.join(TUTORIALS)}")
    if not arguments.budget > 0:
        raise ValueError(f"--budget is {arguments.budget}; allowed: seconds above 0")
    if not arguments.compile:
        return None
    compiler = results.ROOT / arguments.compiler
    if not compiler.exists():
        raise ValueError(
            f"--compiler {compiler} does not exist; `make tutorial` builds it, --no-compile does without it"
        )
    return compiler


def _run(name: str, budget: float, compiler: Path | None, folder: Path, committed: bool) -> int:
    """Measure one tutorial, write its file and its table; return the number of wrong rows."""
    module = load(name)
    document = module.measure(budget, compiler)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / common.file_name(name)).write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    Console(width=200).print(module.table(document), markup=False, highlight=False)
    if committed:
        path = results.ROOT / module.README
        path.write_text(common.update_readme(path.read_text("utf-8"), module, document), "utf-8")
    wrong = module.wrong(document)
    for row in wrong:
        print(f"{PROG}: {name}: {row}: error {document['rows'][row]['error']:.1e}", file=sys.stderr)
    return len(wrong)


def load(name: str) -> Any:
    """Import the module of a tutorial; its interface is in the docstring of `bench.tutorial`."""
    return importlib.import_module(f"bench.tutorial.{name}")


if __name__ == "__main__":
    cli.run_main(main)
