"""Mutants of the kernels, each with one planted fault: `python -m tests.mutation` checks that a test notices each."""

from tests.mutation import (
    attention,
    attention_sm90,
    attention_triton,
    decode_attention,
    decode_attention_triton,
    grouped_matmul,
    grouped_matmul_sm90,
    grouped_matmul_triton,
    linear_cross_entropy,
    linear_cross_entropy_sm90,
    linear_cross_entropy_triton,
    shared,
)
from tests.mutation.mutant import SUITES, Mutant

PARTS = (
    attention,
    attention_sm90,
    attention_triton,
    decode_attention,
    decode_attention_triton,
    grouped_matmul,
    grouped_matmul_sm90,
    grouped_matmul_triton,
    linear_cross_entropy,
    linear_cross_entropy_sm90,
    linear_cross_entropy_triton,
    shared,
)
MUTANTS: list[Mutant] = [mutant for part in PARTS for mutant in part.MUTANTS]

__all__ = ["MUTANTS", "SUITES", "Mutant"]
