"""The specification: each operation in plain `jnp`, one short function, obviously right.

Nothing here is fast. Every implementation in `kernels/` is judged against these functions, so they are written
to be read: scores of all (query, key) pairs, every expert on every token, the cache unrolled in order. They
compute in the dtype they are given; the oracle of a test is the same function in float32 or float64.
"""

from dantinox.reference.attention import attention, visible
from dantinox.reference.decode import decode_attention
from dantinox.reference.grouped_matmul import grouped_matmul
from dantinox.reference.linear_cross_entropy import linear_cross_entropy
from dantinox.reference.moe import moe_mlp

__all__ = ["attention", "decode_attention", "grouped_matmul", "linear_cross_entropy", "moe_mlp", "visible"]
