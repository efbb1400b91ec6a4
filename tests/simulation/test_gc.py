"""`tink gc` deletes what a pass of the worker does; its dry run tells exactly that, and changes nothing."""

from __future__ import annotations

import json
import math
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.simulation.chaos import SCRATCH, quiet
from tests.simulation.cluster import Cluster, stored_bodies
from tests.simulation.scenario import answers, batch, events, long_run, train
from tests.simulation.test_retention import Clock, load, sample, save
from tink.cli.main import main
from tink.domain import ids
from tink.home import Home
from tink.journal import queries
from tink.journal.recording import open_recording
from tink.replay.reach import Reach, reach, remains
from tink.world import World

DAY = 24 * 3600.0
# When `later` is. The homes were written on one day.
NOW = 1_700_000_000.0 + 10 * DAY
STEPS = 12


class Later(World):
    def now(self) -> float:
        return NOW


Tink = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tink.cli.gc.World", Later)


@pytest.fixture
def tink(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Tink:
    """Runs `tink gc` with these options and settings: (exit status, standard output, standard error)."""

    def run(home: Home, *options: str, **settings: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            for name, value in settings.items():
                patch.setenv(name, value)
            code = main(["gc", "--home", str(home.root), *options])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


SHORT = {"TINK_RETENTION_HOURS": "0"}


async def _live(folder: Path) -> None:
    """A worker that deletes nothing, until it is killed: a model that is covered by snapshots, one that is
    not, one that began with a state which has expired; and of each kind what may go."""
    async with Cluster.running(folder, snapshot_seconds=0.05, retention_hours=math.inf) as cluster:
        session = await cluster.session()
        covered, short = [await cluster.create(session, number) for number in range(2)]
        await long_run(cluster, covered, STEPS)
        await answers(cluster, await train(cluster, short, 1, 1))
        await save(cluster, covered, 2 * STEPS + 1, "save_weights", path="kept")
        expiring: dict[str, object] = {"path": "short", "ttl_seconds": int(DAY)}
        path = await save(cluster, covered, 2 * STEPS + 2, "save_weights", **expiring)
        await long_run(cluster, await load(cluster, session, 2, path), STEPS)
        unnamed = {"sampling_session_seq_id": 0}
        sampler = await save(cluster, covered, 2 * STEPS + 3, "save_weights_for_sampler", **unnamed)
        await sample(cluster, sampler, 0)
    for name in (f"{ids.model_directory(covered)}/00000001-snapshot", f"{ids.SCRATCH}/removed-0"):
        (folder / "artifacts" / name).mkdir(parents=True)
        (folder / "artifacts" / name / "file").write_bytes(b"left by a crash")
    with closing(sqlite3.connect(folder / "bodies.sqlite")) as connection, connection:
        left = "INSERT INTO bodies (sha256, size, stored_at, content) VALUES ('nobody', 3, 5.0, x'010203')"
        connection.execute(left)


@pytest.fixture(scope="module")
def lived() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        quiet()
        trio.run(_live, Path(folder) / "home", clock=MockClock(autojump_threshold=0))
        yield Path(folder) / "home"


@pytest.fixture
def home(lived: Path, tmp_path: Path) -> Home:
    """A copy of it for one test."""
    shutil.copytree(lived, tmp_path / "home")
    return Home(tmp_path / "home")


def _models(home: Home) -> list[str]:
    """The one that is covered, the short one, and the one that was loaded."""
    with closing(sqlite3.connect(home.journal)) as connection:
        return [row[0] for row in connection.execute("SELECT model_id FROM models ORDER BY model_id")]


def _files(home: Home) -> dict[str, bytes]:
    """All but what readers of SQLite's log share, and a log that is empty: they make these."""
    paths = [path for path in home.root.rglob("*") if path.is_file() and not path.name.endswith("-shm")]
    found = {str(path): path.read_bytes() for path in paths}
    return {name: content for name, content in found.items() if content or not name.endswith("-wal")}


def _disk(home: Home) -> dict[str, int]:
    """What there is, by name, with its size."""
    found = stored_bodies(home)
    files = [path for path in home.artifacts.rglob("*") if path.is_file()]
    return found | {str(path.relative_to(home.root)): path.stat().st_size for path in files}


def _reach(home: Home, model_id: str) -> Reach | None:
    with open_recording(home) as recording:
        model = queries.model(recording.journal, model_id)
        assert model is not None
        return reach(model, remains(recording, home.artifacts, model))


def _said(report: dict[str, Any]) -> dict[str, Any]:
    """All but whether it was done."""
    return {name: found for name, found in report.items() if name != "dry_run"}


# -- the dry run ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        SHORT,
        {},
        {"TINK_KEEP_REQUESTS_HOURS": "inf"},
        {"TINK_KEEP_RESULTS_HOURS": "inf"},
        {"TINK_KEEP_ADAPTERS_HOURS": "inf"},
    ],
)
def test_a_dry_run_tells_exactly_what_the_run_then_deletes(
    tink: Tink, home: Home, settings: dict[str, str]
) -> None:
    told = json.loads(tink(home, "--dry-run", "--json", **settings)[1])
    before = _disk(home)
    code, out, _ = tink(home, "--json", **settings)
    did = json.loads(out)
    assert code == 0
    assert (told["dry_run"], did["dry_run"]) == (True, False)
    assert _said(told) == _said(did)
    gone = {name: size for name, size in before.items() if name not in _disk(home)}
    amounts = [amount for amount in did["garbage"].values() if isinstance(amount, dict)]
    assert sum(amount["bytes"] for amount in amounts) == sum(gone.values()) > 0
    assert told["garbage"]["expired"] == [f"tinker://{_models(home)[0]}/weights/short"]
    again = json.loads(tink(home, "--dry-run", "--json", **settings)[1])["garbage"]
    assert all(not amount or not amount["count"] for amount in again.values())


def test_each_kind_is_counted(tink: Tink, home: Home) -> None:
    found = json.loads(tink(home, "--dry-run", "--json", **SHORT)[1])["garbage"]
    for kind in ("unnamed_bodies", "checkpoints", "unnamed_directories", "unfinished"):
        assert found[kind]["count"] == 1, kind
    assert found["unnamed_bodies"]["bytes"] == 3
    assert found["unnamed_directories"]["bytes"] == found["unfinished"]["bytes"] == len(b"left by a crash")
    assert found["adapters"]["count"] == len(found["given_up"]) == 1
    assert found["results"]["count"] > 10
    assert found["requests"]["count"] > 5
    assert found["snapshots"]["count"] == 0


def test_each_kind_has_its_own_time(tink: Tink, home: Home) -> None:
    def kinds(**settings: str) -> set[str]:
        found = json.loads(tink(home, "--dry-run", "--json", **settings)[1])["garbage"]
        return {name for name in ("requests", "results", "adapters") if found[name]["count"]}

    hours = {"TINK_KEEP_REQUESTS_HOURS": "0", "TINK_RETENTION_HOURS": "inf"}
    assert kinds(**hours) == {"requests"}
    assert kinds(TINK_RETENTION_HOURS="inf") == set()
    assert kinds(TINK_RETENTION_HOURS="inf", TINK_KEEP_RESULTS_HOURS="168") == {"results"}
    assert kinds(TINK_RETENTION_HOURS="inf", TINK_KEEP_ADAPTERS_HOURS="168") == {"adapters"}
    assert kinds(TINK_KEEP_REQUESTS_HOURS="241") == {"results", "adapters"}


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_dry_run_changes_not_a_byte(tink: Tink, home: Home, options: tuple[str, ...]) -> None:
    before = _files(home)
    assert tink(home, "--dry-run", *options, **SHORT)[0] == 0
    assert _files(home) == before


# -- replays ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "changed"), [(SHORT, [0, 2]), ({"TINK_RETENTION_HOURS": "inf"}, [2])])
def test_what_it_says_of_a_replay_is_what_there_is_before_and_after(
    tink: Tink, home: Home, settings: dict[str, str], changed: list[int]
) -> None:
    covered, short, loaded = _models(home)
    before = {model: _reach(home, model) for model in (covered, short, loaded)}
    told = json.loads(tink(home, "--dry-run", "--json", **settings)[1])["replays"]
    assert [one["model_id"] for one in told] == [_models(home)[number] for number in changed]
    tink(home, **settings)
    after = {model: _reach(home, model) for model in (covered, short, loaded)}
    assert after[short] == before[short]
    for one in told:
        was, now = before[one["model_id"]], after[one["model_id"]]
        assert was is not None
        assert now is not None
        assert (one["now"], one["then"], one["because"]) == (was.told, now.told, now.because)
        assert was.told == "from its start"
        assert now.told.startswith("from the snapshot behind operation ")
        assert now.told.endswith(f" of {STEPS})")


def test_without_its_snapshots_a_model_cannot_be_replayed_until_the_next_one(
    tink: Tink, home: Home
) -> None:
    covered = _models(home)[0]
    for snapshot in home.artifacts.rglob("*-snapshot"):
        shutil.rmtree(snapshot)
    _, out, _ = tink(home, "--dry-run", **SHORT)
    assert (
        f"{covered} can be replayed from its start now, and then not at all until its next snapshot" in out
    )


def test_it_says_what_a_replay_loses_before_it_is_lost(
    tink: Tink, home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []

    async def clean(*_: object) -> tuple[list[Any], bool]:
        said.append(capsys.readouterr().out)
        return [], True

    monkeypatch.setattr("tink.cli.gc._clean", clean)
    tink(home, **SHORT)
    assert f"{_models(home)[0]} can be replayed from its start now, and then from the snapshot" in said[0]


def test_an_export_says_first_what_a_replay_of_the_file_cannot_do(
    tink: Tink, home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tink(home, **SHORT)
    said = {}
    for number, model in enumerate(_models(home)):
        assert main(["export", model, str(tmp_path / f"{number}.tink"), "--home", str(home.root)]) == 0
        said[model] = capsys.readouterr().err
    covered, short, _ = _models(home)
    reached = _reach(home, covered)
    assert reached is not None
    expected = f"tink export: the training can be replayed {reached.told}: {reached.because}\n"
    assert (said[covered], said[short]) == (expected, "")


# -- the run ----------------------------------------------------------------------------------------


async def test_what_a_redo_needs_stays_and_it_gives_the_same_bits(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, lived: Path, tmp_path: Path, tink: Tink
) -> None:
    """The trainer has lost both models: all of them is made again of what is left."""
    shutil.copytree(lived, tmp_path / "kept")
    shutil.copytree(lived, tmp_path / "cleaned")
    code = await trio.to_thread.run_sync(lambda: tink(Home(tmp_path / "cleaned"), **SHORT)[0])
    assert code == 0
    found = []
    for folder in (tmp_path / "kept", tmp_path / "cleaned"):
        clock = Clock(monkeypatch)
        clock.jump(11 * DAY)
        async with Cluster.running(folder, retention_hours=math.inf) as cluster:
            covered, short, _ = _models(cluster.home)
            jobs = [await batch(cluster, covered, 2 * STEPS + 4), *await train(cluster, short, 3, 1)]
            found.append(await answers(cluster, jobs))
            assert events(cluster, "diverged") == []
            assert len(events(cluster, "redone")) == 2
            cluster.check_journal()
    assert found[0] == found[1]
    assert all(isinstance(answer, bytes | dict) for answer in found[0])


def test_the_journal_is_whole_afterwards(tink: Tink, home: Home) -> None:
    tink(home, **SHORT)
    assert main(["db", "check", "--home", str(home.root)]) == 0
    assert main(["journal", "verify", "--home", str(home.root)]) == 0
    assert main(["replay", "decisions", "--home", str(home.root)]) == 0


def test_where_a_worker_runs_the_run_is_refused_and_the_dry_run_answers(tink: Tink, home: Home) -> None:
    with home.lock():
        before = _files(home)
        code, out, err = tink(home, **SHORT)
        assert (code, out) == (2, "")
        assert err.startswith("tink gc: the worker runs and does it every hour")
        assert err.count("\n") == 1
        code, out, err = tink(home, "--dry-run", **SHORT)
        assert (code, err) == (0, "")
        assert "requests of jobs" in out
        assert _files(home) == before


def test_a_sampling_server_keeps_what_it_has_until_a_worker_takes_it_out(tink: Tink, home: Home) -> None:
    with closing(sqlite3.connect(home.journal)) as connection:
        rows = "SELECT adapter_id FROM adapters ORDER BY version DESC LIMIT 1"
        [(adapter,)] = connection.execute(rows)
        statement = (
            "INSERT INTO adapter_placements (adapter_id, replica, state, changed_at) VALUES (?, ?, ?, 0)"
        )
        connection.execute(statement, (adapter, "http://vllm:8000", "loaded"))
        connection.commit()
    found = json.loads(tink(home, "--dry-run", "--json", **SHORT)[1])
    assert adapter in found["garbage"]["given_up"]
    assert (found["garbage"]["adapters"]["count"], found["complete"]) == (0, False)
    assert "sampling servers may have it" in tink(home, "--dry-run", **SHORT)[1]


def test_a_run_with_nothing_to_do_says_so(tink: Tink, home: Home) -> None:
    tink(home, **SHORT)
    assert "nothing would go" in tink(home, "--dry-run", **SHORT)[1]
    code, out, _ = tink(home, **SHORT)
    assert code == 0
    assert "there was nothing to delete" in out
    assert "each model can be replayed then from where it can be now" in out


def test_a_setting_that_cannot_be_is_a_line(tink: Tink, home: Home) -> None:
    code, out, err = tink(home, TINK_KEEP_RESULTS_HOURS="-1")
    assert (code, out) == (2, "")
    assert err == "tink gc: TINK_KEEP_RESULTS_HOURS: -1.0 must be at least 0.0\n"
