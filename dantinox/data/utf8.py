"""UTF-8 text from bytes, and the names of what is not such text."""

import codecs
import contextlib
import itertools
import unicodedata
from collections.abc import Iterable, Iterator

import numpy as np

SAMPLE = 1 << 12
BOMS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


class NotTextError(ValueError):
    """Something is not UTF-8 text; the message says what it is instead."""


def decode(chunks: Iterable[bytes]) -> Iterator[str]:
    """Yield the text of a file of UTF-8, without a byte order mark, up to where it shows that it is something else.

    Raises:
        NotTextError: it is something else.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    start = 0  # offset of what the decoder has not returned yet
    for chunk in itertools.chain(chunks, [b""]):
        if start == 0 and (encoding := _wide_encoding(chunk[:SAMPLE])):
            raise NotTextError(f"{encoding} text")
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            if b"\0" not in error.object[: error.start]:
                byte, offset = error.object[error.start], start + error.start
                raise NotTextError(f"not UTF-8: byte {byte:#04x} at offset {offset}") from None
            text = error.object[: error.start].decode()
        if "\0" in text:  # valid in UTF-8, but not in text
            raise NotTextError(f"binary: a NUL byte at offset {start + len(text.partition('\0')[0].encode())}")
        yield text.removeprefix("\ufeff") if start == 0 else text
        start += len(text.encode())


def _wide_encoding(sample: bytes) -> str | None:
    """Return "UTF-16" or "UTF-32" if the start of a file looks like that, with or without a byte order mark."""
    for mark, encoding in BOMS.items():
        if sample.startswith(mark):
            return encoding
    for codec in ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be"):
        width = int(codec[4:6]) // 8
        units = np.frombuffer(sample[: len(sample) // width * width], np.uint8).reshape(-1, width)
        high, low = (units[:, -1], units[:, 0]) if codec.endswith("le") else (units[:, 0], units[:, -1])
        # Any text has ASCII characters, spaces at least, whose high byte is zero; hardly any has a low byte of zero.
        if len(units) < 4 or (high == 0).mean() < 0.05 or (low == 0).mean() > 0.3:
            continue
        with contextlib.suppress(UnicodeDecodeError):
            text = codecs.getincrementaldecoder(codec)().decode(units.tobytes())  # it may end inside a character
            if all(char.isspace() or unicodedata.category(char) not in ("Cc", "Cn", "Co") for char in text):
                return codec[:6].upper()
    return None
