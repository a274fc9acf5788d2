"""Where the time goes: `python -m bench.profile` traces training steps, or with --op one operation.

Two calls that compile and warm up come first and are not traced. The trace lies in --out for TensorBoard; the tables
printed here are kept beside it in top.json.
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
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jaxlib
from rich.console import Console
from rich.table import Table

from bench import runner
from dantinox import cli, kernels
from dantinox.cli.train import Trainer
from dantinox.config import Config, presets
from dantinox.kernels import workloads
from dantinox.kernels.workloads.types import Decode, Workload
from dantinox.system import malloc
from dantinox.training import profile_report

PROG = "bench.profile"
STEPS, WARM_UP = 5, 2
Implementation = Literal[kernels.implementation_names(*kernels.OPERATIONS)]


@dataclass(frozen=True)
class Arguments:
    """What to trace. The settings of training are flags too, --attn and --moe among them; --steps counts the calls."""

    settings: Config
    preset: str | None = None
    """Settings of the training to trace; flags are laid over them."""
    op: str | None = None
    """Trace this operation alone, at the sizes of --spec."""
    spec: str | None = None
    """A row of the operation in kernels/workloads/."""
    implementation: Implementation = "auto"
    """Implementation of --op."""
    backward: bool = False
    """The gradients of --op too."""
    out: str = "runs/profile"
    """Folder of the traces."""
    json: str | None = None
    """Where to write the tables; None: top.json beside the trace."""
    top: int = 20
    """Operations to show."""
    verbose: bool = False
    """Say which implementations were chosen, and show tracebacks."""


@dataclass(frozen=True)
class TracedProgram:
    """Something to trace: `call(i)` runs it once and waits for it; `hlo` is the compiled program's text."""

    name: str
    call: Callable[[int], Any]
    hlo: str


def parse(argv: Sequence[str]) -> Arguments:
    """Settings from the preset, then flags."""
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


def workload(arguments: Arguments) -> TracedProgram:
    """What the arguments ask for, compiled.

    Raises:
        ValueError: there is no such operation or row, or the flags do not go together.
    """
    if arguments.top < 1:
        raise ValueError(f"top is {arguments.top}; allowed: 1 or more")
    if arguments.op is None:
        for name in ("spec", "backward"):
            if getattr(arguments, name):
                raise ValueError(f"--{name} is about one operation; add --op")
        return training(arguments.settings, arguments.preset or "nano")
    if arguments.preset is not None:
        raise ValueError("--preset is about training and --op about one operation; give one of them")
    allowed = sorted({row.op for row in workloads.ROWS})
    if arguments.op not in allowed:
        raise ValueError(f"op is {arguments.op!r}; allowed: {', '.join(allowed)}")
    spec = workloads.get(arguments.op, arguments.spec or "")
    return operation(spec, arguments.implementation, arguments.backward)


def training(config: Config, name: str) -> TracedProgram:
    """Training steps on the data that the settings name."""
    trainer = Trainer(config)
    state = trainer.init_state()
    compiled = trainer.step.lower(state, *trainer.batch(0), jnp.int32(0)).compile()

    def call(i: int) -> None:
        nonlocal state
        state, _ = compiled(state, *trainer.batch(i), jnp.int32(i))
        jax.block_until_ready(state)

    return TracedProgram(f"training {name}", call, compiled.as_text())


def operation(spec: Workload, implementation: str, backward: bool) -> TracedProgram:
    """One operation at one row's sizes, in the row's first dtype; a decoding cache is donated and handed on."""
    if backward and isinstance(spec, Decode):
        raise ValueError("decode_attention has no backward pass; leave --backward out")
    inputs, state, dout = runner.arguments(spec)
    aux = {name: jax.tree.map(jnp.asarray, value) for name, value in spec.integer_inputs().items()}
    forward = jax.named_scope(spec.op)(runner.ours(spec, implementation))
    program = jax.jit(runner.program(forward, backward), donate_argnums=1)
    compiled = program.lower(inputs, state, aux, dout).compile()

    def call(i: int) -> None:
        nonlocal state
        results, state = compiled(inputs, state, aux, dout)
        jax.block_until_ready((results, state))

    passes = "forward and backward" if backward else "forward"
    return TracedProgram(f"{spec.op} {spec.name!r} {implementation}, {passes}", call, compiled.as_text())


def capture(work: TracedProgram, steps: int, out: Path) -> tuple[Path, float]:
    """(the trace file, seconds that the traced calls took). Each call is a step of its own in the trace."""
    for i in range(WARM_UP):
        work.call(i)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # one event for each Python call would bury, and slow down, what is looked for
    with jax.profiler.trace(str(out), profiler_options=options):
        start = time.perf_counter()
        for i in range(steps):
            with jax.profiler.StepTraceAnnotation("train", step_num=i):
                work.call(WARM_UP + i)
        seconds = time.perf_counter() - start
    return max(out.glob("plugins/profile/*/*.xplane.pb"), key=lambda path: path.stat().st_mtime), seconds


def read(path: Path, work: TracedProgram, steps: int, seconds: float) -> dict[str, Any]:
    """The tables of a trace, to which the parts of the model are added as a plane of its own."""
    data = jax.profiler.ProfileData.from_file(str(path))
    names, found = profile_report.op_names(work.hlo), profile_report.collect_spans(data)
    with path.open("ab") as file:
        file.write(profile_report.scopes_plane(found, names))
    tracks = len({span.track for span in found}) or 1
    tables = {
        "operations": profile_report.time_by_operation(found, names),
        "parts": profile_report.time_by_scope(found, names),
        "kernels": profile_report.time_by_kernel(data),
    }
    device = jax.devices()[0]
    return {
        "what": work.name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device.device_kind,
        "platform": device.platform,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "steps": steps,
        "step_ms": seconds / steps * 1e3,
        "busy_share": profile_report.busy_ms(found) / (seconds * 1e3 * tracks),
    } | {name: [dataclasses.asdict(row) for row in rows] for name, rows in tables.items()}


def show(result: dict[str, Any], top: int) -> None:
    """Print the tables: kernels where a GPU ran them, else XLA's operations; then the parts of the model."""
    console, steps = Console(), result["steps"]
    console.print(
        f"{result['what']} on {result['device']}, jax {result['jax']}: {steps} steps of {result['step_ms']:.1f} ms, "
        f"operations ran in {result['busy_share']:.0%} of the time",
        highlight=False,
        soft_wrap=True,
    )
    kind = "kernels" if result["kernels"] else "operations"
    table = Table(title=f"top {kind}; ms a step")
    for column in (kind[:-1], "part", "calls", "total ms", "self ms", "share"):
        table.add_column(column, justify="left" if column in (kind[:-1], "part") else "right", overflow="fold")
    for row in result[kind][:top]:
        times = (f"{row[name] / steps:.3f}" for name in ("total_ms", "self_ms"))
        part = row["part"] + (" (backward)" if row["backward_ms"] else "")
        table.add_row(row["name"], part, f"{row['count'] / steps:g}", *times, f"{row['share']:.1%}")
    console.print(table)
    table = Table(title="parts, all blocks together; ms a step")
    for column in ("part", "ms", "of it backward", "share"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for row in result["parts"]:
        times = (f"{row[name] / steps:.3f}" for name in ("self_ms", "backward_ms"))
        table.add_row(row["name"], *times, f"{row['share']:.1%}")
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and trace."""
    return run(parse(sys.argv[1:] if argv is None else argv))


def run(arguments: Arguments) -> int:
    """Trace, print the tables and say how to look at the trace."""
    malloc.tune_glibc_malloc()
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    if arguments.verbose:
        logging.getLogger("kernels").setLevel(logging.INFO)
    with cli.one_line_errors(PROG, arguments.verbose):
        work, steps, out = workload(arguments), arguments.settings.train.steps, Path(arguments.out)
        path, seconds = capture(work, steps, out)
        result = read(path, work, steps, seconds)
        summary = Path(arguments.json) if arguments.json else path.with_name("top.json")
        summary.parent.mkdir(parents=True, exist_ok=True)
        summary.write_text(json.dumps(result, indent=1) + "\n")
    with contextlib.suppress(BrokenPipeError):
        show(result, arguments.top)
    print(f"trace {path}\ntables {summary}\nlook at it: make tensorboard LOGDIR={out}, or: tensorboard --logdir {out}")
    return 0


if __name__ == "__main__":
    cli.run_main(main)
