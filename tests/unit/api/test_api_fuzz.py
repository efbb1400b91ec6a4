"""Whatever bytes come to whatever route: an answer in JSON that is not a 5xx, and a worker that is asked
only well-formed questions."""

from __future__ import annotations

import json
from urllib.parse import urlencode

import httpx
import trio
import zstandard
from api_double import BODIES, REST, RUN, SAMPLER, SESSION, StillWorld, Worker, lease, protobuf
from hypothesis import given, settings
from hypothesis import strategies as st

from tink.api import both, rest, tinker
from tink.api.app import create_app
from tink.api.auth import Auth
from tink.domain import messages

POSTS = sorted(
    path for path, handlers in both.together(tinker.TABLE, rest.API).items() if "POST" in handlers
)

# By path. Those that the SDK has too are drawn with its bodies or with these.
PLAIN = {f"/{name}{form}": bodies for name, bodies in REST.items() for form in ("", "_async")} | {
    "/asample": REST["sample"]
}
for _, path in BODIES.keys() & {("POST", path) for path in PLAIN}:
    PLAIN[path] = [*PLAIN[path], BODIES["POST", path]]

_scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
_json = st.recursive(
    _scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner)
)
_names = st.sampled_from(sorted({name for body in BODIES.values() for name in body}))
_keys = st.text(st.characters(max_codepoint=255), max_size=8).map(lambda key: key.encode("latin-1"))
_ids = st.sampled_from(
    [RUN, SESSION, f"{SESSION}:sample:0", "", "x:train:", "../..", "\x00", "tinker://a/b/c"]
)
# Whatever a call of the REST API waits for has come to this end.
_SAVED = messages.Outcome(
    "save_weights_for_sampler", "done", result={"sampling_session_id": SAMPLER, "path": "p"}
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
    if path in PLAIN:
        valid = draw(st.sampled_from(PLAIN[path]))
    return json.dumps({**valid, **draw(_objects)}).encode()


@st.composite
def posts(draw):
    path = draw(st.sampled_from(POSTS))
    valid = json.dumps(draw(st.sampled_from(PLAIN.get(path, [BODIES.get(("POST", path), {})])))).encode()
    if path == "/forward_backward":
        valid = protobuf()
    body = draw(st.binary(max_size=200) | mutated(valid) | changed(path))
    headers = {"idempotency-key": draw(_keys)} if draw(st.booleans()) else {}
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
    worker.script(messages.AwaitOutcome, _SAVED)
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
        assert question.key is None or (question.key.isprintable() and len(question.key) < 200)
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
