"""`tink sql` on PostgreSQL, as the role that owns all of the server and beside a worker that writes:
whatever is asked, nothing happens but an answer."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import uuid

import psycopg
import pytest
from cli_home import SECRET, write

from tests import postgres as postgres_kit
from tests.unit.journal import journal_kit
from tink.home import Home
from tink.journal.database import database
from tink.journal.journal import prepare

# What somebody has made there beside the journal. Each that is called says so in `calls`.
OTHERS = """
CREATE TABLE calls (a TEXT);
CREATE SEQUENCE numbers;
CREATE FUNCTION harm() RETURNS INT LANGUAGE plpgsql AS $$
  BEGIN INSERT INTO calls VALUES ('harm'); RETURN 1; END $$;
CREATE FUNCTION liar(a INT DEFAULT 1) RETURNS INT LANGUAGE plpgsql IMMUTABLE AS $$
  BEGIN PERFORM pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'tink writes%';
  RETURN 1; END $$;
CREATE FUNCTION liar_text(a INT) RETURNS TEXT LANGUAGE sql IMMUTABLE AS $$ SELECT liar(a)::text $$;
CREATE FUNCTION liars(a INT, b INT) RETURNS INT LANGUAGE sql IMMUTABLE AS $$ SELECT liar(a) $$;
CREATE AGGREGATE lying_sum(INT) (sfunc = liars, stype = INT, initcond = '0');
CREATE FUNCTION lies(a INT, b INT) RETURNS BOOL LANGUAGE sql IMMUTABLE AS $$ SELECT liar(a) = 1 $$;
CREATE OPERATOR ~~~ (leftarg = INT, rightarg = INT, function = lies);
CREATE DOMAIN lie AS INT CHECK (liar(value) = 1);
CREATE TYPE mood AS ENUM ('well');
CREATE FUNCTION lying_cast(mood) RETURNS INT LANGUAGE sql IMMUTABLE AS $$ SELECT liar() $$;
CREATE CAST (mood AS INT) WITH FUNCTION lying_cast(mood);
CREATE VIEW behind AS SELECT liar() AS a;
CREATE MATERIALIZED VIEW beside AS SELECT 1 AS a;
"""


@pytest.fixture(scope="module")
def home(postgres, tmp_path_factory):
    """For all tests here: none may change it, which each of them shows."""
    with journal_kit.on_postgres(postgres):
        made = journal_kit.copy_of(write, tmp_path_factory.mktemp("attacked") / "home")
        postgres.execute(OTHERS, _name(made))
        yield made


@pytest.fixture(scope="module")
def worker(home):
    """Its connection: process and lock are there until the end."""
    with journal_kit.written(home) as connection:
        yield connection


# Of the server, beside the rows of each table.
KEPT = (
    "SELECT count(*), max(oid) FROM pg_class WHERE relpersistence <> 't'",
    "SELECT count(*) FROM pg_proc",
    "SELECT rolname, rolpassword FROM pg_authid ORDER BY 1",
    "SELECT count(*) FROM pg_db_role_setting",
    "SELECT count(*) FROM pg_largeobject_metadata",
    "SELECT count(*) FROM pg_replication_slots",
    "SELECT last_value, is_called FROM numbers",
    "SELECT name, setting FROM pg_settings WHERE context <> 'internal' ORDER BY 1",
    "SELECT pg_ls_dir('.') ORDER BY 1",
    "SELECT l.objid, l.mode, a.pid, a.backend_start "
    "FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid WHERE l.locktype = 'advisory'",
)
TABLES = (
    "SELECT oid::regclass::text FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"
)
ROWS = "SELECT md5(string_agg(t::text, ',' ORDER BY t::text)) FROM {} t"


@pytest.fixture(scope="module")
def looker(postgres, home):
    """Sees all, and hears what is notified."""
    with psycopg.connect(
        host="127.0.0.1",
        port=postgres.port,
        user=postgres_kit.SUPERUSER,
        dbname=_name(home),
        autocommit=True,
    ) as connection:
        connection.execute("LISTEN heard")
        yield connection


@pytest.fixture
def unharmed(home, worker, looker):
    """Compares the server before and after, and the worker is still there."""

    def look():
        tables = [ROWS.format(name) for (name,) in looker.execute(TABLES)]
        return {what: looker.execute(what).fetchall() for what in (*KEPT, *tables)}

    before = look()
    yield
    assert look() == before
    assert list(looker.notifies(timeout=0)) == []
    with worker.begin():
        assert worker.exec_driver_sql("SELECT pg_backend_pid()").scalar_one() == _pid(home)


def _pid(home):
    return database(home, "journal").holder().pid


def _sql(tink, home, query, *options):
    return tink("sql", "--home", home.root, "--format", "csv", *options, query)


ATTACKS = {
    # What is no SELECT.
    "delete": "DELETE FROM jobs",
    "update": "UPDATE jobs SET state = 'done'",
    "insert": "INSERT INTO calls VALUES ('a')",
    "merge": "MERGE INTO calls USING jobs ON true WHEN NOT MATCHED THEN DO NOTHING",
    "truncate": "TRUNCATE jobs CASCADE",
    "create": "CREATE TABLE mine (a INT)",
    "create temp": "CREATE TEMP TABLE mine (a INT)",
    "create as": "CREATE TABLE mine AS SELECT 1",
    "drop": "DROP TABLE jobs CASCADE",
    "alter": "ALTER ROLE postgres PASSWORD 'mine'",
    "alter system": "ALTER SYSTEM SET fsync = off",
    "grant": "GRANT ALL ON jobs TO PUBLIC",
    "copy to": "COPY jobs TO 'mine'",
    "copy program": "COPY jobs TO PROGRAM 'touch mine'",
    "copy from": "COPY calls FROM PROGRAM 'echo a'",
    "copy in": "COPY calls FROM STDIN",
    "set": "SET default_transaction_read_only = off",
    "set role": "SET ROLE postgres",
    "reset": "RESET ALL",
    "begin": "BEGIN READ WRITE",
    "commit": "COMMIT",
    "rollback": "ROLLBACK",
    "prepare": "PREPARE mine AS DELETE FROM jobs",
    "execute": "EXECUTE mine",
    "do": "DO $$ BEGIN PERFORM harm(); END $$",
    "call": "CALL harm()",
    "declare": "DECLARE mine CURSOR WITH HOLD FOR SELECT 1",
    "lock": "LOCK TABLE jobs",
    "vacuum": "VACUUM",
    "checkpoint": "CHECKPOINT",
    "discard": "DISCARD ALL",
    "notify": "NOTIFY heard",
    "listen": "LISTEN heard",
    "load": "LOAD 'mine'",
    "show": "SHOW data_directory",
    "explain analyze": "EXPLAIN ANALYZE DELETE FROM jobs",
    "explain": "EXPLAIN SELECT 1",
    # A SELECT that is more than that.
    "modifying with": "WITH a AS (DELETE FROM jobs RETURNING 1) SELECT * FROM a",
    "with before a delete": "WITH a AS (SELECT 1) DELETE FROM jobs",
    "into": "SELECT 1 AS a INTO mine",
    "for update": "SELECT * FROM jobs FOR UPDATE",
    "for key share": "SELECT * FROM jobs FOR KEY SHARE",
    # A second statement, and one that breaks out of whatever is put around it.
    "stacked": "SELECT 1; DELETE FROM jobs",
    "stacked select": "SELECT 1; SELECT 2",
    "stacked, closed": "SELECT 1) AS a; DELETE FROM jobs; SELECT * FROM (SELECT 2",
    "stacked, committed": "SELECT 1) AS a; COMMIT; DROP TABLE calls; SELECT * FROM (SELECT 2",
    "closed, called": "SELECT 1) AS a, (SELECT harm()",
    "closed, in a comment": "SELECT 1) AS a; DROP TABLE calls --",
    "half a comment": "SELECT 1) AS a /*",
    # Functions.
    "end the worker": "SELECT pg_terminate_backend({pid})",
    "end everybody": "SELECT pg_terminate_backend(l.pid) FROM (SELECT {pid} AS pid) l",
    "cancel": "SELECT pg_cancel_backend({pid})",
    "read a file": "SELECT pg_read_file('postgresql.conf')",
    "list files": "SELECT * FROM pg_ls_dir('.')",
    "write a file": "SELECT lo_export(lo_from_bytea(0, 'a'), 'mine')",
    "read into the server": "SELECT lo_import('postgresql.conf')",
    "lock for ever": "SELECT pg_advisory_lock(1952542315, 1)",
    "unlock": "SELECT pg_advisory_unlock_all()",
    "set_config": "SELECT set_config('default_transaction_read_only', 'off', false)",
    "next number": "SELECT nextval('numbers')",
    "set number": "SELECT setval('numbers', 7)",
    "notify by function": "SELECT pg_notify('heard', 'a')",
    "sleep": "SELECT pg_sleep(1000)",
    "sleep as an order": "SELECT 1 FROM jobs ORDER BY length(pg_sleep(1000)::text)",
    "sleep in a condition": "SELECT 1 FROM jobs WHERE pg_sleep(1000) IS NULL",
    "sleep in a join": "SELECT 1 FROM jobs a JOIN jobs b ON length(pg_sleep(1000)::text) > 0",
    "sleep in a subquery": "SELECT (SELECT 1 FROM pg_sleep(1000))",
    "sleep in a with": "WITH a AS (SELECT pg_sleep(1000)) SELECT * FROM a",
    "sleep in a limit": "SELECT 1 LIMIT (SELECT length(pg_sleep(1000)::text))",
    "sleep in a window": "SELECT sum(1) OVER (PARTITION BY pg_sleep(1000)::text) FROM jobs",
    "sleep in a filter": "SELECT count(*) FILTER (WHERE pg_sleep(1000) IS NULL) FROM jobs",
    "sleep in a case": "SELECT CASE WHEN true THEN 1 ELSE length(pg_sleep(1000)::text) END",
    "sleep in rows": "SELECT * FROM ROWS FROM (pg_sleep(1000), now())",
    "sleep in values": "VALUES (pg_sleep(1000))",
    "reload": "SELECT pg_reload_conf()",
    "promote": "SELECT pg_promote()",
    "switch": "SELECT pg_switch_wal()",
    "slot": "SELECT pg_create_physical_replication_slot('mine')",
    "message": "SELECT pg_logical_emit_message(false, 'a', 'b')",
    "export a snapshot": "SELECT pg_export_snapshot()",
    "number a transaction": "SELECT pg_current_xact_id()",
    "seed": "SELECT setseed(0)",
    "sql in a text": "SELECT query_to_xml('SELECT harm()', true, true, '')",
    "a table in a text": "SELECT table_to_xml('behind', true, true, '')",
    "sql for statistics": "SELECT * FROM ts_stat('SELECT to_tsvector(harm()::text)')",
    "a setting": "SELECT current_setting('data_directory')",
    # What others have made: also without a name, and said to be harmless.
    "a function": "SELECT harm()",
    "a function in a schema": "SELECT public.harm()",
    "a function that lies": "SELECT liar()",
    "an aggregate": "SELECT lying_sum(1) FROM jobs",
    "a window": "SELECT lying_sum(1) OVER () FROM jobs",
    "an operator": "SELECT 1 ~~~ 2",
    "an operator of many": "SELECT 1 OPERATOR(public.~~~) ANY ('{{1}}'::int[])",
    "a domain": "SELECT 1::lie",
    "a domain in JSON": "SELECT JSON_VALUE('1', '$' RETURNING lie)",
    "a type in JSON": "SELECT JSON_QUERY('[1]', '$' RETURNING mood)",
    "a type in an array": "SELECT '{{well}}'::mood[]",
    "a domain in a record": "SELECT * FROM json_to_record('{{\"a\": 1}}') AS r(a lie)",
    "a type": "SELECT 'well'::mood",
    "a cast": "SELECT ('well'::mood)::int",
    "a view": "SELECT * FROM behind",
    "a kept view": "SELECT * FROM beside",
    "a table": "SELECT * FROM calls",
    "a sequence": "SELECT * FROM numbers",
    # What is of the server, or a user's.
    "passwords": "SELECT * FROM pg_authid",
    "sessions": "SELECT * FROM pg_stat_activity",
    "settings": "SELECT * FROM pg_settings",
    "files of the server": "SELECT * FROM pg_file_settings",
    "bodies": "SELECT * FROM bodies",
    "short bodies": "SELECT * FROM short_bodies",
    "bodies in a subquery": "SELECT (SELECT max(sha256) FROM public.bodies)",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_what_does_more_than_read_is_refused_in_one_line(tink, home, unharmed, name):
    began = time.monotonic()
    code, out, err = _sql(tink, home, ATTACKS[name].format(pid=_pid(home)))
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert "only reading is allowed here" in err
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    "query",
    [
        "TABLE jobs",
        "(SELECT 1) UNION ALL (VALUES (2))",
        "SELECT random(), clock_timestamp(), gen_random_uuid(), now(), pg_typeof(1)",
        "SELECT to_char(to_timestamp(at), 'HH24'), data ->> 'op', data @> '{}' FROM events",
        "SELECT j.*, row_number() OVER w FROM jobs j WINDOW w AS (PARTITION BY op ORDER BY seq_id)",
        "SELECT * FROM jobs j, LATERAL (SELECT count(*) FROM events e WHERE e.job_id = j.job_id) AS n",
        "SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY run_ms) FROM jobs",
        "SELECT op, count(*) FROM jobs GROUP BY CUBE (op, state)",
        "SELECT * FROM jobs TABLESAMPLE system (100)",
        "SELECT jsonb_path_query(data, '$.op') FROM events",
        "SELECT * FROM JSON_TABLE('[1]', '$[*]' COLUMNS (a INT PATH '$'))",
        "SELECT json_agg(j) FROM jobs j",
        "SELECT string_agg(op, ',') FROM jobs",
        "SELECT * FROM generate_series(1, 3)",
        "SELECT unnest(ARRAY[1, 2]), regexp_replace('a', 'a', 'b'), md5('a'), sha256('a')",
        "SELECT op ~ 'o.*' AND op LIKE 'o%' AND op = ANY ('{a}') AND (op, state) < ('a', 'b') FROM jobs",
        'SELECT 1 AS ":funcid 1", 2 AS "a) b {C :relid 3"',
        "SELECT version_num FROM journal_schema_version",
        "SELECT column_name FROM information_schema.columns WHERE table_name = 'jobs'",
        "SELECT 1 /* ; */ -- ;",
        "SELECT ';', '%s', '100 %', $$ it's $$",
    ],
)
def test_what_only_reads_is_answered(tink, home, unharmed, query):
    code, out, err = _sql(tink, home, query)
    assert (code, err) == (0, "")
    assert len(out.splitlines()) > 1


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("SELECT nought FROM jobs", 'PostgreSQL says: column "nought" does not exist'),
        ("SELECT * FROM job", 'PostgreSQL says: relation "job" does not exist'),
        ("SELEC 1", "only reading is allowed here, one statement at a time"),
        ("SELECT 1 FROM", 'PostgreSQL says: syntax error at or near ")"'),
        ("SELECT $1", "PostgreSQL says: there is no parameter $1"),
        ("SELECT 1 / 0", "PostgreSQL says: division by zero"),
        ("", "there is no statement in it"),
        (" ; ", "there is no statement in it"),
        ("-- a comment", "there is no statement in it"),
        ("/* a\ncomment */;", "there is no statement in it"),
        ("SELECT '\udcff'", "PostgreSQL says: 'utf-8' codec can't encode"),
        ("SELECT '\0'", "it has a NUL in it"),
    ],
)
def test_what_is_wrong_with_a_question_is_one_line(tink, home, unharmed, query, says):
    code, out, err = _sql(tink, home, query)
    assert (code, out) == (2, "")
    assert err.startswith("tink sql: ")
    assert says in err
    assert len(err.splitlines()) == 1


def test_a_value_that_sqlite_has_no_type_for_is_text(tink, home):
    query = (
        "SELECT sum(seq) AS whole, avg(seq) AS mean, 1 = 1 AS truth, 0.5::numeric AS half, "
        "'NaN'::float8::text AS none, '{\"a\": [1]}'::json AS document, '2026-01-02'::date AS day, "
        "'2026-01-02 03:04:05+00'::timestamptz AT TIME ZONE 'UTC' AS time, '{1,2}'::int[] AS array, "
        "'1 day'::interval AS span, ROW(1, 'a') AS row FROM events"
    )
    code, out, _ = tink("sql", "--home", home.root, "--format", "json", query)
    assert code == 0
    assert json.loads(out) == [
        {
            "whole": 153,
            "mean": 9.0,
            "truth": 1,
            "half": 0.5,
            "none": "NaN",
            "document": '{"a": [1]}',
            "day": "2026-01-02",
            "time": "2026-01-02 03:04:05",
            "array": "{1,2}",
            "span": "1 day",
            "row": "(1,a)",
        }
    ]


def test_an_empty_answer_has_its_columns(tink, home):
    assert _sql(tink, home, "SELECT op, state FROM jobs WHERE false") == (0, "op,state\n", "")


@pytest.mark.parametrize(
    "query",
    [
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n",
        "SELECT count(*) FROM generate_series(1, 1000000000000)",
    ],
)
def test_one_that_never_ends_is_stopped_on_the_server(tink, home, postgres, unharmed, query):
    code, out, err = _sql(tink, home, query, "--seconds", "0.3")
    assert (code, out) == (2, "")
    assert "it was not answered within 0.3 s" in err
    assert _active(postgres, home) == []


def test_of_an_endless_answer_no_more_is_made_than_is_taken(tink, home, postgres, unharmed):
    query = (
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i, repeat('x', 9) FROM n"
    )
    code, out, err = _sql(tink, home, query, "--max-rows", "3")
    assert (code, len(out.splitlines())) == (1, 4)
    assert "there are more than 3 rows" in err
    assert _active(postgres, home) == []


def test_ctrl_c_ends_it_on_the_server_too(tink, home, postgres, unharmed):
    def press():
        while not _active(postgres, home):
            pass
        os.kill(os.getpid(), signal.SIGINT)

    pressing = threading.Thread(target=press)
    pressing.start()
    code, out, err = _sql(tink, home, "SELECT count(*) FROM generate_series(1, 1000000000000)")
    pressing.join()
    assert (code, out, err) == (130, "", "")
    assert _active(postgres, home) == []


def _active(postgres, home):
    """The questions that the server works on."""
    return postgres.execute(
        "SELECT query FROM pg_stat_activity WHERE application_name = 'tink reads the journal' AND "
        f"state = 'active' AND query LIKE 'SELECT * FROM (%' AND datname = '{_name(home)}'"
    )


def _name(home):
    return home.database_url.rpartition("/")[2]


@pytest.fixture
def role(postgres, home):
    """May read, and no more than that."""
    name, place = f"reader_{uuid.uuid4().hex}", _name(home)
    postgres.execute(f"CREATE ROLE {name} LOGIN")
    postgres.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {name}", place)
    yield name
    postgres.execute(f"GRANT TEMPORARY ON DATABASE {place} TO PUBLIC")
    postgres.execute(f"DROP OWNED BY {name}", place)
    postgres.execute(f"DROP ROLE {name}")


def test_a_role_that_may_only_read_can_ask(tink, home, postgres, role, monkeypatch):
    monkeypatch.setenv("TINK_DATABASE_URL", home.database_url.replace("postgres@", f"{role}@"))
    assert _sql(tink, home, "SELECT count(*) AS n FROM jobs") == (0, "n\n5\n", "")
    place = _name(home)
    postgres.execute(f"REVOKE TEMPORARY ON DATABASE {place} FROM PUBLIC")
    code, _, err = _sql(tink, home, "SELECT count(*) FROM jobs")
    assert code == 2
    assert "permission denied to create temporary tables" in err


def test_an_audit_answers_the_same_as_on_files(tink, home, tmp_path):
    files = Home(tmp_path / "home")
    files.make()
    prepare(files)
    write(files)
    for question in ("slow-jobs", "lost-time", "steps", "usage"):
        asked = [tink("audit", question, "--home", one.root, "--format", "json") for one in (home, files)]
        assert asked[0] == asked[1]
        assert SECRET not in asked[0][1]


@pytest.mark.slow
def test_a_replica_says_whom_to_ask(tink, tmp_path, monkeypatch):
    with postgres_kit.running() as server, server.replica() as replica:
        home = Home(tmp_path / "home", server.create_database())
        home.make()
        prepare(home)
        monkeypatch.setenv("TINK_DATABASE_URL", replica.url(_name(home)))
        code, out, err = _sql(tink, home, "SELECT 1")
    assert (code, out) == (2, "")
    assert err == (
        "tink sql: this is a replica, which cannot check a question: ask the server that it follows\n"
    )
