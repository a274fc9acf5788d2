"""One mutant, and the test files that should notice it."""

import ast
import re
from typing import NamedTuple

# Test files by suite. A mutant's own tests are in the first file; the others may notice it too.
SUITES = {
    "attention": ("kernels/attention/test_attention", "kernels/test_dispatch"),
    "attention_block_schedule": (
        "kernels/attention/test_block_schedule",
        "kernels/attention/test_pallas_tpu",
        "kernels/attention/test_attention",
    ),
    "attention_hidden_values": ("kernels/attention/test_hidden_values", "kernels/attention/test_attention"),
    "attention_number_range": ("kernels/attention/test_number_range", "kernels/attention/test_attention"),
    "attention_lse": ("kernels/attention/test_lse",),
    "attention_transformations": ("kernels/test_transformations",),
    "attention_segment_ids": (
        "kernels/attention/test_segment_ids",
        "kernels/attention/test_pallas_tpu",
        "kernels/attention/test_attention",
    ),
    "attention_sm90_bwd": ("kernels/attention/test_pallas_sm90_bwd",),
    "attention_sm90_fwd": ("kernels/attention/test_pallas_sm90_fwd",),
    "attention_tpu": ("kernels/attention/test_pallas_tpu", "kernels/attention/test_attention"),
    "attention_triton": ("kernels/attention/test_triton",),
    "decode_attention": ("kernels/decode_attention/test_decode_attention", "kernels/test_dispatch"),
    "decode_attention_eight_bits": ("kernels/decode_attention/test_eight_bits",),
    "decode_attention_hidden": ("kernels/decode_attention/test_hidden_values",),
    "decode_attention_numbers": ("kernels/decode_attention/test_number_range",),
    "decode_attention_sm90": ("kernels/decode_attention/test_pallas_sm90",),
    "decode_attention_tpu": (
        "kernels/decode_attention/test_pallas_tpu",
        "kernels/decode_attention/test_decode_attention",
    ),
    "decode_attention_triton": ("kernels/decode_attention/test_triton",),
    "first_use": ("kernels/test_first_use",),
    "integers": ("kernels/test_integers",),
    "eager_calls": ("kernels/test_eager_calls", "kernels/test_modes"),
    "modes": ("kernels/test_modes",),
    "dispatch": ("kernels/test_dispatch", "kernels/attention/test_attention"),
    "grouped_matmul": ("kernels/grouped_matmul/test_grouped_matmul", "kernels/moe/test_moe", "kernels/test_dispatch"),
    "grouped_matmul_sm90": ("kernels/grouped_matmul/test_pallas_sm90",),
    "grouped_matmul_sm90_block_sizes": ("kernels/grouped_matmul/test_pallas_sm90_block_sizes",),
    "grouped_matmul_triton": ("kernels/grouped_matmul/test_triton", "kernels/moe/test_triton"),
    "grouped_matmul_tpu": (
        "kernels/grouped_matmul/test_pallas_tpu",
        "kernels/grouped_matmul/test_grouped_matmul",
        "kernels/moe/test_moe",
    ),
    "linear_cross_entropy": ("kernels/linear_cross_entropy/test_linear_cross_entropy",),
    "linear_cross_entropy_sm90": ("kernels/linear_cross_entropy/test_pallas_sm90",),
    "linear_cross_entropy_tpu": (
        "kernels/linear_cross_entropy/test_pallas_tpu",
        "kernels/linear_cross_entropy/test_linear_cross_entropy",
    ),
    "linear_cross_entropy_triton": ("kernels/linear_cross_entropy/test_triton",),
    "moe_triton": ("kernels/moe/test_triton",),
    "moe_hidden_values": ("kernels/moe/test_hidden_values", "kernels/moe/test_moe"),
    "moe_number_range": ("kernels/moe/test_number_range", "kernels/moe/test_moe"),
    "moe_activation": ("kernels/moe/test_activation", "kernels/moe/test_moe"),
    "moe": ("kernels/moe/test_moe", "kernels/test_dispatch"),
    "moe_sm90": ("kernels/moe/test_pallas_sm90", "kernels/grouped_matmul/test_pallas_sm90"),
    "race_detector": ("bench/verification/test_race_detector", "kernels/attention/test_pallas_tpu"),
    "workloads": ("kernels/test_workloads",),
}


_TOKEN = re.compile(r"""(?P<skip>\s+|\#[^\n]*)|"{3}.*?"{3}|'(?:\\.|[^'\\\n])*'|"(?:\\.|[^"\\\n])*"|\w+|.""", re.S)


def tokenize(text: str) -> list[tuple[str, int, int]]:
    """Split a piece of Python, which may be cut anywhere, into (token, start, end).

    White space, comments and the comma before a closing bracket are left out, because a formatter moves them.
    """
    tokens = [(match[0], match.start(), match.end()) for match in _TOKEN.finditer(text) if match["skip"] is None]
    following = [*(token for token, _, _ in tokens[1:]), ""]
    return [
        token for token, next_token in zip(tokens, following) if not (token[0] == "," and next_token in (")", "]", "}"))
    ]


def find_code(text: str, code: str) -> list[tuple[int, int]]:
    """Find a piece of code in a text, however either is laid out in lines; returns (start, end) per occurrence."""
    tokens, wanted = tokenize(text), [token for token, _, _ in tokenize(code)]
    words = [token for token, _, _ in tokens]
    starts = [i for i in range(len(words) - len(wanted) + 1) if words[i : i + len(wanted)] == wanted]
    return [(tokens[i][1], tokens[i + len(wanted) - 1][2]) for i in starts] if wanted else []


class Mutant(NamedTuple):
    """One fault: the code `old`, which occurs once in `file`, becomes `new`.

    Code is compared token by token, so how a formatter lays out either does not matter.

    Attributes:
        suite: a key of SUITES.
        tests: the tests that should notice, in the first file of the suite: `test_name[id]`, or `test_name` for all
            cases of a test but the slow ones.
    """

    file: str
    suite: str
    name: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"{self.file.removeprefix('kernels/').removesuffix('.py')}: {self.name}"

    @property
    def files(self) -> list[str]:
        """The test files of the suite."""
        return [f"tests/{file}.py" for file in SUITES[self.suite]]

    @property
    def node_ids(self) -> list[str]:
        """The ids by which pytest knows `tests`."""
        return [f"{self.files[0]}::{test}" for test in self.tests]

    def apply(self, text: str) -> str:
        """Plant the fault in the text of its file.

        Raises:
            ValueError: the text does not contain `old` exactly once, or the result is not valid Python.
        """
        places = find_code(text, self.old)
        if len(places) != 1:
            raise ValueError(f"{self.title}: found {len(places)} times in {self.file}, expected once: {self.old!r}")
        ((start, end),) = places
        changed = text[:start] + self.new.strip() + text[end:]
        try:
            ast.parse(changed)
        except SyntaxError as error:
            raise ValueError(f"{self.title}: {self.file} does not parse: {error}") from None
        return changed


def mutants_of(file: str, suite: str, *faults: tuple[str, str, str, str | tuple[str, ...]]) -> list[Mutant]:
    """Make the mutants of `kernels/{file}.py` from (name, old, new, tests) each."""
    return [
        Mutant(f"kernels/{file}.py", suite, name, old, new, (tests,) if isinstance(tests, str) else tests)
        for name, old, new, tests in faults
    ]
