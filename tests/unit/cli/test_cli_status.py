"""`tink status` says what runs, what waits and what happened last, and its exit status says how it is."""

from __future__ import annotations

import json
import time

import httpx
import pytest
import trio
from cli_home import (
    BEGAN,
    MODEL,
    SAMPLED,
    SECRET,
    SESSION,
    TRAINED,
    WAITING,
    StillWorld,
    files,
    journaled,
    write,
)  # fmt: skip

from tink.cli import printing
from tink.doctor import processes
from tink.domain.events import Diverged
from tink.home import Home
from tink.journal.database import database

WORKER = {
    "pid": 4242,
    "url": "http://127.0.0.1:8400",
    "version": "0.1.0",
    "mode": "training on HuggingFace",
}
TRAINER = {"pid": 4243, "port": 8401, "incarnation": "1ncarnat10n"}
HEALTH = {
    "protocol": "tink-train/1",
    "incarnation": "1ncarnat10n",
    "state": "ready",
    "running": [{"model_id": MODEL, "op_no": 3, "job_id": WAITING, "seconds": 1.5}],
}


@pytest.fixture
def runs(home, monkeypatch):
    """Lets a worker and its trainer run on the home; what they answer can be changed."""
    home.worker.write_text(json.dumps(WORKER))
    home.trainer.write_text(json.dumps(TRAINER))
    monkeypatch.setattr(processes, "alive", lambda pid, word: pid in (4242, 4243))
    answers = {"/healthz": httpx.Response(200, json={}), "/v1/health": httpx.Response(200, json=HEALTH)}
    monkeypatch.setattr(StillWorld, "answer", lambda request: answers[request.url.path])
    return answers


def test_a_stopped_worker_is_said_to_be_stopped_and_exits_3(home, tink, tink_json):
    code, document = tink_json("status", "--home", home.root)
    assert code == 3
    assert document["worker"]["state"] == "stopped"
    assert document["worker"]["stopped_at"] == BEGAN + 100
    assert document["trainer"]["state"] == "stopped"
    code, out, _ = tink("status", "--home", home.root)
    assert code == 3
    assert "stopped" in out


def test_a_worker_that_ended_without_its_last_event_is_said_to_have_crashed(tmp_path, tink, tink_json):
    home = Home(tmp_path / "home")
    write(home, crash=True)
    home.worker.write_text(json.dumps(WORKER))  # it could not take it away
    code, document = tink_json("status", "--home", home.root)
    assert (code, document["worker"]["state"]) == (3, "crashed")
    assert "goes on with it" in tink("status", "--home", home.root)[1]


def test_a_running_worker_is_described_and_exits_0(home, runs, tink, tink_json):
    code, document = tink_json("status", "--home", home.root)
    assert code == 0
    worker = document["worker"]
    assert {name: worker[name] for name in WORKER} == WORKER
    assert (worker["state"], worker["incarnation"], worker["uptime_seconds"]) == ("running", 1, 200.0)
    assert document["trainer"]["state"] == "ready"
    assert document["trainer"]["running"][0]["job_id"] == WAITING
    code, out, _ = tink("status", "--home", home.root)
    assert code == 0
    assert "http://127.0.0.1:8400" in out
    assert "up 3 min 20 s" in out
    assert f"runs {WAITING} for 1.5 s" in out


def test_vllm_servers_are_shown_and_one_that_is_awaited_exits_1(home, runs, tink, tink_json):
    servers = {"http://gpu-1:8000": "ready", "http://gpu-2:8000": "awaited: it is not healthy"}
    runs["/healthz"] = httpx.Response(200, json={"servers": {**servers, "trainer": "ready"}})
    code, document = tink_json("status", "--home", home.root)
    assert (code, document["worker"]["servers"]) == (1, {**servers, "trainer": "ready"})
    out = tink("status", "--home", home.root)[1]
    assert "ready, http://gpu-1:8000" in out
    assert "awaited, http://gpu-2:8000: it is not healthy" in out
    # Samples alone need no trainer.
    runs["/healthz"] = httpx.Response(200, json={"servers": {"http://gpu-1:8000": "ready"}})
    home.trainer.unlink()
    assert tink_json("status", "--home", home.root)[0] == 0


def test_a_training_server_of_somebody_elses_is_shown_as_the_worker_sees_it(home, runs, tink, tink_json):
    home.trainer.unlink()
    for said, code, shown in (
        ("awaited: it does not answer", 1, "awaited: it does not answer"),
        ("ready: a plain one, which only samples", 0, "ready: a plain one, which only samples"),
        ("ready", 0, "ready"),
    ):
        runs["/healthz"] = httpx.Response(200, json={"servers": {"trainer": said}})
        assert tink_json("status", "--home", home.root)[0] == code
        lines = tink("status", "--home", home.root)[1].splitlines()
        (line,) = [line for line in lines if line.startswith("trainer")]
        assert line.split(maxsplit=1)[1].strip() == shown


def test_a_worker_that_does_not_answer_exits_1(home, runs, tink, tink_json):
    runs["/healthz"] = httpx.Response(503)
    code, document = tink_json("status", "--home", home.root)
    assert (code, document["worker"]["state"]) == (1, "silent")


def test_a_worker_that_keeps_its_asker_waiting_is_left_after_a_while(home, runs, monkeypatch, tink_json):
    """A worker without a trainer answers no health until it has one."""

    async def wait(request):
        await trio.sleep_forever()

    monkeypatch.setattr(StillWorld, "answer", wait)
    monkeypatch.setattr(processes, "STATUS_SECONDS", 0.01)
    began = time.monotonic()
    code, document = tink_json("status", "--home", home.root)
    assert time.monotonic() - began < 3
    assert (code, document["worker"]["state"], document["trainer"]["state"]) == (1, "silent", "silent")


@pytest.mark.parametrize("state", ["broken", "silent"])
def test_a_worker_without_a_good_trainer_exits_1(home, runs, tink_json, state):
    answer = {**HEALTH, "state": "broken", "detail": "no such model"} if state == "broken" else "nonsense"
    runs["/v1/health"] = httpx.Response(200, json=answer)
    code, document = tink_json("status", "--home", home.root)
    assert (code, document["trainer"]["state"]) == (1, state)


def test_a_worker_that_holds_the_lock_and_does_not_listen_yet_is_starting(home, monkeypatch, tink_json):
    (home.root / "worker.lock").write_text("4242")
    monkeypatch.setattr(processes, "alive", lambda pid, word: pid == 4242)
    code, document = tink_json("status", "--home", home.root)
    assert (code, document["worker"]["state"], document["worker"]["pid"]) == (1, "starting", 4242)


def test_the_queue_is_counted_by_operation_and_state(home, tink, tink_json):
    queue = tink_json("status", "--home", home.root)[1]["queue"]
    assert queue == {
        "open": 2,
        "oldest_seconds": 170.0,
        "by_op": {"optim_step": {"accepted": 1}, "sample": {"running": 1}},
    }
    assert "2 open, the oldest for 2 min 50 s" in tink("status", "--home", home.root)[1]


def test_redone_results_that_differ_are_counted_and_shown(home, tink, tink_json):
    assert tink_json("status", "--home", home.root)[1]["diverged"] == 0
    assert "diverged" not in tink("status", "--home", home.root)[1]
    journaled(home, TRAINED, Diverged(op_no=2, detail="another loss"))
    assert tink_json("status", "--home", home.root)[1]["diverged"] == 1
    assert "1 redone result" in tink("status", "--home", home.root)[1]


def test_models_sessions_and_the_last_jobs_are_there(home, tink, tink_json):
    document = tink_json("status", "--home", home.root)[1]
    assert document["models"] == {"live": 1}
    assert document["last_models"][0]["model_id"] == MODEL
    assert document["last_models"][0]["op_no"] == 2
    assert document["sessions"] == {"open": 1}
    assert document["last_sessions"][0]["session_id"] == SESSION
    assert [job["job_id"] for job in document["last_jobs"][:2]] == [SAMPLED, WAITING]
    assert document["jobs"] == {"accepted": 1, "done": 2, "failed": 1, "running": 1}
    out = tink("status", "--home", home.root)[1]
    assert all(word in out for word in (MODEL, SESSION, SAMPLED, "2 done"))


def test_where_the_time_of_the_last_jobs_went_is_there(home, tink, tink_json):
    found = tink_json("status", "--home", home.root)[1]["stages"]
    assert found["training"]["jobs"] >= 1
    assert set(found["training"]) == {"jobs", "waited", "server", "worker", "idle"}
    assert "medians of the last" in tink("status", "--home", home.root)[1]


def test_the_disk_that_is_used_is_there(home, tink, tink_json):
    disk = tink_json("status", "--home", home.root)[1]["disk"]
    assert (disk["journal"], disk["bodies"]) == tuple(
        database(home, name).bytes() for name in ("journal", "bodies")
    )
    assert disk["bodies"] > 0
    assert (disk["checkpoints"], disk["adapters"], disk["snapshots"]) == (0, 1500, 0)
    assert "adapters 1.5 kB" in tink("status", "--home", home.root)[1]


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (123456, "123 kB"),
        (999950, "1000 kB"),
        (5 * 10**9, "5 GB"),
    ],
)
def test_a_size_has_three_digits_and_a_unit(count, shown):
    assert printing.size(count) == shown


def test_the_document_has_the_same_keys_whatever_runs(home, runs, tink_json):
    running = tink_json("status", "--home", home.root)[1]
    home.worker.unlink()
    home.trainer.unlink()
    stopped = tink_json("status", "--home", home.root)[1]
    keys = "home version worker trainer events diverged queue disk jobs models sessions"
    lists = ["last_models", "last_sessions", "last_jobs"]
    assert list(running) == list(stopped) == [*keys.split(), *lists, "stages"]
    assert list(running["worker"]) == list(stopped["worker"])
    assert list(running["trainer"]) == list(stopped["trainer"])


def test_status_changes_nothing_and_shows_no_prompt(home, tink):
    before = files(home.root)
    out = tink("status", "--home", home.root)[1] + tink("status", "--home", home.root, "--json")[1]
    assert files(home.root) == before
    assert SECRET not in out


def test_a_dead_process_and_one_of_another_program_are_not_alive(monkeypatch):
    monkeypatch.undo()
    assert not processes.alive(2**22 + 1, "tink")
    assert not processes.alive(1, "no program has such a command line")
