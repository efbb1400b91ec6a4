"""A home's journal moved to another database: from the home's files to a PostgreSQL server, back, or from
one server to another. At every moment one of the two is the home's and whole; the other one is refused by a
worker, or is not there. A move that was interrupted is begun anew, or ended if all of it was copied."""

from __future__ import annotations

import contextlib
import datetime
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from sqlalchemy import Connection, text

from tink import files
from tink.errors import StartupError
from tink.home import Home
from tink.journal import chain, copies, migrations, revisions, sqlite, store
from tink.journal.bodies import Shelf, shelves
from tink.journal.copies import Advance
from tink.journal.database import Database, Writer, database, database_errors
from tink.journal.reader import open_snapshot
from tink.journal.revisions import SCHEMAS, Schema
from tink.limits import DATABASE_BEAT_SECONDS
from tink.world import World

# In the home: what is copied into files, before it is all there.
SCRATCH = "moving"


class Stages(Protocol):
    def __call__(self, name: str, total: int) -> contextlib.AbstractContextManager[Advance]:
        """Around one stage of a move, which goes from 0 to `total`."""


class Moved(NamedTuple):
    """`copied`: false if an earlier move had copied all of it, and was interrupted. `seconds`: of the two
    stages that copy, and of all. `kept`: where the old journal is now."""

    head: chain.Head
    copied: bool
    bodies: int
    bytes: int
    events_seconds: float
    bodies_seconds: float
    seconds: float
    kept: str


def move(source: Home, target: Home, world: World, stages: Stages) -> Moved:
    """Both homes are one folder, with two databases. StartupError if that cannot be done, DatabaseInUse if
    a worker runs, JournalUnavailable if a database fails meanwhile: the source is as it was then."""
    began = world.monotonic()
    stamp = datetime.datetime.fromtimestamp(world.now(), datetime.UTC).strftime("%Y%m%dT%H%M%S")
    with contextlib.ExitStack() as stack:
        stack.enter_context(source.lock())
        origin, goal = (stack.enter_context(contextlib.closing(_end(home))) for home in (source, target))
        origin.lock()
        goal.lock()
        with origin.reading("journal") as journal, origin.reading("bodies") as bodies:
            head = chain.head(journal)
            there = goal.holds(head)
            found = revisions.look(journal, "journal")
            problem = found.problem(origin.place)
            if problem and not (there and found.kind == "moved"):
                raise StartupError(str(problem))
            work = _Work(origin, goal, world, stages)
            if not there:
                work.copy(journal, bodies, head)
            count = sum(map(copies.size, shelves(journal, bodies)))
        origin.beat()
        if not there:
            goal.complete(stamp)
        if source.database_url:
            kept = origin.retire(stamp)
            target.note_database(goal.note)
        else:  # without either a worker would begin a new journal
            target.note_database(goal.note)
            kept = origin.retire(stamp)
    return Moved(
        head=head,
        copied=not there,
        bodies=count,
        bytes=work.bytes,
        events_seconds=work.seconds.get("events", 0.0),
        bodies_seconds=work.seconds.get("bodies", 0.0) + work.seconds.get("short bodies", 0.0),
        seconds=world.monotonic() - began,
        kept=kept,
    )


class _Work:
    """What is copied, and how long that takes. Bodies come first: one is stored before the event that names
    it. They are committed first, too, so a database with events has all of both."""

    def __init__(self, origin: _End, goal: _End, world: World, stages: Stages) -> None:
        self._origin, self._goal, self._world, self._stages = origin, goal, world, stages
        self._beat_at = world.monotonic()
        self.seconds: dict[str, float] = {}
        self.bytes = 0

    def copy(self, journal: Connection, bodies: Connection, head: chain.Head) -> None:
        short, long = shelves(journal, bodies)
        events = store.last_seq(journal)
        self._goal.begin()
        into = self._goal.database("bodies")
        with self._goal.filled("bodies") as target:
            self._copy_bodies(long, target, into, "bodies")
        into = self._goal.database("journal")
        with self._goal.filled("journal") as target:
            self._copy_bodies(short, target, into, "short bodies")
            with self._stage("events", events) as advance:
                copies.copy_events(journal, target, into, advance)
            with self._stage("events again, to verify them", events) as advance, _reading(into):
                copies.verify_events(target, into, head, advance)
            # Whoever has lost the source must not have two of them.
            self._origin.beat()

    def _copy_bodies(self, shelf: Shelf, target: Connection, into: Database, name: str) -> None:
        count = copies.size(shelf)
        with self._stage(name, count) as advance:
            found = copies.copy_bodies(shelf, target, into, advance)
        with self._stage(f"{name} again, to verify them", count) as advance, _reading(into):
            copies.verify_bodies(Shelf(target, shelf.table), into, found, advance)
        self.bytes += found.size

    @contextlib.contextmanager
    def _stage(self, name: str, total: int) -> Iterator[Advance]:
        began = self._world.monotonic()
        with self._stages(name, total) as told:

            def advance(count: int) -> None:
                now = self._world.monotonic()
                if now - self._beat_at >= DATABASE_BEAT_SECONDS:
                    self._beat_at = now
                    self._origin.beat()
                told(count)

            yield advance
        self.seconds[name] = self._world.monotonic() - began


def _reading(copy: Database) -> contextlib.AbstractContextManager[None]:
    return database_errors(f"what was copied into {copy.place} cannot be read")


# -- the two ends -----------------------------------------------------------------------------------


class _End(ABC):
    """Where the journal is, or will be. `note`: what the home says of it. `advice`: if something else is
    there."""

    note: str | None = None
    advice = "name a database that is empty"

    def __init__(self, home: Home) -> None:
        self._home = home
        self._writers: dict[Schema, Writer] = {}
        self.place = database(home, "journal").place

    @abstractmethod
    def lock(self) -> None:
        """Nobody else writes there until `close`. The home is locked already."""

    def reading(self, schema: Schema) -> contextlib.AbstractContextManager[Connection]:
        """What is there, at one moment."""
        return open_snapshot(database(self._home, schema))

    def holds(self, head: chain.Head) -> bool:
        """Whether all of that journal is there already. StartupError if it is another journal."""
        if not database(self._home, "journal").exists():
            return False
        with self.reading("journal") as connection:
            _, revision, kind = revisions.look(connection, "journal")
            if kind not in ("none", "head"):
                raise StartupError(
                    f"{self.place} has a journal already, of schema revision {revision}: {self.advice}"
                )
            last = chain.head(connection) if kind == "head" else chain.NONE
            if last.seq == 0:
                return False
            if not head.seq or chain.hash_of(connection, head.seq) != head.hash:
                raise StartupError(
                    f"{self.place} has another journal already, of {last.seq:,} events: {self.advice}"
                )
        return True

    @abstractmethod
    def database(self, schema: Schema) -> Database:
        """Where it is written to while it is copied."""

    @abstractmethod
    def begin(self) -> None:
        """Before the first of the two is filled: what an interrupted move has left goes."""

    @contextlib.contextmanager
    def filled(self, schema: Schema) -> Iterator[Connection]:
        """A connection to an empty database of the newest schema, which is committed at the end."""
        into = self.database(schema)
        writer = self._writers.get(schema) or self._writers.setdefault(schema, into.writer())
        connection, failed = writer.connection, f"{into.place} cannot be written"
        with database_errors(failed):
            into.unbounded(connection)
            migrations.apply(connection, into)
        yield connection
        with database_errors(failed):
            connection.commit()

    @abstractmethod
    def complete(self, stamp: str) -> None:
        """All is there: a worker may find it."""

    @abstractmethod
    def retire(self, stamp: str) -> str:
        """No worker finds it any more. Returns where it is kept."""

    @abstractmethod
    def beat(self) -> None:
        """JournalUnavailable if somebody else has taken the place."""

    def close(self) -> None:
        for writer in reversed(self._writers.values()):
            writer.close()
        self._writers.clear()


def _end(home: Home) -> _End:
    return _Server(home) if home.database_url else _Files(home)


class _Server(_End):
    def __init__(self, home: Home) -> None:
        super().__init__(home)
        self.note = self.place

    def lock(self) -> None:
        """The journal's first: whoever has that may take the bodies' from whoever is left there."""
        for schema in SCHEMAS:
            self._writers[schema] = self.database(schema).writer()

    def database(self, schema: Schema) -> Database:
        return database(self._home, schema)

    def begin(self) -> None:
        """Bodies that it has left are written over."""

    def complete(self, stamp: str) -> None:
        """It was, when it was committed."""

    def retire(self, stamp: str) -> str:
        writer, table = self._writers["journal"], revisions.version_table("journal")
        statement = text(f"UPDATE {table} SET version_num = :moved")  # noqa: S608  no input
        with database_errors(f"{self.place} cannot be written"), writer.connection.begin():
            writer.connection.execute(statement, {"moved": f"{revisions.MOVED}{stamp}"})
        return self.place

    def beat(self) -> None:
        for writer in self._writers.values():
            writer.beat()


class _Files(_End):
    """In the home. What is copied into files is in a folder of its own until it is whole."""

    advice = "put it elsewhere, with the files beside it"

    def __init__(self, home: Home) -> None:
        super().__init__(home)
        self._scratch = Home(home.root / SCRATCH)

    def lock(self) -> None:
        """The home's lock is that of its files."""

    def beat(self) -> None:
        """Nobody waits for files."""

    def database(self, schema: Schema) -> Database:
        return database(self._scratch, schema)

    def begin(self) -> None:
        shutil.rmtree(self._scratch.root, ignore_errors=True)
        self._scratch.make()

    @contextlib.contextmanager
    def filled(self, schema: Schema) -> Iterator[Connection]:
        with super().filled(schema) as connection:
            yield connection
        # The last one to close it brings everything into the file.
        self._writers.pop(schema).close()

    def complete(self, stamp: str) -> None:
        with self._home.writing():
            for schema in reversed(SCHEMAS):  # with its journal it is a home
                made, place = sqlite.path_of(self._scratch, schema), sqlite.path_of(self._home, schema)
                files.sync(made)
                for path in sqlite.files(place):
                    if path.exists():
                        path.rename(f"{path}.left-{stamp}")
                made.rename(place)
                files.sync(self._home.root)
            shutil.rmtree(self._scratch.root)

    def retire(self, stamp: str) -> str:
        for schema in SCHEMAS:
            found = database(self._home, schema)
            writer = found.writer()
            with contextlib.closing(writer), database_errors(f"{found.place} cannot be written"):
                writer.connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        kept = f".moved-{stamp}"
        with self._home.writing():
            for schema in SCHEMAS:
                place = sqlite.path_of(self._home, schema)
                for path in reversed(sqlite.files(place)):
                    if path.exists():
                        path.rename(path.with_name(path.name.replace(place.name, place.name + kept)))
            files.sync(self._home.root)
        return f"{self._home.journal}{kept}"

    def close(self) -> None:
        super().close()
        shutil.rmtree(self._scratch.root, ignore_errors=True)
