"""API keys: who is let in, and how little the others are told."""

from __future__ import annotations

import hmac

import httpx
import pytest
from starlette.datastructures import Headers

from tink.api import auth as auth_module
from tink.api.app import create_app
from tink.api.auth import Auth
from tink.errors import Unauthorized

KEYS = {"tml-alice": "alice", "tml-bob": "bob", "tml-bob-2": "bob"}

REFUSED = [
    {},
    {"X-API-Key": ""},
    {"X-API-Key": "tml-eve"},
    {"X-API-Key": "tml-alice "},
    {"X-API-Key": "TML-ALICE"},
    {"X-API-Key": "tml-\xe9"},
    {"X-API-Key": "x" * 100_000},
    {"Authorization": "tml-alice"},
    {"Authorization": "Basic tml-alice"},
    {"Authorization": "Bearer"},
    {"Authorization": "Bearer tml-eve"},
    {"X-API-Key": "tml-eve", "Authorization": "Bearer tml-alice"},
]


@pytest.mark.parametrize(
    ("headers", "tenant"),
    [
        ({"X-API-Key": "tml-alice"}, "alice"),
        ({"x-api-key": "tml-bob-2"}, "bob"),
        ({"Authorization": "Bearer tml-bob"}, "bob"),
        ({"Authorization": "bearer  tml-bob "}, "bob"),
    ],
)
def test_a_key_tells_its_tenant(headers, tenant):
    assert Auth(KEYS).tenant(Headers(headers)) == tenant


@pytest.mark.parametrize("headers", REFUSED)
def test_whatever_is_wrong_the_work_and_the_words_are_the_same(headers, monkeypatch):
    compared = []
    compare = hmac.compare_digest

    def counting(a, b):
        compared.append((len(a), len(b)))
        return compare(a, b)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    with pytest.raises(Unauthorized) as refused:
        Auth(KEYS).tenant(Headers(headers))
    assert compared == [(32, 32)] * len(KEYS)
    assert str(refused.value) == auth_module._REFUSAL


async def test_all_refusals_are_one_answer(worker, world, tmp_path):
    app = create_app(worker.ask, auth=Auth(KEYS), artifacts=tmp_path, secret=b"s", world=world)
    answers = set()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://tink") as client:
        for headers in REFUSED:
            raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
            answer = await client.get("/api/v1/sessions", headers=raw)
            kept = {name: value for name, value in answer.headers.items() if name != "x-request-id"}
            answers.add((answer.status_code, answer.content, tuple(kept.items())))
    [(status, _, headers)] = answers
    assert status == 401
    assert dict(headers)["www-authenticate"] == "Bearer"


def test_no_key_is_kept():
    auth = Auth(KEYS)
    assert not any(key in repr(vars(auth)) for key in KEYS)
