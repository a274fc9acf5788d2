"""The marks of other projects' tests."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: tokamax's mark for its long tests")
