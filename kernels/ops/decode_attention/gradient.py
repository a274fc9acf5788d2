"""Decode attention serves inference: its kernels have no gradient, and say so."""

from collections.abc import Callable
from typing import Any

import jax


def without_gradient[**P, R](kernel: Callable[P, R]) -> Callable[P, R]:
    """Return a kernel, a function of arrays, that refuses to be differentiated by one sentence."""
    refusing = jax.custom_jvp(kernel)

    @refusing.defjvp
    def refuse(primals: Any, tangents: Any) -> Any:
        raise NotImplementedError(
            "decode_attention: implementation='pallas' has no gradient; implementation='xla' has one"
        )

    return refusing
