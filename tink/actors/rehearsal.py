"""A pass of retention that changes nothing: the actor's own code, before a journal and an artifact folder
that only remember what it does to them. It needs no lock: a worker may run meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import trio
from sqlalchemy import Connection

from tink.actors import placements
from tink.actors.artifacts import ArtifactFolder
from tink.actors.retention import Gone, Retention, forgotten
from tink.domain import rows
from tink.domain.events import Entry, Record
from tink.domain.ledger import Ledger
from tink.domain.retention import Kept
from tink.home import Home
from tink.journal import queries, store
from tink.journal.bodies import Stored
from tink.journal.present import Present
from tink.journal.reader import open_journal
from tink.journal.recording import Recording, open_recording
from tink.world import World

T = TypeVar("T")


class Placed:
    """The sampling servers as the journal knows them, while no worker talks to them: what it says that they
    have they may read again."""

    def __init__(self, placed: Collection[tuple[rows.Adapter, str]]) -> None:
        self.directories = {adapter.directory for adapter, _ in placed}

    @classmethod
    def of(cls, connection: Connection) -> Placed | None:
        """None if there are none: the trainer samples."""
        placed = queries.placements(connection)
        servers = [one for one in placed if one[1] != placements.TRAINER]
        return cls(servers) if servers else None

    async def let_go(self) -> None:
        """That is the next worker's to ask of them."""
        await trio.lowlevel.checkpoint()


async def rehearse(
    home: Home, artifacts: Path, kept: Kept, world: World, look: Callable[[Recording, list[Gone]], T]
) -> tuple[T, bool]:
    """What `look` makes of what would go now; and whether that is all that nothing needs, and not in use.
    Blocks the Trio thread. StartupError for what cannot be read."""
    folder = _Untouched(artifacts, world)
    with open_journal(home) as journal:
        # Before the journal is asked who needs them: what is published meanwhile is not among them.
        present = store.read_present(journal)
        others = queries.models(journal, await forgotten(folder, present))
        folder.there = await folder.published([*present.models.values(), *others])
    gone: list[Gone] = []
    with open_recording(home) as recording:
        servers = Placed.of(recording.journal)
        books = _Books(recording, world)
        pass_ = Retention(books, folder, world, kept=kept, servers=servers, tell=gone.append)
        complete = await pass_.once()
        return look(recording, gone), complete


class _Books:
    """The journal of a recording. What is appended is seen in `ledger`, and nowhere else."""

    def __init__(self, recording: Recording, world: World) -> None:
        self._journal, self._world = recording.journal, world
        self._present = Present(store.read_present(self._journal))
        self.naming = trio.Lock()
        self.bodies = _Bodies(recording)

    @property
    def ledger(self) -> Ledger:
        return self._present.ledger

    async def read(self, query: Callable[[Connection], T]) -> T:
        await trio.lowlevel.checkpoint()
        return query(self._journal)

    async def append(self, *entries: Entry) -> None:
        await trio.lowlevel.checkpoint()
        for subject, event in entries:
            record = Record(seq=0, at=self._world.now(), incarnation=0, subject=subject, event=event)
            self._present.apply(record)


class _Bodies:
    def __init__(self, recording: Recording) -> None:
        self._recording = recording

    @contextmanager
    def watched(self) -> Iterator[Container[str]]:
        yield frozenset()

    async def oldest(self, before: float, after: Stored | None) -> list[Stored]:
        await trio.lowlevel.checkpoint()
        return self._recording.oldest(before, after)

    async def drop(self, digests: Collection[str], watch: Container[str]) -> None:
        await trio.lowlevel.checkpoint()


class _Untouched(ArtifactFolder):
    there: list[str] | None = None

    async def published(self, models: Collection[rows.Model]) -> list[str]:
        return await super().published(models) if self.there is None else self.there

    async def remove_empty(self, folders: Collection[str]) -> None:
        await trio.lowlevel.checkpoint()

    async def remove(self, directory: str) -> bool:
        await trio.lowlevel.checkpoint()
        return True

    async def clear(self, unfinished: str) -> None:
        await trio.lowlevel.checkpoint()
