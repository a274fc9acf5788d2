"""What a planted fault is."""

import ast
from typing import NamedTuple

# Where a fault may be noticed at all.
FILES = {
    "attention": ("kernels/attention/test_attention", "kernels/test_dispatch"),
    "decode": ("kernels/decode_attention/test_decode_attention", "kernels/test_dispatch"),
    "decode_eight_bits": ("kernels/decode_attention/test_eight_bits",),
    "decode_hopper": ("kernels/decode_attention/test_pallas_sm90",),
    "decode_pallas": ("kernels/decode_attention/test_pallas_tpu", "kernels/decode_attention/test_decode_attention"),
    "flash": ("kernels/attention/test_pallas_tpu", "kernels/attention/test_attention"),
    "grouped_matmul": ("kernels/grouped_matmul/test_grouped_matmul", "kernels/moe/test_moe", "kernels/test_dispatch"),
    "grouped_hopper": ("kernels/grouped_matmul/test_pallas_sm90",),
    "grouped_pallas": (
        "kernels/grouped_matmul/test_pallas_tpu",
        "kernels/grouped_matmul/test_grouped_matmul",
        "kernels/moe/test_moe",
    ),
    "hopper": ("kernels/attention/test_pallas_sm90_fwd",),
    "hopper_backward": ("kernels/attention/test_pallas_sm90_bwd",),
    "hopper_tiles": ("kernels/grouped_matmul/test_pallas_sm90_block_sizes",),
    "moe": ("kernels/moe/test_moe", "kernels/test_dispatch"),
    "moe_hopper": ("kernels/moe/test_pallas_sm90", "kernels/grouped_matmul/test_pallas_sm90"),
    "plan": (
        "kernels/attention/test_block_schedule",
        "kernels/attention/test_pallas_tpu",
        "kernels/attention/test_attention",
    ),
    "refusals": ("kernels/test_dispatch", "kernels/attention/test_attention"),
    "segments": (
        "kernels/attention/test_pallas_tpu",
        "kernels/attention/test_segment_ids",
        "kernels/attention/test_attention",
    ),
    "sanitizer": ("helpers/test_race_detector", "kernels/attention/test_pallas_tpu"),
    "specs": ("kernels/test_workloads",),
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
