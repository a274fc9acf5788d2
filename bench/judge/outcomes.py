"""Run one case in all forms and compare each result with the reference by the rule of the tests."""

import traceback
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from bench.judge import cases, forms, pictures
from bench.judge.cases import AXES, Case, Problem, axes_of
from bench.judge.forms import Results
from bench.verification import error_bound, wrong_places

# States of a result, and of a form as a whole.
OK, WRONG, REFUSED, NO_KERNEL, NO_GRADIENT, FAILED = "ok", "wrong", "refused", "no kernel", "no gradient", "failed"


class Outcome(NamedTuple):
    """What became of one case in one form.

    Attributes:
        case: the case.
        form: one of `forms.DEVICES`.
        states: the state of each result by name.
        lines: for each wrong result, where it is wrong; for the others that are not ok, under "", the reason.
        picture: the tiles, with the wrong ones marked, or "".
    """

    case: Case
    form: str
    states: dict[str, str]
    lines: dict[str, str]
    picture: str = ""


def judge(op: str, implementation: str, chosen_forms: tuple[str, ...], case: Case) -> list[Outcome]:
    """Run one case in the forms that are chosen and compare."""
    problem, plain, exact = prepare(op, case)
    return [_judge_form(op, implementation, form, case, problem, plain, exact) for form in chosen_forms]


def prepare(op: str, case: Case) -> tuple[Problem, Results, Results]:
    """Return the arrays of a case and what `forms.expected` makes of them."""
    problem = cases.draw(case)
    return problem, *forms.expected(op, case, problem)


def _judge_form(
    op: str, implementation: str, form: str, case: Case, problem: Problem, plain: Results, exact: Results
) -> Outcome:
    names, missing = [name for name in AXES[op] if name in exact], {}

    def all_are(state: str, error: BaseException) -> Outcome:
        return Outcome(case, form, _with_scales(dict.fromkeys(names, state)), {"": _message(error)})

    try:
        try:
            actual = forms.run(op, implementation, form, case, problem)
        except forms.NoGradientError as error:
            missing = {name: NO_GRADIENT for name in names if name != "o"}
            lines = {"": _message(error)}
            actual = forms.run(op, implementation, form, case, problem, gradients=False)
        else:
            lines = {}
    except NotImplementedError as error:
        return all_are(REFUSED, error)
    except forms.NoKernelError as error:
        return all_are(NO_KERNEL, error)
    except Exception as error:  # a kernel may raise anything
        return all_are(FAILED, error)
    computed = [name for name in names if name in actual]
    wrong = {name: _difference(op, name, case, actual[name], plain[name], exact[name]) for name in computed}
    lines |= {name: line for name, line in wrong.items() if line}
    states = {name: missing.get(name, WRONG if wrong.get(name) else OK) for name in names}
    states = _with_scales(states)
    picture = ""
    if WRONG in states.values():
        # Pictures of o and dv show tiles of queries and keys.
        shown = next(name for name in ("o", "dv", *names) if states.get(name) == WRONG)
        picture = pictures.draw(op, implementation, form, case, problem, shown, actual, exact)
    return Outcome(case, form, states, lines, picture)


def _with_scales(states: dict[str, str]) -> dict[str, str]:
    """Count the scales of an 8-bit cache as parts of its keys and values."""
    merged: dict[str, str] = {}
    for name, state in states.items():
        part = name.removesuffix("_scale")
        merged[part] = merged[part] if merged.get(part) == WRONG else state
    return merged


def _difference(op: str, name: str, case: Case, actual: Any, plain: Any, exact: Any) -> str:
    """Return where a result breaks the rule, or ""."""
    actual, exact = np.asarray(actual), np.asarray(exact)
    if actual.shape != exact.shape or actual.dtype != plain.dtype:
        return f"{actual.dtype}{list(actual.shape)}, not {plain.dtype}{list(exact.shape)}"
    axes = axes_of(op, name, exact.ndim)
    if name.startswith("cache") or name == "length":
        return _stored_difference(actual, exact, axes)
    plain_error, ulp = error_bound.error_terms(name, plain, error_bound.to_float64(exact), case.dtype)
    # The rule of the tests; in float32 plain jnp runs in NumPy, whose sums are twice as exact as those of a program.
    allowed = 4 * plain_error + 2 * ulp if case.dtype == "float32" else 2 * plain_error + ulp
    error = np.abs(error_bound.to_float64(actual) - error_bound.to_float64(exact)).max(initial=0)
    if error <= allowed:  # false for NaN
        return ""
    return wrong_places.describe(actual, exact, allowed, error_bound.ROW_AXIS.get(exact.ndim), axes)


def _stored_difference(actual: np.ndarray, exact: np.ndarray, axes: str) -> str:
    """Compare what decoding stored: exactly, but for the rounding of values of 8 bits and of their scales."""
    x, y = error_bound.to_float64(actual), error_bound.to_float64(exact)
    unit = np.zeros_like(y)
    if actual.dtype == np.int8:
        unit += 1
    elif actual.dtype == jnp.float8_e4m3fn:
        unit += 2.0**-3 * np.abs(y) + 2.0**-9
    elif axes == "BKC":  # scales
        unit += 2.0**-20 * np.abs(y)
    wrong = ~(np.abs(x - y) <= unit) & ~(np.isnan(x) & np.isnan(y))
    if not wrong.any():
        return ""
    return wrong_places.describe(np.where(wrong, x, y), y, 0.0, 2 if exact.ndim > 2 else None, axes)


def _message(error: BaseException) -> str:
    """Return the error, whole, with the line of the kernel's file that raised it."""
    if isinstance(error, NotImplementedError | forms.NoKernelError | forms.NoGradientError):
        return str(error) or type(error).__name__
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
    place = f" ({frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"
