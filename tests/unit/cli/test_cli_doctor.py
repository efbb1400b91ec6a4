"""`tink doctor` finds what was broken on purpose, says what mends it, and exits accordingly."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import namedtuple
from dataclasses import fields
from importlib.util import find_spec

import httpx
import pytest
from cli_home import BEGAN, StillWorld

from tests.vllm.double import Adapter, Network, VllmDouble
from tink.cli import doctor
from tink.doctor import machine, processes
from tink.settings import Settings
from tink.world import World

URL = "http://127.0.0.1:8000"
INFO = {
    "protocol": "tink-train/1",
    "incarnation": "1ncarnat10n",
    "engine": "megatron",
    "versions": {},
    "base_model": "base",
    "base_path": None,
    "base_digest": "d1ge57",
    "arch": "Qwen3ForCausalLM",
    "parameters": 1,
    "vocab_size": 1024,
    "max_context": 512,
    "max_rank": 512,
    "losses": [],
    "capabilities": ["train", "sample"],
}
HEALTH = {"protocol": "tink-train/1", "incarnation": "1ncarnat10n", "state": "ready"}

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch):
    for field in fields(Settings):
        for name in field.metadata["names"]:
            monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TINK_PORT", "0")  # a free one
    monkeypatch.setattr(doctor, "World", StillWorld)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**12, 0, 10**12))


@pytest.fixture
def diagnosis(tink_json, home, monkeypatch):
    """Runs it: (exit status, (check, state) -> what was said)."""
    monkeypatch.setenv("TINK_DATABASE_URL", home.database_url)

    def run(*arguments):
        code, document = tink_json("doctor", "--home", home.root, *arguments)
        assert document["ok"] == (code == 0)
        found = {}
        for one in document["findings"]:
            found.setdefault((one["check"], one["state"]), f"{one['detail']} -> {one['remedy']}")
        return code, found

    return run


def test_where_all_is_well_every_check_is_ok_and_it_exits_0(tink, diagnosis, home):
    code, found = diagnosis()
    assert code == 0
    checks = [
        "settings",
        "engine",
        "home",
        "disk",
        "artifacts",
        "journal",
        "clock",
        "versions",
        "worker",
        "port",
    ]
    assert list(found) == [(check, "ok") for check in checks]
    code, out, err = tink("doctor", "--home", home.root)
    assert (code, err) == (0, "")
    assert out.rstrip().endswith("nothing is wrong")


def test_a_home_that_is_not_there_yet_is_no_fault_and_is_not_made(tink_json, tmp_path):
    code, _ = tink_json("doctor", "--home", tmp_path / "new" / "home")
    assert code == 0
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("variables", "check", "says"),
    [
        ({"TINK_PRT": "1"}, "settings", "TINK_PRT"),
        ({"MAX_WORKERS": "none"}, "settings", "MAX_WORKERS"),
        ({"TINK_HOST": "0.0.0.0"}, "settings", "TINK_API_KEYS"),
        ({"USE_HF": "false"}, "settings", "No valid sampling backend configured -> sample on vLLM"),
        ({"TINK_ARTIFACTS": "/proc/tink"}, "artifacts", "no file can be made in /proc"),
    ],
)
def test_a_setting_that_cannot_work_is_found(diagnosis, monkeypatch, variables, check, says):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, found = diagnosis()
    assert code == 1
    assert says in found[check, "wrong"]


@pytest.mark.parametrize("config", [None, b"{", b'{"model_type": "\xff"}', b"[" * 10_000])
def test_a_model_that_is_none_is_found(diagnosis, monkeypatch, tmp_path, config):
    if config is not None:
        (tmp_path / "config.json").write_bytes(config)
    monkeypatch.setenv("TINK_HF_MODEL", str(tmp_path))
    code, found = diagnosis()
    assert code == 1
    assert f"{tmp_path}/config.json cannot be read" in found["engine", "wrong"]


@pytest.mark.skipif(find_spec("huggingface_hub") is None, reason="the hub's library is not installed")
def test_a_model_that_must_be_downloaded_is_told_of(diagnosis, monkeypatch, tmp_path):
    monkeypatch.setenv("TINK_HF_MODEL", "nobody/has-this")
    code, found = diagnosis()
    assert code == 0
    assert found["engine", "warning"].endswith("-> hf download nobody/has-this")


@pytest.mark.parametrize(("free", "state"), [(10**8, "wrong"), (5 * 10**9, "warning"), (10**11, "ok")])
def test_little_room_is_found(diagnosis, monkeypatch, free, state):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**12, 10**12 - free, free))
    code, found = diagnosis()
    assert code == (state == "wrong")
    assert f"{free / 1e9:.1f} GB free" in found["disk", state]


@pytest.mark.on_files
def test_a_home_on_a_network_is_found(diagnosis, monkeypatch):
    monkeypatch.setattr(machine, "_file_system", lambda folder: "nfs4")
    code, found = diagnosis()
    assert code == 1
    assert "on a network (nfs4)" in found["home", "wrong"]


def test_a_clock_that_was_set_back_is_found(diagnosis, monkeypatch):
    monkeypatch.setattr(StillWorld, "time", BEGAN - 3600)
    code, found = diagnosis()
    assert code == 1
    assert "s behind the journal's newest event" in found["clock", "wrong"]


@pytest.mark.on_files
def test_a_journal_that_is_none_is_found(diagnosis, home):
    home.journal.write_bytes(b"no database" * 1000)
    code, found = diagnosis()
    assert code == 1
    assert "-> tink db check" in found["journal", "wrong"]


def test_a_journal_that_is_in_another_place_than_the_settings_say_is_found(
    diagnosis, home, monkeypatch, on_database
):
    if on_database == "sqlite":
        monkeypatch.setenv("TINK_DATABASE_URL", "postgresql://tink:secret@nowhere/tink")
        place = "is in SQLite files, and"
    else:
        monkeypatch.delenv("TINK_DATABASE_URL")
        place = f"is in {home.noted_database()}: set TINK_DATABASE_URL"
    code, found = diagnosis()
    assert code == 1
    assert place in found["journal", "wrong"]
    assert "secret" not in str(found)


@pytest.mark.parametrize(
    ("head", "state", "remedy"), [("0000", "wrong", "install"), ("9999", "warning", "tink db upgrade")]
)
def test_a_journal_of_another_schema_is_found(diagnosis, monkeypatch, head, state, remedy):
    monkeypatch.setitem(machine.revisions.HEADS, "journal", head)
    code, found = diagnosis()
    assert code == (state == "wrong")
    assert remedy in found["journal", state]


@pytest.mark.on_files
def test_the_database_that_a_journal_was_moved_out_of_is_found(
    diagnosis, home, postgres, tink, monkeypatch
):
    """From one server to another, and the settings still name the first."""
    first, second = (postgres.create_database() for _ in range(2))
    for url in (first, second):
        assert tink("db", "move", "--home", home.root, "--to", url)[0] == 0
    monkeypatch.setenv("TINK_DATABASE_URL", first)
    code, found = diagnosis()
    assert code == 1
    assert re.search(
        r"was moved elsewhere \(moved-\w+\) -> unset TINK_DATABASE_URL, or name", found["journal", "wrong"]
    )
    for url in (first, second):
        postgres.drop_database(url)


def test_a_port_that_is_taken_is_found(diagnosis, monkeypatch):
    with World().listen("127.0.0.1", 0) as listener:
        monkeypatch.setenv("TINK_PORT", str(listener.getsockname()[1]))
        code, found = diagnosis()
    assert code == 1
    assert "Address already in use -> end who has it, or set TINK_PORT" in found["port", "wrong"]


# -- a worker that runs -------------------------------------------------------------------------------


def test_a_worker_that_runs_is_looked_at(diagnosis, home, monkeypatch):
    record = {"pid": 4242, "url": URL, "version": "0.1.0", "mode": "training on HuggingFace"}
    home.worker.write_text(json.dumps(record))
    monkeypatch.setattr(processes, "alive", lambda pid, word: pid == 4242)
    code, found = diagnosis()
    assert code == 1
    assert "pid 4242 does not answer" in found["worker", "wrong"]
    monkeypatch.setattr(StillWorld, "answer", lambda request: httpx.Response(200, json={}))
    code, found = diagnosis()
    assert "runs, pid 4242" in found["worker", "ok"]
    assert "started with other settings" in found["worker", "warning"]
    assert "embedded, stopped" in found["trainer", "wrong"]


# -- training and vLLM servers ------------------------------------------------------------------------


@pytest.fixture
def answers(monkeypatch):
    """Of a training server, by path; whatever else is asked is refused."""
    monkeypatch.setenv("USE_MEGATRON", "true")
    found = {"/v1/health": HEALTH, "/v1/info": INFO}

    def answer(request):
        if request.url.path not in found:
            return httpx.Response(404, json={"detail": "Not Found"})
        return httpx.Response(200, json=found[request.url.path])

    monkeypatch.setattr(StillWorld, "answer", answer)
    return found


def test_a_training_server_that_is_well_is_said_to_be(diagnosis, answers):
    code, found = diagnosis()
    assert code == 0
    assert "http://127.0.0.1:5000, megatron, base" in found["trainer", "ok"]


@pytest.mark.parametrize(
    ("path", "change", "state", "says"),
    [
        ("/v1/health", {"state": "broken", "detail": "no such model"}, "wrong", "is broken: no such model"),
        ("/v1/health", {"state": "loading"}, "warning", "still loading"),
        ("/v1/health", {"protocol": "tink-train/0"}, "wrong", "tink-train/0"),
        (
            "/v1/info",
            {"capabilities": ["sample"]},
            "warning",
            "Training not supported in non-Megatron mode",
        ),
    ],
)
def test_a_training_server_that_does_not_train_is_found(diagnosis, answers, path, change, state, says):
    answers[path] = {**answers[path], **change}
    code, found = diagnosis()
    assert code == (state == "wrong")
    assert says in found["trainer", state]


def test_servers_that_nobody_started_are_found_with_the_commands_that_start_them(diagnosis, monkeypatch):
    monkeypatch.setenv("USE_MEGATRON", "true")
    monkeypatch.setenv("USE_VLLM", "true")
    code, found = diagnosis()
    assert code == 1
    assert "-> tink trainer --engine megatron --model MODEL --port 5000" in found["trainer", "wrong"]
    assert f"vLLM server can't be reached at {URL}" in found["vllm", "wrong"]
    assert "-> tink vllm MODEL" in found["vllm", "wrong"]


@pytest.fixture
def serving(monkeypatch, home):
    """Lets vLLM doubles serve at these URLs."""
    (home.root / "artifacts").mkdir(exist_ok=True)

    def serve(**options):
        urls = [f"http://vllm-{number}" for number in range(len(options) or 1)]
        monkeypatch.setenv("USE_VLLM", "true")
        monkeypatch.setenv("VLLM_BASE_URL", ",".join(urls))
        doubles = {}

        class Doubles(StillWorld):
            def http_transport(self, origin, max_slots):
                # Made in the loop in which they serve.
                for url, one in zip(urls, options.values() or [{}], strict=True):
                    doubles.setdefault(url, VllmDouble(**one))
                return Network(doubles).http_transport(origin, max_slots)

        monkeypatch.setattr(doctor, "World", Doubles)
        return doubles

    return serve


def test_a_vllm_server_that_takes_adapters_is_said_to(diagnosis, serving, home):
    serving()
    code, found = diagnosis()
    assert code == 0
    assert "http://vllm-0, base, 0 adapters" in found["vllm", "ok"]
    assert "takes adapters up to rank 64" in found["lora", "ok"]
    assert os.listdir(home.root / "artifacts") == []


@pytest.mark.parametrize(
    ("options", "check", "state", "says"),
    [
        ({"runtime_lora": False}, "lora", "wrong", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
        ({"max_lora_rank": 16}, "lora", "wrong", "rank 16 at most, VLLM_MAX_LORA_RANK is 64"),
        (
            {"logprobs_mode": "processed"},
            "vllm",
            "warning",
            "-> start it with --logprobs-mode raw_logprobs",
        ),
    ],
)
def test_a_vllm_server_that_was_started_wrongly_is_found(diagnosis, serving, options, check, state, says):
    serving(one=options)
    code, found = diagnosis()
    assert code == (state == "wrong")
    assert says in found[check, state]


def test_a_vllm_server_that_does_not_see_the_artifact_folder_is_found(diagnosis, serving, monkeypatch):
    serving()
    monkeypatch.setattr(
        VllmDouble, "_load", lambda self, body: self._say("load: missing", b=body["lora_name"])
    )
    code, found = diagnosis()
    assert code == 1
    assert "does not see" in found["lora", "wrong"]


def test_a_vllm_server_that_takes_adapters_unread_is_rid_of_it_again(diagnosis, serving, monkeypatch):
    doubles = serving()

    def load(self: VllmDouble, body: dict[str, str]) -> httpx.Response:
        self.adapters[body["lora_name"]] = Adapter(body["lora_name"], body["lora_path"])
        return self._say("load", a=body["lora_name"])

    monkeypatch.setattr(VllmDouble, "_load", load)
    code, found = diagnosis()
    assert code == 0
    assert "takes adapters up to rank 64" in found["lora", "ok"]
    assert doubles["http://vllm-0"].adapters == {}


def test_vllm_servers_that_differ_are_found(diagnosis, serving):
    serving(one={}, other={"logprobs_mode": "processed"})
    code, found = diagnosis()
    assert code == 1
    assert "is not like the one at http://vllm-" in found["vllm", "wrong"]
