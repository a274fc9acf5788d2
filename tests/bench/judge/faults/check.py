"""Does a kernel of the guides keep the error bound, and does every planted fault exceed it?

python -m tests.bench.judge.faults.check [OP...] [--faults NAME...]
"""

import argparse
import functools
import importlib
import time
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dantinox import kernels
from dantinox.kernels.dispatch import Device, target_device
from tests import numpy_interpreter
from tests.bench.judge.faults.problems import PROBLEMS, Problem
from tests.helpers import tolerance

GUIDES = Path(__file__).parents[4] / "docs" / "guides"
FORMS = {"cpu": Device("cpu", "cpu"), "tpu": Device("tpu", "TPU v6 lite")}
Kernel = Callable[..., Any]


def source_of(op: str) -> str:
    """The guide's kernel."""
    return (GUIDES / f"my_{op}.py").read_text(encoding="utf-8")


def load(op: str, source: str) -> Kernel:
    """The function of an operation that a source text defines."""
    module = types.ModuleType("mine")
    exec(compile(source, f"my_{op}.py", "exec"), module.__dict__)
    return getattr(module, op)


def faulty_source(op: str, old: str, new: str) -> str:
    """The guide's kernel with one fault."""
    source = source_of(op)
    if source.count(old) != 1:
        raise ValueError(f"{old!r} occurs {source.count(old)} times in my_{op}.py; allowed: once")
    return source.replace(old, new)


def faults_of(op: str) -> dict[str, tuple[str, str, tuple[str, ...]]]:
    """Name -> (old text, new text, features of which one must be named as wrong)."""
    return importlib.import_module(f"tests.bench.judge.faults.{op}").FAULTS


def violations(op: str, kernel: Kernel, problem: Problem, index: int, forms: Iterable[str] = FORMS) -> list[str]:
    """What exceeds the error bound, or raises, by form; `index` is the problem's place in `PROBLEMS`."""
    run = _decode if op == "decode_attention" else _with_gradients
    lines = []
    for form in forms:
        try:
            found = run(op, kernel, problem, index, form)
        except Exception as error:
            found = [f"{type(error).__name__}: {error}"]
        lines += [f"{form}: {line}" for line in found]
    return lines


def _arrays(problem: Problem, fill: float) -> dict[str, jax.Array]:
    arrays = {}
    for name, x in problem.inputs.items():
        x = x.copy()
        for hidden, at in problem.unseen:
            if hidden == name:
                x[at] = fill
        arrays[name] = jnp.asarray(x, problem.dtype)
    return arrays


def _in_numpy(f: Callable[..., Any], form: str, *args: Any) -> Any:
    with target_device(*FORMS[form]):
        return numpy_interpreter.run(f, *args)


@functools.cache
def _expected(op: str, index: int) -> tuple[Any, Any, Any]:
    problem = PROBLEMS[op][index]
    out = {"attention": "q", "moe_mlp": "x", "grouped_matmul": "x"}[op]
    shape = problem.inputs[out].shape
    if op == "grouped_matmul":
        shape = (shape[0], problem.inputs["w"].shape[2])
    dout = jnp.asarray(np.random.default_rng(index).standard_normal(shape), problem.dtype)
    run = tolerance.program(op, "reference", tuple(problem.options.items())).__wrapped__
    inputs = _arrays(problem, 0)
    aux = jax.tree.map(jnp.asarray, problem.aux)
    plain = _in_numpy(run, "cpu", inputs, aux, dout)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(tolerance.to_float64(x)), (inputs, dout))
        return plain, _in_numpy(run, "cpu", wide[0], aux, wide[1]), dout


def _with_gradients(op: str, kernel: Kernel, problem: Problem, index: int, form: str) -> list[str]:
    plain, exact, dout = _expected(op, index)
    options = dict(problem.options)
    if op == "attention":
        scale = options.pop("scale", problem.inputs["q"].shape[-1] ** -0.5)
        defaults = {"gate": None, "causal": True, "window": None, "softcap": None, "segment_ids": None}
        options = defaults | options | {"scale": scale}
        if options["window"] is not None:
            options["window"] = min(options["window"], problem.inputs["k"].shape[1])

    def call(inputs: dict[str, jax.Array], aux: dict[str, Any]) -> jax.Array:
        names = {"grouped_matmul": ("x", "w"), "moe_mlp": ("x", "w_gate", "w_up", "w_down")}.get(op, ("q", "k", "v"))
        args = [inputs[name] for name in names]
        if op == "grouped_matmul":
            return kernel(*args, aux["group_sizes"])
        if op == "moe_mlp":
            return kernel(*args, aux["expert_ids"], inputs["expert_weights"])
        return kernel(*args, **options | {"gate": inputs.get("gate")} | aux)

    def run(inputs: dict[str, jax.Array], aux: dict[str, Any], dout: jax.Array) -> dict[str, jax.Array]:
        return tolerance.output_and_gradients(lambda inputs: call(inputs, aux), inputs, dout)

    aux = jax.tree.map(jnp.asarray, problem.aux)
    actual = _in_numpy(run, form, _arrays(problem, np.nan), aux, dout)
    return tolerance.bound_violations(actual, plain, exact, problem.dtype)


def _step(inputs: dict[str, jax.Array], length: jax.Array, kernel: Kernel, options: Any) -> dict[str, jax.Array]:
    inputs = dict(inputs)
    cache = kernels.KVCache(inputs.pop("cache_k"), inputs.pop("cache_v"), length)
    o, cache = kernel(inputs.pop("q"), inputs.pop("k"), inputs.pop("v"), cache, **options, **inputs)
    return {"o": o, "cache.k": cache.k, "cache.v": cache.v, "cache.length": cache.length}


def _decode(op: str, kernel: Kernel, problem: Problem, index: int, form: str) -> list[str]:
    options = {"window": None, "softcap": None, "scale": problem.inputs["q"].shape[-1] ** -0.5} | problem.options
    if "gate" not in problem.inputs:
        options["gate"] = None
    length = jnp.asarray(problem.aux["length"])
    reference = functools.partial(_step, kernel=_reference_step, options=options)
    inputs = _arrays(problem, 0)
    plain = _in_numpy(reference, "cpu", inputs, length)
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(tolerance.to_float64(x)) for name, x in inputs.items()}
        exact = _in_numpy(reference, "cpu", wide, length)
    inputs = _arrays(problem, np.nan)
    actual = _in_numpy(functools.partial(_step, kernel=kernel, options=options), form, inputs, length)
    lines = tolerance.bound_violations({"o": actual["o"]}, {"o": plain["o"]}, {"o": exact["o"]}, problem.dtype)
    slot = problem.aux["length"] % inputs["cache_k"].shape[2]
    for name in ("k", "v"):
        expected = np.array(inputs[f"cache_{name}"])
        for b, n in enumerate(slot):
            expected[b, :, n] = inputs[name][b]
        if not np.array_equal(tolerance.to_float64(actual[f"cache.{name}"]), tolerance.to_float64(expected), True):
            lines.append(f"cache.{name}: wrong")
    if not np.array_equal(actual["cache.length"], problem.aux["length"] + 1):
        lines.append("cache.length: wrong")
    return lines


def _reference_step(*args: Any, **options: Any) -> Any:
    from dantinox.reference import decode_attention

    return decode_attention(*args, **options)


def describe(problem: Problem) -> str:
    """The features and sizes of a problem."""
    shapes = " ".join(f"{name}{list(x.shape)}" for name, x in problem.inputs.items())
    return f"{', '.join(sorted(problem.features))}: {shapes} {problem.options}"


def check_parity(op: str) -> int:
    """Print what exceeds the bound; returns the number of such problems."""
    kernel, failures = load(op, source_of(op)), 0
    for index, problem in enumerate(PROBLEMS[op]):
        if lines := violations(op, kernel, problem, index):
            failures += 1
            print("WRONG", describe(problem), *lines, sep="\n    ", flush=True)
    print(f"{op}: {failures} of {len(PROBLEMS[op])} problems exceed the error bound", flush=True)
    return failures


def detected(op: str, name: str) -> str:
    """The first problem with one of a fault's features on which it exceeds the bound; "" if there is none."""
    old, new, features = faults_of(op)[name]
    kernel = load(op, faulty_source(op, old, new))
    chosen = [(i, p) for i, p in enumerate(PROBLEMS[op]) if p.features.intersection(features)]
    for index, problem in sorted(chosen, key=lambda pair: pair[1].inputs[min(pair[1].inputs)].size):
        if lines := violations(op, kernel, problem, index, ("tpu",)) or violations(
            op, kernel, problem, index, ("cpu",)
        ):
            return f"{describe(problem)} {[line[:70] for line in lines[:4]]}"
    return ""


def main() -> int:
    """Check parity, or the faults."""
    parser = argparse.ArgumentParser()
    parser.add_argument("ops", nargs="*", default=list(PROBLEMS))
    parser.add_argument("--faults", nargs="*")
    arguments = parser.parse_args()
    failures = 0
    for op in arguments.ops or PROBLEMS:
        start = time.perf_counter()
        if arguments.faults is None:
            failures += check_parity(op)
        else:
            for name in arguments.faults or faults_of(op):
                found = detected(op, name)
                failures += not found
                print(f"{op} / {name}: {found or 'NOT DETECTED'}", flush=True)
        print(f"{op}: {time.perf_counter() - start:.0f} s")
    return int(failures > 0)


if __name__ == "__main__":
    raise SystemExit(main())
