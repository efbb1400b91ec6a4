"""`tink sql` answers any question that only reads, and nothing else; programs can read what it prints."""

from __future__ import annotations

import csv
import hashlib
import io
import json

import pytest
from cli_home import MODEL, TRAINED
from trio.testing import MockClock

from tink.cli import answers as command
from tink.cli import printing
from tink.journal import sql
from tink.journal.reader import open_journal
from tink.journal.views import VIEWS
from tink.limits import CELL

ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"


def test_the_tables_can_be_asked_anything(tink, home):
    query = "SELECT op, state, count(*) AS jobs FROM jobs GROUP BY op, state ORDER BY op, state"
    code, out, err = tink("sql", "--home", home.root, query)
    assert (code, err) == (0, "")
    head, *lines = [line.split() for line in out.splitlines()]
    assert head == ["op", "state", "jobs"]
    assert ["forward_backward", "done", "1"] in lines
    with open_journal(home) as connection:
        assert len(lines) == len(connection.exec_driver_sql(query).all())


@pytest.mark.parametrize(
    "query",
    [
        "VALUES (1)",
        "WITH a AS (SELECT 1) SELECT * FROM a",
        "SELECT sum(loss_sum) OVER (ORDER BY op_no) FROM jobs",
        "SELECT 1 -- and no more;\n",
        "SELECT 1;\n",
        "SELECT '%s', '100 %'",
        *(f"SELECT * FROM {view}" for view in VIEWS),
    ],
)
def test_what_only_reads_is_answered(tink, home, query):
    code, out, err = tink("sql", "--home", home.root, query)
    assert (code, err) == (0, "")
    assert out


@pytest.mark.on_files
@pytest.mark.parametrize(
    "query",
    [
        "EXPLAIN QUERY PLAN SELECT * FROM jobs",
        "SELECT name FROM sqlite_master",
        "SELECT value FROM json_each('[1]')",
    ],
)
def test_what_only_reads_of_sqlites_own_is_answered(tink, home, query):
    code, out, err = tink("sql", "--home", home.root, query)
    assert (code, err) == (0, "")
    assert len(out.splitlines()) > 1


# What PostgreSQL refuses: test_cli_sql_postgres.py.
@pytest.mark.on_files
@pytest.mark.parametrize(
    "query",
    [
        "DELETE FROM jobs",
        "UPDATE jobs SET state = 'done'",
        "INSERT INTO jobs DEFAULT VALUES",
        "WITH a AS (SELECT 1) DELETE FROM jobs",
        "CREATE TABLE mine (a)",
        "CREATE TEMP TABLE mine (a)",
        "CREATE TEMP VIEW mine AS SELECT 1",
        "DROP TABLE jobs",
        "ALTER TABLE jobs ADD COLUMN mine",
        "REINDEX",
        "ANALYZE",
        "VACUUM",
        "VACUUM INTO 'copy.sqlite'",
        "ATTACH 'bodies.sqlite' AS bodies",
        "DETACH main",
        "PRAGMA query_only = 0",
        "PRAGMA journal_mode",
        "SELECT * FROM pragma_table_info('jobs')",
        "BEGIN",
        "COMMIT",
        "ROLLBACK",
        "SAVEPOINT a",
        "SELECT load_extension('mine')",
        "SELECT 1; DELETE FROM jobs",
        "SELECT 1; SELECT 2",
    ],
)
def test_what_does_more_than_read_is_refused_in_one_line(tink, home, query, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {path: hashlib.sha256(path.read_bytes()).digest() for path in home.root.rglob("*.sqlite")}
    code, out, err = tink("sql", "--home", home.root, query)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert "only reading is allowed here" in err
    assert {path: hashlib.sha256(path.read_bytes()).digest() for path in files} == files
    assert not (tmp_path / "copy.sqlite").exists()


@pytest.mark.on_files
@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("SELECT nought FROM jobs", "SQLite says: no such column: nought"),
        ("SELECT * FROM job", "SQLite says: no such table: job"),
        ("SELEC 1", 'SQLite says: near "SELEC": syntax error'),
        ("SELECT ?", "SQLite says: "),
        ("", "there is no statement in it"),
        ("-- a comment", "there is no statement in it"),
        ("SELECT '\udcff'", "SQLite says: "),
        ("SELECT '\0'", "SQLite says: "),
        ("SELECT randomblob(1000000000)", "SQLite says: string or blob too big"),
        ("SELECT * FROM short_bodies", "requests and results are not for questions"),
        ("SELECT (SELECT max(content) FROM short_bodies)", "requests and results are not for questions"),
        ("SELECT content FROM Short_Bodies", "requests and results are not for questions"),
        ("SELECT count(*) FROM short_bodies", "and not of short_bodies"),
        ("SELECT count(*) FROM SHORT_BODIES", "and not of short_bodies"),
        ('SELECT EXISTS (SELECT 1 FROM main."Short_bodies")', "and not of short_bodies"),
        ("WITH b AS (SELECT rowid FROM short_bodies) SELECT count(*) FROM b", "not for questions"),
    ],
)
def test_what_is_wrong_with_a_question_is_one_line(tink, home, query, says):
    code, out, err = tink("sql", "--home", home.root, query)
    assert (code, out) == (2, "")
    assert err.startswith("tink sql: ")
    assert says in err
    assert len(err.splitlines()) == 1


@pytest.mark.on_files
def test_one_that_never_ends_is_stopped(tink, home, monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr(command.World, "monotonic", lambda world: next(now))
    code, out, err = tink("sql", "--home", home.root, "--seconds", "5", ENDLESS)
    assert (code, out) == (2, "")
    assert "it was not answered within 5 s" in err


@pytest.mark.on_files
def test_ctrl_c_ends_one_that_takes_long(tink, home, monkeypatch):
    def pressed(world):
        looks.append(world)
        if len(looks) == 3:
            raise KeyboardInterrupt
        return 0.0

    looks = []
    monkeypatch.setattr(command.World, "monotonic", pressed)
    code, out, _ = tink("sql", "--home", home.root, ENDLESS)
    assert (code, out) == (130, "")


def test_an_answer_that_was_cut_is_told_from_a_whole_one(tink, home):
    query = "SELECT seq FROM events ORDER BY seq"
    code, out, err = tink("sql", "--home", home.root, "--format", "csv", "--max-rows", "3", query)
    assert (code, out.splitlines()) == (1, ["seq", "1", "2", "3"])
    assert "there are more than 3 rows: ask for less, or for more with --max-rows" in err
    code, out, err = tink("sql", "--home", home.root, "--max-rows", "3", f"{query} LIMIT 3")
    assert (code, err) == (0, "")


def test_a_long_table_looks_as_all_tables_do_and_rich_is_not_asked_for_each_row(tink, home, monkeypatch):
    columns = ["id", "na\u00efve \u6570", "n", "[b]x[/b]", "last"]
    rows = [
        ["a", "\u6570\u5b57", "1", "[red]", "x"],
        ["bb", "\u00e9", "22", "-", "y"],
        ["-", "z", "-", "q", "[link"],
    ]
    made = printing.table(*map(printing.text, columns), right=("n",))
    for row in rows:
        made.add_row(*map(printing.text, row))
    assert printing.listing(columns, rows, [2]) == printing.wide(made)

    monkeypatch.delattr(printing.Table, "__rich_console__")
    code, out, _ = tink("sql", "--home", home.root, "SELECT * FROM v_jobs")
    assert code == 0
    assert len(out.splitlines()) > 2


def test_an_answer_that_would_fill_the_memory_is_cut(tink, home, monkeypatch):
    monkeypatch.setattr(sql, "SQL_ANSWER_BYTES", 1000)
    letters = "'" + "x" * 100 + "'"
    query = f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT {letters} AS a FROM n"
    code, out, err = tink("sql", "--home", home.root, "--format", "csv", query)
    assert (code, len(out.splitlines())) == (1, 11)
    assert err.strip().endswith("more than 1000 bytes: ask for less")


@pytest.fixture
def mixed(on_database):
    """A question whose answer has a value of each kind."""
    blob = {"sqlite": "x'00ff'", "postgresql": "'\\x00ff'::bytea"}[on_database]
    return f"SELECT 'a,\"b\"' AS text, 1 AS whole, 0.1 AS real, NULL AS none, {blob} AS bytes"


def test_csv_has_every_value(tink, home, mixed):
    code, out, _ = tink("sql", "--home", home.root, "--format", "csv", mixed)
    assert code == 0
    assert list(csv.reader(io.StringIO(out))) == [
        ["text", "whole", "real", "none", "bytes"],
        ['a,"b"', "1", "0.1", "", "00ff"],
    ]


def test_json_has_every_value(tink, home, mixed):
    code, out, _ = tink("sql", "--home", home.root, "--format", "json", mixed)
    assert code == 0
    assert json.loads(out) == [{"text": 'a,"b"', "whole": 1, "real": 0.1, "none": None, "bytes": "00ff"}]


def test_parquet_has_every_value(tink, home, tmp_path, mixed):
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "answer.parquet"
    code, out, err = tink("sql", "--home", home.root, "--output", file, mixed)
    assert (code, out, err) == (0, "", "")
    (row,) = parquet.read_table(file).to_pylist()
    assert row == {"text": 'a,"b"', "whole": 1, "real": 0.1, "none": None, "bytes": b"\x00\xff"}


@pytest.mark.parametrize("form", ["json", "parquet"])
def test_two_columns_of_one_name_are_refused_where_a_format_cannot_say_that(tink, home, tmp_path, form):
    file = tmp_path / "answer"
    query = "SELECT 1 AS a, 2 AS a"
    code, out, err = tink("sql", "--home", home.root, "--format", form, "--output", file, query)
    assert (code, out) == (2, "")
    assert "two columns are called a" in err
    assert not file.exists()


@pytest.mark.on_files  # PostgreSQL has no such column
def test_a_column_of_several_types_is_refused_in_parquet(tink, home, tmp_path):
    file = tmp_path / "answer.parquet"
    code, _, err = tink("sql", "--home", home.root, "--output", file, "SELECT 1 AS a UNION ALL SELECT 'b'")
    assert code == 2
    assert "column a has values of several types" in err
    assert not file.exists()


def test_the_format_is_that_of_the_files_name(tink, home, tmp_path):
    for name, begins in {"a.csv": b"seq\n", "a.json": b"[", "a.txt": b"seq"}.items():
        assert tink("sql", "--home", home.root, "--output", tmp_path / name, "SELECT 1 AS seq")[0] == 0
        assert (tmp_path / name).read_bytes().startswith(begins)


def test_a_file_that_cannot_be_written_is_one_line(tink, home, tmp_path):
    code, _, err = tink("sql", "--home", home.root, "--output", tmp_path / "none" / "a.csv", "SELECT 1")
    assert code == 2
    assert "a.csv cannot be written: No such file or directory" in err


def test_a_table_cuts_no_column_and_no_line_but_long_values(tink, home, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    wide = ", ".join(f"'{'x' * 100}' AS column_{i}" for i in range(5))
    code, out, _ = tink("sql", "--home", home.root, f"SELECT {wide}, '{'y' * 500}' AS long")
    head, line = out.splitlines()
    assert code == 0
    assert head.split() == [*(f"column_{i}" for i in range(5)), "long"]
    assert line.split() == [*["x" * 100] * 5, "y" * (CELL - 1) + "\N{HORIZONTAL ELLIPSIS}"]


def test_control_characters_do_not_reach_the_terminal(tink, home):
    _, out, _ = tink("sql", "--home", home.root, "SELECT '\x1b[2J' AS a")
    assert "\x1b" not in out


def test_the_question_may_come_from_standard_input(tink, home, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"SELECT loss_sum FROM jobs WHERE job_id = '{TRAINED}'"))
    code, out, _ = tink("sql", "--home", home.root, "--format", "csv", "-")
    assert code == 0
    assert out.startswith("loss_sum\n")


def test_a_model_can_be_found_by_its_id(tink, home):
    query = f"SELECT count(*) FROM jobs WHERE model_id = '{MODEL}'"
    code, out, _ = tink("sql", "--home", home.root, "--format", "csv", query)
    assert (code, out.splitlines()[1]) == (0, "4")


def test_a_question_that_is_watched_is_asked_again_until_ctrl_c(tink, home, monkeypatch):
    """The clock stands still for the answers: what is waited for is Trio's."""

    def run(function, *arguments):
        return trio_run(function, *arguments, clock=MockClock(autojump_threshold=0))

    def asked(*arguments, **bounds):
        asks.append(arguments)
        if len(asks) == 4:
            raise KeyboardInterrupt
        return honest(*arguments, **bounds)

    trio_run, honest, asks = command.trio.run, command.ask, []
    monkeypatch.setattr(command.trio, "run", run)
    monkeypatch.setattr(command, "ask", asked)
    code, out, _ = tink("sql", "--home", home.root, "--format", "csv", "--watch", "3600", "SELECT 1 AS a")
    assert (code, out.split()) == (130, ["a", "1"] * 3)


@pytest.mark.parametrize(
    "option", [("--max-rows", "0"), ("--seconds", "0"), ("--seconds", "inf"), ("--watch", "-1")]
)
def test_an_option_that_makes_no_sense_is_a_usage_error(tink, home, option):
    code, _, err = tink("sql", "--home", home.root, *option, "SELECT 1")
    assert code == 2
    assert "must be" in err
