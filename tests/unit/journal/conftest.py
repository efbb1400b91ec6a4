"""The promises of a journal hold on both databases: a test runs on each, unless it is marked `on_files`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.journal import journal_kit

DATABASES = ("sqlite", "postgresql")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.definition.get_closest_marker("on_files") is None:
        metafunc.parametrize("on_database", DATABASES, indirect=True)


@pytest.fixture(autouse=True)
def on_database(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where `journal_kit.new_home` makes its journals."""
    name = str(getattr(request, "param", "sqlite"))
    if name == "sqlite":
        yield name
        return
    with journal_kit.on_postgres(request.getfixturevalue("postgres")):
        yield name
