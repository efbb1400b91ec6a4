"""What a request leaves in the log: its id, its route, its end, and nothing that its sender wrote."""

from __future__ import annotations

import json

import httpx
import pytest
from api_double import BODIES, StillWorld, Worker, lease

from tink.api import tinker
from tink.api.app import create_app
from tink.api.auth import Auth

CANARIES = ["tml-canary-key", "canary-query", "canary-body", "canary-header"]


async def test_one_line_per_request_with_the_id_of_its_answer(client, log_output):
    answers = [await client.get(f"/api/v1/samplers/s{i}") for i in range(3)]
    assert [entry["request_id"] for entry in log_output.entries] == [
        answer.headers["X-Request-Id"] for answer in answers
    ]
    assert log_output.entries[0] == {
        "event": "request",
        "log_level": "debug",
        "request_id": answers[0].headers["X-Request-Id"],
        "method": "GET",
        "route": "/api/v1/samplers/{sampler_id}",
        "status": 200,
        "ms": log_output.entries[0]["ms"],
    }


async def test_nothing_that_a_client_wrote_is_in_the_log(tmp_path, log_output):
    app = create_app(
        Worker().ask, auth=Auth({"tml-x": "x"}), artifacts=tmp_path, secret=b"s", world=StillWorld()
    )
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://tink") as client:
        for path, handlers in tinker.TABLE.items():
            for method in handlers:
                if path == "/retrieve_future":
                    continue
                body = {**BODIES.get((method, path), {}), "extra": "canary-body"}
                for key in ("tml-x", "tml-canary-key"):
                    await client.request(
                        method,
                        f"/api/v1{lease(path)}?q=canary-query",
                        json=body,
                        headers={"X-API-Key": key, "X-Thing": "canary-header"},
                    )
        await client.get("/canary-body")
    text = json.dumps(log_output.entries)
    assert len(log_output.entries) > 50
    assert not [canary for canary in CANARIES if canary in text]


@pytest.mark.parametrize("sent", [b"", b"{", b"[]", b'{"model_id":"x","seq_id":1}', b"\xff"])
async def test_what_a_user_did_leaves_no_traceback(client, log_output, sent):
    for path in ("/optim_step", "/asample", "/create_session", "/retrieve_future", "/get_info"):
        answer = await client.post(
            f"/api/v1{path}", content=sent, headers={"Content-Type": "application/json"}
        )
        assert 200 <= answer.status_code < 500
    assert {entry["log_level"] for entry in log_output.entries} == {"debug"}
