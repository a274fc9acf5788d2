"""Show where the time goes: `python -m bench.profile` traces training steps, or one operation with --op.

Two warm-up calls come first and are not traced. The trace is written to --out for TensorBoard, and the printed tables
to top.json beside it.
"""

import contextlib
import dataclasses
import datetime
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
from rich.table import Table

from bench.operations import runner
from dantinox import cli
from dantinox.cli.train import Trainer
from dantinox.config import Config, Implementation, presets
from dantinox.kernels import workloads
from dantinox.kernels.workloads.types import Decode, Workload
from dantinox.system import malloc
from dantinox.system.console import Console
from dantinox.training import profile_report, profile_table

PROG = "bench.profile"
STEPS, WARM_UP = 5, 2


@dataclass(frozen=True)
class Arguments:
    """What to trace. All settings of training are flags, such as --attn and --moe; --steps is the number of calls."""

    settings: Config
    preset: str | None = None
    """Settings of the training to trace; flags override them."""
    op: str | None = None
    """Trace only this operation, at the sizes of --spec."""
    spec: str | None = None
    """A workload of the operation in kernels/workloads/."""
    implementation: Implementation = "auto"
    """Implementation of --op."""
    backward: bool = False
    """Run the gradients of --op as well."""
    out: str = "runs/profile"
    """Folder of the traces."""
    json: str | None = None
    """Where to write the tables (default: top.json beside the trace)."""
    top: int = 20
    """Number of operations to show."""
    verbose: bool = False
    """Log which implementations were chosen, and show tracebacks."""


@dataclass(frozen=True)
class TracedProgram:
    """A program to trace.

    Attributes:
        name: its name in the tables.
        call: `call(i)` runs it once and waits for its results.
        hlo: the text of the compiled program.
    """

    name: str
    call: Callable[[int], Any]
    hlo: str


def parse(argv: Sequence[str]) -> Arguments:
    """Parse the command line: the settings of the preset, overridden by flags."""
    with cli.one_line_errors(PROG):
        preset = cli.peek_flag(argv, "--preset")
        base = Config.from_preset(preset or "nano", steps=STEPS)
        return cli.parse(
            Arguments,
            argv,
            default=Arguments(base, preset=preset),
            prog=PROG,
            description=f"Trace training steps, or one operation. Presets: {', '.join(presets())} (default: nano).",
        )


def build_program(arguments: Arguments) -> TracedProgram:
    """Compile the program that the arguments ask for.

    Raises:
        ValueError: there is no such operation or workload, or the flags do not go together.
    """
    if arguments.top < 1:
        raise ValueError(f"top is {arguments.top}; allowed: 1 or more")
    if arguments.op is None:
        for name in ("spec", "backward"):
            if getattr(arguments, name):
                raise ValueError(f"--{name} is about one operation; add --op")
        return build_training(arguments.settings, arguments.preset or "nano")
    if arguments.preset is not None:
        raise ValueError("--preset is about training and --op about one operation; give one of them")
    allowed = sorted({row.op for row in workloads.ROWS})
    if arguments.op not in allowed:
        raise ValueError(f"op is {arguments.op!r}; allowed: {', '.join(allowed)}")
    workload = workloads.get(arguments.op, arguments.spec or "")
    return build_operation(workload, arguments.implementation, arguments.backward)


def build_training(config: Config, name: str) -> TracedProgram:
    """Compile training steps on the data of the settings."""
    trainer = Trainer(config)
    state = trainer.init_state()
    compiled = trainer.step.lower(state, *trainer.batch(0), jnp.int32(0)).compile()

    def call(i: int) -> None:
        nonlocal state
        state, _ = compiled(state, *trainer.batch(i), jnp.int32(i))
        jax.block_until_ready(state)

    return TracedProgram(f"training {name}", call, compiled.as_text())


def build_operation(workload: Workload, implementation: str, backward: bool) -> TracedProgram:
    """Compile one operation at the sizes of a workload, in its first dtype; a decoding cache is donated."""
    if backward and isinstance(workload, Decode):
        raise ValueError("decode_attention has no backward pass; leave --backward out")
    inputs, state, dout = runner.random_arguments(workload)
    aux = {name: jax.tree.map(jnp.asarray, value) for name, value in workload.integer_inputs().items()}
    forward = jax.named_scope(workload.op)(runner.implementation_function(workload, implementation))
    jitted = jax.jit(runner.build_program(forward, backward), donate_argnums=1)
    compiled = jitted.lower(inputs, state, aux, dout).compile()

    def call(i: int) -> None:
        nonlocal state
        results, state = compiled(inputs, state, aux, dout)
        jax.block_until_ready((results, state))

    passes = "forward and backward" if backward else "forward"
    return TracedProgram(f"{workload.op} {workload.name!r} {implementation}, {passes}", call, compiled.as_text())


def capture(program: TracedProgram, steps: int, out: Path) -> tuple[Path, float]:
    """Trace a program; each call is a step of its own in the trace.

    Returns:
        The trace file, and the seconds that the traced calls took.
    """
    for i in range(WARM_UP):
        program.call(i)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # an event per Python call would hide and slow down the operations
    with jax.profiler.trace(str(out), profiler_options=options):
        start = time.perf_counter()
        for i in range(steps):
            with jax.profiler.StepTraceAnnotation("train", step_num=i):
                program.call(WARM_UP + i)
        seconds = time.perf_counter() - start
    return max(out.glob("plugins/profile/*/*.xplane.pb"), key=lambda path: path.stat().st_mtime), seconds


def analyze(path: Path, program: TracedProgram, steps: int, seconds: float) -> dict[str, Any]:
    """Read the tables of a trace, and add the parts of the model to its file as a plane."""
    data = jax.profiler.ProfileData.from_file(str(path))
    names, spans = profile_report.op_names(program.hlo), profile_report.collect_spans(data)
    with path.open("ab") as file:
        file.write(profile_report.scopes_plane(spans, names))
    num_tracks = len({span.track for span in spans}) or 1
    tables = {
        "operations": profile_report.time_by_operation(spans, names),
        "parts": profile_report.time_by_scope(spans, names),
        "kernels": profile_report.time_by_kernel(data),
    }
    device = jax.devices()[0]
    return {
        "what": program.name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device.device_kind,
        "platform": device.platform,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "steps": steps,
        "step_ms": seconds / steps * 1e3,
        "busy_share": profile_report.busy_ms(spans) / (seconds * 1e3 * num_tracks),
    } | {name: [dataclasses.asdict(row) for row in rows] for name, rows in tables.items()}


def show(result: dict[str, Any], top: int) -> None:
    """Print the tables: a GPU's kernels or else XLA's operations, then the parts of the model."""
    console, steps = Console(), result["steps"]
    console.print(
        f"{result['what']} on {result['device']}, jax {result['jax']}: {steps} steps of {result['step_ms']:.1f} ms, "
        f"operations ran in {result['busy_share']:.0%} of the time",
        highlight=False,
        soft_wrap=True,
    )
    kind = "kernels" if result["kernels"] else "operations"
    table = Table(title=f"top {kind}; ms per step")
    for column in (kind[:-1], "part", "calls", "total ms", "self ms", "share"):
        table.add_column(column, justify="left" if column in (kind[:-1], "part") else "right", overflow="fold")
    for row in result[kind][:top]:
        times = (f"{row[name] / steps:.3f}" for name in ("total_ms", "self_ms"))
        part = row["part"] + (" (backward)" if row["backward_ms"] else "")
        table.add_row(row["name"], part, f"{row['count'] / steps:g}", *times, f"{row['share']:.1%}")
    console.print(table)
    rows = [profile_report.Row(**row) for row in result["parts"]]
    console.print(profile_table.parts_table(rows, steps))


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and trace."""
    return run(parse(sys.argv[1:] if argv is None else argv))


def run(arguments: Arguments) -> int:
    """Trace, print the tables, and print how to view the trace."""
    malloc.tune_glibc_malloc()
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    if arguments.verbose:
        logging.getLogger("dantinox.kernels").setLevel(logging.INFO)
    with cli.one_line_errors(PROG, arguments.verbose):
        program, steps, out = build_program(arguments), arguments.settings.train.steps, Path(arguments.out)
        path, seconds = capture(program, steps, out)
        result = analyze(path, program, steps, seconds)
        summary = Path(arguments.json) if arguments.json else path.with_name("top.json")
        summary.parent.mkdir(parents=True, exist_ok=True)
        summary.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    with contextlib.suppress(BrokenPipeError):
        show(result, arguments.top)
    print(f"trace {path}\ntables {summary}\nlook at it: make tensorboard LOGDIR={out}, or: tensorboard --logdir {out}")
    return 0


if __name__ == "__main__":
    cli.run_main(main)
