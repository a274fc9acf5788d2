"""Fixtures of the tests that start training programs."""

import pytest

from tests.helpers.process_group import Starter, training_folder


@pytest.fixture(scope="module")
def process_folder(tmp_path_factory):
    """A folder with a text, in which the test and the programs run."""
    with training_folder(tmp_path_factory.mktemp("processes")) as path:
        yield path


@pytest.fixture(scope="module")
def starter(process_folder):
    """Starts programs of several processes in that folder."""
    starter = Starter(process_folder)
    yield starter
    starter.close()
