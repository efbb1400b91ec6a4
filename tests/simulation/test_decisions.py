"""`tink replay decisions`: what was decided is decided again by the same code, whatever happened; and where
the code has changed, that is found, and nothing else."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

import msgspec
import pytest

from tests.postgres import PostgresServer
from tests.simulation import golden
from tests.simulation.chaos import quiet, simulate
from tests.simulation.program import program
from tink.actors import pool
from tink.actors.megatron import MegatronActor
from tink.actors.router import Router
from tink.actors.vllm import VLLMActor
from tink.cli.main import main
from tink.domain import events, ids, plans, requests, sampling
from tink.domain.lane import Lane
from tink.errors import UserError
from tink.home import Home
from tink.journal.moves import move
from tink.journal.recording import open_recording
from tink.replay.decisions.comparison import Difference
from tink.replay.decisions.history import look
from tink.replay.decisions.replay import Report, replay
from tink.replay.decisions.treatment import TREATMENTS
from tink.world import World

VERSIONS = sorted(path.parent for path in golden.GOLDEN.glob("*/*/journal.sqlite.zst"))
NEWEST = {part: [path for path in VERSIONS if path.name == part][-1] for part in golden.PARTS}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    quiet()


def _replay(home: Home) -> Report:
    with open_recording(home) as recording:
        return replay(recording, look(recording))


@contextmanager
def _untold(_name: str, _total: int) -> Iterator[Callable[[int], None]]:
    yield lambda _: None


KEPT = [(path, place) for path in VERSIONS for place in ("sqlite", "postgresql")]


@pytest.fixture(
    scope="module", params=KEPT, ids=lambda kept: f"{kept[0].parent.name}-{kept[0].name}-{kept[1]}"
)
def kept(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Home, Any]]:
    """Each golden journal, in files and as `tink db move` takes it to a server, and what was sent."""
    path, place = request.param
    home = Home(tmp_path_factory.mktemp("golden") / "home")
    sent = golden.read(path, home)
    if place == "sqlite":
        yield home, sent
        return
    server: PostgresServer = request.getfixturevalue("postgres")
    there = Home(home.root, server.create_database())
    move(home, there, World(), _untold)
    yield there, sent
    server.drop_database(there.database_url)


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Home]:
    """The golden journals of the newest version. Not to be changed."""
    made = {}
    for part, path in NEWEST.items():
        made[part] = Home(tmp_path_factory.mktemp(part) / "home")
        golden.read(path, made[part])
    return made


def test_every_golden_journal_is_decided_as_it_was(kept: tuple[Home, Any]) -> None:
    report = _replay(kept[0])
    assert report.differences == []
    assert report.compared > 50
    assert (report.skipped, report.lost_jobs) == (0, 0)


def test_what_is_sent_to_servers_is_what_was_sent(kept: tuple[Home, Any]) -> None:
    home, sent = kept
    now = golden.sent_of(home)
    assert {job: now.get(job) for job in sent} == sent


def test_the_golden_journals_have_every_kind_of_job_and_of_event_that_is_replayed(
    homes: dict[str, Home],
) -> None:
    kinds, ops = set(), set()
    for home in homes.values():
        with open_recording(home) as recording:
            for record in recording.records():
                kinds.add(type(record.event))
                if isinstance(record.event, events.JobAccepted):
                    ops.add(record.event.op)
    assert ops == set(get_args(requests.OpName))
    assert set(get_args(events.AnyEvent)) - kinds <= {
        *(events.BodiesPruned, events.CheckpointForked, events.Diverged),  # left out
        events.IncarnationStopped,  # left out; the simulation only crashes
    }


def test_every_kind_of_event_has_its_treatment_and_a_reason() -> None:
    assert set(TREATMENTS) == set(get_args(events.AnyEvent))
    assert all(reason for _, reason in TREATMENTS.values())


@pytest.mark.parametrize(
    "seed", [17, 53, 105]
)  # crashes, pruned bodies, a clock that is set back, late numbers
def test_whatever_happened_to_a_worker_its_decisions_are_the_same(seed: int, tmp_path: Path) -> None:
    what = program(seed)
    with patch.object(pool, "VLLMActor", partial(VLLMActor, registered=what.registered)):
        simulate(tmp_path / "home", seed, what, disturbed=True)
    report = _replay(Home(tmp_path / "home"))
    assert report.differences == []
    assert report.compared > 0


# -- it bites ---------------------------------------------------------------------------------------


def _changed(
    monkeypatch: pytest.MonkeyPatch, home: Home, place: Any, name: str, value: Any
) -> list[Difference]:
    monkeypatch.setattr(place, name, value)
    return _replay(home).differences


def test_a_limit_that_is_lowered_is_found_where_it_refuses(
    monkeypatch: pytest.MonkeyPatch, homes: dict[str, Home]
) -> None:
    ttl, late, changed = _changed(monkeypatch, homes["trainer"], plans, "LONGEST_TTL", 59)
    assert ttl.recorded.startswith("job_started")
    assert 'error="ttl_seconds 60 cannot be used: 1 to 59 can"' in ttl.today
    # The other one was refused then, too: in other words.
    assert (late.kind, "315360000" in late.recorded, "1 to 59" in late.today) == ("job_failed", True, True)
    # The limit is the same one where a checkpoint's time is changed.
    assert changed.recorded == "checkpoint_changed"
    assert "ttl_seconds 1000000 cannot be used: 1 to 59 can" in changed.today


def test_a_check_that_is_gone_is_found_where_it_refused(
    monkeypatch: pytest.MonkeyPatch, homes: dict[str, Home]
) -> None:
    (found,) = _changed(monkeypatch, homes["trainer"], sampling, "MAX_TOPK", 100_000)
    assert (found.kind, found.today) == ("job_failed", "it is sent to a server")
    assert "topk_sample_logprobs 10000" in found.recorded


def test_another_number_of_an_adapter_version_is_found(
    monkeypatch: pytest.MonkeyPatch, homes: dict[str, Home]
) -> None:
    exported = plans.exported

    def wrong(*arguments: Any) -> Any:
        adapter = exported(*arguments)
        if adapter is None or adapter.version == 0:
            return adapter
        version = adapter.version + 1
        adapter_id = ids.adapter_id(adapter.model_id, version)
        return msgspec.structs.replace(adapter, version=version, adapter_id=adapter_id)

    found = _changed(monkeypatch, homes["vllm"], plans, "exported", wrong)
    numbers = [one for one in found if one.kind == "adapter_exported"]
    # Each of the two versions: what was journaled, and what is instead of it.
    assert len(numbers) == 4
    assert {one.subject.rpartition(":")[2] for one in found} == {"3", "4"}


def test_another_answer_is_found(monkeypatch: pytest.MonkeyPatch, homes: dict[str, Home]) -> None:
    removed = plans._removed
    monkeypatch.setattr(plans, "_removed", lambda job, ledger: removed(job, ledger)[:0])
    found = _replay(homes["vllm"]).differences
    assert [(one.recorded, one.today) for one in found] == [("model_removed", "nothing")]


def test_another_order_of_jobs_is_found(monkeypatch: pytest.MonkeyPatch, homes: dict[str, Home]) -> None:
    def skip_nothing(lane: Lane) -> tuple[int, int] | None:
        return None

    found = _changed(monkeypatch, homes["trainer"], Lane, "gap", skip_nothing)
    assert (found[0].kind, found[0].today) == ("seq_skipped", "nothing")


def test_another_number_of_a_job_that_came_without_one_is_found(
    monkeypatch: pytest.MonkeyPatch, homes: dict[str, Home]
) -> None:
    end = Lane.end
    found = _changed(monkeypatch, homes["vllm"], Lane, "end", lambda lane: end(lane) + 1)
    (unload,) = found
    assert unload.kind == "job_accepted"
    assert '"seq_id"' not in unload.recorded
    assert ("seq_id=7" in unload.recorded, "seq_id=8" in unload.today) == (True, True)


def test_another_op_no_is_found(monkeypatch: pytest.MonkeyPatch, homes: dict[str, Home]) -> None:
    begin = MegatronActor._begin_attempt

    async def wrong(self: MegatronActor, job: Any, op_no: int, plan: Any) -> None:
        await begin(self, job, op_no + (job.op == "load_weights" and job.seq_id != 0), plan)

    (found,) = _changed(monkeypatch, homes["trainer"], MegatronActor, "_begin_attempt", wrong)
    recorded, today = (
        int(text.removeprefix("job_started op_no=")) for text in (found.recorded, found.today)
    )
    assert today == recorded + 1


def test_a_request_that_is_not_accepted_any_more_is_found_and_those_behind_it_go_on(
    monkeypatch: pytest.MonkeyPatch, homes: dict[str, Home]
) -> None:
    submit = Router._submit_training

    def wrong(self: Router, ask: Any) -> Any:
        if ask.op == "save_weights_external":
            raise UserError("no longer")
        return submit(self, ask)

    found = _changed(monkeypatch, homes["trainer"], Router, "_submit_training", wrong)
    assert [(one.kind, one.today) for one in found] == [("job_accepted", "refused: no longer")] * 2


def test_a_seed_that_is_drawn_though_its_client_named_one_is_found(
    monkeypatch: pytest.MonkeyPatch, homes: dict[str, Home]
) -> None:
    submit: Callable[..., Any] = Router._submit_sample_as

    def wrong(self: Router, ask: Any, seq: int, key: str | None = None) -> Any:
        return submit(self, msgspec.structs.replace(ask, seed=None), seq, key)

    found = _changed(monkeypatch, homes["trainer"], Router, "_submit_sample_as", wrong)
    assert [(one.kind, one.recorded, one.today) for one in found] == [
        ("job_accepted", "job_accepted seed=3", "job_accepted seed=4")
    ] * 2


def test_a_bug_in_an_answer_is_a_difference_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, homes: dict[str, Home]
) -> None:
    def broken(*_arguments: Any) -> Any:
        raise ZeroDivisionError("a bug")

    found = _changed(monkeypatch, homes["trainer"], ids, "sequence_ids", broken)
    assert {one.today for one in found} == {"internal error: ZeroDivisionError('a bug')"}


def test_another_default_is_found_in_what_is_sent(
    monkeypatch: pytest.MonkeyPatch, homes: dict[str, Home]
) -> None:
    """No journal holds it: its golden journal has it beside."""
    before = golden.sent_of(homes["trainer"])

    class Adam(requests.AdamParams, frozen=True):
        beta2: float = 0.999

    monkeypatch.setattr(requests, "AdamParams", Adam)
    now = golden.sent_of(homes["trainer"])
    others = {job: sent for job, sent in now.items() if sent != before[job]}
    assert others
    assert {(sent[0]["type"], sent[0]["beta2"]) for sent in others.values()} == {("optim_step", 0.999)}


def test_samples_whose_requests_were_pruned_are_left_out_and_counted(
    homes: dict[str, Home], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(homes["vllm"].root, tmp_path / "home")
    home = Home(tmp_path / "home")
    with closing(sqlite3.connect(home.journal)) as journal, closing(sqlite3.connect(home.bodies)) as bodies:
        samples = journal.execute("SELECT job_id, body_sha256 FROM jobs WHERE op = 'sample'").fetchall()
        for connection, table in ((journal, "short_bodies"), (bodies, "bodies")):
            statement = f"DELETE FROM {table} WHERE sha256 = ?"
            connection.executemany(statement, [digest for _, *digest in samples])
            connection.commit()
    report = _replay(home)
    assert (report.differences, report.lost_jobs) == ([], len(samples))
    assert report.skipped >= 3 * len(samples) - 2  # accepted, started and done; two were refused
    assert main(["replay", "decisions", "--home", str(home.root)]) == 0
    said = capsys.readouterr().err
    assert f"{len(samples)} of" in said
    assert "cannot be replayed" in said


def test_the_journal_is_not_touched(homes: dict[str, Home]) -> None:
    def content() -> list[bytes]:
        return [path.read_bytes() for path in (homes["trainer"].journal, homes["trainer"].bodies)]

    before = content()
    _replay(homes["trainer"])
    assert content() == before


# -- the command ------------------------------------------------------------------------------------


def test_the_command_says_what_it_found_and_its_status_tells(
    monkeypatch: pytest.MonkeyPatch, homes: dict[str, Home], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["replay", "decisions", "--home", str(homes["trainer"].root)]
    assert main(command) == 0
    assert "all would be decided as they were" in capsys.readouterr().out
    monkeypatch.setattr(sampling, "MAX_TOPK", 100_000)
    assert main(command) == 1
    out, err = capsys.readouterr()
    assert "it is sent to a server" in out
    assert "1 would be decided otherwise" in out
    assert main([*command, "--format", "json"]) == 1
    (found,) = json.loads(capsys.readouterr().out)["differences"]
    assert (found["kind"], found["today"], err) == ("job_failed", "it is sent to a server", "")
