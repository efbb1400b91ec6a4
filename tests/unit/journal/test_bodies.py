"""Bodies: durable when put returns, exactly what was put, and never taken for something else."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
import trio
from sqlalchemy import update
from trio.testing import MockClock, assert_checkpoints, wait_all_tasks_blocked

from tests.unit.journal.journal_kit import InlineWorld, new_home, opened, written
from tink.domain.events import Entry, JobAccepted, JobDone, Subject
from tink.errors import JournalUnavailable
from tink.journal import schema
from tink.journal.bodies import BodyStore, Stored
from tink.journal.journal import Journal


@pytest.fixture(autouse=True)
def _every_body_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are not: test_short_bodies.py."""
    monkeypatch.setattr("tink.journal.bodies.SHORT_BODY", -1)


async def test_what_was_put_is_read_back_after_a_restart(autojump_clock: MockClock, tmp_path: Path) -> None:
    home = new_home(tmp_path)
    contents = [b"", b"\0\xff" * 1000, "größe".encode()]
    async with opened(home) as journal:
        digests = [await journal.bodies.put(content) for content in contents]
    async with opened(home) as journal:
        assert [await journal.bodies.get(digest) for digest in digests] == contents
        # and from memory too
        assert [await journal.bodies.put(content) for content in contents] == digests
        assert [await journal.bodies.get(digest) for digest in digests] == contents


async def test_the_same_body_is_stored_once_whoever_puts_it(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    home = new_home(tmp_path)
    async with opened(home) as journal:
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(journal.bodies.put, b"one")
        await journal.bodies.put(b"one")
    with written(home, "bodies") as connection:
        assert connection.exec_driver_sql("SELECT count(*), sum(size) FROM bodies").one() == (1, 3)


@pytest.mark.on_files
async def test_a_body_on_a_page_that_is_damaged_is_lost_and_the_others_are_not(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    home = new_home(tmp_path)
    contents = [bytes([number]) * 9000 for number in range(1, 9)]
    async with opened(home) as journal:
        digests = [await journal.bodies.put(content) for content in contents]
    raw = home.bodies.read_bytes()
    page = raw.index(contents[3][:4000]) // 4096 - 1  # that its content continues on
    home.bodies.write_bytes(raw[: page * 4096] + bytes(4096) + raw[(page + 1) * 4096 :])
    lost = 0
    async with opened(home) as journal:
        for digest, content in zip(digests, contents, strict=True):
            try:
                assert await journal.bodies.get(digest) == content
            except LookupError:
                lost += 1
        assert await journal.bodies.put(b"another")
    assert 0 < lost < len(contents)


async def test_a_put_returns_only_after_the_commit(autojump_clock: MockClock, tmp_path: Path) -> None:
    world = InlineWorld()
    async with opened(new_home(tmp_path), world) as journal:
        world.block = trio.Event()
        stored: list[str] = []

        async def put() -> None:
            stored.append(await journal.bodies.put(b"x"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(put)
            await wait_all_tasks_blocked()
            assert stored == []
            world.block.set()
        assert len(stored) == 1


async def test_a_body_that_was_pruned_is_a_lookup_error(autojump_clock: MockClock, tmp_path: Path) -> None:
    async with opened(new_home(tmp_path)) as journal:
        with pytest.raises(LookupError, match="not stored any more"):
            await journal.bodies.get("0" * 64)


async def test_a_body_that_is_damaged_on_disk_is_never_handed_out(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    home = new_home(tmp_path)
    async with opened(home) as journal:
        digest = await journal.bodies.put(b"a body")
    with written(home, "bodies") as connection:
        connection.execute(update(schema.bodies).values(content=b"a bodY"))
        connection.commit()
    async with opened(home) as journal:
        with pytest.raises(LookupError, match="damaged on disk"):
            await journal.bodies.get(digest)


async def test_memory_for_bodies_is_bounded_and_holds_the_last_ones(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tink.journal.bodies.BODY_CACHE_BYTES", 1000)
    world = InlineWorld()
    async with opened(new_home(tmp_path), world) as journal:
        digests = [await journal.bodies.put(bytes([i]) * 300) for i in range(6)]
        await journal.bodies.put(b"larger than the cache" * 100)
        assert journal.bodies._recent_bytes == sum(map(len, journal.bodies._recent.values())) <= 1000
        digests = [await journal.bodies.put(bytes([i]) * 300) for i in range(6)]
        assert list(journal.bodies._recent) == digests[-3:]
        before = world.calls
        await journal.bodies.get(digests[-1])
        assert world.calls == before  # from memory
        await journal.bodies.get(digests[0])
        assert world.calls == before + 1


async def test_put_and_get_are_checkpoints(autojump_clock: MockClock, tmp_path: Path) -> None:
    async with opened(new_home(tmp_path)) as journal:
        with assert_checkpoints():
            digest = await journal.bodies.put(b"x")
        with assert_checkpoints():
            await journal.bodies.get(digest)
        journal.bodies._recent.clear()
        with assert_checkpoints():
            await journal.bodies.get(digest)


async def test_a_body_that_leaves_memory_while_it_is_read_is_read_all_the_same(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tink.journal.bodies.BODY_CACHE_BYTES", 100)
    async with opened(new_home(tmp_path)) as journal:
        digest = await journal.bodies.put(b"a" * 80)
        found: list[bytes] = []

        async def get() -> None:
            found.append(await journal.bodies.get(digest))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(get)
            await trio.lowlevel.checkpoint()  # it waits at its own now
            journal.bodies._remember("other", b"b" * 80)
        assert found == [b"a" * 80]


async def test_a_body_store_that_cannot_commit_stops_the_journal(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: BodyStore, rows: object) -> None:
        raise JournalUnavailable("disk full")

    monkeypatch.setattr(BodyStore, "_commit", fail)
    refused = False
    with pytest.RaisesGroup(JournalUnavailable, flatten_subgroups=True):
        async with opened(new_home(tmp_path)) as journal:
            with trio.fail_after(10), trio.CancelScope(shield=True):
                try:
                    await journal.bodies.put(b"x")
                except JournalUnavailable:
                    refused = True
            await trio.sleep_forever()
    assert refused


# -- deleting ---------------------------------------------------------------------------------------


class Calendar(InlineWorld):
    """Its clock is set by hand."""

    time = 100.0

    def now(self) -> float:
        return self.time


def _accepted(digest: str, number: int = 0) -> Entry:
    subject = Subject(tenant="t", job_id=f"j{number}")
    return subject, JobAccepted(op="forward", seq_id=number, body_sha256=digest)


async def _drop(journal: Journal, *digests: str) -> None:
    with journal.bodies.watched() as watch:
        await journal.bodies.drop(digests, watch)


async def test_a_body_that_was_dropped_is_gone_from_disk_and_memory(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    home = new_home(tmp_path)
    async with opened(home) as journal:
        gone, kept = [await journal.bodies.put(content) for content in (b"gone", b"kept")]
        await journal.append(_accepted(gone), _accepted(kept, 1))
        await _drop(journal, gone)
        with pytest.raises(LookupError, match="not stored any more"):
            await journal.bodies.get(gone)
        assert await journal.bodies.get(kept) == b"kept"
        assert journal.bodies._recent_bytes == len(b"kept")
        assert await journal.bodies.put(b"gone") == gone
        assert await journal.bodies.get(gone) == b"gone"


async def test_a_body_that_no_event_names_yet_is_not_dropped_however_often_it_was_put(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with opened(new_home(tmp_path)) as journal:
        for _ in range(2):
            digest = await journal.bodies.put(b"of two jobs")
        for number in range(2):
            await _drop(journal, digest)
            journal.bodies._recent.clear()
            assert await journal.bodies.get(digest) == b"of two jobs"
            await journal.append(_accepted(digest, number))
        assert journal.bodies._unnamed == {}
        await _drop(journal, digest)
        with pytest.raises(LookupError):
            await journal.bodies.get(digest)


async def test_a_result_that_no_event_names_yet_is_not_dropped(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with opened(new_home(tmp_path)) as journal:
        await journal.append(_accepted("elsewhere"))
        digest = await journal.bodies.put(b"a result")
        await _drop(journal, digest)
        assert await journal.bodies.get(digest) == b"a result"
        await journal.append((Subject(tenant="t", job_id="j0"), JobDone(result_sha256=digest)))
        assert journal.bodies._unnamed == {}


async def test_a_body_that_was_put_since_somebody_looked_who_needs_it_is_not_dropped(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with opened(new_home(tmp_path)) as journal:
        digest = await journal.bodies.put(b"x")
        await journal.append(_accepted(digest))
        with journal.bodies.watched() as watch:
            assert digest not in watch
            # Whoever looked before this thinks that nobody needs it.
            await journal.bodies.put(b"x")
            await journal.append(_accepted(digest, 1))
            await journal.bodies.drop([digest], watch)
        journal.bodies._recent.clear()
        assert await journal.bodies.get(digest) == b"x"


async def test_a_body_that_is_put_while_it_is_being_dropped_is_there(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    world = InlineWorld()
    async with opened(new_home(tmp_path), world) as journal:
        digest = await journal.bodies.put(b"x")
        await journal.append(_accepted(digest))
        world.block = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_drop, journal, digest)
            await wait_all_tasks_blocked()
            nursery.start_soon(journal.bodies.put, b"x")
            await wait_all_tasks_blocked()
            world.block.set()
        journal.bodies._recent.clear()
        assert await journal.bodies.get(digest) == b"x"


async def test_a_body_that_is_put_again_is_young_again_and_never_gets_older(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    world = Calendar()
    async with opened(new_home(tmp_path), world) as journal:
        for world.time in (100.0, 300.0, 200.0):
            digest = await journal.bodies.put(b"x")
        assert await journal.bodies.oldest(300.0, None) == []
        assert await journal.bodies.oldest(300.5, None) == [Stored(digest, 1, 300.0)]


async def test_the_oldest_bodies_come_in_pages_each_once(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tink.journal.bodies.PRUNE_ROWS", 3)
    monkeypatch.setattr("tink.journal.bodies.PRUNE_BYTES", 100)
    world = Calendar()
    async with opened(new_home(tmp_path), world) as journal:
        put = []
        for size in (1, 2, 3, 4, 5, 60, 70, 500, 6):
            world.time += size % 2  # some at the same moment
            put.append(Stored(await journal.bodies.put(b"x" * size), size, world.time))
        world.time += 1
        await journal.bodies.put(b"too young")
        pages: list[list[Stored]] = []
        while page := await journal.bodies.oldest(world.time, pages[-1][-1] if pages else None):
            pages.append(page)
        assert sorted(body for page in pages for body in page) == sorted(put)
        assert [body.stored_at for page in pages for body in page] == sorted(b.stored_at for b in put)
        assert all(len(page) <= 3 for page in pages)
        assert all(len(page) == 1 or sum(body.size for body in page) <= 100 for page in pages)


@pytest.mark.on_files
async def test_every_page_of_the_store_is_used_again(autojump_clock: MockClock, tmp_path: Path) -> None:
    home = new_home(tmp_path)
    sizes = []
    async with opened(home) as journal:
        for round_ in range(4):
            digests = [await journal.bodies.put(bytes([round_, i]) * 50_000) for i in range(20)]
            await journal.append(*(_accepted(digest, 100 * round_ + i) for i, digest in enumerate(digests)))
            await _drop(journal, *digests)
            with sqlite3.connect(home.bodies) as connection:
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            connection.close()
            sizes.append(home.bodies.stat().st_size)
    assert sizes[-1] <= 1.05 * sizes[0]
