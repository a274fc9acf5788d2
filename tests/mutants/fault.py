"""What a planted fault is."""

import ast
from typing import NamedTuple

# Where a fault may be noticed at all.
FILES = {
    "attention": ("attention", "refusals"),
    "decode": ("decode", "refusals"),
    "decode_eight_bits": ("decode_eight_bits",),
    "decode_hopper": ("decode_hopper",),
    "decode_pallas": ("decode_pallas", "decode"),
    "flash": ("flash", "attention"),
    "grouped_matmul": ("grouped_matmul", "moe", "refusals"),
    "grouped_hopper": ("grouped_hopper",),
    "grouped_pallas": ("grouped_pallas", "grouped_matmul", "moe"),
    "hopper": ("hopper",),
    "hopper_backward": ("hopper_backward",),
    "hopper_tiles": ("hopper_tiles",),
    "moe": ("moe", "refusals"),
    "moe_hopper": ("moe_hopper", "grouped_hopper"),
    "plan": ("plan", "flash", "attention"),
    "refusals": ("refusals", "attention"),
    "segments": ("flash", "segments", "attention"),
    "sanitizer": ("sanitizer", "flash"),
    "specs": ("specs",),
}


class Mutant(NamedTuple):
    """One fault: `old`, found once in `file`, becomes `new`; `tests` is one of FILES, `likely` a pytest -k for it.

    Where it begins with "slow and", the tests that notice wait for the long run.
    """

    file: str
    tests: str
    name: str
    old: str
    new: str
    likely: str

    @property
    def title(self) -> str:
        return f"{self.file.removeprefix('kernels/').removesuffix('.py')}: {self.name}"

    def applied(self, text: str) -> str:
        """The file with the fault.

        Raises:
            ValueError: the old text is not there exactly once, or Python does not parse the new one.
        """
        if (found := text.count(self.old)) != 1:
            raise ValueError(f"{self.title}: found {found} times in {self.file}, expected once: {self.old!r}")
        changed = text.replace(self.old, self.new)
        try:
            ast.parse(changed)
        except SyntaxError as error:
            raise ValueError(f"{self.title}: {self.file} does not parse: {error}") from None
        return changed


def planted(file: str, tests: str, *faults: tuple[str, str, str, str]) -> list[Mutant]:
    return [Mutant(f"kernels/{file}.py", tests, *fault) for fault in faults]
