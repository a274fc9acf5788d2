"""A process that compiles for one target. It reads one case per line and writes one answer per line.

    python -m bench.aot.worker h100 DUMPS

The parent sets the environment (`gpu.compiler.environment`, `tpu.compiler.environment`). Whatever the compilers print
goes to a file in DUMPS: some of it is a result, and none of it may reach the user.
"""

import contextlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.aot import hardware
from bench.aot.cases import Case
from bench.aot.gpu import compiler as gpu_compiler
from bench.aot.tpu import compiler as tpu_compiler
from bench.report import results


def main(argv: list[str]) -> None:
    """Answer requests until standard input ends."""
    target, dumps = hardware.get(argv[0]), Path(argv[1])
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    log = os.open(dumps.parent / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    make_compiler = gpu_compiler.make_compiler if isinstance(target, hardware.Gpu) else tpu_compiler.make_compiler
    compile_ = make_compiler(target)
    answers.write(json.dumps({"versions": versions(target)}) + "\n")
    triton_dumped = False
    for line in sys.stdin:
        request = json.loads(line)
        case = Case(**request["case"])
        if triton_dumped and may_be_triton(case):
            # jax-triton dumps a kernel once per process, and this row may share one with an earlier row.
            answers.write(json.dumps({"status": "again"}) + "\n")
            continue
        row = answer(target, compile_, dumps, case)
        triton_dumped |= any((dumps / "triton").rglob("*.ptx"))
        if request.get("keep"):
            shutil.copytree(dumps, request["keep"], dirs_exist_ok=True)
        answers.write(json.dumps(row) + "\n")  # last: the reader may look into the folder of `keep`


def may_be_triton(case: Case) -> bool:
    """Return whether an implementation may have Triton kernels: one that is not built in may have any."""
    return case.implementation == "triton" or bool(results.custom_implementations({case.op}, [case.implementation]))


def versions(target: hardware.Target) -> dict[str, str]:
    """The versions that a result depends on."""
    import jax
    import jaxlib

    compiler = gpu_compiler.version() if isinstance(target, hardware.Gpu) else tpu_compiler.version()
    return {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "compiler": compiler}


def answer(target: hardware.Target, compile_: Callable[..., Any], dumps: Path, case: Case) -> dict[str, Any]:
    """Compile a case; return its row of the profile, with the seconds that the compile took."""
    import jax

    from bench.aot import memory_traffic, programs
    from bench.aot.tpu import attention_bundles, executed_bundles, gmm_bundles, xla_cycles
    from dantinox.kernels import dispatch

    clear(dumps)
    start = time.perf_counter()
    try:
        with stdout_to(dumps / "printed.txt"), dispatch.target_device(target.platform, target.kind):
            program = programs.build(case)
            compiled = compile_(program.function, program.shapes, program.donate)
            seconds = time.perf_counter() - start
        printed = (dumps / "printed.txt").read_text(errors="replace", encoding="utf-8")
        if isinstance(target, hardware.Gpu):
            # The rules know what our kernels do; those of other packages may do more.
            apply_rules = case.implementation == "pallas"
            kernels, totals = gpu_compiler.read(target, dumps, printed, apply_rules=apply_rules)
        else:
            kernels, totals = tpu_compiler.read(dumps)
        memory = compiled.memory_analysis()
        row = {
            "status": "compiled",
            "argument_bytes": memory.argument_size_in_bytes,
            "temp_bytes": memory.temp_size_in_bytes,
            "totals": totals,
            "kernels": kernels,
            "seconds": seconds,
        }
        if isinstance(target, hardware.Tpu):
            row["xla_cycles"] = xla_cycles.count(compiled.as_text())
        attention_bundles.add(row, case, target, dumps)
        gmm_bundles.add(row, case, target, dumps)
        executed_bundles.add(row, case, target, dumps)
        memory_traffic.add(row, case, target)
    except NotImplementedError as error:
        return {"status": "refused", "reason": _reason(error)}
    except Exception as error:  # a compiler may raise anything, and the next case must still be compiled
        return {"status": "failed", "reason": _reason(error), "seconds": time.perf_counter() - start}
    finally:
        jax.clear_caches()
    return row


def clear(dumps: Path) -> None:
    """Remove what the compilers dumped before, and make the folder that jax-triton expects."""
    for path in dumps.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (dumps / "triton").mkdir()


@contextlib.contextmanager
def stdout_to(path: Path) -> Iterator[None]:
    """Redirect standard output to a file, that of C++ included."""
    before = os.dup(1)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        os.dup2(file, 1)
        yield
    finally:
        sys.stdout.flush()
        os.dup2(before, 1)
        os.close(before)
        os.close(file)


def _reason(error: BaseException) -> str:
    """The error's first line, without addresses and paths, which differ from run to run."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    line = re.sub(r"(?:/[\w.@+-]+){2,}", "...", re.sub(r"0x[0-9a-f]+", "0x..", line))
    line = re.sub(r"^\w+: implementation='\w+' cannot run here: ", "", line)  # the row says which
    kind = "" if isinstance(error, NotImplementedError) and line else f"{type(error).__name__}: "
    return (kind + line)[:200]


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        main(sys.argv[1:])
