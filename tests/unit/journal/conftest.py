"""The promises of a journal hold on both databases."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _on_each_database(on_database: str) -> None:
    pass
