"""The home: one worker's, its own, and refused in one line when it cannot be used."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from tink.errors import StartupError
from tink.home import Home, WorkerRecord
from tink.wire.ready import Ready

HOLD = """
import sys
from pathlib import Path
from tink.home import Home
with Home(Path(sys.argv[1])).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_folders_are_the_owners_alone(tmp_path: Path) -> None:
    home = Home(tmp_path / "deep" / "home")
    home.make()
    home.make()
    for folder in (home.root, home.logs):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert list(home.root.glob(".*")) == []


def test_a_home_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartupError, match=r"cannot be used.*TINK_HOME"):
        Home(tmp_path / "file" / "home").make()


def test_what_its_files_say_is_nothing_while_they_are_not_there_or_damaged(tmp_path: Path) -> None:
    home = Home(tmp_path)

    def said() -> tuple[object, ...]:
        return home.worker_record(), home.trainer_record(), home.lock_owner()

    assert said() == (None, None, None)
    for file in (home.worker, home.trainer, home.root / "worker.lock"):
        file.write_bytes(b'{"pid": 1')
    assert said() == (None, None, None)
    worker = WorkerRecord(1, "http://127.0.0.1:8400", "0.1.0", "training on HuggingFace")
    home.announce(worker)
    trainer = Ready(2, 8401, "1ncarnat10n")
    home.trainer.write_bytes(msgspec.json.encode(trainer))
    with home.lock():
        assert said() == (worker, trainer, os.getpid())


def test_a_journal_that_is_in_another_kind_of_place_than_the_settings_say_is_told_of(
    tmp_path: Path,
) -> None:
    files, server = Home(tmp_path), Home(tmp_path, "postgresql://somewhere/tink")
    assert (files.misplaced(), server.misplaced()) == (None, None)
    files.journal.touch()
    assert files.misplaced() is None
    assert "is in SQLite files, and TINK_DATABASE_URL names another place" in str(server.misplaced())
    files.journal.unlink()
    server.note_database("postgresql://somewhere/tink")
    assert server.misplaced() is None
    assert "is in postgresql://somewhere/tink: set TINK_DATABASE_URL" in str(files.misplaced())


def test_two_workers_cannot_share_a_home_and_a_killed_one_leaves_it_free(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.make()
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(StartupError, match=rf"another worker \(pid {other.pid}\)"), home.lock():
            pass
        other.kill()
        other.wait()
        with home.lock():
            assert (home.root / "worker.lock").read_text() == str(os.getpid())
            with pytest.raises(StartupError, match=str(os.getpid())), home.lock():
                pass
        with home.lock():
            pass


def test_the_lock_is_not_passed_on_to_children(tmp_path: Path) -> None:
    """The embedded trainer outlives its worker, and must not hold the next one off."""
    home = Home(tmp_path)
    home.make()
    with home.lock():
        child = subprocess.Popen(
            [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE
        )
    with home.lock():
        pass
    child.communicate(timeout=10)


def test_the_secret_is_made_once_and_is_the_owners_alone(tmp_path: Path) -> None:
    home = Home(tmp_path)
    first = home.load_secret()
    assert (len(first), home.load_secret()) == (32, first)
    assert stat.S_IMODE(home.secret.stat().st_mode) == 0o600
