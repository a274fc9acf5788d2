"""Numbers as people write them on command lines and in YAML files."""

import re

_GROUPED = re.compile(r"[+-]?\d{1,3}(,\d{3})+")
# A point needs an exponent, or a lone zero after it: 1.000 is a thousand to some and one to others.
_EXACT = re.compile(r"([+-]?\d+)(?:\.(\d+))?(?:[eE]([+-]?\d{1,2}))?")


def parse_int(text: str) -> int | None:
    """Return the integer that a text is exactly, such as 1000, 1_000, 1,000, 1e3 or 1.5e3; None otherwise."""
    text = text.strip()
    if len(text) > 100:
        return None
    try:
        return int(text)
    except ValueError:
        pass
    if _GROUPED.fullmatch(text):
        return int(text.replace(",", ""))
    match = _EXACT.fullmatch(text)
    if match is None:
        return None
    whole, fraction, exponent = match[1], match[2] or "", match[3]
    if exponent is None:
        return int(whole) if fraction == "0" else None
    shift = int(exponent) - len(fraction)
    digits = int(whole + fraction)
    if shift >= 0:
        return digits * 10**shift
    quotient, remainder = divmod(digits, 10**-shift)
    return quotient if remainder == 0 else None


def parse_float(text: str) -> float | None:
    """Return the number that a text is, which may be infinite or NaN; None if it is none."""
    try:
        return float(text)
    except ValueError:
        return None
