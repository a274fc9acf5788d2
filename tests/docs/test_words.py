"""The check of banned phrasings finds them, and lets plain sentences pass."""

import pytest

from scripts import check_words

BANNED = {
    "rows that are nobody's": "nobody",
    "the cache is built anew": "anew",
    "3200 tokens a second": "tokens a second",
    "one block a step": "block a step",
    "it goes on from step 400": "goes on",
    "'x' is no number": "is no number",
    "fails without a word": "without a word",
    "a manifest that is believed": "believed",
    "the run is told to stop": "is told",
    "what it holds": "what it holds",
}
PLAIN = (
    "3200 tokens per second",
    "one block per step",
    "a step that processes a block a second time",
    "resumes from step 400",
    "the value on the left is no longer used",
)


@pytest.mark.parametrize(("sentence", "words"), BANNED.items(), ids=BANNED)
def test_banned_phrasing_is_found(sentence, words):
    assert [(number, found) for number, found, _ in check_words.find_banned(f"# a line\n{sentence}\n")] == [(2, words)]


@pytest.mark.parametrize("sentence", PLAIN)
def test_plain_sentence_passes(sentence):
    assert list(check_words.find_banned(sentence)) == []


def test_exit_status_and_message_name_the_line(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("fine\n\nsaved anew\n")
    assert check_words.main([str(page)]) == 1
    assert capsys.readouterr().out.startswith(f"{page}:3: 'anew'; write: ")
    page.write_text("fine\n")
    assert check_words.main([str(page)]) == 0
