"""What a rule finds."""

from typing import NamedTuple


class Finding(NamedTuple):
    """A violation of a rule.

    Attributes:
        rule: its name.
        line: where in the PTX of the kernel.
        message: what is wrong there.
    """

    rule: str
    line: int
    message: str
