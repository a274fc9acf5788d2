"""Which forms an implementation has, found by tracing it for each device."""

import dataclasses
import importlib.util
from typing import Any

import jax

from bench.judge import cases, forms
from bench.judge.cases import Case
from dantinox.kernels import workloads
from dantinox.kernels.dispatch import target_device


def forms_of(op: str, implementation: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return (the forms to judge, why each other one is not judged)."""
    found, absent = [], {}
    small = simulated_cases(op)[0]
    for form in ("CPU", "TPU", "Hopper", "Triton"):
        reason = _reason(op, implementation, form, small)
        if reason is not None and form == "CPU":
            reason = _reason(op, implementation, form, cases.cases(op)[0])
        if reason is None and form == "Triton" and importlib.util.find_spec("triton") is None:
            reason = "triton is not installed; `make setup EXTRAS='dev triton'` brings it"
        if reason is None:
            found.append(form)
        else:
            absent[form] = reason
    if not found:  # its reasons are worth a report
        found, _ = ["CPU"], absent.pop("CPU")
    return tuple(found), absent


def _reason(op: str, implementation: str, form: str, case: Case) -> str | None:
    """Return why an implementation has no kernel in a form, or refuses a case in it, or None."""
    problem = cases.draw(case)
    f = forms.program(op, implementation, case.workload, gradients=False)
    with target_device(*forms.DEVICES[form]):
        try:
            jaxpr = jax.make_jaxpr(lambda *args: f(*args))(*forms.arguments(case, problem))
            if form != "CPU":
                forms.require_kernel(form, jaxpr)
        except (NotImplementedError, forms.NoKernelError) as error:
            return str(error)
        except Exception as error:
            if form != "CPU":  # there, the cases show the error
                return f"traced for {forms.DEVICES[form].kind}: {type(error).__name__}: {error}"
    return None


def simulated_cases(op: str) -> list[Case]:
    """Return cases at sizes that a simulator of a GPU runs in seconds, in bfloat16; each has several features."""

    def row(name: str, *, poisoned: bool = False, **sizes: Any) -> Case:
        kinds = {
            "attention": {"D": 64},
            "decode_attention": {"D": 64, "C": 136},
            "linear_cross_entropy": {"M": 64, "V": 200},
        }
        kind = kinds.get(op, {"M": 64, "F": 128})
        workload = dataclasses.replace(
            workloads.get(op, f"features: {name}"), name=f"simulated: {name}", **kind | sizes
        )
        return Case(workload, "bfloat16", poisoned)

    if op == "attention":
        return [
            row("window", T=130, S=230, window=70, H=4, gate="elementwise", poisoned=True),
            row("full", T=200, S=130, gate="head"),
            row("segments", T=200, S=200, softcap=2.0, B=2),
            row("several tiles", T=200, S=200, scale=0.5),
            row("sinks", T=100, S=130),
        ]
    if op == "grouped_matmul":
        return [
            row("uneven groups", N=130, sizes=(70, 1, 50, 9)),
            row("empty groups, rows past the sum", N=130, sizes=(0, 64, 3, 0), M=128, F=256, poisoned=True),
        ]
    if op == "moe_mlp":
        names = ("experts without tokens", "top 1, uneven groups")
        return [row(name, N=70, poisoned="without" in name) for name in names]
    if op == "linear_cross_entropy":
        return [
            row("soft cap, rows without part", N=130, poisoned=True),
            row("z-loss, rows without part", N=70, V=300, poisoned=True),
        ]
    return [
        row("part-filled ring", lengths=(50, 70, 130), H=4, gate="head", poisoned=True),
        row("ragged lengths", lengths=(0, 63, 64, 136, 300), window=70, gate="elementwise", poisoned=True),
        row("wrapped ring", lengths=(137, 200, 271), softcap=2.0, scale=0.5),
        row("sinks", lengths=(0, 200), H=4, K=2),
    ]
