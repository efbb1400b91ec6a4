"""The databases' files, under a journal that is open: deleted, replaced, locked by somebody else."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from trio.testing import MockClock

from tests.unit.journal.journal_kit import new_home, opened, session, stops_with
from tink.errors import StartupError
from tink.home import Home
from tink.journal import sqlite
from tink.limits import SHORT_BODY

pytestmark = pytest.mark.on_files


def delete(path: Path) -> None:
    path.unlink()


def replace(path: Path) -> None:
    """By a copy of itself, as a restore does it."""
    copy = path.with_name("copy")
    shutil.copy(path, copy)
    copy.replace(path)


def move(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))


@pytest.mark.parametrize("change", [delete, replace, move])
@pytest.mark.parametrize("wal", ["", "-wal"])
@pytest.mark.parametrize("name", ["journal.sqlite", "bodies.sqlite"])
async def test_nothing_is_acknowledged_once_a_file_is_gone_or_another(
    autojump_clock: MockClock, tmp_path: Path, name: str, wal: str, change: Callable[[Path], None]
) -> None:
    """SQLite would go on, and what it was told then would be gone at the next start."""
    home = new_home(tmp_path / "home")
    told = False
    with stops_with(f"{name} or its -wal file was deleted or replaced"):
        async with opened(home) as journal:
            await journal.append(session(1))
            await journal.bodies.put(b"one" * SHORT_BODY)
            change(home.root / f"{name}{wal}")
            if name == "bodies.sqlite":
                await journal.bodies.put(b"two" * SHORT_BODY)
            else:
                await journal.append(session(2))
            told = True
    assert not told


async def test_a_lock_of_another_process_is_waited_for_and_then_named(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tink.journal.database.LOCK_SECONDS", 0.2)
    monkeypatch.setitem(sqlite._WRITER_PRAGMAS, "busy_timeout", ("200", 200))
    home = new_home(tmp_path / "home")
    other = sqlite3.connect(home.journal, isolation_level=None)
    with stops_with("another process has held a lock for 0.2 s"):
        async with opened(home) as journal:
            other.execute("BEGIN IMMEDIATE")
            await journal.append(session(1))
    other.execute("COMMIT")
    async with opened(home) as journal:
        await journal.append(session(1))
    other.close()


def test_a_secret_that_was_half_written_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that was full once must not leave an empty key behind."""
    home = Home(tmp_path / "home")
    home.make()
    with monkeypatch.context() as full:
        full.setattr("os.fsync", _full)
        with pytest.raises(StartupError, match="No space left"):
            home.load_secret()
    assert not home.secret.exists()
    assert len(home.load_secret()) == 32


def _full(_handle: int) -> None:
    raise OSError(28, "No space left on device")
