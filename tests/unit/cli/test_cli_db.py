"""`tink db check` finds what is wrong and changes nothing; `tink db upgrade` needs the home to itself, as
`tink db move` does; `tink db backup` does not."""

from __future__ import annotations

import hashlib
import re
import sqlite3
from contextlib import closing

import pytest
import trio
from cli_home import BEGAN, MADE, MODEL, RESULT, SESSION, TRAINED, WAITING, StillWorld, files

from tink.domain.events import BodiesPruned, JobDone, Subject
from tink.home import Home
from tink.journal import backups, checks
from tink.journal.journal import Journal
from tink.journal.postgres import PostgreSQL, shown
from tink.limits import SHORT_BODY

pytestmark = pytest.mark.on_files

LONG = b"a long result" * SHORT_BODY


def alter(path, *statements):
    """What a bad disk or a curious hand does to the file."""
    connection = sqlite3.connect(path)
    with connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()


def wrong(document):
    """(database, check) -> problems, of the checks that found any."""
    return {
        (check["database"], check["name"]): check["problems"]
        for check in document["checks"]
        if not check["ok"]
    }


def test_a_whole_journal_passes_every_check(home, tink, tink_json):
    code, document = tink_json("db", "check", "--home", home.root)
    assert code == 0
    assert document["ok"] is True
    assert [(check["database"], check["name"]) for check in document["checks"]] == [
        ("journal", "file"),
        ("journal", "schema"),
        ("journal", "events"),
        ("journal", "tables"),
        ("journal", "bodies"),
        ("bodies", "file"),
        ("bodies", "schema"),
        ("bodies", "bodies"),
    ]
    code, out, err = tink("db", "check", "--home", home.root)
    assert (code, err) == (0, "")
    assert out.endswith("all is well\n")


def test_a_check_writes_nothing(home, tink):
    before = files(home.root)
    tink("db", "check", "--home", home.root)
    tink("db", "check", "--home", home.root, "--quick", "--json")
    assert files(home.root) == before


def test_a_check_runs_beside_the_worker(home, tink):
    with home.lock():
        assert tink("db", "check", "--home", home.root)[0] == 0


def test_a_missing_event_is_found(home, tink_json, tink):
    alter(home.journal, "DELETE FROM events WHERE seq = 5")
    code, document = tink_json("db", "check", "--home", home.root)
    assert code == 1
    assert wrong(document)["journal", "events"] == ["no events from 5 to 5"]
    assert "no event 5" in wrong(document)["journal", "tables"][0]
    assert "something is wrong" in tink("db", "check", "--home", home.root)[1]


def test_a_row_that_no_event_made_is_found(home, tink_json):
    alter(home.journal, f"UPDATE jobs SET loss_sum = 1.5 WHERE job_id = '{TRAINED}'")
    code, document = tink_json("db", "check", "--home", home.root)
    assert code == 1
    problems = wrong(document)
    assert list(problems) == [("journal", "tables")]
    assert TRAINED in problems["journal", "tables"][0]


def test_an_event_that_cannot_be_read_is_found(home, tink_json):
    alter(home.journal, "UPDATE events SET kind = 'miracle' WHERE seq = 5")
    code, document = tink_json("db", "check", "--home", home.root)
    assert (code, list(wrong(document))) == (1, [("journal", "events"), ("journal", "tables")])


def test_another_schema_is_found(home, tink_json):
    alter(home.journal, "ALTER TABLE jobs ADD COLUMN mood TEXT", "DROP INDEX ix_jobs_open")
    code, document = tink_json("db", "check", "--home", home.root)
    assert code == 1
    problems = " ".join(wrong(document)["journal", "schema"])
    assert "mood" in problems
    assert "ix_jobs_open" in problems


def test_a_revision_of_another_tink_is_found_and_nothing_is_built_on_it(home, tink_json, tink):
    alter(home.journal, "UPDATE journal_schema_version SET version_num = '9999'")
    code, document = tink_json("db", "check", "--home", home.root)
    assert code == 1
    assert "written by a newer one" in wrong(document)["journal", "schema"][0]
    assert ("journal", "tables") not in {(c["database"], c["name"]) for c in document["checks"]}
    code, _, err = tink("db", "upgrade", "--home", home.root)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "9999" in err


def test_a_damaged_body_is_found_unless_quick(home, tink_json):
    alter(home.journal, "UPDATE short_bodies SET content = x'00' WHERE rowid = 1")
    code, document = tink_json("db", "check", "--home", home.root)
    assert (code, list(wrong(document))) == (1, [("journal", "bodies")])
    assert "damaged" in wrong(document)["journal", "bodies"][0]
    assert tink_json("db", "check", "--home", home.root, "--quick")[0] == 0


def test_a_missing_body_is_found_even_when_quick(home, tink_json):
    digest = hashlib.sha256(b"a request").hexdigest()
    alter(home.journal, f"DELETE FROM short_bodies WHERE sha256 = '{digest}'")
    code, document = tink_json("db", "check", "--home", home.root, "--quick")
    assert code == 1
    assert wrong(document)["bodies", "bodies"] == [f"the body {digest} of the job {TRAINED} is missing"]


@pytest.mark.parametrize("before", [BEGAN + 10, BEGAN + 100])
def test_a_body_that_was_pruned_is_not_missing_and_an_older_one_is(home, tink_json, before):
    async def prune():
        async with Journal.open(home, StillWorld(), version="0", settings_digest="0") as journal:
            pruned = BodiesPruned(count=1, bytes=9, submitted_before=BEGAN, finished_before=before)
            await journal.append((Subject(), pruned))

    trio.run(prune)
    digest = hashlib.sha256(RESULT).hexdigest()
    alter(home.journal, f"DELETE FROM short_bodies WHERE sha256 = '{digest}'")
    problems = wrong(tink_json("db", "check", "--home", home.root)[1])
    job_ended = BEGAN + 15
    assert (problems == {}) == (before > job_ended)


def test_a_missing_body_store_is_found(home, tink_json):
    home.bodies.unlink()
    code, document = tink_json("db", "check", "--home", home.root)
    assert (code, list(wrong(document))) == (1, [("bodies", "file")])
    assert not home.bodies.exists()


def test_a_damaged_file_is_found(home, tink_json):
    content = bytearray(home.journal.read_bytes())
    content[8192 : 8192 + 4096] = b"\xff" * 4096
    home.journal.write_bytes(content)
    code, document = tink_json("db", "check", "--home", home.root)
    assert code == 1
    assert ("journal", "file") in wrong(document)


def test_problems_without_end_are_counted_not_listed(home, tink_json, monkeypatch):
    monkeypatch.setattr(checks, "SHOWN_PROBLEMS", 1)
    alter(home.journal, "UPDATE jobs SET attempts = 9")
    problems = wrong(tink_json("db", "check", "--home", home.root)[1])["journal", "tables"]
    assert problems[1:] == ["... and 4 more"]


def test_upgrade_of_the_newest_schema_does_nothing(home, tink, tink_json):
    before = files(home.root)
    code, document = tink_json("db", "upgrade", "--home", home.root)
    assert code == 0
    assert document["home"] == str(home.root)
    for database in ("journal", "bodies"):
        found = document["databases"][database]
        assert found["from"] == found["to"]
        assert found["changed"] is False
    assert "nothing to do" in tink("db", "upgrade", "--home", home.root)[1]
    assert {name: content for name, content in files(home.root).items() if name != "worker.lock"} == before


def test_upgrade_makes_what_is_missing(home, tink, tink_json):
    home.bodies.unlink()
    code, document = tink_json("db", "upgrade", "--home", home.root)
    assert code == 0
    assert document["databases"]["bodies"]["from"] is None
    assert document["databases"]["bodies"]["changed"] is True
    assert tink("db", "upgrade", "--home", home.root)[0] == 0


def test_upgrade_while_the_worker_runs_is_one_line_and_exits_2(home, tink):
    with home.lock():
        code, out, err = tink("db", "upgrade", "--home", home.root)
    assert (code, out) == (2, "")
    assert err.startswith("tink db: the worker is running: stop it first")
    assert len(err.splitlines()) == 1


def test_a_problem_that_is_long_is_cut(home):
    found = checks._found("journal", "tables", "", ["x" * 5000])
    assert [len(problem) for problem in found.problems] == [1000]


@pytest.mark.parametrize("action", ["check", "upgrade"])
def test_an_empty_home_stays_empty(tmp_path, tink, action):
    Home(tmp_path / "home").make()
    code, _, err = tink("db", action, "--home", tmp_path / "home")
    assert code == 2
    assert "has no journal" in err
    assert files(tmp_path / "home") == {}


def test_the_job_that_names_no_body_needs_none(home, tink_json):
    assert tink_json("jobs", "show", MADE, "--home", home.root)[1]["job"]["body_sha256"] is None
    assert tink_json("db", "check", "--home", home.root)[0] == 0


# -- move -------------------------------------------------------------------------------------------


def test_a_journal_is_moved_to_a_server_and_back(home, postgres_url, tink, tink_json, monkeypatch):
    code, out, err = tink("db", "move", "--home", home.root, "--to", postgres_url)
    assert (code, err) == (0, "")
    assert re.search(r"moved 1\d events \([\d,]+/s\) and 3 bodies, \S+ k?B \([\d,]+/s\), in ", out)
    assert f"now in {shown(postgres_url)}" in out
    head = re.search(r"head +(\S+)", out)[1]
    assert tink("db", "check", "--home", home.root)[0] == 0  # the home says where it is
    assert tink("journal", "verify", "--home", home.root, "--head", head)[0] == 0

    code, document = tink_json("db", "move", "--home", home.root, "--to", "sqlite")
    assert code == 0
    assert (document["from"], document["to"]) == (shown(postgres_url), str(home.journal))
    assert (document["head"], document["copied"]) == (head, True)
    assert tink("journal", "verify", "--home", home.root, "--head", head)[0] == 0
    monkeypatch.setenv("TINK_DATABASE_URL", postgres_url)
    for command in (("jobs",), ("db", "upgrade")):
        code, out, err = tink(*command, "--home", home.root)
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert "was moved elsewhere" in err
    code, out, _ = tink("db", "move", "--home", home.root, "--to", "sqlite")
    assert (code, out.splitlines()[0]) == (
        0,
        "all of it was there already: an earlier move has come to its end",
    )


def test_the_url_of_what_comes_after_may_be_set_already(home, postgres_url, tink, monkeypatch):
    monkeypatch.setenv("TINK_DATABASE_URL", postgres_url)
    assert tink("db", "move", "--home", home.root, "--to", postgres_url)[0] == 0
    assert tink("jobs", "--home", home.root)[::2] == (0, "")
    code, _, err = tink("db", "move", "--home", home.root, "--to", postgres_url, "--from", postgres_url)
    assert (code, err) == (2, f"tink db: the journal is in {shown(postgres_url)} already\n")


def test_a_password_stays_where_it_was(home, postgres_url, tink, monkeypatch):
    secret = postgres_url.replace("postgres@", "postgres:s3cret@")
    monkeypatch.setenv("TINK_DATABASE_URL", secret)
    printed = [tink("db", "move", "--home", home.root, "--to", shown(secret))]
    printed += [tink("db", "move", "--home", home.root, "--to", "sqlite")]
    assert [code for code, *_ in printed] == [0, 0]
    assert "s3cret" not in str(printed)
    assert not any(b"s3cret" in content for content in files(home.root).values())


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--to", "sqlite"], "the journal is in .*journal.sqlite already"),
        (["--to", "mysql://host/tink"], "it is not like postgresql"),
        (["--to", "nonsense"], "it is not like postgresql"),
        (["--to", "postgresql://127.0.0.1:1/tink"], "postgresql://127.0.0.1:1/tink cannot be opened: conn"),
        (["--to", "sqlite", "--from", "postgresql://127.0.0.1:1/tink"], "cannot be read: conn"),
    ],
)
def test_a_move_that_cannot_be_is_one_line(home, tink, options, line):
    before = files(home.root)
    code, out, err = tink("db", "move", "--home", home.root, *options)
    assert (code in (2, 3), out, len(err.splitlines())) == (True, "", 1)
    assert re.search(line, err)
    assert {**files(home.root), "worker.lock": b""} == {**before, "worker.lock": b""}


def test_a_server_without_a_journal_is_not_moved(home, postgres_url, tink):
    code, _, err = tink("db", "move", "--home", home.root, "--to", "sqlite", "--from", postgres_url)
    assert (code, err) == (2, f"tink db: {shown(postgres_url)} has no journal: --from says where it is\n")


def test_a_home_that_is_not_there_is_not_moved(tmp_path, postgres_url, tink):
    code, _, err = tink("db", "move", "--home", tmp_path / "nowhere", "--to", postgres_url)
    assert (code, "there is no home" in err) == (2, True)
    assert not (tmp_path / "nowhere").exists()


def test_a_move_goes_to_the_database_that_is_set_without_its_password_on_the_command_line(
    home, postgres_url, tink, monkeypatch
):
    monkeypatch.delenv("TINK_DATABASE_URL", raising=False)
    code, _, err = tink("db", "move", "--home", home.root, "--to", "postgresql")
    assert (code, "TINK_DATABASE_URL names, and it names none" in err) == (2, True)
    monkeypatch.setenv("TINK_DATABASE_URL", postgres_url.replace("postgres@", "postgres:s3cret@"))
    code, out, err = tink("db", "move", "--home", home.root, "--to", "postgresql")
    assert code == 0, err
    assert "s3cret" not in out + err + home.database.read_text()


@pytest.mark.parametrize("command", [("upgrade",), ("move", "--to", "sqlite")], ids=" ".join)
def test_while_a_worker_writes_to_the_server_it_is_one_line(home, postgres_url, tink, command):
    assert tink("db", "move", "--home", home.root, "--to", postgres_url)[0] == 0
    with closing(PostgreSQL(postgres_url, "journal").writer()):
        code, out, err = tink("db", *command, "--home", home.root)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith("tink db: a worker is running: stop it first, and those that wait (postgresql://")
    assert "is in use: a worker on" in err
    assert tink("db", *command, "--home", home.root)[0] == 0


# -- on a server ------------------------------------------------------------------------------------


def test_a_server_is_checked_like_the_files(home, postgres, postgres_url, tink, tink_json, monkeypatch):
    files_checks = tink_json("db", "check", "--home", home.root)[1]["checks"]
    tink("db", "move", "--home", home.root, "--to", postgres_url)
    code, document = tink_json("db", "check", "--home", home.root)
    assert (code, document["ok"]) == (0, True)
    places = [(check["database"], check["name"]) for check in document["checks"]]
    assert places == [(check["database"], check["name"]) for check in files_checks]
    assert re.match(r"PostgreSQL \d+\S*, whose files", document["checks"][0]["detail"])

    name = postgres_url.rpartition("/")[2]
    for statement, place, told in (
        (f"ALTER DATABASE {name} SET synchronous_commit = off", ("journal", "file"), "synchronous_commit"),
        ("UPDATE jobs SET loss_sum = 1.5 WHERE loss_sum IS NOT NULL", ("journal", "tables"), TRAINED),
        ("UPDATE events SET at = at + 1 WHERE seq = 5", ("journal", "events"), "event 5"),
        ("ALTER TABLE jobs ADD COLUMN mood text", ("journal", "schema"), "mood"),
        ("UPDATE short_bodies SET content = '' WHERE size > 0", ("journal", "bodies"), "damaged"),
        ("DROP INDEX ix_bodies_stored_at", ("bodies", "schema"), "ix_bodies_stored_at"),
    ):
        postgres.execute(statement, name)
        code, document = tink_json("db", "check", "--home", home.root)
        assert (code, told in wrong(document)[place][0]) == (1, True), statement
        for mended in (f"ALTER DATABASE {name} RESET ALL", "ALTER TABLE jobs DROP COLUMN IF EXISTS mood"):
            postgres.execute(mended, name)  # nothing is looked at beyond that


# -- backup -----------------------------------------------------------------------------------------


def test_a_backup_is_a_home(home, tmp_path, tink, tink_json):
    folder = tmp_path / "deep" / "backup"
    with home.lock():  # the worker runs
        code, document = tink_json("db", "backup", folder, "--home", home.root)
    assert (code, document["ok"]) == (0, True)
    assert sorted(files(folder)) == ["bodies.sqlite", "journal.sqlite"]
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    assert tink("journal", "verify", "--home", folder, "--head", document["head"])[0] == 0
    assert tink("jobs", "--home", folder)[1] == tink("jobs", "--home", home.root)[1]
    out = tink("db", "backup", tmp_path / "other", "--home", home.root)[1]
    assert out.endswith("all is well\n")
    assert document["head"] in out


def test_a_backup_goes_into_a_new_folder_or_an_empty_one(home, tmp_path, tink):
    (tmp_path / "empty").mkdir()
    assert tink("db", "backup", tmp_path / "empty", "--home", home.root)[0] == 0
    before = files(tmp_path / "empty")
    for folder in (tmp_path / "empty", home.root):
        code, _, err = tink("db", "backup", folder, "--home", home.root)
        assert (code, err) == (2, f"tink db: {folder} is there already: name a new folder\n")
    assert files(tmp_path / "empty") == before


def test_a_backup_that_fails_leaves_nothing(home, tmp_path, tink, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(backups, "_copy", full)
    code, _, err = tink("db", "backup", tmp_path / "to" / "there", "--home", home.root)
    assert (code, len(err.splitlines()), "No space left" in err) == (2, 1, True)
    assert list((tmp_path / "to").iterdir()) == []


def test_a_backup_of_what_is_damaged_says_so(home, tmp_path, tink):
    alter(home.journal, "UPDATE short_bodies SET content = x'00' WHERE rowid = 1")
    code, out, _ = tink("db", "backup", tmp_path / "backup", "--home", home.root)
    assert code == 1
    assert "is damaged: it is not what was stored" in out


def test_a_server_is_backed_up_with_its_own_tools(home, postgres_url, tmp_path, tink):
    tink("db", "move", "--home", home.root, "--to", postgres_url)
    code, _, err = tink("db", "backup", tmp_path / "backup", "--home", home.root)
    assert (code, "pg_dump" in err, len(err.splitlines())) == (2, True, 1)


def test_a_backup_is_of_one_moment_while_it_is_written_to(home, tmp_path, tink_json, monkeypatch):
    """Between two pages, and between the two files."""
    monkeypatch.setattr(backups, "BACKUP_PAGES", 1)
    before, copy = tink_json("jobs", "--home", home.root)[1], backups._copy

    def busy(connection, path, told):
        def write(done, total):
            async def live():
                async with Journal.open(home, StillWorld(), version="0", settings_digest="0") as journal:
                    await journal.bodies.put(b"later %d" % done)

            if done % 20 == 0:
                trio.run(live)
            told(done, total)

        copy(connection, path, write)

    monkeypatch.setattr(backups, "_copy", busy)
    code, document = tink_json("db", "backup", tmp_path / "backup", "--home", home.root)
    assert (code, document["ok"]) == (0, True)
    assert tink_json("jobs", "--home", tmp_path / "backup")[1]["jobs"] == before["jobs"]
    assert tink_json("db", "check", "--home", home.root)[0] == 0


def test_a_body_that_is_deleted_between_two_looks_is_looked_at_again(
    home, tmp_path, tink_json, monkeypatch
):
    """As retention does it: in the journal first."""
    looks, open_bodies = [], backups.open_snapshot

    async def end():
        async with Journal.open(home, StillWorld(), version="0", settings_digest="0") as journal:
            waiting = Subject(tenant="default", session_id=SESSION, model_id=MODEL, job_id=WAITING)
            digest = await journal.bodies.put(LONG)
            await journal.append((waiting, JobDone(result_sha256=digest, result_bytes=len(LONG))))

    trio.run(end)

    async def prune():
        async with Journal.open(home, StillWorld(), version="0", settings_digest="0") as journal:
            now = StillWorld.time + 1
            pruned = BodiesPruned(count=1, bytes=9, submitted_before=BEGAN, finished_before=now)
            await journal.append((Subject(), pruned))
            await journal.bodies.drop([hashlib.sha256(LONG).hexdigest()], ())

    def late(database):
        if not looks:
            trio.run(prune)
        looks.append(database)
        return open_bodies(database)

    monkeypatch.setattr(backups, "open_snapshot", late)
    code, document = tink_json("db", "backup", tmp_path / "backup", "--home", home.root)
    assert (code, document["ok"], len(looks)) == (0, True, 2)
