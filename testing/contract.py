"""The base of all contracts: every test runs for every plugin that a subclass names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import pytest


class Contract:
    """Tests of one kind of plugin.

    A subclass whose name begins with ``Test`` says which plugins it is about; it may override any
    fixture, and add tests. Test functions get the plugin's ``name``.

    Attributes:
        plugins: Names in the registry of this kind.
    """

    plugins: ClassVar[Sequence[str]] = ()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run a test once per plugin.

        Raises:
            ValueError: If the subclass names none: its tests would pass without a plugin.
        """
        if not self.plugins:
            raise ValueError(
                f"{type(self).__name__} tests nothing: set plugins = ('my_plugin',) in the class."
            )
        if "name" in metafunc.fixturenames:
            metafunc.parametrize("name", self.plugins)

    def test_says_in_one_line_what_it_does(self, name: str) -> None:
        """Lists of plugins print the first line of the docstring."""
        first, *rest = (self.plugin(name).__doc__ or "").splitlines()
        assert first.strip().endswith(".")
        assert not rest or not rest[0].strip()

    def plugin(self, name: str) -> object:
        """The plugin itself, from its registry."""
        raise NotImplementedError
