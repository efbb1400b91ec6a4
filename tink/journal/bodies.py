"""The body store: request bodies and large results, exactly as received, named by their sha256."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from pathlib import Path

import trio
from sqlalchemy import select
from sqlalchemy.dialects.sqlite import insert

from tink.journal import schema
from tink.journal.commits import GroupCommit
from tink.journal.database import database_errors, reader_engine, writer_engine
from tink.limits import BODY_BATCH_BYTES, BODY_CACHE_BYTES, READ_CONNECTIONS
from tink.world import World


class BodyStore:
    """Put is durable when it returns; get reads what was put. Run `run()` in a nursery."""

    def __init__(self, path: Path, world: World) -> None:
        self._world = world
        self._engine = writer_engine(path)
        self._connection = self._engine.connect()
        self._reader = reader_engine(path)
        self._readers = trio.CapacityLimiter(READ_CONNECTIONS)
        self._recent: OrderedDict[str, bytes] = OrderedDict()
        self._recent_bytes = 0
        self._commits: GroupCommit[dict[str, object]] = GroupCommit(
            self._commit, world, max_bytes=BODY_BATCH_BYTES
        )

    async def put(self, content: bytes) -> str:
        """Stores `content` and returns its sha256 (hex). Putting it again changes nothing."""
        digest = hashlib.sha256(content).hexdigest()
        row = {"sha256": digest, "size": len(content), "stored_at": self._world.now(), "content": content}
        await self._commits.submit([row], len(content))
        self._remember(digest, content)
        return digest

    async def get(self, digest: str) -> bytes:
        """The content of that name. LookupError if it is not stored any more, or if what is
        on disk is not what was put."""

        if digest in self._recent:
            self._recent.move_to_end(digest)
            await trio.lowlevel.checkpoint()
            return self._recent[digest]

        def read() -> bytes | None:
            with database_errors("reading a body"), self._reader.connect() as connection:
                return connection.execute(
                    select(schema.bodies.c.content).where(schema.bodies.c.sha256 == digest)
                ).scalar()

        content = await self._world.run_sync(read, limiter=self._readers)
        if content is None:
            raise LookupError(f"the body {digest} is not stored any more")
        if hashlib.sha256(content).hexdigest() != digest:
            raise LookupError(f"the body {digest} is damaged on disk")
        return content

    def _remember(self, digest: str, content: bytes) -> None:
        """What was just put is about to be used: sent to a backend, or fetched by its client."""
        if digest not in self._recent:
            self._recent[digest] = content
            self._recent_bytes += len(content)
        while self._recent_bytes > BODY_CACHE_BYTES:
            self._recent_bytes -= len(self._recent.popitem(last=False)[1])

    async def run(self) -> None:
        await self._commits.run()

    def close(self) -> None:
        self._connection.close()
        self._engine.dispose()
        self._reader.dispose()

    def _commit(self, rows: list[dict[str, object]]) -> None:
        with database_errors("the body store could not commit"), self._connection.begin():
            put = insert(schema.bodies)
            # A copy that is there already may be damaged: this one is not.
            whole = put.on_conflict_do_update(
                index_elements=["sha256"], set_={"content": put.excluded.content}
            )
            self._connection.execute(whole, rows)
