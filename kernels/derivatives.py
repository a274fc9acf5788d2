"""The order of derivatives that an implementation has."""

from collections.abc import Callable
from typing import Any

import jax


def first_order[**P, R](f: Callable[P, R], op: str, implementation: str = "pallas") -> Callable[P, R]:
    """Return f, which refuses to be differentiated by one sentence.

    The kernels of a `jax.custom_vjp` function (its forward pass with residuals, its backward pass) are only
    differentiated for a second derivative, and the error of a `pallas_call` does not say so.

    Args:
        f: a function of arrays, in any structure, that calls a kernel; static values are bound to it.
        op: name of the operation.
        implementation: name of the implementation.
    """
    refusing = jax.custom_jvp(f)

    @refusing.defjvp
    def refuse(primals: Any, tangents: Any) -> Any:
        raise NotImplementedError(
            f"{op}: implementation={implementation!r} has no second derivative; implementation='xla' has one"
        )

    return refusing
