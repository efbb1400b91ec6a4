from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.simulation.chaos import SCRATCH


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """pytest's, but in memory if there is such a folder: here, syncs to a disk take most of the time."""
    with tempfile.TemporaryDirectory(dir=SCRATCH) as made:
        yield Path(made)
