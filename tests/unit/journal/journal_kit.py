"""What the journal's tests share."""

from __future__ import annotations

import atexit
import functools
import itertools
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import trio
from sqlalchemy import Connection

from tests.postgres import PostgresServer
from tink.domain.events import AnyEvent, SessionCreated, Subject
from tink.errors import JournalUnavailable, tink_error
from tink.home import Home
from tink.journal.database import database
from tink.journal.journal import Journal, prepare
from tink.journal.reader import open_snapshot
from tink.journal.revisions import Schema
from tink.journal.store import check
from tink.world import World

T = TypeVar("T")


class InlineWorld(World):
    """No threads, so that MockClock works; time and ids that are counted; `block` holds a thread's work."""

    def __init__(self) -> None:
        self._ids = itertools.count(1)
        self.block: trio.Event | None = None
        self.calls = 0

    def now(self) -> float:
        return 1_700_000_000.0

    def monotonic(self) -> float:
        return trio.current_time()

    def new_id(self) -> str:
        return f"{next(self._ids):032x}"

    def new_seed(self) -> int:
        return next(self._ids)

    async def run_sync(
        self, fn: Callable[..., T], *args: Any, limiter: trio.CapacityLimiter | None = None
    ) -> T:
        await trio.lowlevel.checkpoint()
        with trio.CancelScope(shield=True):  # a thread cannot be cancelled
            if self.block is not None:
                await self.block.wait()
            await trio.lowlevel.checkpoint()
        self.calls += 1
        return fn(*args)


@functools.cache
def _migrated() -> dict[str, bytes]:
    """Empty databases of today's schema: to make them takes longer than most tests."""
    with tempfile.TemporaryDirectory() as folder:
        prepare(Home(Path(folder)))
        return {path.name: path.read_bytes() for path in Path(folder).glob("*.sqlite")}


_server: PostgresServer | None = None
_made: list[str] = []


@contextmanager
def on_postgres(server: PostgresServer) -> Iterator[None]:
    """The journals of `new_home` are there meanwhile, and gone afterwards."""
    global _server
    _server = server
    try:
        yield
    finally:
        _server = None
        while _made:
            server.drop_database(_made.pop())


@functools.cache
def _migrated_on(server: PostgresServer) -> str:
    with tempfile.TemporaryDirectory() as folder:
        home = Home(Path(folder), server.create_database())
        prepare(home)
    return home.database_url


def new_home(folder: Path, *, empty: bool = False) -> Home:
    """A home with databases that are migrated already, or with none (`empty`)."""
    if _server is not None:
        _made.append(_server.create_database(None if empty else _migrated_on(_server)))
        home = Home(folder, _made[-1])
        home.make()
        return home
    home = Home(folder)
    home.make()
    if not empty:
        for name, content in _migrated().items():
            (folder / name).write_bytes(content)
    return home


@functools.cache
def _made_once(write: Callable[[Home], None], server: PostgresServer | None) -> Home:
    """For as long as the process, or the server, is there."""
    folder = Path(tempfile.mkdtemp(prefix="tink-home-"))
    atexit.register(shutil.rmtree, folder, True)
    home = new_home(folder / "home")
    if server is not None:
        _made.remove(home.database_url)
    write(home)
    return home


def copy_of(write: Callable[[Home], None], folder: Path) -> Home:
    """A home as `write` leaves an empty one, for a test that may change it. It notes its database."""
    made = _made_once(write, _server)
    shutil.copytree(made.root, folder)
    if _server is None:
        return Home(folder)
    _made.append(_server.create_database(made.database_url))
    home = Home(folder, _made[-1])
    home.note_database(home.database_url)
    return home


# So that a row can be damaged that others name.
FOREIGN_KEYS_OFF = {
    "sqlite": "PRAGMA foreign_keys=OFF",
    "postgresql": "SET session_replication_role = replica",
}


@contextmanager
def written(home: Home, schema: Schema = "journal") -> Iterator[Connection]:
    """A connection to change a database by hand."""
    writer = database(home, schema).writer()
    try:
        yield writer.connection
    finally:
        writer.close()


@asynccontextmanager
async def opened(home: Home, world: World | None = None) -> AsyncIterator[Journal]:
    async with Journal.open(home, world or InlineWorld(), version="0", settings_digest="0") as journal:
        yield journal


def session(number: int | str, **fields: Any) -> tuple[Subject, AnyEvent]:
    return Subject(tenant="t", session_id=f"s{number}"), SessionCreated(**fields)


def stored_sessions(home: Home) -> set[str]:
    """What another process reads in the tables, once they have been compared with the events."""
    with open_snapshot(database(home, "journal")) as connection:
        assert check(connection) == []
        rows = connection.exec_driver_sql("SELECT session_id FROM sessions")
        return set(rows.scalars())


@contextmanager
def stops_with(reason: str) -> Iterator[None]:
    """JournalUnavailable, and nothing else, in however many groups."""
    try:
        yield
    except Exception as raised:
        error = tink_error(raised)
        assert isinstance(error, JournalUnavailable)
        assert reason in str(error)
    else:
        raise AssertionError("it went on")


async def cancel_at(step: int, fn: Callable[[], Awaitable[None]]) -> bool:
    """Runs `fn` and cancels it at its `step`-th await. False if it ended before that."""

    class Watch(trio.abc.Instrument):
        def __init__(self) -> None:
            self.task = trio.lowlevel.current_task()
            self.count = 0

        def after_task_step(self, task: trio.lowlevel.Task) -> None:
            if task is self.task:
                self.count += 1
                if self.count == step:
                    scope.cancel()

    watch = Watch()
    with trio.CancelScope() as scope:
        trio.lowlevel.add_instrument(watch)
        try:
            await fn()
        finally:
            trio.lowlevel.remove_instrument(watch)
    return watch.count >= step
