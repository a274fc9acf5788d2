"""Five decode attention kernels, each with one new idea; README.md in this folder is the guide.

    read_everything      every slot of the cache, visible or not
    visible_blocks       no block after the last visible slot
    ring_buffer          from the oldest visible block to the newest, across the end of the ring buffer
    append_in_kernel     the kernel also writes the new token, into the cache that it reads
    eight_bit_cache      int8 keys and values, with one scale per vector

A step's file is named after its number and its name, such as `step1_read_everything.py`. Each step has the signature of
an implementation of `dantinox.kernels.decode_attention`.
"""

import importlib
from collections.abc import Callable
from typing import Any

STEPS = ("read_everything", "visible_blocks", "ring_buffer", "append_in_kernel", "eight_bit_cache")


def load_step(name: str) -> Callable[..., Any]:
    """Import a step of the tutorial and return its `decode_attention`."""
    module = f"step{STEPS.index(name) + 1}_{name}"
    return importlib.import_module(f"dantinox.kernels.tutorial.decode_attention.{module}").decode_attention
