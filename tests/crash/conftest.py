"""What the tests of this folder compare with."""

from __future__ import annotations

import pytest

from tests.crash import short
from tests.crash.runs import Numbers
from tests.live import LiveServer


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Numbers:
    """What the short run gives where nothing happens."""
    alone = LiveServer(tmp_path_factory.mktemp("undisturbed") / "home")
    try:
        alone.start()
        return short.ended(short.begun(alone.url)).numbers
    finally:
        alone.close()
