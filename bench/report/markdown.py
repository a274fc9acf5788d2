"""Markdown tables, and text between two marks of a file."""

from collections.abc import Sequence
from typing import Any


def row(cells: Sequence[Any]) -> str:
    """Format one row of a table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def header(names: Sequence[str]) -> list[str]:
    """Format the head of a table whose columns are all aligned to the right."""
    return [row(names), "|" + "---:|" * len(names)]


def replace_between(text: str, marks: tuple[str, str], new: str) -> str:
    """Replace what stands between two marks.

    Raises:
        ValueError: one of the marks does not occur exactly once.
    """
    begin, end = marks
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"README.md has not one {begin.strip()} and one {end}")
    return text[: text.index(begin) + len(begin)] + new + text[text.index(end) :]
