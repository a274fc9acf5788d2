"""Which programs are compiled: rows of `dantinox.kernels.workloads`, implementations, directions."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bench.aot import hardware
from dantinox import kernels
from dantinox.kernels import workloads

OPERATIONS = ("attention", "grouped_matmul", "moe_mlp", "decode_attention")
DIRECTIONS = ("forward", "both")  # both: forward and backward, by jax.vjp

# What CI compiles: one of each kind of program, in a minute. (op, spec, implementations, direction)
SHORT = (
    ("attention", "aot d128 causal", ("pallas", "jax_mgpu", "splash"), "forward"),
    ("grouped_matmul", "aot E=8 uniform", ("pallas", "xla"), "forward"),
    ("moe_mlp", "aot top 2 of 8", ("pallas",), "forward"),
    ("decode_attention", "aot ring", ("pallas", "xla"), "forward"),
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
        """Its name in a profile."""
        return f"{self.op} / {self.spec} / {self.implementation} / {self.dtype} / {self.direction}"

    def program(self) -> tuple:
        """What the compiler sees of it: rows that differ only in the values of their arrays are one program."""
        workload = workloads.get(self.op, self.spec)
        sizes = dataclasses.asdict(workload)
        for name in ("name", "suites", "devices", "dtypes", "sweep", "skew", "sizes", "lengths"):
            sizes.pop(name, None)
        batch = len(getattr(workload, "lengths", ()))
        return (self.op, self.implementation, self.dtype, self.direction, batch, tuple(sorted(sizes.items(), key=str)))

    def roofline_seconds(self, target: hardware.Target) -> float:
        """No implementation takes less."""
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
    """The programs for a target, those of the smallest rows first; empty filters mean all.

    Raises:
        ValueError: a filter holds a name that nothing has.
    """
    from bench.aot import baselines  # it imports jax, which the check of a command line need not

    known_specs = {row.name for op in OPERATIONS for m in ("h100", "tpu") for row in workloads.select(op, "aot", m)}
    for what, given, known in (
        ("op", ops, OPERATIONS),
        ("spec", names, sorted(known_specs)),
        (
            "implementation",
            implementations,
            (*dict.fromkeys(n for op in OPERATIONS for n in ours(op)), *baselines.PEERS),
        ),
    ):
        for name in given:
            if name not in known:
                raise ValueError(f"{what} is {name!r}; allowed: {', '.join(known)}")
    taken = lambda op: {name: peer.takes(op) for name, peer in baselines.PEERS.items()}
    found = [
        case for op in ops or OPERATIONS for case in _of_op(op, target, baselines.names(op, target.name), taken(op))
    ]
    if short:
        found = [c for c in found if any(_in_short(c, row) for row in SHORT)]
    found = [
        case
        for case in found
        if (not names or case.spec in names) and (not implementations or case.implementation in implementations)
    ]
    # The features at small sizes come first: a run that is cut short has seen every kernel.
    return sorted(found, key=lambda case: not case.spec.startswith("aot "))


def ours(op: str) -> tuple[str, ...]:
    """The implementations of an operation that are compiled: all in its table but the specification."""
    return tuple(name for name in kernels.implementation_names(op) if name not in ("auto", "reference"))


def _of_op(
    op: str, target: hardware.Target, peer_names: Sequence[str], accepted: Mapping[str, Sequence[str]]
) -> Iterator[Case]:
    """All programs of an operation; `accepted` has the dtypes that a peer takes."""
    directions = DIRECTIONS[:1] if op == "decode_attention" else DIRECTIONS
    for row in workloads.select(op, "aot", target.machine):
        for implementation in (*ours(op), *peer_names):
            dtypes = [dtype for dtype in row.dtypes if dtype in target.flops]
            # Another dtype of the same width shows nothing new, except in a kernel whose every instruction is chosen.
            if implementation == "xla" or implementation in peer_names:
                dtypes = _first(dtypes, accepted.get(implementation, dtypes))
            for dtype in dtypes:
                for direction in directions:
                    yield Case(op, row.name, implementation, dtype, direction)


def _first(dtypes: Sequence[str], accepted: Sequence[str]) -> list[str]:
    """The first dtype that is accepted; where none is, the first, to be refused with a reason."""
    return [*(dtype for dtype in dtypes if dtype in accepted), *dtypes][:1]


def _in_short(case: Case, row: tuple[str, str, tuple[str, ...], str]) -> bool:
    op, name, implementations, direction = row
    return (
        (case.op, case.spec, case.direction) == (op, name, direction)
        and case.implementation in implementations
        and (case.dtype == "bfloat16" or case.implementation not in ours(op))
    )
