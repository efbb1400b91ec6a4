"""The body store: request bodies and large results, exactly as received, named by their sha256."""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Container, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

import trio
import zstandard
from sqlalchemy import Connection, bindparam, case, delete, select, tuple_

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
    READ_CONNECTIONS,
)
from tink.world import World

T = TypeVar("T")


class Stored(NamedTuple):
    """A body without its content."""

    sha256: str
    size: int
    stored_at: float


class _Put(NamedTuple):
    sha256: str
    size: int
    stored_at: float
    content: bytes


class _Drop(NamedTuple):
    sha256: str


def read_body(connection: Connection, digest: str) -> bytes:
    """The content of that name. LookupError if it is not stored any more, or is not what was put."""
    query = select(schema.bodies.c.content).where(schema.bodies.c.sha256 == digest)
    content: bytes | None = connection.execute(query).scalar()
    if content is None:
        raise LookupError(f"the body {digest} is not stored any more")
    if hashlib.sha256(content).hexdigest() != digest:
        raise LookupError(f"the body {digest} is damaged on disk")
    return content


def stored(connection: Connection, digests: Collection[str]) -> set[str]:
    """Those of these names that are stored. Whether what is there is whole, reading it tells."""
    found = set[str]()
    for some in batched(sorted(digests)):
        query = select(schema.bodies.c.sha256).where(schema.bodies.c.sha256.in_(some))
        found.update(connection.execute(query).scalars())
    return found


def oldest(connection: Connection, before: float, after: Stored | None) -> list[Stored]:
    """A page of what was stored before `before`, the oldest first, behind `after`."""
    table = schema.bodies
    place = tuple_(table.c.stored_at, table.c.sha256)
    query = select(table.c.sha256, table.c.size, table.c.stored_at).where(table.c.stored_at < before)
    if after is not None:
        query = query.where(place > (after.stored_at, after.sha256))
    page: list[Stored] = []
    total = 0
    for row in connection.execute(query.order_by(table.c.stored_at, table.c.sha256).limit(PRUNE_ROWS)):
        total += row.size
        if page and total > PRUNE_BYTES:
            break
        page.append(Stored(*row))
    return page


def decompressed(body: bytes, codec: str) -> bytes:
    """As its client made it. What it decompresses to was counted before it was accepted."""
    if codec == "identity":
        return body
    return zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW).decompressobj().decompress(body)


class BodyStore:
    """Put is durable when it returns; get reads what was put. Run `run()` in a nursery."""

    def __init__(self, database: Database, world: World) -> None:
        self._world, self._database = world, database
        self._writer = database.writer()
        self._statements = _statements(self._writer.connection.dialect.name)
        self._reader = database.reader()
        self._readers = trio.CapacityLimiter(READ_CONNECTIONS)
        self._recent: OrderedDict[str, bytes] = OrderedDict()
        self._recent_bytes = 0
        # What was put and is in no event yet, with how many times; and what was put since each watch began.
        self._unnamed: Counter[str] = Counter()
        self._watches: list[set[str]] = []
        self._commits: GroupCommit[_Put | _Drop] = GroupCommit(
            self._commit, world, name="bodies", max_bytes=BODY_BATCH_BYTES
        )

    async def put(self, content: bytes) -> str:
        """Stores `content` and returns its sha256 (hex). Putting it again only makes it young again. It
        cannot be deleted before the event that names it is committed (`named`)."""
        digest = hashlib.sha256(content).hexdigest()
        self._unnamed[digest] += 1
        for watch in self._watches:
            watch.add(digest)
        put = _Put(digest, len(content), self._world.now(), content)
        await self._commits.submit([put], len(content))
        self._remember(digest, content)
        return digest

    def named(self, digest: str) -> None:
        """An event that names this body is committed."""
        self._unnamed[digest] -= 1
        if self._unnamed[digest] <= 0:
            del self._unnamed[digest]

    async def get(self, digest: str) -> bytes:
        """The content of that name. LookupError if it is not stored any more, or if what is
        on disk is not what was put."""
        hot = self._recent.get(digest)
        if hot is not None:
            self._recent.move_to_end(digest)
            await trio.lowlevel.checkpoint_if_cancelled()
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

    async def drop(self, digests: Iterable[str], watch: Container[str]) -> None:
        """Deletes these bodies, for good when it returns, but for those that are in `watch` now: what is
        put from now on is stored after them."""
        doomed: list[_Put | _Drop] = [_Drop(digest) for digest in digests if digest not in watch]
        await self._commits.submit(doomed, 0)
        for drop in doomed:
            self._recent_bytes -= len(self._recent.pop(drop.sha256, b""))

    # -- the inside ---------------------------------------------------------------------------------

    async def _read(self, read: Callable[[Connection], T]) -> T:
        def connected() -> T:
            with database_errors("reading a body"), self._reader.connect() as connection:
                return read(connection)

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

    def _commit(self, items: list[_Put | _Drop]) -> None:
        connection = self._writer.connection
        with database_errors("the body store could not commit"), connection.begin():
            for kind, run in groupby(items, key=type):
                connection.execute(self._statements[kind], [item._asdict() for item in run])
        self._writer.check()


def _statements(dialect: str) -> dict[type, Any]:
    put, table = upsert(dialect, schema.bodies), schema.bodies
    # A copy that is there already may be damaged: this one is not. And it may be old: another job needs
    # it now.
    new, old = put.excluded.stored_at, table.c.stored_at
    put = put.on_conflict_do_update(
        index_elements=["sha256"],
        set_={"content": put.excluded.content, "stored_at": case((new > old, new), else_=old)},
    )
    return {_Put: put, _Drop: delete(table).where(table.c.sha256 == bindparam("sha256"))}
