"""Whatever bytes come to whatever route: an answer in JSON that is not a 5xx, and a worker that is asked
only well-formed questions."""

from __future__ import annotations

import json
from urllib.parse import urlencode

import httpx
import trio
import zstandard
from api_double import BODIES, RUN, SESSION, StillWorld, Worker, lease, protobuf
from hypothesis import given, settings
from hypothesis import strategies as st

from tink.api import tinker
from tink.api.app import create_app
from tink.api.auth import Auth
from tink.domain import messages

POSTS = sorted(
    path for path, handlers in tinker.TABLE.items() if "POST" in handlers and path != "/retrieve_future"
)

_scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
_json = st.recursive(
    _scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner)
)
_names = st.sampled_from(sorted({name for body in BODIES.values() for name in body}))
_ids = st.sampled_from(
    [RUN, SESSION, f"{SESSION}:sample:0", "", "x:train:", "../..", "\x00", "tinker://a/b/c"]
)
_objects = st.dictionaries(_names, _json | _ids, max_size=8)


@st.composite
def mutated(draw, valid):
    """A valid body with a few bytes changed, or cut off."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(0, 4))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(0, len(data)))]) if draw(st.booleans()) else bytes(data)


@st.composite
def changed(draw, path):
    """A valid body with some of its fields replaced."""
    valid = BODIES.get(("POST", path), {"model_id": RUN, "seq_id": 1})
    return json.dumps({**valid, **draw(_objects)}).encode()


@st.composite
def posts(draw):
    path = draw(st.sampled_from(POSTS))
    valid = json.dumps(BODIES.get(("POST", path), {})).encode()
    if path == "/forward_backward":
        valid = protobuf()
    body = draw(st.binary(max_size=200) | mutated(valid) | changed(path))
    headers = {}
    media = "application/x-protobuf" if path == "/forward_backward" else "application/json"
    headers["content-type"] = draw(st.sampled_from([media] * 8 + ["", "text/plain", "application/json"]))
    if draw(st.integers(0, 3)) == 0:
        headers["content-encoding"] = "zstd"
        body = draw(st.sampled_from([body, zstandard.compress(body)]) | mutated(zstandard.compress(body)))
    return path, body, headers


async def _post(worker, path, body, headers):
    app = create_app(worker.ask, auth=Auth(), artifacts="/nowhere", secret=b"s", world=StillWorld())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://tink") as client:
        return await client.post("/api/v1" + lease(path), content=body, headers=headers)


@settings(max_examples=600, deadline=None)
@given(post=posts())
def test_no_bytes_are_an_internal_error(post):
    worker = Worker()
    answer = trio.run(_post, worker, *post)
    assert answer.status_code < 500
    if answer.status_code >= 400:
        assert answer.json()["detail"]
    for question in worker.asked:
        _assert_well_formed(question)


def _assert_well_formed(question):
    for name in ("session_id", "model_id", "sampler_id", "job_id"):
        text = getattr(question, name, None)
        assert text is None or (text and text.isascii() and text.isprintable() and len(text) <= 256)
    for name in ("seq_id", "model_seq_id", "sampling_seq_id"):
        number = getattr(question, name, None)
        assert number is None or (type(number) is int and 0 <= number < 2**63)
    if isinstance(question, messages.SubmitTraining):
        assert question.model_id.startswith(f"{question.session_id}:train:")
        assert (question.seq_id == 0) == (question.model_seq_id is not None)
        assert question.invalid is None or (question.invalid and question.body == b"")


async def _status(method, path, query):
    """Of a request past the HTTP parser, where a client library would not let it through."""
    app = create_app(Worker().ask, auth=Auth(), artifacts="/nowhere", secret=b"s", world=StillWorld())
    statuses = []
    scope = {
        "type": "http",
        "method": method,
        "path": f"/api/v1/{path}",
        "query_string": query,
        "headers": [],
    }

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        statuses.append(message.get("status"))

    await app(scope, receive, send)
    return statuses[0]


_methods = st.sampled_from(["GET", "PUT", "DELETE", "HEAD", "OPTIONS", ""])


@settings(max_examples=300, deadline=None)
@given(path=st.text(max_size=40), query=st.binary(max_size=40), method=_methods)
def test_no_path_is_an_internal_error(path, query, method):
    assert trio.run(_status, method, path, query) < 500


@settings(max_examples=300, deadline=None)
@given(
    route=st.sampled_from(sorted(p for p, handlers in tinker.TABLE.items() if "GET" in handlers)),
    part=st.text(max_size=20) | _ids,
    name=st.sampled_from(["limit", "offset", "access_scope", "project_id"]),
    value=st.text(max_size=20) | st.integers().map(str),
)
def test_no_id_and_no_page_is_an_internal_error(route, part, name, value):
    parameters = dict.fromkeys(("session_id", "run_id", "sampler_id", "kind", "name"), part)
    query = urlencode({name: value}).encode()
    assert trio.run(_status, "GET", route.format_map(parameters)[1:], query) < 500
