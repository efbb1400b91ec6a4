"""`tink db check` finds what is wrong and changes nothing; `tink db upgrade` needs the home to itself."""

from __future__ import annotations

import hashlib
import sqlite3

import pytest
import trio
from cli_home import BEGAN, MADE, RESULT, TRAINED, StillWorld, files

from tink.domain.events import BodiesPruned, Subject
from tink.home import Home
from tink.journal import checks
from tink.journal.journal import Journal

pytestmark = pytest.mark.on_files


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
    assert "newer Tink" in wrong(document)["journal", "schema"][0]
    assert ("journal", "tables") not in {(c["database"], c["name"]) for c in document["checks"]}
    code, _, err = tink("db", "upgrade", "--home", home.root)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "9999" in err


def test_a_damaged_body_is_found_unless_quick(home, tink_json):
    alter(home.bodies, "UPDATE bodies SET content = x'00' WHERE rowid = 1")
    code, document = tink_json("db", "check", "--home", home.root)
    assert (code, list(wrong(document))) == (1, [("bodies", "bodies")])
    assert "damaged" in wrong(document)["bodies", "bodies"][0]
    assert tink_json("db", "check", "--home", home.root, "--quick")[0] == 0


def test_a_missing_body_is_found_even_when_quick(home, tink_json):
    digest = hashlib.sha256(b"a request").hexdigest()
    alter(home.bodies, f"DELETE FROM bodies WHERE sha256 = '{digest}'")
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
    alter(home.bodies, f"DELETE FROM bodies WHERE sha256 = '{digest}'")
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
