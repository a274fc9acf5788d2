"""Check the PTX of Mosaic GPU kernels that were compiled before, and print each finding with its instruction.

    make aot ARGS="--target h100 --op attention --implementation pallas --keep runs/aot"
    .venv-aot/bin/python -m bench.aot.gpu.ptx_rules runs/aot

`make aot` and `make aot-check` run the same rules on the rows of `pallas` for an H100, where a finding fails the row.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.aot.gpu import ptx, ptx_rules
from bench.aot.gpu.ptx_rules import launch, program
from dantinox.system.streams import run_main

PROG = "bench.aot.gpu.ptx_rules"


def main(argv: Sequence[str] | None = None) -> int:
    """Check all kernels below the folders; return 1 if there is a finding."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # jax only reads what was launched
    parser = argparse.ArgumentParser(prog=PROG, description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="+", type=Path, help="dumps that `python -m bench.aot --keep FOLDER` kept")
    arguments = parser.parse_args(argv)
    rows = sorted({path.parent for folder in arguments.folder for path in folder.rglob("printed.txt")})
    if not rows:
        print(f"{PROG}: error: no printed.txt in {', '.join(map(str, arguments.folder))}", file=sys.stderr)
        return 2
    kernels = failed = 0
    for row in rows:
        modules = ptx.split_modules((row / "printed.txt").read_text("utf-8", errors="replace"))
        launches = launch.read_all(row) if modules else []
        for module in modules:
            lines = module.split("\n")
            for kernel in program.parse(module):
                report = ptx_rules.check_launched(kernel, launches)
                kernels += 1
                failed += bool(report.findings)
                print(f"{row.name}: {report.summary()}", flush=True)
                for finding in report.findings:
                    text = lines[finding.line - 1].strip()[:100] if finding.line else ""
                    print(f"  {finding.rule}: line {finding.line}: {finding.message}\n      {text}")
    print(f"{kernels} kernels checked, {failed} with findings")
    return 1 if failed else 0


if __name__ == "__main__":
    run_main(main)
