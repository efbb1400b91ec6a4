"""The journal on a real SQLite file: what was acknowledged is there, whole, and in its place."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from sqlalchemy import Connection, event
from sqlalchemy.exc import OperationalError
from trio.testing import MockClock, assert_checkpoints

from tests.unit.journal.journal_kit import (
    FOREIGN_KEYS_OFF,
    cancel_at,
    new_home,
    opened,
    session,
    stops_with,
    stored_sessions,
    written,
)
from tink.domain import rows
from tink.domain.events import (
    AdapterDeleted,
    AdapterExported,
    ClientFailed,
    JobAccepted,
    JobDone,
    Subject,
)
from tink.domain.ledger import Ledger
from tink.errors import JournalUnavailable, StartupError, tink_error
from tink.home import Home
from tink.journal import queries, sqlite, store
from tink.journal.bodies import Stored
from tink.journal.database import Database, Writer
from tink.journal.journal import prepare
from tink.journal.postgres import PostgreSQL
from tink.journal.reader import open_journal
from tink.journal.sqlite import SQLite, reader_engine, writer_engine
from tink.limits import SHORT_BODY


def _seqs(home: Home) -> list[int]:
    with open_journal(home) as connection:
        return [record.seq for record in store.read_events(connection)]


def _write(home: Home, statement: str) -> None:
    """As someone would with sqlite3 or psql."""
    with written(home) as connection:
        connection.exec_driver_sql(FOREIGN_KEYS_OFF[connection.dialect.name])
        connection.commit()
        connection.exec_driver_sql(statement)
        connection.commit()


def _checked(home: Home) -> list[str]:
    """What `tink db check` finds in the tables."""
    with open_journal(home) as connection:
        return store.check(connection)


async def test_what_append_returned_for_is_on_disk_and_in_the_ledger(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    home = new_home(tmp_path)
    async with opened(home) as journal:
        await journal.append(session(1), session(2))
        assert stored_sessions(home) == {"s1", "s2"}
        assert {key[0] for key in journal.ledger.sessions} == {"s1", "s2"}


async def test_seq_has_no_gap_over_restarts_and_each_boot_is_an_incarnation(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    home = new_home(tmp_path)
    for boot in range(1, 4):
        async with opened(home) as journal:
            assert journal.incarnation == boot
            async with trio.open_nursery() as nursery:
                for i in range(7):
                    nursery.start_soon(journal.append, session(f"{boot}-{i}"))
    assert _seqs(home) == list(range(1, 3 * 9 + 1))
    with open_journal(home) as connection:
        found = list(store.read_tables(connection).incarnations.values())
    assert [(row.number, row.stop_reason) for row in found] == [(n, "stopped") for n in (1, 2, 3)]  # type: ignore[attr-defined]


@pytest.mark.on_files
async def test_a_second_writer_collides_at_once_and_changes_nothing(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    home = new_home(tmp_path)
    with stops_with("another process"):
        async with opened(home) as first:
            await first.append(session(1))
            async with opened(home) as second:
                await second.append(session(2))
                before = _seqs(home)
                try:
                    with trio.CancelScope(shield=True):
                        await first.append(session(3))
                finally:
                    assert _seqs(home) == before
                    assert stored_sessions(home) == {"s1", "s2"}


async def test_a_batch_is_committed_as_a_whole_or_not_at_all(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    home = new_home(tmp_path)
    with stops_with("another process"):  # so a row that is there looks
        async with opened(home) as journal:
            await journal.append(session(1))
            with trio.CancelScope(shield=True):
                await journal.append(session(2), session(1))  # its second row is there already
    assert stored_sessions(home) == {"s1"}


async def test_an_append_that_is_cancelled_anywhere_is_whole_or_nothing(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    home = new_home(tmp_path)
    async with opened(home) as journal:
        for step in range(1, 30):
            pair = session(f"{step}-a"), session(f"{step}-b")
            cancelled = await cancel_at(step, lambda p=pair: journal.append(*p))
            await journal.append(session(f"{step}-after"))
            found = stored_sessions(home)
            assert f"s{step}-after" in found
            assert (f"s{step}-a" in found) == (f"s{step}-b" in found)
            if not cancelled:
                return
    raise AssertionError("it never ran to its end")


async def test_every_call_of_the_journal_is_a_checkpoint(autojump_clock: MockClock, tmp_path: Path) -> None:
    async with opened(new_home(tmp_path)) as journal:
        accepted = JobAccepted(op="sample", seq_id=0, request="{}")
        with assert_checkpoints():
            await journal.append((Subject(tenant="t", job_id="j"), accepted))
        job = await journal.job("j")
        assert job is not None
        # In memory; and once it has ended and is forgotten, from the database.
        for ended in (False, True):
            if ended:
                await journal.append((Subject(tenant="t", job_id="j"), JobDone()))
                journal.present._recent.clear()
            with assert_checkpoints():
                await journal.job("j")
            with assert_checkpoints():
                assert await journal.acceptance(job) == accepted
        with assert_checkpoints():
            assert await journal.job("nobody's") is None
        with assert_checkpoints():
            assert await journal.read(partial(queries.ops, model_id="m", after=0, upto=9)) == []
        with assert_checkpoints():
            assert await journal.read(queries.loads) == []


async def test_an_ended_job_leaves_the_ledger_and_is_found_again(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tink.journal.present.RECENT_JOBS", 2)
    async with opened(new_home(tmp_path)) as journal:
        for i in range(5):
            subject = Subject(tenant="t", job_id=f"j{i}")
            await journal.append((subject, JobAccepted(op="sample", seq_id=i)))
            await journal.append((subject, JobDone(result={"i": i})))
        assert journal.ledger.jobs == {}
        assert len(journal.present._recent) == 2
        assert journal.present._acceptances == {}
        for i in range(5):
            job = await journal.job(f"j{i}")
            assert job is not None
            assert (job.state, job.result) == ("done", {"i": i})


# -- errors at every point --------------------------------------------------------------------------


class FailingCalls:
    """Makes the `nth` statement or commit on a writer's connection fail, once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
        self.count, self.nth = 0, nth
        real = SQLite.writer, PostgreSQL.writer

        def failing(database: Database) -> Writer:
            writer = real[isinstance(database, PostgreSQL)](database)  # type: ignore[arg-type]
            event.listen(writer.connection, "before_cursor_execute", self._statement)
            event.listen(writer.connection, "commit", self._commit)
            return writer

        for kind in (SQLite, PostgreSQL):
            monkeypatch.setattr(kind, "writer", failing)

    @property
    def failed(self) -> bool:
        return self.count >= self.nth

    def _statement(self, *arguments: object) -> None:
        self._call()

    def _commit(self, connection: Connection) -> None:
        self._call()

    def _call(self) -> None:
        self.count += 1
        if self.count == self.nth:
            raise OperationalError("statement", {}, Exception("disk I/O error"))


async def _history(home: Home, told: set[str]) -> None:
    """Some appends and a body; `told` is what was acknowledged."""
    async with opened(home) as journal:

        async def append(name: str) -> None:
            await journal.append(session(name), session(f"{name}-too"))
            told.update({f"s{name}", f"s{name}-too"})

        for i in range(3):
            await append(f"{i}")
        digest = await journal.bodies.put(b"a body" * SHORT_BODY)
        told.add(digest)
        async with trio.open_nursery() as nursery:
            for i in range(4):
                nursery.start_soon(append, f"together-{i}")


async def test_an_error_at_any_call_of_the_database_gives_no_wrong_answer(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    for nth in range(1, 200):
        home = new_home(tmp_path / str(nth))
        told: set[str] = set()
        with pytest.MonkeyPatch.context() as patch:
            calls = FailingCalls(patch, nth)
            error: BaseException | None = None
            try:
                with trio.fail_after(100):
                    await _history(home, told)
            except Exception as raised:
                error = raised
        if not calls.failed:
            assert error is None
            assert nth > 20
            break
        assert error is not None, f"call {nth} failed and nobody noticed"
        assert isinstance(tink_error(error), JournalUnavailable | StartupError), error
        bodies = {name for name in told if not name.startswith("s")}
        # It opens again, and has what was told, each pair as a whole.
        async with opened(home) as journal:
            found = stored_sessions(home)
            assert told - bodies <= found
            assert {name for name in found if f"{name}-too" not in found and "too" not in name} == set()
            for digest in bodies:
                journal.bodies._recent.clear()
                assert await journal.bodies.get(digest) == b"a body" * SHORT_BODY
    else:
        raise AssertionError("it never ran to its end")


async def test_an_error_at_any_call_of_a_migration_leaves_a_database_that_opens(tmp_path: Path) -> None:
    for nth in range(1, 200, 3):
        home = new_home(tmp_path / str(nth), empty=True)
        with pytest.MonkeyPatch.context() as patch:
            calls = FailingCalls(patch, nth)
            try:
                prepare(home)
            except (StartupError, JournalUnavailable):
                assert calls.failed
            else:
                assert not calls.failed
                assert nth > 40
                return
        prepare(home)
    raise AssertionError("it never ran to its end")


# -- durability settings ----------------------------------------------------------------------------


@pytest.mark.on_files
async def test_commits_are_synced_and_the_settings_are_read_back(tmp_path: Path) -> None:
    engine = writer_engine(tmp_path / "j.sqlite")
    with engine.connect() as connection:
        found = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        }
    engine.dispose()
    assert found == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}


@pytest.mark.on_files
@pytest.mark.parametrize("pragma", ["journal_mode", "synchronous", "foreign_keys", "busy_timeout"])
async def test_a_database_that_does_not_honour_a_setting_stops_the_start(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pragma: str
) -> None:
    asked = dict(sqlite._WRITER_PRAGMAS)
    other = {"journal_mode": "MEMORY", "synchronous": "NORMAL", "foreign_keys": "OFF", "busy_timeout": "0"}
    asked[pragma] = (other[pragma], asked[pragma][1])
    monkeypatch.setattr(sqlite, "_WRITER_PRAGMAS", asked)
    with pytest.raises(StartupError, match=pragma):
        async with opened(new_home(tmp_path)):
            pass


@pytest.mark.on_files
async def test_a_reader_cannot_write(autojump_clock: MockClock, tmp_path: Path) -> None:
    home = new_home(tmp_path)
    async with opened(home):
        engine = reader_engine(home.journal)
        for statement in (
            "DELETE FROM events",
            "INSERT INTO events (seq, at, incarnation, kind, data) VALUES (99, 0, 1, 'x', '{}')",
            "PRAGMA query_only=0; DELETE FROM events",
            "DROP TABLE events",
            "CREATE TABLE other (x)",
        ):
            with engine.connect() as connection, pytest.raises(Exception, match=r"readonly|one statement"):
                connection.exec_driver_sql(statement)
        engine.dispose()
    assert _seqs(home) == [1, 2]


# -- damage -----------------------------------------------------------------------------------------

DAMAGE = {
    "a row is gone": "DELETE FROM incarnations",
    "a row was changed": "UPDATE sessions SET tenant = 'other' WHERE session_id = 's1'",
    "an event is gone": "DELETE FROM events WHERE seq = 2",
    "the first event is gone": "DELETE FROM events WHERE seq = 1",
    "the last event is gone": "DELETE FROM events WHERE seq = (SELECT max(seq) FROM events)",
    "an event was changed": 'UPDATE events SET data = \'{"tags": ["9"]}\' WHERE seq = 2',
    "an event is of an unknown kind": "UPDATE events SET kind = 'newer_than_this' WHERE seq = 2",
    "an event does not decode": "UPDATE events SET data = '{\"tags\": 7}' WHERE seq = 2",
    "an event is about nobody": "UPDATE events SET session_id = NULL WHERE seq = 2",
    "an event is there twice": (
        "INSERT INTO events SELECT (SELECT max(seq) + 1 FROM events), at, incarnation, tenant, kind, "
        "session_id, model_id, job_id, adapter_id, replica, data, hash FROM events WHERE seq = 2"
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
async def test_a_damaged_journal_is_found_at_the_start(
    autojump_clock: MockClock, tmp_path: Path, damage: str
) -> None:
    home = new_home(tmp_path)
    async with opened(home) as journal:
        await journal.append(session(1))
        await journal.append(session(2))
        await journal.append((Subject(session_id="s1"), ClientFailed(exception_type="X")))
    _write(home, DAMAGE[damage])
    with pytest.raises(StartupError, match=r"damaged.*restore a backup"):
        async with opened(home):
            pass


@pytest.mark.parametrize("damage", DAMAGE)
async def test_damage_that_is_older_than_what_a_start_looks_at_is_found_by_a_check(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(store, "CHECKED_EVENTS", 3)
    home = new_home(tmp_path)
    async with opened(home) as journal:
        await journal.append(session(1))
        await journal.append(*(session(number) for number in range(2, 20)))
    _write(home, DAMAGE[damage])
    assert _checked(home)
    if damage == "a row is gone":  # where the last event has written
        with pytest.raises(StartupError, match=r"damaged.*restore a backup"):
            async with opened(home):
                pass
    else:
        async with opened(home):
            pass


@pytest.mark.on_files
async def test_an_event_that_is_no_json_is_found_at_the_start(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    home = new_home(tmp_path)
    async with opened(home) as journal:
        await journal.append(session(1))
    _write(home, "UPDATE events SET data = '{\"tags\": ' WHERE seq = 2")
    with pytest.raises(StartupError, match=r"damaged.*restore a backup"):
        async with opened(home):
            pass


async def test_a_row_that_no_event_made_is_found_by_a_check(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    home = new_home(tmp_path)
    async with opened(home):
        pass
    _write(home, "INSERT INTO incarnations VALUES (9, 'b', 'v', 'd', 0, NULL, NULL)")
    assert "incarnations[9]" in _checked(home)[0]


async def test_an_adapter_that_was_deleted_is_looked_up_and_one_that_lives_is_there(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    home = new_home(tmp_path)
    model = Subject(tenant="t", session_id="s1", model_id="m", job_id="m:0")
    exported = AdapterExported(version=1, directory="d", size_bytes=3, files={"a": "b"})
    async with opened(home) as journal:
        await journal.append(
            session(1),
            (model, JobAccepted(op="create_model", seq_id=0, model_seq_id=0, request="{}")),
            (Subject(tenant="t", session_id="s1", model_id="m", job_id="m:1", adapter_id="m@1"), exported),
        )
        made = await journal.adapter("m@1")
    async with opened(home) as journal:
        assert journal.ledger.adapters == {("m@1",): made}
        await journal.append((Subject(model_id="m", adapter_id="m@1"), AdapterDeleted(reason="idle")))
        assert journal.ledger.adapters == {}
        assert (await journal.adapter("m@1")).state == "idle"
        with pytest.raises(LookupError, match="m@2"):
            await journal.adapter("m@2")


@pytest.mark.on_files
@pytest.mark.parametrize("name", ["journal", "bodies"])
async def test_a_file_that_is_no_database_is_refused(
    autojump_clock: MockClock, tmp_path: Path, name: str
) -> None:
    home = new_home(tmp_path)
    getattr(home, name).write_bytes(b"this is not a database" * 100)
    with pytest.raises(StartupError, match=f"{name}.sqlite"):
        async with opened(home):
            pass


# -- the hot queries --------------------------------------------------------------------------------


@pytest.mark.on_files
async def test_hot_queries_use_their_indexes(autojump_clock: MockClock, tmp_path: Path) -> None:
    """Of the statements as they are sent: taken from the engine, not written down again."""
    sent: list[str] = []
    async with opened(new_home(tmp_path)) as journal:

        def note(connection: object, cursor: object, statement: str, *rest: object) -> None:
            sent.append(statement)

        event.listen(journal._reader, "before_cursor_execute", note)
        await journal.job("j")
        await journal.read(partial(queries.ops, model_id="m", after=3, upto=7))
        await journal.read(partial(queries.job_of_key, model_id="m", key="k"))
        await journal.read(partial(queries.sample_of_key, tenant="t", key="k"))
        await journal.read(partial(queries.weights, model_id="m"))
        with journal._reader.connect() as connection:
            store.read_present(connection)
            begun = len(sent)
            written = {(name, ("x",) * len(key)): {} for name, (_, key) in rows.TABLES.items()}
            store._stored(connection, written, Ledger())
        event.remove(journal._reader, "before_cursor_execute", note)
        one, ops, of_key, sample_of_key, weights, *tables = sent[:begun]
        by_key = sent[begun:]
        open_jobs, adapters, snapshots = [
            next(s for s in tables if f"FROM {name}" in s) for name in ("jobs", "adapters", "snapshots")
        ]

        def plan(statement: str) -> str:
            # Parameters as the reader binds them; a partial index needs its values in the text.
            with journal._reader.connect() as connection:
                steps = connection.connection.cursor().execute(
                    f"EXPLAIN QUERY PLAN {statement}", ["x"] * statement.count("?")
                )
                return "\n".join(str(step[3]) for step in steps)

        assert "USING INDEX sqlite_autoindex_jobs_1 (job_id=?)" in plan(one)
        assert "USING INDEX uq_jobs_model_id_op_no (model_id=? AND op_no>? AND op_no<?)" in plan(ops)
        assert "USING INDEX uq_jobs_model_id_key (model_id=? AND key=?)" in plan(of_key)
        assert "USING INDEX uq_jobs_tenant_key (tenant=? AND key=?)" in plan(sample_of_key)
        assert "USING INDEX uq_jobs_model_id_seq_id (model_id=?)" in plan(weights)
        assert "USE TEMP B-TREE" not in plan(weights)
        assert "ix_jobs_open" in plan(open_jobs)
        assert "ix_adapters_live" in plan(adapters)
        assert "ix_snapshots_live" in plan(snapshots)
        assert "SCAN" not in "".join(map(plan, by_key))
        assert len(by_key) == len(rows.TABLES)


@pytest.mark.on_files
async def test_the_questions_of_retention_use_their_indexes(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    plans: list[str] = []
    async with opened(new_home(tmp_path)) as journal:

        def explain(connection: Any, cursor: Any, statement: str, parameters: Any, *rest: object) -> None:
            if not statement.startswith("EXPLAIN"):
                found = connection.connection.cursor().execute(
                    f"EXPLAIN QUERY PLAN {statement}", parameters
                )
                plans.append(" ".join(str(row[3]) for row in found))

        for engine in (journal._reader, journal.bodies._reader):
            event.listen(engine, "before_cursor_execute", explain)
        await journal.read(partial(queries.jobs_naming, digests=["a", "b"], ended_since=1.0))
        await journal.read(partial(queries.loads_behind, covers={"m": 3, "n": 0}))
        await journal.read(partial(queries.last_requests, samplers=["s"]))
        await journal.read(queries.trainers)
        await journal.read(queries.last_end)
        await journal.read(partial(queries.damaged_snapshots, since=1.0))
        await journal.bodies.oldest(1.0, Stored("a", 1, 0.5))
    naming, loads, requests, trainers, ended, damaged, short, oldest = plans
    assert "ix_jobs_body_sha256" in naming
    assert "ix_jobs_result_sha256" in naming
    assert "ix_jobs_loads (model_id=? AND op_no>?)" in loads
    assert "uq_jobs_sampler_id_seq_id (sampler_id=?)" in requests
    assert "ix_events_kind_seq (kind=?)" in trainers
    assert "ix_events_kind_seq (kind=?)" in ended
    assert "ix_snapshots_damaged (dropped_at>?)" in damaged
    assert "ix_short_bodies_stored_at" in short
    assert "ix_bodies_stored_at" in oldest
    assert not any("SCAN" in plan for plan in plans)
    assert "TEMP B-TREE" not in short + oldest
