"""Kernels that a test registers are gone after it."""

import pytest

from dantinox.kernels import registry


@pytest.fixture(autouse=True)
def no_registrations(monkeypatch):
    """The table of registered implementations, empty and of this test's own."""
    monkeypatch.setattr(registry, "_registered", {})
