"""Whatever the home is, a command that reads says so in one line and makes nothing; and it neither waits
for the writer nor holds it up."""

from __future__ import annotations

import sqlite3

import pytest
from cli_home import TRAINED, alter
from sqlalchemy import select, text

from tests.unit.journal.journal_kit import written
from tink.journal import queries, schema
from tink.journal.reader import open_journal

READERS = [("status",), ("jobs",), ("jobs", "show", TRAINED), ("db", "check"), ("db", "upgrade")]


@pytest.mark.parametrize("command", READERS, ids=" ".join)
def test_a_missing_home_is_one_line_and_is_not_made(tmp_path, tink, command):
    code, out, err = tink(*command, "--home", tmp_path / "nowhere")
    assert (code, out) == (2, "")
    assert err.startswith(f"tink {command[0]}: there is no home {tmp_path / 'nowhere'}")
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("command", READERS, ids=" ".join)
def test_a_file_for_a_home_is_one_line(tmp_path, tink, command):
    (tmp_path / "file").touch()
    code, _, err = tink(*command, "--home", tmp_path / "file")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "is not a folder" in err


@pytest.mark.on_files
@pytest.mark.parametrize("command", [*READERS[:3], ("db", "upgrade")], ids=" ".join)
@pytest.mark.parametrize("content", ["text", "nothing", "another program's tables"])
def test_a_file_that_is_no_journal_is_one_line_and_stays_as_it_is(home, tink, command, content):
    home.journal.unlink()
    if content == "another program's tables":
        sqlite3.connect(home.journal).execute("CREATE TABLE journal_schema_version (version_num)").close()
    else:
        home.journal.write_text(
            "not a database, but long enough for a header" * 9 if content == "text" else ""
        )
    before = home.journal.read_bytes()
    if command == ("db", "upgrade") and content != "text":
        return  # an empty database, which it may fill
    code, out, err = tink(*command, "--home", home.root)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert str(home.journal) in err
    assert home.journal.read_bytes() == before


@pytest.mark.parametrize("damage", ["kind = 'miracle'", "data = '\"{\"'", "data = '{}'"])
def test_an_event_that_cannot_be_read_is_one_line(home, tink, damage):
    alter(home, f"UPDATE events SET {damage} WHERE job_id = '{TRAINED}'")
    code, out, err = tink("jobs", "show", TRAINED, "--home", home.root)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "tink db check" in err
    assert tink("db", "check", "--home", home.root)[0] == 1


def test_the_home_comes_from_the_option_then_tink_home_then_the_users_folder(
    home, tink, tink_json, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    assert str(tmp_path / "user" / ".tink") in tink("status")[2]
    monkeypatch.setenv("TINK_HOME", str(home.root))
    assert tink_json("jobs", "--limit", "1")[0] == 0
    assert tink("jobs", "--home", tmp_path / "nowhere")[0] == 2


def test_settings_of_the_worker_do_not_stop_a_reader(home, tink, monkeypatch):
    monkeypatch.setenv("TINK_PORT", "many")
    monkeypatch.setenv("TINK_NO_SUCH_THING", "1")
    assert tink("jobs", "--home", home.root)[0] == 0


def test_a_reader_neither_waits_for_the_writer_nor_holds_it_up(home, tink):
    with written(home) as writer:
        writer.execute(text("UPDATE sessions SET display_name = 'new'"))
        assert tink("jobs", "--home", home.root)[0] == 0
        with open_journal(home) as reader:
            name = select(schema.sessions.c.display_name)
            assert reader.execute(name).scalar_one() is None
            writer.commit()
            assert reader.execute(name).scalar_one() is None, "another moment than the first read"


@pytest.mark.on_files  # of PostgreSQL: tests/unit/journal/test_postgres_plans.py
@pytest.mark.parametrize(
    ("query", "index"),
    [
        (lambda connection: queries.open_jobs(connection), "ix_jobs_open"),
        (lambda connection: queries.jobs(connection, limit=20, state="open"), "ix_jobs_open"),
        (lambda connection: queries.jobs(connection, limit=20), "ix_jobs_submitted_at"),
        (lambda connection: queries.jobs(connection, limit=20, since=1.0), "ix_jobs_submitted_at"),
        (lambda connection: queries.events_of(connection, TRAINED), "ix_events_job_id"),
    ],
    ids=["open_jobs", "jobs, open", "jobs", "jobs since", "events_of"],
)
def test_a_query_of_a_long_history_reads_an_index(home, query, index):
    with open_journal(home) as connection:
        statements = []
        connection.connection.driver_connection.set_trace_callback(statements.append)
        query(connection)
        connection.connection.driver_connection.set_trace_callback(None)
        plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statements[0]}").all()
    assert index in " ".join(str(step) for step in plan)
