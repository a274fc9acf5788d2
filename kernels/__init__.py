"""The operations of DantinoX, each behind one signature with several implementations.

    attention          sliding-window gated grouped-query attention
    grouped_matmul     rows sorted by group, each times its group's matrix
    moe_mlp            dropless mixture of SwiGLU experts
    decode_attention   append one token to a key/value ring and attend, in place
    implementations    which implementation of an operation can run here, and why the others cannot

`implementation="auto"` chooses; any other name runs that implementation or raises `NotImplementedError`.
"""

from kernels.attention import attention
from kernels.decode import KVCache, decode_attention
from kernels.dispatch import NAMES, implementations
from kernels.grouped_matmul import grouped_matmul, moe_mlp

__all__ = [
    "NAMES",
    "KVCache",
    "attention",
    "decode_attention",
    "grouped_matmul",
    "implementations",
    "moe_mlp",
]
