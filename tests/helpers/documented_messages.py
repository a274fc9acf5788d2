"""The messages that docs/robustness.md shows, as patterns for the messages that tests produce."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "robustness.md"


def documented_messages() -> dict[str, str]:
    """Returns situation -> the message in its row, for rows that have one."""
    part = PAGE.read_text()
    rows = re.findall(r"^\| (?!\|)(.*?) \| (.*?) \| .*? \|$", part, re.M)
    return {name: message[1] for name, text in rows if (message := re.match(r"`([^`]*)`", text))}


def message_pattern(situation: str) -> re.Pattern[str]:
    """A pattern for the message of a situation, in which numbers, run and damaged file may differ."""
    pattern = re.escape(documented_messages()[situation]).replace("nano", r"[\w-]+").replace("d/9fa6", r"\S+")
    number = r"(?:\d+(?:\.\d+)?|nan)"
    return re.compile(re.sub(r"\d+(?:\\\.\d+)?|(?<=loss\\ )nan|(?<=norm\\ )nan", lambda _: number, pattern))
