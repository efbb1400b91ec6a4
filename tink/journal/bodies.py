"""The body store: request bodies and large results, exactly as received, named by their sha256.

Short ones are kept in the journal's database, in the commit of the event that names them; the others beside
it, in a commit of their own before that.
"""

from __future__ import annotations

import functools
import hashlib
import heapq
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Collection, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby, islice
from typing import Any, NamedTuple, TypeVar

import trio
import zstandard
from sqlalchemy import Connection, Engine, Table, bindparam, case, delete, select, tuple_

from tink.errors import JournalUnavailable
from tink.journal import schema
from tink.journal.commits import GroupCommit
from tink.journal.database import Database, batched, database_errors, upsert
from tink.limits import (
    BODY_BATCH_BYTES,
    BODY_CACHE_BYTES,
    MAX_ZSTD_WINDOW,
    PRUNE_BYTES,
    PRUNE_ROWS,
    PRUNE_SHORT_ROWS,
    SHORT_BODY,
)
from tink.world import World

T = TypeVar("T")


class Stored(NamedTuple):
    """A body without its content."""

    sha256: str
    size: int
    stored_at: float


class Put(NamedTuple):
    """A row of a shelf."""

    sha256: str
    size: int
    stored_at: float
    content: bytes

    @classmethod
    def of(cls, content: bytes, digest: str, stored_at: float) -> Put:
        return cls(digest, len(content), stored_at, content)


class Drop(NamedTuple):
    sha256: str


class Shelf(NamedTuple):
    """A table of bodies, and a connection to it."""

    connection: Connection
    table: Table


def shelves(journal: Connection, bodies: Connection) -> Sequence[Shelf]:
    """All that there are. A short body of an older journal is on the long one's."""
    return Shelf(journal, schema.short_bodies), Shelf(bodies, schema.bodies)


def read_body(shelves: Sequence[Shelf], digest: str) -> bytes:
    """The content of that name. LookupError if it is not stored any more, or is not what was put."""
    wrong = "is not stored any more"
    for connection, table in shelves:
        query = select(table.c.content).where(table.c.sha256 == digest)
        content: bytes | None = connection.execute(query).scalar()
        if content is not None and hashlib.sha256(content).hexdigest() == digest:
            return content
        if content is not None:
            wrong = "is damaged on disk"
    raise LookupError(f"the body {digest} {wrong}")


def stored(shelves: Sequence[Shelf], digests: Collection[str]) -> set[str]:
    """Those of these names that are stored. Whether what is there is whole, reading it tells."""
    found = set[str]()
    for connection, table in shelves:
        for some in batched(sorted(digests)):
            query = select(table.c.sha256).where(table.c.sha256.in_(some))
            found.update(connection.execute(query).scalars())
    return found


def oldest(shelves: Sequence[Shelf], before: float, after: Stored | None) -> list[Stored]:
    """A page of what was stored before `before`, the oldest first, behind `after`."""
    found = heapq.merge(*(_oldest(shelf, before, after) for shelf in shelves), key=_place)
    page: list[Stored] = []
    total = 0
    for body in islice(found, PRUNE_ROWS):
        total += body.size
        if page and total > PRUNE_BYTES:
            break
        page.append(body)
    return page


def _oldest(shelf: Shelf, before: float, after: Stored | None) -> Iterator[Stored]:
    connection, table = shelf
    place = table.c.stored_at, table.c.sha256
    query = select(table.c.sha256, table.c.size, table.c.stored_at).where(table.c.stored_at < before)
    if after is not None:
        query = query.where(tuple_(*place) > _place(after))
    return (Stored(*row) for row in connection.execute(query.order_by(*place).limit(PRUNE_ROWS)))


def _place(body: Stored) -> tuple[float, str]:
    return body.stored_at, body.sha256


def change(connection: Connection, table: Table, items: Iterable[Put | Drop]) -> None:
    """In the connection's transaction, in this order. What is there already may be damaged: what is put now
    is not. And it may be old: another job needs it now."""
    statements = _statements(connection.dialect.name, table)
    for kind, run in groupby(items, key=type):
        connection.execute(statements[kind], [item._asdict() for item in run])


@functools.cache  # to make a statement costs more than to run it
def _statements(dialect: str, table: Table) -> dict[type, Any]:
    put = upsert(dialect, table)
    new, old = put.excluded.stored_at, table.c.stored_at
    put = put.on_conflict_do_update(
        index_elements=["sha256"],
        set_={"content": put.excluded.content, "stored_at": case((new > old, new), else_=old)},
    )
    return {Put: put, Drop: delete(table).where(table.c.sha256 == bindparam("sha256"))}


def decompressed(body: bytes, codec: str) -> bytes:
    """As its client made it. What it decompresses to was counted before it was accepted."""
    if codec == "identity":
        return body
    return zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW).decompressobj().decompress(body)


class BodyStore:
    """What is put is durable before an event that names it is; get reads what was put. Run `run()` in a
    nursery."""

    def __init__(
        self,
        database: Database,
        world: World,
        journal: Engine,
        readers: trio.CapacityLimiter,
        drop: Callable[[list[Drop]], Awaitable[None]],
    ) -> None:
        """`journal`: connections that read there, as many as `readers` has tokens. `drop` commits what goes
        there; what is put there it takes from `short`, with the events."""
        self._world, self._database = world, database
        self._writer = database.writer()
        self._reader = database.reader()
        self._journal, self._readers, self._drop = journal, readers, drop
        # By name, until an event that names it is committed.
        self._short: dict[str, bytes] = {}
        self._recent: OrderedDict[str, bytes] = OrderedDict()
        self._recent_bytes = 0
        # What was put and is in no event yet, with how many times; and what was put since each watch began.
        self._unnamed: Counter[str] = Counter()
        self._watches: list[set[str]] = []
        self._commits: GroupCommit[Put | Drop] = GroupCommit(
            self._commit, world, name="bodies", max_bytes=BODY_BATCH_BYTES
        )

    async def put(self, content: bytes) -> str:
        """Stores `content` and returns its sha256 (hex). Putting it again only makes it young again. It
        cannot be deleted before the event that names it is committed (`named`)."""
        digest = hashlib.sha256(content).hexdigest()
        self._unnamed[digest] += 1
        for watch in self._watches:
            watch.add(digest)
        if len(content) <= SHORT_BODY:
            self._short[digest] = content
            await trio.lowlevel.checkpoint()
        else:
            await self._commits.submit([Put.of(content, digest, self._world.now())], len(content))
        self._remember(digest, content)
        return digest

    def short(self, digest: str) -> bytes | None:
        """A body that is to be committed with the event that names it."""
        return self._short.get(digest)

    def named(self, digest: str) -> None:
        """An event that names this body is committed."""
        self._unnamed[digest] -= 1
        if self._unnamed[digest] <= 0:
            del self._unnamed[digest]
            self._short.pop(digest, None)

    async def get(self, digest: str) -> bytes:
        """The content of that name. LookupError if it is not stored any more, or if what is
        on disk is not what was put."""
        hot = self._recent.get(digest)
        if hot is not None:
            self._recent.move_to_end(digest)
            await trio.lowlevel.checkpoint()
            return hot

        try:
            return await self._read(partial(read_body, digest=digest))
        except JournalUnavailable as error:
            if not self._database.is_damage(error):
                raise
            raise LookupError(f"the body {digest} is damaged on disk") from error

    # -- retention ----------------------------------------------------------------------------------

    @contextmanager
    def watched(self) -> Iterator[Container[str]]:
        """What must not be dropped, whatever the journal says of it meanwhile: bodies that no event
        names yet, and those that are put while this is open. Look at the journal inside of it."""
        watch = set(self._unnamed)
        self._watches.append(watch)
        try:
            yield watch
        finally:
            self._watches = [other for other in self._watches if other is not watch]

    async def oldest(self, before: float, after: Stored | None) -> list[Stored]:
        """A page of what was stored before `before`, the oldest first, behind `after`."""
        return await self._read(partial(oldest, before=before, after=after))

    async def drop(self, digests: Collection[str], watch: Container[str]) -> None:
        """Deletes these bodies, for good when it returns, but for those that are in `watch` now: what is
        put from now on is stored after them."""
        # At each step anew: meanwhile some may have been put, and stored, again.
        for some in batched(list(digests), PRUNE_SHORT_ROWS):
            await self._drop([Drop(digest) for digest in some if digest not in watch])
        doomed = [Drop(digest) for digest in digests if digest not in watch]
        await self._commits.submit(list(doomed), 0)
        for drop in doomed:
            self._recent_bytes -= len(self._recent.pop(drop.sha256, b""))

    # -- the inside ---------------------------------------------------------------------------------

    async def _read(self, read: Callable[[Sequence[Shelf]], T]) -> T:
        def connected() -> T:
            with (
                database_errors("reading a body"),
                self._journal.connect() as journal,
                self._reader.connect() as bodies,
            ):
                return read(shelves(journal, bodies))

        return await self._world.run_sync(connected, limiter=self._readers)

    def _remember(self, digest: str, content: bytes) -> None:
        """What was just put is about to be used: sent to a backend, or fetched by its client."""
        if digest not in self._recent:
            self._recent[digest] = content
            self._recent_bytes += len(content)
        while self._recent_bytes > BODY_CACHE_BYTES:
            self._recent_bytes -= len(self._recent.popitem(last=False)[1])

    async def run(self) -> None:
        await self._commits.run()

    async def watch(self) -> None:
        await self._commits.watch()

    def close(self) -> None:
        self._writer.close()
        self._reader.dispose()

    def _commit(self, items: list[Put | Drop]) -> None:
        connection = self._writer.connection
        with database_errors("the body store could not commit"), connection.begin():
            change(connection, schema.bodies, items)
        self._writer.check()
