"""Bodies: durable when put returns, exactly what was put, and never taken for something else."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, assert_checkpoints, wait_all_tasks_blocked

from tests.unit.journal.journal_kit import InlineWorld, new_home, opened
from tink.errors import JournalUnavailable
from tink.journal.bodies import BodyStore


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
    connection = sqlite3.connect(home.bodies)
    assert connection.execute("SELECT count(*), sum(size) FROM bodies").fetchone() == (1, 3)
    connection.close()


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
    connection = sqlite3.connect(home.bodies)
    with connection:
        connection.execute("UPDATE bodies SET content = ?", (b"a bodY",))
    connection.close()
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
