"""Run an operation's Hopper kernels with two thread blocks, so that each takes several tiles."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from bench.verification import race_detector


def run_on_two_blocks(
    operation: Callable[..., Any], inputs: dict, aux: dict, dout: Any, **options: Any
) -> dict[str, Any]:
    """Compute the output and the gradients of a Hopper operation with two thread blocks."""
    o, pull = jax.vjp(lambda x: operation(**x, **aux, blocks=2, **options), inputs)
    return {"o": o} | {f"d{name}": gradient for name, gradient in pull(dout.astype(o.dtype))[0].items()}


def run_two_blocks_checked(
    operation: Callable[..., Any], width: int | None, inputs: dict, aux: dict, dout: Any
) -> dict[str, Any]:
    """`run_on_two_blocks` on a simulated GPU; fails on a race, an invalid read or uninitialized memory."""
    findings = race_detector.on_gpu(functools.partial(run_on_two_blocks, operation, width=width), inputs, aux, dout)
    assert findings.clean, findings
    return findings.result
