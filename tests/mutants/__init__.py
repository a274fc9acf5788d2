"""Faults to plant in the kernels: `python -m tests.mutants` asks whether a test notices each."""

from tests.mutants import around, attention, decode, grouped_hopper, grouped_matmul, hopper
from tests.mutants.fault import FILES, Mutant

PARTS = (attention, hopper, decode, grouped_matmul, grouped_hopper, around)
MUTANTS: list[Mutant] = [mutant for part in PARTS for mutant in part.MUTANTS]

__all__ = ["FILES", "MUTANTS", "Mutant"]
