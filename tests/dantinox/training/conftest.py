"""Fixtures of the tests that start training programs."""

import os
from pathlib import Path

import pytest

from tests.helpers.process_group import Starter


@pytest.fixture(scope="module")
def process_folder(tmp_path_factory):
    """A folder with a text, in which the test and the programs run."""
    path, before = tmp_path_factory.mktemp("processes"), Path.cwd()
    (path / "text.txt").write_text("".join(f"{i} Nel mezzo del cammin di nostra vita\n" for i in range(300)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DANTINOX_CACHE", str(path / "cache"))
        os.chdir(path)
        yield path
        os.chdir(before)


@pytest.fixture(scope="module")
def starter(process_folder):
    """Starts programs of several processes in that folder."""
    starter = Starter(process_folder)
    yield starter
    starter.close()
