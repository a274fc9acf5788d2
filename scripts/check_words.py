"""Find phrasings that the style guide bans, in code, documentation and messages: `make lint` runs it.

    python scripts/check_words.py [FILE...]    default: every tracked text file

Exit status 1 if a line has one; each is printed with the words to use instead.
"""

import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
SELF = ("check_words.py", "test_words.py")
SUFFIXES = (".py", ".md", ".sh", ".yaml", ".yml", ".toml", ".ipynb", "Makefile")
UNITS = (
    "tokens|steps|bytes|nats|bits|registers|bundles|flops|rows|numbers|instructions|samples|sequences|experts|values"
    "|blocks|programs|files|lines|cycles|clocks|figures|points|words|seconds|minutes|milliseconds|products|scores|chunks"
    "|axis|line|folder|class|object|result|process|title|scale|copy|block|warp|sum|program|table|column|kernel"
)
EACH = (
    "second|minute|token|step|thread|row|pair|query|key|block|tile|vector|number|head|sequence|expert|device|chip|core"
    "|call|cycle|target|line|operation|layer|group|slot|warp|byte|letter|run|batch|dot|program|implementation|kernel"
)
BANNED = {
    r"\bnobody": "no one, or name the thing: unassigned rows, masked keys",
    r"\banew\b": "again, from scratch",
    r"\blearnt\b": "learned",
    r"\bfor want of\b": "without, because there is no",
    r"\bwithout a word\b": "silently",
    r"\bbrings? (it|them) back\b": "restore",
    rf"\b(?:{UNITS}) an? (?:{EACH})\b(?!-| time)": "per",
    r"\b(?:is|are|was|were|be) told\b": "name the actor: X passes, X says",
    r"\b(?:goes|go) on\b(?! the| a\b| top)": "continues",
    r"\bis no (?:name|number|terminal|file|folder|run|array|integer)\b": "is not a valid ...",
    r"\bbelieved?\b": "trust, verify",
    r"\bso many (?:rows|bytes|tokens|steps|seconds|keys|bundles)\b": "the number",
    r"\bone's own\b": "your own",
    r"\bin vain\b": "wasted",
    r"\b(?:lies|lie) (?:in|at|there|beside|below)\b": "is",
    r"\bstands? (?:in|at|here|there|beside|below)\b": "is",
    r"\bset(?:s)? about\b": "start",
    r"\bwhat (?:it|they) holds?\b": "its contents",
    r"\blook(?:s)? of the host\b": "host sync",
}
PATTERNS = {re.compile(pattern, re.IGNORECASE): advice for pattern, advice in BANNED.items()}


def find_banned(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield (line number, banned words, what to write instead)."""
    for number, line in enumerate(text.splitlines(), 1):
        for pattern, advice in PATTERNS.items():
            for match in pattern.finditer(line):
                yield number, match[0], advice


def tracked_files() -> list[Path]:
    """Return the text files that git tracks, without this one and its test."""
    names = subprocess.run(
        ["git", "ls-files"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        encoding="utf-8",
    ).stdout.splitlines()
    files = [ROOT / name for name in names if name.endswith(SUFFIXES) and not name.startswith("profiles/")]
    return [file for file in files if file.is_file() and not file.is_symlink() and file.name not in SELF]


def main(arguments: Sequence[str]) -> int:
    """Print every banned phrase; 1 if there is one."""
    status = 0
    for file in [Path(name) for name in arguments] or tracked_files():
        for number, words, advice in find_banned(file.read_text(errors="replace", encoding="utf-8")):
            print(f"{file}:{number}: {words!r}; write: {advice}")
            status = 1
    return status


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
