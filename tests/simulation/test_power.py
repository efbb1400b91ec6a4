"""A power cut at any moment: what Tink names is whole, and what it does not name is in nobody's way."""

from __future__ import annotations

import json
import random
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from itertools import count, pairwise
from pathlib import Path

import pytest
import trio
from sqlalchemy import Engine, Pool, event

from tests.simulation import vfs
from tests.simulation.disk import Disk, Killed
from tests.simulation.power import Image, Storage, torn
from tests.unit.journal.journal_kit import new_home, opened
from tink.errors import NotFound
from tink.home import SECRET_BYTES, Home
from tink.journal.journal import prepare
from tink.pretrained import built_in
from tink.trainer import tiny
from tink.trainer.artifacts import Artifacts
from tink.world import World

_LIVES = count()
FILES = {"weights": b"w" * 1000, "book": b"b" * 100}


def _fill(folder: Path) -> None:
    for name, content in FILES.items():
        (folder / name).write_bytes(content)


def _publish(root: Path) -> None:
    life = next(_LIVES)
    Artifacts(root / "artifacts", f"life-{life}").publish("session/0/save", "job", {}, _fill)


def _is_whole(root: Path) -> bool:
    """False: it is not there at all. Anything between raises."""
    try:
        folder, _ = Artifacts(root / "artifacts", "reader").open("session/0/save")
    except NotFound:
        return False
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    return True


def _home(root: Path) -> None:
    Home(root / "deep" / "home").make()


def _secret(root: Path) -> bytes:
    return Home(root).load_secret()


def _build(out: Path) -> None:
    with tiny._published(out) as folder:
        _fill(folder)


def _model(root: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "build", _build)
        return tiny.ensure(root)


def _model_is_whole(root: Path) -> bool:
    folder = built_in(root)
    if not folder.is_dir():
        return False
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    return True


SCENARIOS: dict[str, tuple[Callable[[Path], object], Callable[[Path], bool]]] = {
    "artifact": (_publish, _is_whole),
    "secret": (_secret, lambda root: (root / "secret").exists() and len(_secret(root)) == SECRET_BYTES),
    "home": (_home, lambda root: (root / "deep" / "home" / "logs").is_dir()),
    "built-in model": (_model, _model_is_whole),
}


@pytest.fixture
def rng() -> random.Random:
    return random.Random(7)


@pytest.mark.parametrize("name", SCENARIOS)
def test_what_is_being_published_is_whole_or_absent_and_then_it_is_there(
    tmp_path: Path, rng: random.Random, name: str
) -> None:
    act, is_whole = SCENARIOS[name]
    root = tmp_path / "root"
    root.mkdir()
    disk = Disk(root)
    with disk.recorded():
        act(root)
    for left in disk.cuts(rng, tmp_path / "any"):
        is_whole(left)
        act(left)  # the next life does it again
        assert is_whole(left)
    for left in disk.cuts(rng, tmp_path / "last", last_only=True):
        assert is_whole(left)


@pytest.mark.parametrize("name", SCENARIOS)
def test_who_was_killed_at_it_leaves_the_next_one_to_finish_it(
    tmp_path: Path, rng: random.Random, name: str
) -> None:
    """A kill, another try, and only then the power cut: what the first one did not sync the second does."""
    act, is_whole = SCENARIOS[name]
    for kill_at in range(100):
        root = tmp_path / str(kill_at)
        root.mkdir()
        disk = Disk(root)
        try:
            with disk.recorded(kill_at=kill_at):
                act(root)
        except Killed:
            pass
        else:
            assert kill_at >= 3, "there was something to kill"
            return
        with disk.recorded():
            act(root)  # the next life's
        for left in disk.cuts(rng, tmp_path / f"cuts-{kill_at}", last_only=True):
            assert is_whole(left)
    pytest.fail("it has no end")


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_sync_is_needed(tmp_path: Path, rng: random.Random, name: str) -> None:
    """So the model of the disk would find one that is missing."""
    act, is_whole = SCENARIOS[name]

    def holds(without: int) -> bool:
        root = tmp_path / f"without-{without}"
        root.mkdir()
        disk = Disk(root)
        with disk.recorded(without_sync=without):
            act(root)
        for left in disk.cuts(rng, tmp_path / f"cuts-{without}", last_only=True):
            try:
                if not is_whole(left):
                    return False
            except Exception:
                return False
        return True

    root = tmp_path / "all"
    root.mkdir()
    disk = Disk(root)
    with disk.recorded():
        act(root)
    assert disk.syncs > 1
    assert [number for number in range(disk.syncs) if holds(number)] == []


# -- databases --------------------------------------------------------------------------------------


def test_sqlite_syncs_as_the_model_says(tmp_path: Path) -> None:
    """FULL at each commit, NORMAL around a checkpoint only, OFF never."""
    command = [sys.executable, "-m", "tests.simulation.vfs", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode == vfs.NO_LIBRARY:
        pytest.skip("this interpreter has SQLite built in")
    assert done.returncode == 0, done.stderr.decode()
    for level, steps in json.loads(done.stdout).items():
        wal, database = f"{level}.db-wal", f"{level}.db"
        commit, checkpoint = (_runs(steps[name]) for name in ("commit", "checkpoint"))
        assert commit == [("write", wal)] + [("sync", wal)] * (level == "FULL")
        if level == "OFF":
            assert checkpoint == [("write", database)]
        else:
            assert checkpoint == [("sync", wal), ("write", database), ("sync", database)]


def _runs(calls: list[list[str]]) -> list[tuple[str, ...]]:
    """Without the repetitions."""
    return [tuple(call) for call, before in zip(calls, [None, *calls], strict=False) if call != before]


@pytest.mark.parametrize("level", ["OFF", "NORMAL", "FULL"])
def test_a_commit_that_is_cut_is_there_or_not_and_with_full_those_before_it_are(
    tmp_path: Path, rng: random.Random, level: str
) -> None:
    path, lost = tmp_path / "some.db", 0
    for _ in range(60):
        storage = Storage(path)
        connection = sqlite3.connect(path, isolation_level=None)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute(f"PRAGMA synchronous={level}")
        connection.execute("PRAGMA wal_autocheckpoint=7")
        connection.execute("CREATE TABLE IF NOT EXISTS t (x)")
        storage.attach(connection)
        before = connection.execute("SELECT count(*) FROM t").fetchone()[0]
        for _ in range(rng.randint(0, 9)):
            connection.execute("INSERT INTO t VALUES (randomblob(?))", (rng.randint(10, 9000),))
            assert storage.committed()
            before += 1
        image = Image.read(path)
        connection.execute("INSERT INTO t VALUES (randomblob(5000))")
        left = storage.after_power_cut(rng, image)
        storage.detach()
        connection.close()
        storage.power_is_back(left)
        try:
            connection = sqlite3.connect(path)
            found = connection.execute("SELECT count(*) FROM t").fetchone()[0]
            whole = connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        except sqlite3.DatabaseError:
            whole = False
        connection.close()
        if not whole or not before <= found <= before + 1:
            lost += 1
            path.unlink()
            path.with_name(f"{path.name}-wal").unlink(missing_ok=True)
    assert (lost == 0) == (level == "FULL"), f"{lost} of 60 cuts lost something"


def test_a_cut_during_the_very_first_start_leaves_a_home_that_starts(
    tmp_path: Path, rng: random.Random
) -> None:
    """Before and after every statement of the migrations, and in the middle of their commits."""
    home = new_home(tmp_path / "made", empty=True)
    images: list[dict[str, Image]] = []

    def look(*_: object) -> None:
        images.append({path.name: Image.read(path) for path in (home.journal, home.bodies)})

    listened = [(Engine, "before_cursor_execute"), (Engine, "after_cursor_execute")]
    listened += [(Pool, "connect"), (Pool, "checkin"), (Pool, "close")]
    for target, name in listened:
        event.listen(target, name, look)
    try:
        prepare(home)
    finally:
        for target, name in listened:
            event.remove(target, name, look)
    look()
    distinct = [now for now, before in zip(images, [None, *images], strict=False) if now != before]
    assert len(distinct) > 4
    for number, (before, now) in enumerate(pairwise(distinct)):
        for turn in range(3):
            left = new_home(tmp_path / f"{number}-{turn}", empty=True)
            for path in (left.journal, left.bodies):
                _cut_between(rng, before[path.name], now[path.name]).write(path)

            async def start(home: Home = left) -> None:
                async with opened(home, World()) as journal:
                    assert journal.incarnation == 1

            trio.run(start)


def _cut_between(rng: random.Random, before: Image, now: Image) -> Image:
    if before.database == now.database:
        return Image(now.database, torn(rng, before.wal, now.wal))
    if not before.database:
        return rng.choice([before, now])  # not in WAL mode yet: its rollback journal makes it one step
    # A checkpoint, behind the sync of the -wal file.
    return Image(torn(rng, before.database, now.database), now.wal or before.wal)
