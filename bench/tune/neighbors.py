"""Choices of block sizes next to a given one: one size halved or doubled."""

from collections.abc import Iterator

from dantinox.kernels.tuning import Size

# Sizes that are not tiles, or that follow from the others.
FIXED = {"kv_span", "vmem_bytes", "leading_k", "block_k_sub", "max_chunks"}
SMALL = {"num_stages", "stages", "k_stages", "v_stages", "q_stages", "kv_blocks_per_step"}  # one more or less, too
# In interpreted attention a step of several key blocks holds all that a query block sees: with other blocks, one.
RESET = {"kv_blocks_per_step": 1}


def neighbors(choice: Size) -> Iterator[Size]:
    """Yield the choices next to one; some may not work.

    Args:
        choice: an integer, a list of integers, or integers by name.
    """
    if isinstance(choice, int):
        yield from _steps(choice)
    elif isinstance(choice, list):
        for i, size in enumerate(choice):
            changed = (sorted({*choice[:i], other, *choice[i + 1 :]}, reverse=True) for other in _steps(size))
            yield from (sizes for sizes in changed if sizes != choice)
    elif isinstance(choice, dict):
        for name, size in choice.items():
            if name in FIXED or not isinstance(size, int):
                continue
            reset = {other: value for other, value in RESET.items() if other in choice and other != name}
            for other in (*_steps(size), *((size - 1, size + 1) if name in SMALL else ())):
                if other >= 1 and other != size:
                    yield choice | reset | {name: other}


def _steps(size: int) -> Iterator[int]:
    yield 2 * size
    if size > 1:
        yield size // 2
