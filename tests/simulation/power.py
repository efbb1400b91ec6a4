"""What of an SQLite file in WAL mode is on the disk when the power goes.

A commit appends to the -wal file. SQLite documents when that is synced: with `synchronous=FULL` at each
commit, with NORMAL at checkpoints only, with OFF never. A checkpoint copies the pages into the database:
the -wal file is synced before it and the database after it, unless OFF. What was written and not synced
survives in any mixture: lost, cut off anywhere, or sector by sector old, new and neither. Bytes beside it
are safe, in the same sector too: SQLite relies on that (its "powersafe overwrite"), and disks give it.

(test_power.py compares this with the writes and syncs that SQLite really makes.)
"""

from __future__ import annotations

import random
import sqlite3
from pathlib import Path
from typing import NamedTuple

SECTOR = 512
# PRAGMA synchronous
OFF, NORMAL, FULL = 0, 1, 2


class Image(NamedTuple):
    """The bytes of both files; empty for one that is not there."""

    database: bytes
    wal: bytes

    @classmethod
    def read(cls, path: Path) -> Image:
        return cls(*(file.read_bytes() if file.exists() else b"" for file in (path, _wal(path))))

    def write(self, path: Path) -> None:
        """As new files: whoever has the old ones open does not see it."""
        for file, content in ((path, self.database), (_wal(path), self.wal)):
            file.unlink(missing_ok=True)
            if content:
                file.write_bytes(content)
        path.with_name(f"{path.name}-shm").unlink(missing_ok=True)  # memory, that no power cut leaves


class Storage:
    """One SQLite file of a simulated machine."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # What is on the disk, when that is not simply what is in the files.
        self._synced: Image | None = None
        self._level = FULL
        self._writer: sqlite3.Connection | None = None
        self._reader: sqlite3.Connection | None = None
        self._version = 0

    @property
    def synced(self) -> bool:
        """Whether all that was committed is on the disk."""
        return self._synced is None

    @property
    def reader(self) -> sqlite3.Connection:
        assert self._reader is not None, "no process has it open"
        return self._reader

    def attach(self, writer: sqlite3.Connection) -> None:
        """A process has opened it. Its settings decide what its commits are worth."""
        self._writer = writer
        self._reader = sqlite3.connect(f"file:{self.path}?mode=ro", uri=True)
        self._version, self._level = self._data_version(), self._synchronous()
        if self._synced is None and self._level < FULL:
            self._synced = Image.read(self.path)

    def detach(self) -> None:
        """The process is gone."""
        if self._reader is not None:
            self._reader.close()
        self._reader = self._writer = None

    def power_is_back(self, left: Image) -> None:
        left.write(self.path)
        self._synced = None

    def committed(self) -> bool:
        """Whether something was committed since this was asked last."""
        if self._reader is None or self._data_version() == self._version:
            return False
        self._version = self._data_version()
        self._level = self._synchronous()
        if self._level >= FULL:
            self._synced = None
        elif self._level == NORMAL and self._synced is not None:
            now = Image.read(self.path)
            if now.database != self._synced.database:  # a checkpoint
                self._synced = now
        return True

    def after_power_cut(self, rng: random.Random, before: Image | None = None) -> Image:
        """What is left. `before`: the files as they were before a commit that the cut comes into."""
        now = Image.read(self.path)
        if self._synced is not None:
            database = now.database
            if self._level == OFF:
                database = torn(rng, self._synced.database, now.database)
            return Image(database, torn(rng, self._synced.wal, now.wal))
        if before is None or before == now:
            return now
        if before.database == now.database or rng.random() < 0.5:
            return Image(before.database, torn(rng, before.wal, now.wal))
        # The commit ends with a checkpoint: the -wal file is synced by then.
        return Image(torn(rng, before.database, now.database), now.wal)

    def _synchronous(self) -> int:
        assert self._writer is not None
        return int(self._writer.execute("PRAGMA synchronous").fetchone()[0])

    def _data_version(self) -> int:
        """Another one after each commit of another connection."""
        return int(self.reader.execute("PRAGMA data_version").fetchone()[0])


def torn(rng: random.Random, old: bytes, new: bytes) -> bytes:
    """A file that was being rewritten when the power went."""
    how = rng.choice(["lost", "cut", "mixed"])
    if how == "lost":
        return old
    if how == "cut":
        end = rng.randint(0, len(new))
        return new[:end] + old[end:]
    pieces = []
    for at in range(0, max(len(old), len(new)), SECTOR):
        was, becomes = old[at : at + SECTOR], new[at : at + SECTOR]
        changed = (at for at, (a, b) in enumerate(zip(was, becomes, strict=False)) if a != b)
        same = next(changed, min(len(was), len(becomes)))
        neither = becomes[:same] + rng.randbytes(len(becomes) - same)
        pieces.append(rng.choice([was, becomes, neither]))
    return b"".join(piece.ljust(SECTOR, b"\0") for piece in pieces)


def _wal(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")
