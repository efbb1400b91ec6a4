"""Whatever reads a home says the same of it when its journal is in PostgreSQL, word for word."""

from __future__ import annotations

import io
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from sqlalchemy import insert, select, text

import tink
from tests.postgres import PostgresServer
from tests.simulation import golden
from tests.unit.journal.journal_kit import FOREIGN_KEYS_OFF
from tink.cli.main import main
from tink.home import Home
from tink.journal import schema, store
from tink.journal.database import database
from tink.journal.journal import prepare
from tink.journal.reader import open_snapshot
from tink.journal.recording import open_recording
from tink.journal.views import VIEWS
from tink.replay import bundle

PASSWORD = "n0t-to-be-seen"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Home:
    made = Home(tmp_path_factory.mktemp("golden") / "home")
    golden.read(golden.GOLDEN / tink.__version__ / "trainer", made)
    return made


@pytest.fixture(scope="module")
def home(files: Home, postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """The same journal and artifacts."""
    root = tmp_path_factory.mktemp("moved") / "home"
    shutil.copytree(files.root, root, ignore=shutil.ignore_patterns("*.sqlite*"))
    url = postgres.create_database()
    made = Home(root, url.replace("postgres@", f"postgres:{PASSWORD}@"))
    prepare(made)
    with (
        open_recording(files) as recording,
        closing(database(made, "journal").writer()) as writer,
        writer.connection.begin(),
    ):
        writer.connection.execute(text(FOREIGN_KEYS_OFF["postgresql"]))
        store.put(writer.connection, list(store.raw_events(recording.journal)))
        for row in recording.journal.execute(select(schema.short_bodies)).mappings():
            writer.connection.execute(insert(schema.short_bodies), [dict(row)])
    with (
        open_snapshot(database(files, "bodies")) as bodies,
        closing(database(made, "bodies").writer()) as writer,
        writer.connection.begin(),
    ):
        for row in bodies.execute(select(schema.bodies)).mappings():
            writer.connection.execute(insert(schema.bodies), [dict(row)])
    made.note_database(url)
    yield made
    postgres.drop_database(url)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """A command: (exit status, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture(scope="module")
def model(files: Home) -> str:
    """The one with the most steps."""
    with open_recording(files) as recording:
        query = select(schema.models.c.model_id).order_by(schema.models.c.steps.desc()).limit(1)
        return str(recording.journal.execute(query).scalar_one())


COMMANDS = [
    "status --json",
    "jobs --json --limit 1000",
    "jobs show MODEL:3 --json",
    "journal verify",
    "replay state --format json",
    "replay state --at 40 --format json",
    "replay state --diff 1 end --format json",
    "replay state --model MODEL --format json",
    "replay state --at 40",
    "replay decisions",
    "replay decisions --format json",
    "gc --dry-run --json",
    *(f"audit {name} --days 10000" for name in ("slow-jobs", "lost-time")),
    *(f"audit {name} MODEL@1" for name in ("lineage", "samples")),
    *("audit steps", "audit jumps MODEL", "audit data MODEL 1", "audit usage"),
    *(f"sql 'SELECT * FROM {view} ORDER BY 1, 2, 3, 4'" for view in VIEWS),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_says_the_same(files: Home, home: Home, model: str, run: Run, command: str) -> None:
    arguments = shlex.split(command.replace("MODEL", model))
    told = []
    for one in (files, home):
        code, out, err = run(*arguments, "--home", one.root)
        out = out.replace(str(one.root), "HOME")
        content = msgspec.json.decode(out) if "json" in command else out
        if command.startswith("status"):
            assert min(content["disk"].pop(name) for name in ("journal", "bodies")) > 0
        told.append((code, content, err))
    assert told[0] == told[1]
    assert told[0][0] == (3 if command.startswith("status") else 0)


def test_a_walk_says_the_same(files: Home, home: Home, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    for one in (files, home):
        monkeypatch.setattr("sys.stdin", io.StringIO("n 30\nc\np models\ng 12\nn 3\n"))
        told.append(run("replay", "state", "--step", "--break", "kind=model_created", "--home", one.root))
    assert told[0] == told[1]
    assert told[0][0] == 0


def test_a_bundle_has_the_same_in_it(files: Home, home: Home, model: str, run: Run, tmp_path: Path) -> None:
    found = []
    for number, one in enumerate((files, home)):
        file = tmp_path / f"{number}.tink"
        assert run("export", model, file, "--home", one.root)[0] == 0
        with bundle.opened(file) as carried, open_recording(carried) as recording:
            about = bundle.about(carried)
            assert about is not None
            assert list(bundle.broken(carried, about)) == []
            rows = list(store.raw_events(recording.journal))
            digests = recording.stored({row["data"].get("body_sha256") or "" for row in rows})
            contents = {digest: recording.body(digest) for digest in digests}
            found.append((msgspec.structs.replace(about, exported_at=0.0), rows, contents))
    assert found[0] == found[1]
    code, out, err = run("replay", "state", "--home", tmp_path / "1.tink", "--format", "json")
    assert (code, err) == (0, "")
    assert run("replay", "state", "--home", tmp_path / "0.tink", "--format", "json")[1] == out
    told = [run("replay", tmp_path / f"{number}.tink")[1].splitlines() for number in (0, 1)]
    lines = [[line for line in some if not line.startswith("exported ")] for some in told]
    assert lines[0] == lines[1]


# -- the password -----------------------------------------------------------------------------------

WRONG = {
    "no such server": lambda url: url.rpartition(":")[0] + ":1/tink",
    "no such database": lambda url: url.rpartition("/")[0] + "/nowhere",
    "no such role": lambda url: url.replace("postgres:", "nobody:"),
    "no such option": lambda url: url + "?nonsense=1",
    "no URL": lambda url: url.replace("//", ""),
    "another database's": lambda url: url.replace("postgresql", "mysql"),
}
READERS = [
    *("status", "jobs", "journal verify", "replay state", "replay decisions", "gc --dry-run"),
    *("audit steps", "sql 'SELECT 1'", "export MODEL FILE", "doctor", "doctor --json", "config"),
    *("config --json", "db check", "sql 'SELECT * FROM nowhere'"),
]


@pytest.mark.parametrize("wrong", ["nothing", *WRONG])
def test_the_password_is_shown_nowhere(
    home: Home, model: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    url = home.database_url if wrong == "nothing" else WRONG[wrong](home.database_url)
    assert PASSWORD in url
    monkeypatch.setenv("TINK_DATABASE_URL", url)
    for command in READERS:
        arguments = shlex.split(command.replace("MODEL", model).replace("FILE", f"{tmp_path}/run.tink"))
        code, out, err = run(*arguments, "--home", home.root)
        assert PASSWORD not in out + err, command
        assert "Traceback" not in err
        if wrong != "nothing" and not command.startswith(("doctor", "config")):
            assert (code, out) == (2, ""), command
            assert len(err.splitlines()) == 1, command
    kept = [path.read_bytes() for path in home.root.rglob("*") if path.is_file()]
    assert not any(PASSWORD.encode() in content for content in kept)


def test_no_process_and_no_row_has_the_password(
    home: Home, postgres: PostgresServer, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `ps` shows them, and the server its sessions."""
    monkeypatch.setenv("TINK_DATABASE_URL", home.database_url)
    with open_recording(home) as recording:
        assert recording.journal.exec_driver_sql("SELECT 1").scalar() == 1
        lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
        assert not any(PASSWORD.encode() in line for line in lines)
        assert PASSWORD not in str(postgres.execute("SELECT * FROM pg_stat_activity"))
    assert PASSWORD not in repr(home)
    assert PASSWORD not in postgres.output()
