"""Faults to plant in the kernels: `python -m tests.mutants` asks whether a test notices each."""

from tests.mutants import around, attention, decode, grouped_hopper, grouped_matmul
from tests.mutants.fault import FILES, Mutant

MUTANTS: list[Mutant] = [*attention.MUTANTS, *decode.MUTANTS, *grouped_matmul.MUTANTS]
MUTANTS += [*grouped_hopper.MUTANTS, *around.MUTANTS]

__all__ = ["FILES", "MUTANTS", "Mutant"]
