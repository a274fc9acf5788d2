"""Documents: text of UTF-8 is read as it is, and everything else is called by its name and place."""

import itertools
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dantinox.data import formats
from dantinox.data.corpus import find_documents
from dantinox.data.formats import Source, read_chunks
from dantinox.data.utf8 import NotTextError, decode

PROSE = "Nel mezzo del cammin di nostra vita\nmi ritrovai per una selva oscura 😀\n" * 200
RUSSIAN = "Все счастливые семьи похожи друг на друга, каждая несчастливая несчастлива по-своему.\n" * 50
CHINESE = "道可道,非常道。名可名,非常名。\n一二三,一一一\n" * 100
EMOJI = "😀👩\u200d👩\u200d👧 👍🏽\n" * 50


def read_text(path) -> str:
    return "".join(decode(read_chunks(Source.at(path.name, path))))


def reason(path, raw: bytes) -> str:
    path.write_bytes(raw)
    with pytest.raises(NotTextError) as error:
        read_text(path)
    return str(error.value)


@pytest.mark.parametrize(
    "text", [PROSE, RUSSIAN, CHINESE, EMOJI, "abcd"], ids=["prose", "russian", "chinese", "emoji", "short"]
)
@pytest.mark.parametrize("codec", [f"utf-{bits}{end}" for bits in (16, 32) for end in ("", "-le", "-be")])
def test_utf16_and_utf32_are_named_with_and_without_a_mark(tmp_path, text, codec):
    name = codec[:6].upper()
    assert reason(tmp_path / "x", text.encode(codec)) == f"{name} text"
    for end in ("-le", "-be"):
        assert reason(tmp_path / "x", ("\ufeff" + text).encode(codec[:6] + end)) == f"{name} text"
    with pytest.raises(ValueError, match=rf"^no text in .*x: it is {name} text; allowed: UTF-8 text$"):
        find_documents(tmp_path / "x")


def test_utf8_with_a_mark_is_read_without_it(tmp_path):
    path = tmp_path / "x.txt"
    for text in ("abc", "é\r\n", "a\ufeffb", "\ufeff", ""):
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert read_text(path) == text


@pytest.mark.parametrize("codec", ["latin-1", "cp1252", "cp437"])
def test_bad_byte_is_named_with_its_offset(tmp_path, codec, caplog):
    good = "à l'heure\n" * 3
    raw = good.encode() + "né\n".encode(codec)
    byte, offset = "é".encode(codec), len(good.encode()) + 1
    message = f"not UTF-8: byte 0x{byte.hex()} at offset {offset}"
    assert reason(tmp_path / "x.txt", raw) == message
    with pytest.raises(ValueError, match=f"x.txt: it is {message}; allowed: UTF-8 text"):
        find_documents(tmp_path / "x.txt")
    (tmp_path / "y.txt").write_text(good)
    with caplog.at_level(logging.WARNING):
        assert [d.text for d in find_documents(tmp_path)] == [good]
    assert f"skipped 1 file(s) that are not UTF-8 text: x.txt ({message})" in caplog.text


@given(st.binary(max_size=60), st.integers(1, 9))
def test_any_bytes_are_judged_as_python_does(tmp_path_factory, raw, chunk):
    """In chunks of any size: the text, or the offset of the first byte that is not UTF-8 or not text."""
    chunks = [raw[i : i + chunk] for i in range(0, len(raw), chunk)]
    try:
        want, bad = raw.decode(), None
    except UnicodeDecodeError as error:
        want, bad = raw[: error.start].decode(), error.start
    nul = want.encode().find(b"\0")
    try:
        assert "".join(decode(chunks)) == want.removeprefix("\ufeff") and bad is None and nul < 0
    except NotTextError as error:
        message = str(error)
        if not message.startswith("UTF-"):
            assert message.endswith(f" at offset {nul if nul >= 0 else bad}")
            assert message.startswith("binary" if nul >= 0 else "not UTF-8")


def test_offset_is_right_at_the_border_of_a_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "CHUNK", 16)
    for length, tail in itertools.product(range(12, 20), (b"\xff", b"\xe9x", "é".encode()[:1], "漢".encode()[:2])):
        message = reason(tmp_path / "x", b"a" * length + tail)
        assert message == f"not UTF-8: byte {tail[0]:#04x} at offset {length}"
        message = reason(tmp_path / "x", ("é" * length).encode() + tail)
        assert message == f"not UTF-8: byte {tail[0]:#04x} at offset {2 * length}"
        for text in ("a" * length + "漢é", "é" * length + "a", "a" * 16 + "\ufeffb"):
            assert read_text_of(tmp_path / "x", text.encode()) == text


def read_text_of(path, raw: bytes) -> str:
    path.write_bytes(raw)
    return read_text(path)


@pytest.mark.parametrize(
    "raw", [b"text\0", b"\0", b"a\0\xff", b"\x7fELF\x02\x01\0\0" + bytes(99), b"\0\0\0\1" * 20, b"\0ab\0" * 5]
)
def test_binary_is_called_binary(tmp_path, raw):
    assert reason(tmp_path / "x", raw) == f"binary: a NUL byte at offset {raw.index(0)}"


def test_binary_file_is_not_read_to_its_end(tmp_path):
    with open(tmp_path / "large", "wb") as file:
        file.write(b"head\0")
        file.truncate(1 << 40)
    with pytest.raises(NotTextError, match="binary"):
        read_text(tmp_path / "large")


def test_nothing_to_read_says_why(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / ".text").write_text("hidden")
    (tmp_path / "blank").mkdir()
    for name in "abcd":
        (tmp_path / "blank" / name).write_bytes(b"" if name < "d" else b"\xff")
    (tmp_path / "file").write_text("")
    for name, message in {
        "empty": "no text in .*: the folder has no files",
        "hidden": "no text in .*: the folder has no files",
        "blank": r"no text in .*: 1 file\(s\) that are not UTF-8 text: d \(.*\); 3 empty file\(s\): a, b, c",
        "file": r"no text in .*file: 1 empty file\(s\): file",
        "bl*k/[abc]": r"no text in .*: 3 empty file\(s\)",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            find_documents(tmp_path / name)
        assert "\n" not in str(error.value)
