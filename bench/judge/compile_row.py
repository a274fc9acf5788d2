"""Compile an implementation for a TPU v6e or an H100, and print what the compiler made of it as JSON.

python -m bench.judge.compile_row OP NAME|FILE v6e|h100
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.aot import hardware
from bench.aot.gpu import compiler as gpu_compiler
from bench.aot.tpu import compiler as tpu_compiler

SPECS = {
    "attention": "aot d128 window, gate",
    "grouped_matmul": "aot E=8 uniform",
    "moe_mlp": "aot top 2 of 8",
    "decode_attention": "aot ring",
    "linear_cross_entropy": "aot V=32000",
}


def compile_row(op: str, name_or_file: str, target_name: str) -> dict[str, Any]:
    """Return the status and the kernels of an implementation's program, with gradients where the operation has them."""
    target = hardware.get(target_name)
    is_gpu = isinstance(target, hardware.Gpu)
    with tempfile.TemporaryDirectory() as folder:
        dumps = Path(folder)
        os.environ |= gpu_compiler.environment(dumps) if is_gpu else tpu_compiler.environment(target, dumps)
        from bench.aot import programs, worker
        from bench.aot.cases import Case
        from bench.aot.tpu import executed_bundles
        from bench.judge import subject
        from dantinox import kernels
        from dantinox.kernels import dispatch, workloads

        if not name_or_file.endswith(".py") and name_or_file not in kernels.implementation_names(op):
            reason = f"{sys.prefix} has no {name_or_file}; install its package there too"
            return {"spec": SPECS[op], "directions": {"forward": {"status": "refused", "reason": reason}}}
        name = subject.load(op, name_or_file)
        compile_program = (gpu_compiler if is_gpu else tpu_compiler).make_compiler(target)
        workload, row = workloads.get(op, SPECS[op]), {}

        def build(direction: str) -> programs.Program:
            return programs.build_workload(workload, name, "bfloat16", direction)

        # With gradients a program has all kernels; without them it is compiled where it has no gradient.
        for direction in ("both", "forward") if op != "decode_attention" else ("forward",):
            worker.clear(dumps)
            try:
                with dispatch.target_device(target.platform, target.kind), worker.stdout_to(dumps / "printed.txt"):
                    program = build(direction)
                    if direction == "both" and (reason := _no_gradient(program, build("forward"))):
                        row[direction] = {"status": "no gradient", "reason": reason}
                        continue
                    compiled = compile_program(program.function, program.shapes, program.donate)
            except NotImplementedError as error:
                row[direction] = {"status": "refused", "reason": str(error)}
            except Exception as error:  # a compiler may raise anything; its whole message is the answer
                row[direction] = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
            else:
                printed = (dumps / "printed.txt").read_text("utf-8", "replace")
                found, _ = gpu_compiler.read(target, dumps, printed) if is_gpu else tpu_compiler.read(dumps)
                if not is_gpu:  # where the spills are
                    case = Case(op, workload.name, name, "bfloat16", direction)
                    executed_bundles.add({"kernels": found}, case, target, dumps)
                temp_bytes = compiled.memory_analysis().temp_size_in_bytes
                row[direction] = {"status": "compiled", "kernels": found, "temp_bytes": temp_bytes}
                break
        return {"spec": workload.name, "directions": row}


def _no_gradient(both: Any, forward: Any) -> str:
    """Return why a program with gradients cannot be traced although the one without can, or ""."""
    import jax

    def trace(program: Any) -> None:
        jax.eval_shape(program.function, *(jax.ShapeDtypeStruct(*shape) for shape in program.shapes))

    try:
        trace(both)
    except NotImplementedError:
        raise
    except Exception as error:  # a kernel may raise anything
        try:
            trace(forward)
        except Exception:
            return ""
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def main() -> int:
    """Print the row of the implementation that the command line names; compilers print above it."""
    row = compile_row(*sys.argv[1:])
    print(f"\n{json.dumps(row)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
