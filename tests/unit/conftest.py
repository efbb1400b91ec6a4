"""What works on one database works on the other: a test that asks for `on_database` runs on each, unless it
is marked `on_files` or `on_postgres`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.journal import journal_kit

DATABASES = ("sqlite", "postgresql")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    one = any(map(metafunc.definition.get_closest_marker, ("on_files", "on_postgres")))
    if "on_database" in metafunc.fixturenames and not one:
        metafunc.parametrize("on_database", DATABASES, indirect=True)


@pytest.fixture
def on_database(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where `journal_kit.new_home` and `copy_of` make their journals."""
    name = str(getattr(request, "param", "sqlite"))
    if name == "sqlite":
        yield name
        return
    with journal_kit.on_postgres(request.getfixturevalue("postgres")):
        yield name
