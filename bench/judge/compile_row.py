"""Compile an implementation for a TPU v6e, and print what the compiler made of it as JSON.

python -m bench.judge.compile_row OP NAME|FILE
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.aot import hardware
from bench.aot.tpu import compiler

SPECS = {
    "attention": "aot d128 window, gate",
    "grouped_matmul": "aot E=8 uniform",
    "moe_mlp": "aot top 2 of 8",
    "decode_attention": "aot ring",
}


def compile_row(op: str, name_or_file: str) -> dict[str, Any]:
    """Return the status and the kernels of an implementation's program, with gradients where the operation has them."""
    target = hardware.get("v6e")
    assert isinstance(target, hardware.Tpu)
    with tempfile.TemporaryDirectory() as folder:
        dumps = Path(folder)
        os.environ |= compiler.environment(target, dumps)
        from bench.aot import programs
        from bench.judge import subject
        from dantinox.kernels import dispatch, workloads

        name = subject.load(op, name_or_file)
        compile_program = compiler.make_compiler(target)
        workload, row = workloads.get(op, SPECS[op]), {}
        for direction in ("forward",) if op == "decode_attention" else ("forward", "both"):
            try:
                with dispatch.target_device(target.platform, target.kind):
                    program = programs.build_workload(workload, name, "bfloat16", direction)
                    compile_program(program.function, program.shapes, program.donate)
            except NotImplementedError as error:
                row[direction] = {"status": "refused", "reason": str(error)}
            except Exception as error:  # a compiler may raise anything; its whole message is the answer
                row[direction] = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
            else:
                row[direction] = {"status": "compiled", "kernels": compiler.read(dumps)[0]}
        return {"spec": workload.name, "directions": row}


def main() -> int:
    """Print the row of the implementation that the command line names."""
    row = compile_row(*sys.argv[1:])
    print(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
