"""J1, J5: a process that writes the journal is killed at random times. What it was told is there, whole,
and the next one opens it and goes on."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.unit.journal import journal_kit
from tests.unit.journal.journal_kit import new_home, opened
from tink.home import Home
from tink.journal import chain, store
from tink.journal.reader import open_journal
from tink.limits import SHORT_BODY
from tink.world import World

KILLS = 15

# Ten clients append pairs, and jobs with short and long bodies, as fast as they can, and say on standard
# output what they were told.
WRITER = """
import os, sys, trio
from pathlib import Path
from tests.crash.test_journal import body
from tink.domain.events import JobAccepted, SessionCreated, Subject
from tink.home import Home
from tink.journal.journal import Journal
from tink.world import World

async def client(journal, who):
    number = 0
    while True:
        number += 1
        name = f"{journal.incarnation}-{who}-{number}"
        digest = await journal.bodies.put(body(name))
        pair = [(Subject(tenant="t", session_id=f"{name}-{half}"), SessionCreated()) for half in "ab"]
        job = Subject(tenant="t", session_id=f"{name}-a", job_id=name)
        await journal.append(*pair, (job, JobAccepted(op="sample", seq_id=number, body_sha256=digest)))
        os.write(1, f"{name} {digest}\\n".encode())

async def main():
    home = Home(Path(sys.argv[1]), sys.argv[2])
    with home.lock():
        async with Journal.open(home, World(), version="0", settings_digest="0") as journal:
            os.write(1, b"open\\n")
            async with trio.open_nursery() as nursery:
                for who in range(10):
                    nursery.start_soon(client, journal, who)
trio.run(main)
"""


def body(name: str) -> bytes:
    """Every other one is long."""
    return name.encode() * (50 if name[-1] in "02468" else SHORT_BODY // 4)


@pytest.fixture(params=["sqlite", "postgresql"], autouse=True)
def _on_each_database(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "sqlite":
        yield
        return
    with journal_kit.on_postgres(request.getfixturevalue("postgres")):
        yield


def _life(home: Home, seconds: float) -> list[tuple[str, str]]:
    """Runs a writer, kills it `seconds` after it has opened, and says what it was told."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(home.root), home.database_url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"open\n", process.stderr.read().decode()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
        told = process.stdout.read().decode()
        assert process.wait() == -9, process.stderr.read().decode()
    whole = told[: told.rfind("\n") + 1].splitlines()
    return [(line.split()[0], line.split()[1]) for line in whole]


@pytest.mark.slow
def test_no_kill_loses_what_was_acknowledged_or_tears_a_batch(tmp_path: Path) -> None:
    home = new_home(tmp_path)
    rng = random.Random(7)
    told: list[tuple[str, str]] = []
    for _ in range(KILLS):
        told += _life(home, rng.uniform(0.005, 0.15))
    assert len(told) > 100, "too little was written to show anything"

    with open_journal(home) as connection:
        if connection.dialect.name == "sqlite":
            assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
        assert store.check(connection) == []
        assert list(chain.breaks(connection)) == []
        stored = store.read_tables(connection)
        last = store.last_seq(connection)
        events = sum(1 for _ in store.read_events(connection))
    assert events == last
    sessions = {key[0] for key in stored.sessions}
    assert {f"{name}-{half}" for name, _ in told for half in "ab"} <= sessions
    assert {name[:-1] for name in sessions if name.endswith("a")} == {
        name[:-1] for name in sessions if name.endswith("b")
    }
    lives = stored.incarnations
    assert sorted(key[0] for key in lives) == list(range(1, KILLS + 1))
    assert {row.stop_reason for row in lives.values()} == {None}

    async def read_all() -> None:
        async with opened(home, World()) as journal:
            assert journal.incarnation == KILLS + 1
            for name, digest in told:
                assert await journal.bodies.get(digest) == body(name)

    assert {len(body(name)) > SHORT_BODY for name, _ in told} == {True, False}

    trio.run(read_all)


@pytest.mark.slow
def test_a_kill_during_the_very_first_start_leaves_a_home_that_starts(tmp_path: Path) -> None:
    """The migrations make the tables in one transaction each."""
    rng = random.Random(11)
    script = (
        "import sys; from pathlib import Path; from tink.home import Home\n"
        "from tink.journal.journal import prepare; print('go', flush=True)\n"
        "prepare(Home(Path(sys.argv[1]), sys.argv[2]))"
    )
    for number in range(4):
        home = new_home(tmp_path / str(number), empty=True)
        with subprocess.Popen(
            [sys.executable, "-c", script, str(home.root), home.database_url], stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            try:
                process.wait(rng.uniform(0.01, 0.2))
            except subprocess.TimeoutExpired:
                process.kill()

        async def start(home: Home = home) -> None:
            async with opened(home, World()):
                pass

        trio.run(start)
