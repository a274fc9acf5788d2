"""Checks of token ids that a caller of `generate` passes."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dantinox.inference import prefill
from dantinox.inference.chunk import DONE_TOKEN

Ids = Sequence[int] | np.ndarray


def check_prompts(prompts: Sequence[Ids], vocab_size: int) -> list[np.ndarray]:
    """Return the prompts as int32 arrays of at least one id each."""
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Sequence | np.ndarray):
        raise ValueError(f"prompts are a {type(prompts).__name__}; allowed: a list of lists of token ids")
    if len(prompts) == 0:
        raise ValueError("prompts are empty; allowed: at least one prompt")
    return [_check_ids(f"prompts[{i}]", prompt, vocab_size) for i, prompt in enumerate(prompts)]


def _check_ids(name: str, ids: Any, vocab_size: int) -> np.ndarray:
    """int32 [T] with T >= 1."""
    try:
        array = np.asarray(ids)
    except ValueError:  # lists of different lengths
        array = np.asarray(None)
    if array.ndim != 1:
        raise ValueError(f"{name} is {ids!s:.50}; allowed: a list of token ids")
    if array.size == 0:
        raise ValueError(f"{name} is empty; allowed: at least one token id")
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} contains {array.dtype} values; allowed: integers")
    bad = (array < 0) | (array >= vocab_size)
    if bad.any():
        raise ValueError(f"{name} contains id {array[bad][0]}; allowed: 0 to {vocab_size - 1}")
    return array.astype(np.int32)


def check_stop_tokens(stop_tokens: Iterable[int], vocab_size: int) -> np.ndarray:
    """Return the stop tokens as int32, padded with DONE_TOKEN to a power of two to compile few sizes."""
    stop_ids = list(stop_tokens) if isinstance(stop_tokens, Iterable) else stop_tokens
    array = np.zeros(0, np.int32) if stop_ids == [] else _check_ids("stop_tokens", stop_ids, vocab_size)
    return np.pad(array, (0, prefill.round_up_to_bucket(len(array), 16) - len(array)), constant_values=DONE_TOKEN)
