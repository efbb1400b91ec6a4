"""A journal that is moved to another database is the same there, and whatever comes between, one whole
journal is left, which the next move finds."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from sqlalchemy import Connection, select
from trio.testing import MockClock

from tests.postgres import PostgresServer
from tests.simulation import golden
from tests.unit.journal.journal_kit import InlineWorld, new_home, opened, session, written
from tink.domain.events import JobAccepted, JobDone, SessionCreated, Subject
from tink.errors import DatabaseInUse, JournalUnavailable, StartupError, TinkError
from tink.home import Home
from tink.journal import chain, checks, copies, moves, schema, store
from tink.journal.database import database
from tink.journal.journal import prepare
from tink.journal.moves import Moved, move
from tink.journal.postgres import PostgreSQL, shown
from tink.journal.reader import open_journal, open_snapshot
from tink.journal.revisions import SCHEMAS, Schema
from tink.limits import SHORT_BODY
from tink.world import World

pytestmark = pytest.mark.on_files

VERSIONS = sorted(path.parent for path in golden.GOLDEN.glob("*/*/journal.sqlite.zst"))
LOOK_SECONDS = 0.01


@contextlib.contextmanager
def untold(name: str, total: int) -> Iterator[copies.Advance]:
    yield lambda count: None


def moved(source: Home, target: Home) -> Moved:
    return move(source, target, World(), untold)


def content(home: Home) -> tuple[Any, ...]:
    """All that is in a journal: its events with their hashes, the rows of its tables, its bodies."""
    with open_snapshot(database(home, "journal")) as connection:
        events = list(store.raw_events(connection))
        tables = store.read_tables(connection).tables
        short = connection.execute(select(schema.short_bodies).order_by(schema.short_bodies.c.sha256)).all()
    with open_snapshot(database(home, "bodies")) as connection:
        long = connection.execute(select(schema.bodies).order_by(schema.bodies.c.sha256)).all()
    return events, tables, [*short, *long]


def is_well(home: Home) -> bool:
    return all(part.ok for part in checks.check(home, quick=False))


def says(home: Home) -> Home:
    """Where a worker of this home looks for its journal."""
    return Home(home.root, home.noted_database() or "")


async def history(home: Home, name: str = "") -> None:
    """With what databases keep differently: floats that are whole, very large, very long; text."""
    odd = {
        "0.1": 0.1,
        "5": 5.0,
        "big": 1e17,
        "small": 5e-324,
        "none": None,
        "é \N{GRINNING FACE}": ["'", "%s"],
    }
    async with opened(home) as journal:
        await journal.append(session(1, tags=["a", "b"], user_metadata=odd))
        body = await journal.bodies.put(b"\0request" * SHORT_BODY)
        result = await journal.bodies.put(b"")
        who = Subject(tenant="t", session_id="s1", model_id="m", job_id="m:0")
        await journal.append((who, JobAccepted(op="create_model", seq_id=0, model_seq_id=0, request="{}")))
        who = Subject(tenant="t", session_id="s1", model_id="m", job_id="m:1")
        await journal.append((who, JobAccepted(op="forward_backward", seq_id=2**60, body_sha256=body)))
        await journal.append((who, JobDone(result_sha256=result, loss_sum=0.1 + 0.2, run_ms=1e-9)))
        await journal.append(*(session(f"{number}{name}") for number in range(2, 30)))


def run(fn: Callable[..., Any], *arguments: Any) -> None:
    trio.run(fn, *arguments, clock=MockClock(autojump_threshold=0))


@pytest.fixture
def home(tmp_path: Path) -> Home:
    made = new_home(tmp_path / "home")
    run(history, made)
    return made


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few events are many batches."""
    monkeypatch.setattr(copies, "COPY_EVENTS", 7)
    monkeypatch.setattr("tink.journal.bodies.PRUNE_ROWS", 1)


def to_server(home: Home, url: str) -> Home:
    return Home(home.root, url)


# -- it is the same ---------------------------------------------------------------------------------


def test_there_and_back_it_is_the_same(home: Home, postgres_url: str) -> None:
    server, before = to_server(home, postgres_url), content(home)
    found = moved(home, server)
    assert content(server) == before
    assert is_well(server)
    assert (found.head.seq, found.bodies) == (len(before[0]), len(before[2]))
    assert home.noted_database() == shown(postgres_url)
    assert not home.journal.exists()

    moved(server, home)
    assert content(home) == before
    assert is_well(home)
    assert home.noted_database() is None


@pytest.mark.parametrize("version", VERSIONS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_every_golden_journal_is_the_same_there_and_back(
    version: Path, tmp_path: Path, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    home = Home(tmp_path / "home")
    golden.read(version, home)
    before = content(home)
    moved(home, to_server(home, postgres_url))
    assert content(to_server(home, postgres_url)) == before
    moved(to_server(home, postgres_url), home)
    assert content(home) == before


def test_a_worker_goes_on_where_the_other_one_stopped(home: Home, postgres_url: str) -> None:
    async def go_on(home: Home, incarnation: int) -> None:
        async with opened(home) as journal:
            assert journal.incarnation == incarnation
            assert len(journal.ledger.sessions) == 29 + incarnation - 2
            await journal.append(session(f" of {incarnation}"))

    server = to_server(home, postgres_url)
    moved(home, server)
    run(go_on, server, 2)
    moved(server, home)
    run(go_on, home, 3)
    with open_snapshot(database(home, "journal")) as connection:
        assert list(chain.breaks(connection)) == []


def test_from_one_server_to_another(home: Home, postgres: PostgresServer) -> None:
    first, second = (to_server(home, postgres.create_database()) for _ in range(2))
    before = content(home)
    moved(home, first)
    moved(first, second)
    assert content(second) == before
    assert says(home).database_url == shown(second.database_url)
    with pytest.raises(StartupError, match="was moved elsewhere"):
        prepare(first)
    for one in (first, second):
        postgres.drop_database(one.database_url)


def test_an_empty_journal_is_moved_too(tmp_path: Path, postgres_url: str) -> None:
    home = new_home(tmp_path / "home")
    assert moved(home, to_server(home, postgres_url)).head == chain.NONE
    assert is_well(to_server(home, postgres_url))


# -- what was moved away is out of use --------------------------------------------------------------


def test_files_that_were_moved_are_kept_under_another_name(home: Home, postgres_url: str) -> None:
    before = content(home)
    kept = Path(moved(home, to_server(home, postgres_url)).kept)
    assert kept.name.startswith("journal.sqlite.moved-")
    left = sorted(path.name for path in home.root.glob("*.sqlite*"))
    assert left == [kept.name.replace("journal", "bodies"), kept.name]
    home.database.unlink()
    for name in left:
        (home.root / name).rename(home.root / f"{name.split('.')[0]}.sqlite")
    assert content(home) == before


def test_a_database_that_was_moved_away_is_refused_by_worker_and_reader(
    home: Home, postgres: PostgresServer, postgres_url: str
) -> None:
    server, third = to_server(home, postgres_url), to_server(home, postgres.create_database())
    moved(home, server)
    moved(server, home)
    refusal = r"was moved elsewhere \(moved-\d+T\d+\): unset TINK_DATABASE_URL"
    for use in (prepare, lambda server: moved(server, third)):
        with pytest.raises(StartupError, match=refusal):
            use(server)
    with pytest.raises(StartupError, match=refusal), open_journal(server):
        raise AssertionError("it is read")
    (told,) = next(part.problems for part in checks.check(server, quick=True) if part.name == "schema")
    assert "was moved elsewhere" in told
    postgres.drop_database(third.database_url)


# -- what is refused, and changes nothing -----------------------------------------------------------


def named(home: Home) -> set[str]:
    """The files that are there, but for what readers leave."""
    others = (".lock", "-wal", "-shm")
    return {path.name for path in home.root.iterdir() if not path.name.endswith(others)}


@contextlib.contextmanager
def refused(home: Home, error: type[TinkError], match: str) -> Iterator[None]:
    before = content(home)
    names = named(home)
    with pytest.raises(error, match=match):
        yield
    assert content(home) == before
    assert named(home) == names
    assert says(home).database_url == (shown(home.database_url) if home.database_url else "")


def is_empty(postgres: PostgresServer, url: str) -> bool:
    query = "SELECT 1 FROM pg_tables WHERE schemaname = 'public' AND tablename = 'events'"
    return not postgres.execute(query, url.rpartition("/")[2])


def test_the_home_of_a_worker_that_runs(home: Home, postgres_url: str) -> None:
    with home.lock(), refused(home, StartupError, r"another worker \(pid \d+\) is using"):
        moved(home, to_server(home, postgres_url))


@pytest.mark.parametrize("end", ["from", "to"])
def test_a_database_that_a_worker_writes_to(home: Home, postgres_url: str, end: str) -> None:
    server = to_server(home, postgres_url)
    if end == "from":
        moved(home, server)
    ends = {"from": (server, home), "to": (home, server)}[end]
    writer = database(server, "journal").writer()
    with (
        contextlib.closing(writer),
        refused(ends[0], DatabaseInUse, "is in use: a worker on"),
    ):
        moved(*ends)


def test_a_database_that_has_another_journal(home: Home, tmp_path: Path, postgres_url: str) -> None:
    other = new_home(tmp_path / "other")
    run(history, other, "other")
    moved(other, to_server(other, postgres_url))
    before = content(to_server(other, postgres_url))
    with refused(home, StartupError, r"has another journal already, of \d+ events: name a database"):
        moved(home, to_server(home, postgres_url))
    assert content(to_server(other, postgres_url)) == before


def test_a_home_that_has_files_of_another_journal(home: Home, tmp_path: Path, postgres_url: str) -> None:
    server = to_server(home, postgres_url)
    moved(home, server)
    run(history, new_home(home.root), "other")
    with refused(server, StartupError, r"journal.sqlite has another journal already, of \d+ events"):
        moved(server, home)


def test_bodies_of_another_journal(home: Home, postgres: PostgresServer, postgres_url: str) -> None:
    server = to_server(home, postgres_url)
    prepare(server)
    with written(server, "bodies") as connection:
        connection.exec_driver_sql("INSERT INTO bodies VALUES ('00', 0, 0, '')")
        connection.commit()
    with refused(home, StartupError, "the body 00 is damaged"):
        moved(home, server)
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    with written(server, "bodies") as connection:
        connection.exec_driver_sql(f"UPDATE bodies SET sha256 = '{empty}', stored_at = 5")
        connection.exec_driver_sql("INSERT INTO bodies VALUES ('ca', 1, 9, 'x')")
        connection.exec_driver_sql("UPDATE bodies SET sha256 = encode(sha256(content), 'hex')")
        connection.commit()
    with refused(home, StartupError, "has 3 bodies .* not the 1 .* name a database that is empty"):
        moved(home, server)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        ("UPDATE events SET hash = x'00' WHERE seq = 9", "event 9 is not what was written behind event 8"),
        ("UPDATE events SET data = '{}' WHERE seq = 3", "event 3 is not one that this Tink can read"),
        ("UPDATE events SET at = 5 WHERE seq = 12", "event 12 is not what was written behind event 11"),
        ("DELETE FROM events WHERE seq = 20", "no events from 20 to 20"),
    ],
)
def test_a_damaged_journal(
    home: Home, postgres: PostgresServer, postgres_url: str, damage: str, match: str
) -> None:
    with written(home) as connection:
        connection.exec_driver_sql("PRAGMA foreign_keys=OFF")
        connection.exec_driver_sql(damage)
        connection.commit()
    with refused(home, StartupError, match):
        moved(home, to_server(home, postgres_url))
    assert is_empty(postgres, postgres_url)


@pytest.mark.parametrize(("where", "table"), [("journal", "short_bodies"), ("bodies", "bodies")])
def test_a_damaged_body(
    home: Home, postgres: PostgresServer, postgres_url: str, where: Schema, table: str
) -> None:
    with written(home, where) as connection:
        connection.exec_driver_sql(f"UPDATE {table} SET content = x'00'")
        connection.commit()
    with refused(home, StartupError, "the body .* is damaged"):
        moved(home, to_server(home, postgres_url))
    assert is_empty(postgres, postgres_url)


def test_a_journal_of_an_older_revision(home: Home, postgres_url: str) -> None:
    with written(home) as connection:
        connection.exec_driver_sql("UPDATE journal_schema_version SET version_num = '0001'")
        connection.commit()
    with refused(home, StartupError, "has schema revision 0001.*run 'tink db upgrade'"):
        moved(home, to_server(home, postgres_url))


def test_a_nul_that_an_older_tink_has_journaled_is_told_of(home: Home, postgres_url: str) -> None:
    with written(home) as connection:
        seq, before = chain.head(connection)
        event = SessionCreated(display_name="a\0b")
        record = store.Record(seq + 1, 5.0, 1, Subject(tenant="t", session_id="nul"), event)
        store.write(connection, [record], before)
        connection.commit()
    with refused(
        home, JournalUnavailable, rf"event {seq + 1} has a NUL in it, which PostgreSQL cannot keep"
    ):
        moved(home, to_server(home, postgres_url))


def test_a_copy_that_is_not_the_same(
    home: Home, postgres: PostgresServer, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the reason: it is read back before it is kept."""

    def wrong(statement: str) -> Callable[..., None]:
        def copy(source: Connection, target: Connection, *others: Any) -> None:
            copy_events(source, target, *others)
            target.exec_driver_sql(statement)

        return copy

    copy_events = copies.copy_events
    for statement, match in (
        ("UPDATE sessions SET sdk_version = 'x' WHERE session_id = 's9'", r"1 differences.*'s9'"),
        ("DELETE FROM events WHERE seq = (SELECT max(seq) FROM events)", "it ends with event"),
    ):
        monkeypatch.setattr(copies, "copy_events", wrong(statement))
        with refused(home, StartupError, match):
            moved(home, to_server(home, postgres_url))
        assert is_empty(postgres, postgres_url)


def test_a_disk_that_is_full(home: Home, postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server, copy_events = to_server(home, postgres_url), copies.copy_events
    moved(home, server)

    def full(source: Connection, target: Connection, *others: Any) -> None:
        target.exec_driver_sql("PRAGMA max_page_count = 1")
        copy_events(source, target, *others)

    monkeypatch.setattr(copies, "copy_events", full)
    with refused(server, JournalUnavailable, "journal.sqlite cannot be written: database or disk is full"):
        moved(server, home)


@pytest.mark.parametrize("lost", ["from", "to"])
def test_a_server_whose_place_was_taken_meanwhile(
    home: Home, postgres: PostgresServer, postgres_url: str, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """By a worker that waits for its turn, or a restart of the server."""
    source, target = (to_server(home, postgres.create_database()), to_server(home, postgres_url))
    moved(home, source)
    verify_events = copies.verify_events

    def taken(*arguments: Any) -> None:
        verify_events(*arguments)
        found = PostgreSQL((source if lost == "from" else target).database_url, "journal")
        holder = found.holder()
        assert holder is not None
        assert found.put_out(holder)

    monkeypatch.setattr(copies, "verify_events", taken)
    with refused(source, JournalUnavailable, "is lost" if lost == "from" else "cannot be written"):
        moved(source, target)
    assert is_empty(postgres, postgres_url)
    monkeypatch.undo()
    moved(source, target)
    postgres.drop_database(source.database_url)


def test_a_source_on_a_server_gives_signs_of_life(
    home: Home, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = to_server(home, postgres_url)
    moved(home, server)
    monkeypatch.setattr(moves, "DATABASE_BEAT_SECONDS", 0.0)
    silent: list[float] = []

    class Watched(InlineWorld):
        def monotonic(self) -> float:
            return len(silent)

    @contextlib.contextmanager
    def watch(name: str, total: int) -> Iterator[copies.Advance]:
        def told(count: int) -> None:
            holder = PostgreSQL(postgres_url, "journal").holder()
            assert holder is not None
            silent.append(holder.silent)

        yield told

    move(server, home, Watched(), watch)
    assert len(silent) > 8
    assert max(silent) < 5.0


# -- kill -9 ----------------------------------------------------------------------------------------

KILLED = """
import contextlib, os, signal, sys
from pathlib import Path
from tink.home import Home
from tink.journal import copies, moves
from tink.limits import SHORT_BODY
from tink.world import World
root, source, target, owner, name, when = sys.argv[1:]
owner = {"copies": copies, "Home": Home}.get(owner) or getattr(moves, owner)
whole = getattr(owner, name)
def dies(*arguments, **named):
    if when == "after":
        whole(*arguments, **named)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(owner, name, dies)
copies.COPY_EVENTS = 7
@contextlib.contextmanager
def untold(name, total):
    yield lambda count: None
moves.move(Home(Path(root), source), Home(Path(root), target), World(), untold)
"""
STEPS = [
    *(("copies", name, "after") for name in ("copy_bodies", "copy_events", "verify_events")),
    ("copies", "copy_events", "before"),
    *(("{target}", "complete", when) for when in ("before", "after")),
    ("Home", "note_database", "after"),
    ("{source}", "retire", "after"),
]


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS, ids=" ".join)
@pytest.mark.parametrize("back", [False, True], ids=["to a server", "to files"])
def test_killed_at_any_moment_one_journal_is_whole_and_the_next_move_ends_it(
    home: Home, postgres_url: str, back: bool, step: tuple[str, str, str]
) -> None:
    server, before = to_server(home, postgres_url), content(home)
    source, target = (server, home) if back else (home, server)
    if back:
        moved(home, server)
    kinds = {"source": source, "target": target}
    place = {name: "_Server" if one.database_url else "_Files" for name, one in kinds.items()}
    owner, name, when = (word.format(**place) for word in step)
    arguments = str(home.root), source.database_url, target.database_url, owner, name, when
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], cwd=Path(__file__).parents[3])
    assert done.returncode == -signal.SIGKILL
    _wait_until_free(postgres_url)

    # What a worker would find: the journal, or that it has to be asked once more. Never a part of it, and
    # never none.
    here = says(home)
    assert here.database_url or home.journal.exists()
    if back and name == "retire":
        with pytest.raises(StartupError, match="if 'tink db move' was interrupted, run it again"):
            prepare(here)
    else:
        prepare(here)
        assert content(here) == before

    if name != ("note_database" if back else "retire"):  # the last of the steps
        moved(source, target)
    assert content(target) == before
    assert is_well(target)
    assert says(home).database_url == (shown(target.database_url) if target.database_url else "")
    if back:
        with pytest.raises(StartupError, match="was moved elsewhere"):
            prepare(server)
    else:
        assert not home.journal.exists()
    assert not (home.root / moves.SCRATCH).exists()


def _wait_until_free(url: str) -> None:
    """A server notices a moment later that a process has ended."""
    deadline = World().monotonic() + 30
    while any(PostgreSQL(url, schema).holder() for schema in SCHEMAS):
        assert World().monotonic() < deadline
        os.sched_yield()
