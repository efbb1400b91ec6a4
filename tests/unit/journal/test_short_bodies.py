"""Short bodies: in the journal, with the event that names them or not at all."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from sqlalchemy import Table, update
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.unit.journal.journal_kit import InlineWorld, new_home, opened, session, written
from tink.domain.events import Entry, JobAccepted, JobDone, Subject
from tink.home import Home
from tink.journal import checks, schema
from tink.journal.bodies import Stored
from tink.journal.database import database
from tink.journal.journal import Journal
from tink.journal.reader import open_snapshot
from tink.journal.revisions import Schema
from tink.limits import SHORT_BODY

WHO = Subject(tenant="t", session_id="s1", model_id="m", job_id="m:1")


def accepted(digest: str, number: int = 1) -> Entry:
    who = Subject(tenant="t", session_id="s1", model_id="m", job_id=f"m:{number}")
    return who, JobAccepted(op="forward_backward", seq_id=number, body_sha256=digest)


async def begin(journal: Journal) -> None:
    made = Subject(tenant="t", session_id="s1", model_id="m", job_id="m:0")
    create = JobAccepted(op="create_model", seq_id=0, model_seq_id=0, request="{}")
    await journal.append(session(1), (made, create))


class Clock(InlineWorld):
    time = 100.0

    def now(self) -> float:
        return self.time


def counts(home: Home) -> tuple[int, int]:
    """Of the short ones, and of the others."""
    with open_snapshot(database(home, "journal")) as connection:
        short = connection.exec_driver_sql("SELECT count(*) FROM short_bodies").scalar_one()
    with open_snapshot(database(home, "bodies")) as connection:
        return short, connection.exec_driver_sql("SELECT count(*) FROM bodies").scalar_one()


def is_well(home: Home) -> bool:
    return all(part.ok for part in checks.check(home, quick=False))


@pytest.mark.parametrize(("length", "where"), [(0, (1, 0)), (SHORT_BODY, (1, 0)), (SHORT_BODY + 1, (0, 1))])
async def test_a_body_is_read_back_after_a_restart_whatever_its_length(
    autojump_clock: MockClock, tmp_path: Path, length: int, where: tuple[int, int]
) -> None:
    home, content = new_home(tmp_path), b"\0" * length
    async with opened(home) as journal:
        await begin(journal)
        digest = await journal.bodies.put(content)
        await journal.append(accepted(digest))
    assert counts(home) == where
    assert is_well(home)
    async with opened(home) as journal:
        assert await journal.bodies.get(digest) == content
        assert await journal.bodies.put(content) == digest


async def test_one_that_no_event_names_is_never_stored(autojump_clock: MockClock, tmp_path: Path) -> None:
    home = new_home(tmp_path)
    async with opened(home) as journal:
        digest = await journal.bodies.put(b"x")
        assert await journal.bodies.get(digest) == b"x"
        await begin(journal)
    assert counts(home) == (0, 0)


async def test_a_request_and_its_result_are_each_stored_with_their_event(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    home = new_home(tmp_path)
    async with opened(home) as journal:
        await begin(journal)
        same = [await journal.bodies.put(b"x"), await journal.bodies.put(b"x")]
        await journal.append(accepted(same[0]))
        await journal.append((WHO, JobDone(result_sha256=same[1])))
        assert journal.bodies.short(same[0]) is None, "it is committed"
        journal.bodies._recent.clear()
        assert await journal.bodies.get(same[0]) == b"x"
    assert counts(home) == (1, 0)
    assert is_well(home)


async def test_one_that_is_dropped_is_gone_from_wherever_it_is(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A short body of an older journal is among the long ones."""
    home = new_home(tmp_path)
    async with opened(home) as journal:
        await begin(journal)
        with monkeypatch.context() as older:
            older.setattr("tink.journal.bodies.SHORT_BODY", -1)
            await journal.append(accepted(await journal.bodies.put(b"x")))
        digest = await journal.bodies.put(b"x")
        await journal.append(accepted(digest, 2))
        assert counts(home) == (1, 1)
        journal.bodies._recent.clear()
        assert await journal.bodies.get(digest) == b"x"
        with journal.bodies.watched() as watch:
            await journal.bodies.drop([digest], watch)
        with pytest.raises(LookupError, match="is not stored any more"):
            await journal.bodies.get(digest)
    assert counts(home) == (0, 0)


async def test_one_that_is_put_again_while_it_is_dropped_stays(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    home = new_home(tmp_path)
    async with opened(home) as journal:
        await begin(journal)
        digest = await journal.bodies.put(b"x")
        await journal.append(accepted(digest))
        with journal.bodies.watched() as watch:
            await journal.bodies.put(b"x")
            await journal.append(accepted(digest, 2))
            await journal.bodies.drop([digest], watch)
        journal.bodies._recent.clear()
        assert await journal.bodies.get(digest) == b"x"


async def test_one_that_is_put_again_into_the_commit_that_drops_it_stays(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A drop is on its way, and then there is another job with the same body."""
    home, world = new_home(tmp_path), InlineWorld()
    committed: list[list[str]] = []
    commit = Journal._commit

    def told(self: Journal, items: list[Any]) -> None:
        committed.append([type(item).__name__ for item in items])
        commit(self, items)

    async with opened(home, world) as journal:
        await begin(journal)
        digest = await journal.bodies.put(b"x")
        await journal.append(accepted(digest))
        # Behind a commit that takes its time.
        world.block = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(journal.append, session(2))
            await wait_all_tasks_blocked()
            monkeypatch.setattr(journal._commits, "_commit", partial(told, journal))
            with journal.bodies.watched() as watch:
                nursery.start_soon(journal.bodies.drop, [digest], watch)
                await wait_all_tasks_blocked()
                await journal.bodies.put(b"x")
                nursery.start_soon(journal.append, accepted(digest, 2))
                await wait_all_tasks_blocked()
                world.block.set()
                await wait_all_tasks_blocked()
        assert committed[-1] == ["Drop", "tuple"]
        journal.bodies._recent.clear()
        assert await journal.bodies.get(digest) == b"x"
    assert is_well(home)


async def test_short_bodies_count_for_the_size_of_a_commit(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    async with opened(new_home(tmp_path)) as journal:
        await begin(journal)
        submit = journal._commits.submit

        async def noted(items: list[Any], size: int) -> None:
            sizes.append(size)
            await submit(items, size)

        monkeypatch.setattr(journal._commits, "submit", noted)
        for number, length in enumerate([1, SHORT_BODY], 1):
            await journal.append(accepted(await journal.bodies.put(b"x" * length), number))
    assert sizes[1] - sizes[0] == SHORT_BODY - 1


async def test_the_oldest_of_all_bodies_come_first(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tink.journal.bodies.PRUNE_ROWS", 2)
    world = Clock()
    put: list[Stored] = []
    async with opened(new_home(tmp_path), world) as journal:
        await begin(journal)
        for number, size in enumerate([1, SHORT_BODY + 1, 2, 3, SHORT_BODY + 2], 1):
            world.time += 1
            digest = await journal.bodies.put(b"x" * size)
            put.append(Stored(digest, size, world.time))
            await journal.append(accepted(digest, number))
        found: list[Stored] = []
        while page := await journal.bodies.oldest(world.time + 1, found[-1] if found else None):
            assert len(page) <= 2
            found += page
    assert found == put


@pytest.mark.parametrize(
    ("length", "table", "place"),
    [(6, schema.short_bodies, "journal"), (SHORT_BODY + 1, schema.bodies, "bodies")],
)
async def test_one_that_is_damaged_is_told_of(
    autojump_clock: MockClock, tmp_path: Path, length: int, table: Table, place: Schema
) -> None:
    home = new_home(tmp_path)
    async with opened(home) as journal:
        await begin(journal)
        digest = await journal.bodies.put(b"x" * length)
        await journal.append(accepted(digest))
    with written(home, place) as connection:
        connection.execute(update(table).values(content=b"y" * length))
        connection.commit()
    async with opened(home) as journal:
        with pytest.raises(LookupError, match="is damaged on disk"):
            await journal.bodies.get(digest)
    (wrong,) = [part for part in checks.check(home, quick=False) if not part.ok]
    assert (wrong.database, wrong.name) == (place, "bodies")
