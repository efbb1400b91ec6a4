"""The home folder: where everything of one worker lies, and the lock that makes it one worker's."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

from tink import files
from tink.errors import UNREADABLE, StartupError
from tink.wire.ready import Ready

T = TypeVar("T")

SECRET_BYTES = 32


class WorkerRecord(msgspec.Struct):
    """worker.json: how to reach the running worker."""

    pid: int
    url: str
    version: str
    mode: str


@dataclass(frozen=True)
class Home:
    """Paths under TINK_HOME, and what its files say. Only the worker that holds `lock()` writes here, and
    the trainer that it started."""

    root: Path
    # Of the PostgreSQL database that the journal is in; empty: it is in the files below.
    database_url: str = field(default="", repr=False)

    @property
    def journal(self) -> Path:
        return self.root / "journal.sqlite"

    @property
    def bodies(self) -> Path:
        return self.root / "bodies.sqlite"

    @property
    def bundle(self) -> Path:
        """What a home that came out of a bundle says of itself (replay/bundle.py)."""
        return self.root / "bundle.json"

    @property
    def worker(self) -> Path:
        """Where the running worker says how to reach it."""
        return self.root / "worker.json"

    @property
    def trainer(self) -> Path:
        """Where the embedded trainer says how to reach it: its ready file."""
        return self.root / "trainer.json"

    @property
    def trainer_command(self) -> Path:
        """How the embedded trainer was started: one of another configuration is not adopted."""
        return self.root / "trainer.command"

    @property
    def database(self) -> Path:
        """Which PostgreSQL database the journal is in, if it is in one; without the password."""
        return self.root / "database"

    @property
    def secret(self) -> Path:
        return self.root / "secret"

    @property
    def artifacts(self) -> Path:
        """Unless TINK_ARTIFACTS is set."""
        return self.root / "artifacts"

    @property
    def models(self) -> Path:
        return self.root / "models"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def trainer_log(self) -> Path:
        return self.logs / "trainer.log"

    @property
    def _lock(self) -> Path:
        return self.root / "worker.lock"

    def worker_record(self) -> WorkerRecord | None:
        """None if no worker has said so, or it cannot be read. The one that did may have been killed."""
        return _read(self.worker, WorkerRecord)

    def trainer_record(self) -> Ready | None:
        """None if no trainer has said so, or it cannot be read. The one that did may have been killed."""
        return _read(self.trainer, Ready)

    def noted_database(self) -> str | None:
        """The URL, without its password, of the PostgreSQL database that the worker of this home wrote to;
        None if it has its own files."""
        try:
            return self.database.read_text().strip() or None
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, *UNREADABLE) as error:
            raise StartupError(f"{self.database} cannot be read: {error}") from error

    def note_database(self, place: str | None) -> None:
        """Says for good in which PostgreSQL database the journal is (without its password); None: in its
        own files. Raises StartupError if it cannot."""
        with self.writing():
            if place is None:
                self.database.unlink(missing_ok=True)
            else:
                files.write(self.database, f"{place}\n".encode())
            files.sync(self.root)

    def misplaced(self) -> str | None:
        """Why no worker may start here: its journal is in another kind of place than the settings say, and
        it would begin a new one. StartupError if that cannot be told."""
        if self.database_url and self.journal.exists():
            return (
                f"the journal of {self.root} is in SQLite files, and TINK_DATABASE_URL names another "
                "place: 'tink db move' takes it there, or pass another --home"
            )
        if not self.database_url and (noted := self.noted_database()):
            return (
                f"the journal of {self.root} is in {noted}: set TINK_DATABASE_URL, or pass another --home"
            )
        return None

    def lock_owner(self) -> int | None:
        """The process that took the lock last, which may have ended since."""
        with contextlib.suppress(OSError, ValueError):
            return int(self._lock.read_text())
        return None

    def make(self) -> None:
        """Creates the folders, readable by their owner only. Raises StartupError if it cannot."""
        with self.writing():
            for folder in (self.root, self.logs):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            files.sync_names(self.logs)
        self.check_writable()

    def check_writable(self) -> None:
        """Raises StartupError if no file can be made here."""
        with self.writing():
            probe = self.root / ".writable"
            probe.touch()
            probe.unlink()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Around what makes or changes files here. Raises StartupError when that cannot be done."""
        try:
            yield
        except OSError as error:
            raise StartupError(
                f"the home {self.root} cannot be used: {error.strerror or error}; "
                "pass --home DIR or set TINK_HOME"
            ) from error

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Held for the worker's life; the kernel drops it when the process dies, however it dies."""
        with self.writing():
            handle = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = self.lock_owner() or "unknown"
                raise StartupError(
                    f"another worker (pid {owner}) is using {self.root}: stop it, or pass another --home"
                ) from None
            with contextlib.suppress(OSError):  # no room: it is for people only
                os.ftruncate(handle, 0)
                os.pwrite(handle, str(os.getpid()).encode(), 0)
            yield
        finally:
            os.close(handle)

    def load_secret(self) -> bytes:
        """32 random bytes that sign download links; made once, and never half: an empty key is no key. The
        caller holds the lock. Raises StartupError if it cannot be made, or is not what was made."""
        with self.writing():
            if not self.secret.exists():
                files.write(self.secret, os.urandom(SECRET_BYTES))
            # Whoever made it may have been killed before its name was synced.
            files.sync(self.root)
            secret = self.secret.read_bytes()
        if len(secret) != SECRET_BYTES:
            raise StartupError(f"{self.secret} is damaged: delete it; links given out end with it")
        return secret

    def announce(self, record: WorkerRecord) -> None:
        """Says how to reach the running worker. Raises StartupError if it cannot."""
        with self.writing():
            self.worker.write_bytes(msgspec.json.encode(record))

    def withdraw(self) -> None:
        """The worker stops, and a home that cannot be written must not hold it up."""
        with contextlib.suppress(OSError):
            self.worker.unlink(missing_ok=True)


def _read(path: Path, kind: type[T]) -> T | None:
    with contextlib.suppress(OSError, *UNREADABLE):
        return msgspec.json.decode(path.read_bytes(), type=kind)
    return None
