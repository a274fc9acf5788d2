"""The operations of DantinoX, each behind one signature with several implementations.

    attention          sliding-window gated grouped-query attention
    grouped_matmul     rows sorted by group, each times its group's matrix
    moe_mlp            dropless mixture of SwiGLU experts
    decode_attention   append one token to a key/value ring and attend, in place
    implementations    which implementations of an operation can run here, and why each other one cannot
    implementation_names    what `implementation` may be: "auto", and the names in the operation's table

`implementation="auto"` chooses; any other name runs that implementation or raises `NotImplementedError`.
"""

from collections.abc import Callable

from dantinox.kernels.dispatch import IMPLEMENTATION_NAMES, OPERATIONS, Choice, target_device
from dantinox.kernels.ops.attention.api import _table as _attention
from dantinox.kernels.ops.attention.api import attention
from dantinox.kernels.ops.decode_attention.api import KVCache, decode_attention
from dantinox.kernels.ops.decode_attention.api import _table as _decode
from dantinox.kernels.ops.grouped_matmul.api import _table as _grouped
from dantinox.kernels.ops.grouped_matmul.api import grouped_matmul
from dantinox.kernels.ops.moe.api import _table as _moe
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

_TABLES: dict[str, Callable[[], dict[str, Choice]]] = {
    "attention": _attention,
    "grouped_matmul": _grouped,
    "moe_mlp": _moe,
    "decode_attention": _decode,
}


def implementations(op: str) -> dict[str, str | None]:
    """Each implementation of `op`: None where it can run on this device, else the reason it cannot.

    Raises:
        ValueError: `op` is not one of the operations.
    """
    if op not in _TABLES:
        raise ValueError(f"op is {op!r}; allowed: {', '.join(_TABLES)}")
    return {name: choice if isinstance(choice, str) else None for name, choice in _TABLES[op]().items()}


def implementation_names(*ops: str) -> tuple[str, ...]:
    """What `implementation` may be in any of these operations; asks no device, so that no backend is started."""
    with target_device("cpu", ""):
        return tuple(dict.fromkeys(["auto", *(name for op in ops for name in _TABLES[op]())]))
