"""The recipes of docs/operations.md, word for word: a journal that is moved, or backed up while a
client trains and restored, is the same journal, or a prefix of it."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import postgres as postgres_kit
from tests.crash.runs import Run, sft
from tests.live import LiveServer
from tests.postgres import PostgresServer
from tink.home import Home
from tink.journal import chain, store
from tink.journal.database import database
from tink.journal.reader import open_snapshot
from tools.ports import free_port

pytestmark = [
    pytest.mark.slow,
    # The SDK leaves sockets to the garbage collector when its server ends.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

PAGE = (Path(__file__).resolve().parents[2] / "docs/operations.md").read_text()
RECIPES = dict(re.findall(r"<!-- run: (.*?) -->\n```sh\n(.*?)```", PAGE, re.DOTALL))
PATIENCE_SECONDS = 120.0


def wait(done: Callable[[], object], what: str) -> None:
    """Another process gives no event to wait for, so this looks, and again."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not done():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def do(*names: str, **environment: str) -> str:
    """Runs recipes of the page in one shell; what they print."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", "\n".join(RECIPES[name] for name in names)],
        env={**os.environ, "PATH": path, "COLUMNS": "200", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == 0, f"{names}: {done.stdout}\n{done.stderr}"
    return done.stdout


def events(home: Home) -> list[dict[str, Any]]:
    with open_snapshot(database(home, "journal")) as connection:
        return list(store.raw_events(connection))


def trains(server: LiveServer) -> Run:
    run = Run("sft", sft, 3)
    run.start(server.url)
    more_steps(run)
    return run


def more_steps(run: Run) -> None:
    made = run.made
    wait(lambda: run.error is not None or run.made >= made + 6, "the client trains")
    assert run.error is None


def ends(run: Run) -> None:
    run.enough.set()
    wait(lambda: run.ended, "the run ends")
    assert run.error is None


@contextlib.contextmanager
def serving(home: Path, **environment: str) -> Iterator[LiveServer]:
    server = LiveServer(home, **environment)
    try:
        server.start()
        yield server
    finally:
        server.close()


# -- a server with an archive -----------------------------------------------------------------------


def owner() -> tuple[int, int]:
    """Whom a server of tests/postgres.py runs as."""
    nobody = pwd.getpwnam("nobody")
    return (nobody.pw_uid, nobody.pw_gid) if os.geteuid() == 0 else (os.geteuid(), os.getegid())


class Restored:
    """Where a second server will be, with the tools of PostgreSQL as its user runs them."""

    def __init__(self, folder: Path, server: PostgresServer) -> None:
        self.data, self.port = folder / "restored", free_port()
        self.archive, self.backup, self.tools = folder / "archive", folder / "backup", folder / "bin"
        self.tools.mkdir()
        self._server = server
        user, group = map(str, owner())
        root = os.geteuid() == 0
        prefix = ["setpriv", "--reuid", user, "--regid", group, "--clear-groups"] if root else []
        for tool in ("pg_dump", "pg_restore", "createdb", "psql", "pg_basebackup", "pg_ctl"):
            words = shlex.join([*prefix, str(PostgresServer.bin(tool))])
            path = self.tools / tool
            path.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
            path.chmod(0o755)

    def environment(self, url: str) -> dict[str, str]:
        name = url.rpartition("/")[2]
        return {
            **{key: text for key, text in self._server.environment(name).items() if key.startswith("PG")},
            "PATH": f"{self.tools}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "TINK_DATABASE_URL": url,
            "BACKUP": str(self.backup),
            "ARCHIVE": str(self.archive),
            "RESTORED_DATA": str(self.data),
            "RESTORED_PORT": str(self.port),
        }

    def close(self) -> None:
        if (self.data / "postmaster.pid").exists():
            stop = [str(self.tools / "pg_ctl"), "--pgdata", str(self.data), "--mode=immediate", "stop"]
            subprocess.run(stop, check=True, stdout=subprocess.DEVNULL, env={"PATH": os.environ["PATH"]})


@pytest.fixture(scope="module")
def archiving() -> Iterator[tuple[PostgresServer, Restored]]:
    """A server of its own, because it archives."""
    with postgres_kit.scratch() as folder:
        for made in (folder, folder / "archive", folder / "backup"):
            made.mkdir(exist_ok=True)
            os.chown(made, *owner())
        command = f"test ! -f {folder}/archive/%f && cp %p {folder}/archive/%f"
        options = {"archive_mode": "on", "archive_command": command}
        with postgres_kit.running(folder / "data", options=options) as server:
            restored = Restored(folder, server)
            try:
                yield server, restored
            finally:
                restored.close()


# -- the recipes ------------------------------------------------------------------------------------


def test_every_recipe_of_the_page_is_run_here() -> None:
    text = Path(__file__).read_text()
    assert len(RECIPES) == 8
    assert all(f'"{name}"' in text for name in RECIPES)
    assert len(re.findall("^```sh", PAGE, re.MULTILINE)) == len(RECIPES)


def test_files_are_backed_up_while_a_client_trains_and_restored(tmp_path: Path) -> None:
    home, backup, restored = tmp_path / "home", tmp_path / "backup", tmp_path / "restored"
    backup.mkdir()
    with serving(home) as server:
        run = trains(server)
        places = {"TINK_HOME": str(home), "BACKUP": str(backup), "RESTORED": str(restored)}
        told = do("back up files", **places)
        more_steps(run)
        ends(run)
    assert "all is well" in do("restore files", **places)
    before, after = events(Home(restored)), events(Home(home))
    assert 10 < len(before) < len(after)
    assert before == after[: len(before)]
    head = chain.Head.parse(re.findall(r"head +(\S+)", told)[0])
    assert head == (before[-1]["seq"], before[-1]["hash"])

    with serving(restored) as server:
        ends(trains(server))


def test_a_journal_is_moved_between_two_lives_of_a_worker(tmp_path: Path, postgres_url: str) -> None:
    home = Home(tmp_path / "home")
    there = Home(home.root, postgres_url)
    with serving(home.root) as server:
        ends(trains(server))
    before = events(home)
    told = do("move", TINK_HOME=str(home.root), TINK_DATABASE_URL=postgres_url)
    assert "all is well" in told
    assert events(there) == before
    with serving(home.root, TINK_DATABASE_URL=postgres_url) as server:
        ends(trains(server))
    longer = events(there)
    assert longer[: len(before)] == before
    assert "all is well" in do("move back", TINK_HOME=str(home.root), TINK_DATABASE_URL=postgres_url)
    assert events(home) == longer
    with serving(home.root) as server:
        ends(trains(server))


def test_a_server_is_dumped_while_a_client_trains_and_restored(
    tmp_path: Path, archiving: tuple[PostgresServer, Restored]
) -> None:
    server, tools = archiving
    url, home, restored = server.create_database(), tmp_path / "home", tmp_path / "restored"
    environment = {**tools.environment(url), "TINK_HOME": str(home), "RESTORED": str(restored)}
    with serving(home, TINK_DATABASE_URL=url) as worker:
        run = trains(worker)
        do("back up a server", **environment)
        more_steps(run)
        ends(run)
    assert "all is well" in do("restore a server", **environment)
    there = Home(restored, f"{url.rpartition('/')[0]}/tink_restored")
    before, after = events(there), events(Home(home, url))
    assert 10 < len(before) < len(after)
    assert before == after[: len(before)]
    assert any((restored / "artifacts").iterdir())
    with serving(restored, TINK_DATABASE_URL=there.database_url) as worker:
        ends(trains(worker))


def test_a_server_comes_back_as_it_was_at_a_moment(
    tmp_path: Path, archiving: tuple[PostgresServer, Restored]
) -> None:
    server, tools = archiving
    url, home = server.create_database(), tmp_path / "home"
    environment = {**tools.environment(url), "TINK_HOME": str(home), "RESTORED": str(tmp_path / "restored")}
    with serving(home, TINK_DATABASE_URL=url) as worker:
        run = trains(worker)
        do("base backup", **environment)  # while it is written to
        more_steps(run)
        ends(run)
        then = events(Home(home, url))
        ((moment,),) = server.execute("SELECT clock_timestamp()::text")
        ends(trains(worker))
    server.execute(
        "DELETE FROM steps; DROP VIEW v_steps", url.rpartition("/")[2]
    )  # what he should not have
    assert "all is well" in do("restore to a moment", MOMENT=moment, **environment)
    there = url.replace(str(server.port), str(tools.port))
    assert events(Home(tmp_path / "restored", there)) == then
    assert len(events(Home(home, url))) > len(then)
