"""What README says a user sees: its table "What happens when", as patterns for the messages that tests produce."""

import re
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def table() -> dict[str, str]:
    """Situation -> the message in its row, for rows that have one."""
    part = README.read_text().split("## What happens when")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (?!\|)(.*?) \| (.*?) \| .*? \|$", part, re.M)
    return {name: found[1] for name, text in rows if (found := re.match(r"`([^`]*)`", text))}


def promised(situation: str) -> re.Pattern[str]:
    """The message of a situation; its numbers, the run and the damaged file may be others, all else may not."""
    pattern = re.escape(table()[situation]).replace("nano", r"[\w-]+").replace("d/9fa6", r"\S+")
    number = r"(?:\d+(?:\.\d+)?|nan)"
    return re.compile(re.sub(r"\d+(?:\\\.\d+)?|(?<=loss\\ )nan|(?<=norm\\ )nan", lambda _: number, pattern))
