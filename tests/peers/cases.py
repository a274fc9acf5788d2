"""Test cases of other projects' suites: each runs, or is skipped because it does not map to our operation."""

import fnmatch
from collections.abc import Mapping
from typing import Any

import pytest

from tests.peers.masks import NotMapped


def import_peer(name: str) -> Any:
    """Import a module of tokamax, or one that its tests need; skip the file of tests where it is missing."""
    return pytest.importorskip(name, reason=f"{name.split('.')[0]} is not installed; make test-peers installs it")


def find_reason(table: Mapping[str, str], name: str) -> str | None:
    """Return why the test of a name does not map, or None; the first pattern that matches counts."""
    return next((reason for pattern, reason in table.items() if fnmatch.fnmatchcase(name, pattern)), None)


def unmatched_patterns(table: Mapping[str, str], names: list[str]) -> list[str]:
    """Return the patterns that are no test's reason."""
    used = {next((p for p in table if fnmatch.fnmatchcase(name, p)), None) for name in names}
    return [pattern for pattern in table if pattern not in used]


class Mapped:
    """A unittest case whose tests raise NotMapped exactly if the table `NOT_MAPPED` names them, with that reason."""

    NOT_MAPPED: Mapping[str, str]

    def __init__(self, name: str = "runTest", **options: Any) -> None:
        super().__init__(name, **options)
        if (test := getattr(self, name, None)) is not None:
            setattr(self, name, lambda: self._run_mapped(test, find_reason(self.NOT_MAPPED, name)))

    def _run_mapped(self, test: Any, reason: str | None) -> None:
        try:
            test()
        except NotMapped as error:
            if str(error) != reason:
                raise
            self.skipTest(f"not mapped: {reason}")
        if reason is not None:
            self.fail(f"the table says that this does not map ({reason}), but it passes")
