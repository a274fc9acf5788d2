"""What a planted fault is."""

import ast
import re
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


_TOKEN = re.compile(r"""(?P<skip>\s+|\#[^\n]*)|"{3}.*?"{3}|'(?:\\.|[^'\\\n])*'|"(?:\\.|[^"\\\n])*"|\w+|.""", re.S)


def tokens(text: str) -> list[tuple[str, int, int]]:
    """The tokens of a piece of Python that may be cut anywhere: (text, start, end) of each.

    White space, comments and the comma before a closing bracket are left out: a formatter moves them.
    """
    found = [(m[0], m.start(), m.end()) for m in _TOKEN.finditer(text) if m["skip"] is None]
    closes = [*(token for token, _, _ in found[1:]), ""]
    return [each for each, after in zip(found, closes) if not (each[0] == "," and after in (")", "]", "}"))]


def occurrences(text: str, piece: str) -> list[tuple[int, int]]:
    """Where a piece of code occurs in a text, however either is laid out in lines: (start, end) of each."""
    whole, wanted = tokens(text), [token for token, _, _ in tokens(piece)]
    words = [token for token, _, _ in whole]
    starts = [i for i in range(len(words) - len(wanted) + 1) if words[i : i + len(wanted)] == wanted]
    return [(whole[i][1], whole[i + len(wanted) - 1][2]) for i in starts] if wanted else []


class Mutant(NamedTuple):
    """One fault: the code `old`, found once in `file`, becomes `new`.

    Code is compared token by token, so how a formatter lays out either does not matter.

    Attributes:
        tests: one of FILES.
        likely: a pytest -k expression for the tests that notice; where it begins with "slow and", they are slow.
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
        found = occurrences(text, self.old)
        if len(found) != 1:
            raise ValueError(f"{self.title}: found {len(found)} times in {self.file}, expected once: {self.old!r}")
        ((start, end),) = found
        changed = text[:start] + self.new.strip() + text[end:]
        try:
            ast.parse(changed)
        except SyntaxError as error:
            raise ValueError(f"{self.title}: {self.file} does not parse: {error}") from None
        return changed


def planted(file: str, tests: str, *faults: tuple[str, str, str, str]) -> list[Mutant]:
    return [Mutant(f"kernels/{file}.py", tests, *fault) for fault in faults]
