"""A folder of documents, and corpora of it."""

import pytest

from dantinox.data.corpus import load_corpus
from tests.helpers.text_files import write


@pytest.fixture
def folder(tmp_path):
    """40 small distinct documents, and a copy of each of the first ten."""
    for i in range(40):
        write(tmp_path / "docs" / f"{i:02}.txt", f"document number {i}, {i * i} words long\n" * 5)
    for i in range(10):
        write(tmp_path / "docs" / "copies" / f"{i:02}.md", f"document number {i}, {i * i} words long\n" * 5)
    return tmp_path / "docs"


@pytest.fixture
def make(tmp_path):
    """prepare() with a cache of the test's own."""
    return lambda spec, **options: load_corpus(spec, cache_dir=tmp_path / "cache", **options)
