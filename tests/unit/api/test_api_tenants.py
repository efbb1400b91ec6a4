"""Every route of the table, so that a new one cannot be forgotten: whose question it asks, and what
it answers to a stranger."""

from __future__ import annotations

import json

import httpx
import pytest
from api_double import BODIES, RUN, Worker, lease, missing, protobuf

from tink.api import front, tinker
from tink.api.app import create_app
from tink.api.auth import Auth
from tink.domain import messages
from tink.errors import JournalUnavailable, Overloaded

KEYS = {"tml-alice": "alice", "tml-bob": "bob"}

ROUTES = [(method, path) for path, handlers in tinker.TABLE.items() for method in handlers]
# These answer without asking the worker anything.
SILENT = {("POST", "/client/config"), ("POST", "/client/dynamic_config")} | {
    (method, path) for path, handlers in tinker.unsupported.TABLE.items() for method in handlers
}
ASKING = [route for route in ROUTES if route not in SILENT]


@pytest.fixture
def auth():
    return Auth(KEYS)


@pytest.fixture
def send(client):
    async def send(method, path, key=None):
        headers = {} if key is None else {"X-API-Key": key}
        content = None
        if path == "/forward_backward":
            content, headers["Content-Type"] = protobuf(), "application/x-protobuf"
        elif (method, path) in BODIES:
            content = json.dumps(BODIES[method, path]).encode()
            headers["Content-Type"] = "application/json"
        return await client.request(method, "/api/v1" + lease(path), content=content, headers=headers)

    return send


@pytest.fixture
def worker():
    worker = Worker()
    worker.outcomes[f"{RUN}:1"] = messages.Outcome("optim_step", "done", result={})
    return worker


@pytest.mark.parametrize(("method", "path"), ASKING)
@pytest.mark.parametrize("key", KEYS)
async def test_every_question_names_the_tenant_of_the_key(send, worker, method, path, key):
    answer = await send(method, path, key)
    assert answer.is_success, answer.text
    assert worker.asked
    assert {question.tenant for question in worker.asked} == {KEYS[key]}


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_without_a_key_no_route_of_the_api_answers(send, worker, method, path):
    for key in (None, "", "tml-eve", "tml-alic", "x" * 10_000):
        answer = await send(method, path, key)
        assert answer.status_code == 401
    assert worker.asked == []


@pytest.mark.parametrize(("method", "path"), ASKING)
async def test_the_id_of_another_tenant_is_not_found(send, worker, method, path):
    for kind in messages.Question.__args__:
        worker.script(kind, missing)
    answer = await send(method, path, "tml-alice")
    assert (answer.status_code, answer.json()) == (404, {"detail": "there is none"})


@pytest.mark.parametrize(("method", "path"), ASKING)
@pytest.mark.parametrize("error", [Overloaded("too much"), JournalUnavailable("no disk")])
async def test_a_worker_that_cannot_now_says_when_to_try_again(send, worker, method, path, error):
    for kind in messages.Question.__args__:
        worker.script(kind, error)
    answer = await send(method, path, "tml-alice")
    # After a 5xx the SDK would poll a future again without a pause.
    assert answer.status_code == (429 if path == "/retrieve_future" else error.status)
    assert answer.json() == {"detail": str(error)}
    assert int(answer.headers["Retry-After"]) >= 1


@pytest.mark.parametrize(("method", "path"), ASKING)
async def test_a_bug_is_answered_and_logged_once_and_hurts_nobody_else(
    send, worker, method, path, autojump_clock, log_output
):
    for kind in messages.Question.__args__:
        worker.script(kind, ZeroDivisionError("a bug in the worker"))
    answer = await send(method, path, "tml-alice")
    assert answer.status_code == 500
    assert "a bug" not in answer.text
    [line] = [entry for entry in log_output.entries if entry["log_level"] == "error"]
    assert line["request_id"] in answer.text
    assert (line["route"], line["exc_info"]) == ("/api/v1" + path, True)
    worker.scripted.clear()
    assert (await send(method, path, "tml-bob")).is_success


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_a_wrong_method_is_named_in_json(client, method, path):
    wrong = "PATCH"
    answer = await client.request(wrong, "/api/v1" + lease(path), headers={"X-API-Key": "tml-alice"})
    assert answer.status_code == 405
    assert method in answer.headers["Allow"].split(", ")
    assert wrong in answer.json()["detail"]


@pytest.mark.parametrize(("method", "path"), sorted(SILENT))
async def test_what_is_not_supported_says_so(send, method, path):
    answer = await send(method, path, "tml-alice")
    if path.startswith("/client"):
        assert answer.is_success
    else:
        assert answer.status_code == 404
        assert answer.json()["detail"].startswith("not supported by Tink: ")


@pytest.mark.parametrize("path", ["/api/v1/nothing", "/nothing", "/api/v1", "/api/v1/optim_step/", "//"])
async def test_an_unknown_route_is_named_in_json(client, path):
    answer = await client.post(f"http://tink{path}", json={})
    assert (answer.status_code, answer.json()) == (404, {"detail": f"there is no {path} here"})


async def test_the_routes_that_need_no_key_are_these(client):
    about = {"/", "/openapi.json", "/healthz", "/api/v1/healthz"}
    assert set(front.TABLE) == about | {"/metrics", "/api/v1/downloads/{path:path}"}
    for path in about:
        assert (await client.get(path)).is_success


async def test_an_open_server_serves_whatever_key_as_the_default_tenant(worker, world, tmp_path):
    app = create_app(worker.ask, auth=Auth(), artifacts=tmp_path, secret=b"s", world=world)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://tink") as client:
        for headers in ({}, {"X-API-Key": "tml-x"}, {"Authorization": "Basic x"}):
            assert (await client.get("/api/v1/sessions", headers=headers)).is_success
    assert {question.tenant for question in worker.asked} == {"default"}
