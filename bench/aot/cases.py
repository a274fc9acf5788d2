"""The programs that are compiled: workloads x implementations x dtypes x directions."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bench.aot import hardware
from dantinox import kernels
from dantinox.kernels import workloads

OPERATIONS = ("attention", "grouped_matmul", "moe_mlp", "decode_attention", "linear_cross_entropy")
DIRECTIONS = ("forward", "both")  # both: forward and backward, by jax.vjp

# (op, workload, implementations, direction) of what CI compiles: one of each kind of program, in a minute
SHORT = (
    ("attention", "aot d128 causal", ("pallas", "jax_mgpu", "splash"), "forward"),
    ("grouped_matmul", "aot E=8 uniform", ("pallas", "xla"), "forward"),
    ("moe_mlp", "aot top 2 of 8", ("pallas",), "forward"),
    ("decode_attention", "aot ring", ("pallas", "xla"), "forward"),
    ("linear_cross_entropy", "aot V=32000", ("pallas", "xla"), "forward"),
)
SHORT_TARGETS = ("h100", "v6e")


@dataclass(frozen=True)
class Case:
    """One program for one target."""

    op: str
    spec: str
    implementation: str
    dtype: str
    direction: str

    @property
    def key(self) -> str:
        """The program's key in a profile."""
        return f"{self.op} / {self.spec} / {self.implementation} / {self.dtype} / {self.direction}"

    def is_main(self) -> bool:
        """Whether this is one of the rows that are compiled by default for an implementation that is not built in."""
        return self.dtype == "bfloat16" and any((self.op, self.spec) == row[:2] for row in SHORT)

    def program(self) -> tuple:
        """What the compiler sees: workloads that differ only in the values of their arrays are one program."""
        workload = workloads.get(self.op, self.spec)
        sizes = dataclasses.asdict(workload)
        for name in ("name", "suites", "devices", "dtypes", "sweep", "skew", "sizes", "lengths"):
            sizes.pop(name, None)
        batch = len(getattr(workload, "lengths", ()))
        return (self.op, self.implementation, self.dtype, self.direction, batch, tuple(sorted(sizes.items(), key=str)))

    def roofline_seconds(self, target: hardware.Target) -> float:
        """Lower bound on the time of any implementation."""
        workload = workloads.get(self.op, self.spec)
        work = workload.cost()
        if self.direction == "both":
            work = work + workload.cost(backward=True)
        return target.seconds(work.flops, work.bytes, self.dtype)


def cases(
    target: hardware.Target,
    *,
    ops: Sequence[str] = (),
    names: Sequence[str] = (),
    implementations: Sequence[str] = (),
    short: bool = False,
) -> list[Case]:
    """List the programs for a target, those of the smallest workloads first.

    Args:
        target: the accelerator.
        ops: operations to include; empty: all.
        names: workloads to include; empty: all.
        implementations: implementations to include; empty: all.
        short: only the programs of `SHORT`.

    Raises:
        ValueError: a name is unknown.
    """
    from bench.aot import baselines  # it imports jax, which checking a command line must not

    known_specs = {row.name for op in OPERATIONS for m in ("h100", "tpu") for row in workloads.select(op, "aot", m)}
    for argument, given, known in (
        ("op", ops, OPERATIONS),
        ("spec", names, sorted(known_specs)),
        (
            "implementation",
            implementations,
            (*dict.fromkeys(n for op in OPERATIONS for n in compiled_implementations(op)), *baselines.BASELINES),
        ),
    ):
        for name in given:
            if name not in known:
                other = "; that of another package, where it is installed in .venv-aot" * (argument == "implementation")
                raise ValueError(f"{argument} is {name!r}; allowed: {', '.join(known)}{other}")
    chosen: list[Case] = []
    for op in ops or OPERATIONS:
        for name in compiled_implementations(op):
            if name in baselines.BASELINES and (not implementations or name in implementations):
                raise ValueError(f"{name!r} names an implementation of {op} and a public kernel; rename it")
        dtypes = {name: baselines.BASELINES[name].dtypes_of(op) for name in baselines.names(op, target.name)}
        chosen += _cases_of(op, target, dtypes)
    if short:
        chosen = [case for case in chosen if any(_in_short(case, row) for row in SHORT)]
    chosen = [
        case
        for case in chosen
        if (not names or case.spec in names) and (not implementations or case.implementation in implementations)
    ]
    # Small sizes with every feature come first: a run that is cut short has compiled every kernel.
    return sorted(chosen, key=lambda case: not case.spec.startswith("aot "))


def compiled_implementations(op: str) -> tuple[str, ...]:
    """List our implementations of an operation but the reference, which is not compiled."""
    return tuple(name for name in kernels.implementation_names(op) if name not in ("auto", "reference"))


def _cases_of(op: str, target: hardware.Target, baseline_dtypes: Mapping[str, Sequence[str]]) -> Iterator[Case]:
    """Yield all programs of an operation.

    Args:
        op: the operation.
        target: the accelerator.
        baseline_dtypes: the public kernels of the operation on this target, and the dtypes that each supports.

    Yields:
        The programs, workload by workload.
    """
    directions = DIRECTIONS[:1] if op == "decode_attention" else DIRECTIONS
    for row in workloads.select(op, "aot", target.machine):
        for implementation in (*compiled_implementations(op), *baseline_dtypes):
            dtypes = [dtype for dtype in row.dtypes if dtype in target.flops]
            # Another dtype of the same width only matters in our own kernels.
            if implementation == "xla" or implementation in baseline_dtypes:
                dtypes = _first_supported(dtypes, baseline_dtypes.get(implementation, dtypes))
            for dtype in dtypes:
                for direction in directions:
                    yield Case(op, row.name, implementation, dtype, direction)


def _first_supported(dtypes: Sequence[str], supported: Sequence[str]) -> list[str]:
    """The first dtype that is supported; the first of all if none is, to be refused with a reason."""
    return [*(dtype for dtype in dtypes if dtype in supported), *dtypes][:1]


def _in_short(case: Case, row: tuple[str, str, tuple[str, ...], str]) -> bool:
    op, name, implementations, direction = row
    return (
        (case.op, case.spec, case.direction) == (op, name, direction)
        and case.implementation in implementations
        and (case.dtype == "bfloat16" or case.implementation not in compiled_implementations(op))
    )
