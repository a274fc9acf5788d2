"""The operations of DantinoX, each behind one signature with several implementations.

    attention          sliding-window gated grouped-query attention
    grouped_matmul     rows sorted by group, each times its group's matrix
    moe_mlp            dropless mixture of SwiGLU experts
    decode_attention   append one token to a key/value ring and attend, in place
    implementations    which implementations of an operation can run here, and why each other one cannot
    implementation_names    allowed values of `implementation`: "auto" and the names in the operation's table

`implementation="auto"` chooses; any other name runs that implementation or raises `NotImplementedError`.
"""

from dantinox.kernels.dispatch import IMPLEMENTATION_NAMES, OPERATIONS, Operation
from dantinox.kernels.ops.attention.api import OPERATION as _ATTENTION
from dantinox.kernels.ops.attention.api import attention
from dantinox.kernels.ops.decode_attention.api import OPERATION as _DECODE_ATTENTION
from dantinox.kernels.ops.decode_attention.api import KVCache, decode_attention
from dantinox.kernels.ops.grouped_matmul.api import OPERATION as _GROUPED_MATMUL
from dantinox.kernels.ops.grouped_matmul.api import grouped_matmul
from dantinox.kernels.ops.moe.api import OPERATION as _MOE_MLP
from dantinox.kernels.ops.moe.api import moe_mlp

__all__ = [
    "IMPLEMENTATION_NAMES",
    "OPERATIONS",
    "KVCache",
    "attention",
    "decode_attention",
    "grouped_matmul",
    "implementation_names",
    "implementations",
    "moe_mlp",
]

_REGISTRY = {operation.name: operation for operation in (_ATTENTION, _GROUPED_MATMUL, _MOE_MLP, _DECODE_ATTENTION)}


def _get_operation(op: str) -> Operation:
    if op not in _REGISTRY:
        raise ValueError(f"op is {op!r}; allowed: {', '.join(_REGISTRY)}")
    return _REGISTRY[op]


def implementations(op: str) -> dict[str, str | None]:
    """Return why the current device cannot run each implementation of an operation, or None if it can.

    Raises:
        ValueError: `op` is not one of the operations.
    """
    return _get_operation(op).unsupported_reasons()


def implementation_names(*ops: str) -> tuple[str, ...]:
    """Return the allowed values of `implementation` in any of these operations; starts no JAX backend."""
    return tuple(dict.fromkeys(name for op in ops for name in _get_operation(op).names()))
