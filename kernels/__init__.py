"""The operations of DantinoX, each behind one signature with several implementations.

    attention          sliding-window gated grouped-query attention
    merge_attention    merge attention to two parts of the keys
    grouped_matmul     rows sorted by group, each times its group's matrix
    moe_mlp            dropless mixture of SwiGLU experts
    decode_attention   append one token, or a few, to a key/value ring and attend, in place
    rewind             take the last tokens of a ring back
    linear_cross_entropy    the loss of a projection to a vocabulary, without its logits
    implementations    which implementations of an operation can run here, and why each other one cannot
    unsupported_reason      the same of one implementation
    implementation_names    allowed values of `implementation`: "auto" and the names of the operation's implementations
    register                add an implementation of your own
    compose_moe_mlp         make an implementation of moe_mlp from a grouped matmul

`implementation="auto"` chooses; any other name runs that implementation or raises `NotImplementedError`.
"""

from collections.abc import Callable
from typing import Any

from dantinox.kernels import registry
from dantinox.kernels.dispatch import IMPLEMENTATION_NAMES, OPERATIONS, Operation
from dantinox.kernels.ops.attention.api import OPERATION as _ATTENTION
from dantinox.kernels.ops.attention.api import attention
from dantinox.kernels.ops.attention.lse import merge_attention
from dantinox.kernels.ops.decode_attention.api import OPERATION as _DECODE_ATTENTION
from dantinox.kernels.ops.decode_attention.api import KVCache, decode_attention
from dantinox.kernels.ops.decode_attention.kv_cache import rewind
from dantinox.kernels.ops.grouped_matmul.api import OPERATION as _GROUPED_MATMUL
from dantinox.kernels.ops.grouped_matmul.api import grouped_matmul
from dantinox.kernels.ops.linear_cross_entropy.api import OPERATION as _LINEAR_CROSS_ENTROPY
from dantinox.kernels.ops.linear_cross_entropy.api import linear_cross_entropy
from dantinox.kernels.ops.moe.api import OPERATION as _MOE_MLP
from dantinox.kernels.ops.moe.api import moe_mlp
from dantinox.kernels.ops.moe.compose import compose_moe_mlp

__all__ = [
    "IMPLEMENTATION_NAMES",
    "OPERATIONS",
    "KVCache",
    "attention",
    "compose_moe_mlp",
    "decode_attention",
    "grouped_matmul",
    "implementation_names",
    "implementations",
    "linear_cross_entropy",
    "merge_attention",
    "moe_mlp",
    "register",
    "rewind",
    "unsupported_reason",
]

_REGISTRY = {
    operation.name: operation
    for operation in (_ATTENTION, _GROUPED_MATMUL, _MOE_MLP, _DECODE_ATTENTION, _LINEAR_CROSS_ENTROPY)
}


def _get_operation(op: str) -> Operation:
    if op not in tuple(_REGISTRY):
        raise ValueError(f"op is {op!r}; allowed: {', '.join(_REGISTRY)}")
    return _REGISTRY[op]


def implementations(op: str) -> dict[str, str | None]:
    """Return why the current device cannot run each implementation of an operation, or None if it can.

    Raises:
        ValueError: `op` is not one of the operations.
    """
    return _get_operation(op).unsupported_reasons()


def unsupported_reason(op: str, implementation: str) -> str | None:
    """Return why the current device cannot run one implementation of an operation, or None if it can.

    Raises:
        ValueError: `op` is not one of the operations, or has no implementation of this name.
    """
    return _get_operation(op).unsupported_reason(implementation)


def implementation_names(*ops: str) -> tuple[str, ...]:
    """Return the allowed values of `implementation` in any of these operations; starts no JAX backend."""
    return tuple(dict.fromkeys(name for op in ops for name in _get_operation(op).names()))


def register(op: str, name: str, f: Callable[..., Any] | str) -> None:
    """Add an implementation to an operation, in this process.

    A registered grouped matmul also serves `moe_mlp` under its name, by `compose_moe_mlp`, unless another one is
    registered there. "auto" never chooses what is registered. A second registration of a name replaces the first, and
    drops JAX's compiled programs, which may contain it.

    Args:
        op: attention, grouped_matmul, moe_mlp, decode_attention or linear_cross_entropy.
        name: the value of `implementation` that selects it, such as "mine".
        f: takes the operation's arguments after their checks, all but `implementation`, and computes its result with
            its gradients; it raises NotImplementedError for what it does not support. Or its path as
            "package.module:function", which is imported at the first call.

    Raises:
        ValueError: `op` is not one of the operations, `name` is not a word or belongs to a built-in implementation, or
            `f` is neither a function nor a path.
    """
    registry.register(op, name, f, _get_operation(op).built_in_names())
