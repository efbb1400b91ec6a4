"""Bodies: their limits, their codecs, and the number that a body consumes even when it cannot be served."""

from __future__ import annotations

import gc
import json
import sys
import tracemalloc

import pytest
import trio
import zstandard
from api_double import BODIES, RUN, SAMPLER, SESSION, protobuf

from tink import limits
from tink.api.app import create_app
from tink.api.body import Body, beginning, expand
from tink.domain import messages
from tink.errors import MalformedRequest, TooLarge
from tink.limits import MAX_SEQ
from tink.world import World

JSON = {"Content-Type": "application/json"}
PROTOBUF = {"Content-Type": "application/x-protobuf"}
ZSTD = {"Content-Encoding": "zstd"}

OPTIM = b'{"model_id":"%s","seq_id":2,"type":"optim_step"' % RUN.encode()

TRAINING = [
    path
    for (_, path), sent in BODIES.items()
    if {"model_id", "seq_id"} <= sent.keys() or path in ("/create_model", "/load_weights")
]


@pytest.fixture
def post(client):
    async def post(path, content, *headers):
        merged = {name: value for part in headers for name, value in part.items()}
        return await client.post("/api/v1" + path, content=content, headers=merged)

    return post


def zstd(data, **kwargs):
    return zstandard.ZstdCompressor(**kwargs).compress(data)


def undeclared(data):
    """A frame that does not say how much it holds."""
    return zstd(data, write_content_size=False)


def assert_consumed(worker, answer, op, seq_id, why):
    """The job was accepted, with nothing but the reason why it must fail."""
    assert answer.status_code == 200, answer.text
    [asked] = worker.asked
    assert asked == messages.SubmitTraining(
        "default", op, SESSION, RUN, seq_id, b"", "identity", None, asked.invalid
    )
    assert why in asked.invalid


# -- what cannot be served but names its job --------------------------------------------------------


@pytest.mark.parametrize(
    ("rest", "why"),
    [
        (b',"adam_params":{"learning_rate":NaN}}', "invalid character"),
        (b',"adam_params":{"learning_rate":-Infinity}}', "invalid"),
        (b',"adam_params":{"learning_rate":"fast"}}', "$.adam_params.learning_rate"),
        (b',"adam_params":[]}', "$.adam_params"),
        (b',"adam_params":{"beta1":' + str(10**400).encode() + b"}}", "range"),
        (b',"x":"a\\u0000b"}', "NUL"),
        (b',"adam_params":', "truncated"),
        (b"", "truncated"),
        (b"} trailing", "trailing"),
        (b',"x":"\xff"}', "not UTF-8"),
        (b',"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "valid OptimStep"),
        (b',"x":"' + b"y" * limits.MAX_JSON_BODY + b'"}', "over the limit"),
    ],
)
async def test_a_command_that_names_its_job_consumes_its_number(post, worker, rest, why):
    answer = await post("/optim_step", OPTIM + rest, JSON)
    assert_consumed(worker, answer, "optim_step", 2, why)


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"{",
        b'{"model_id":"x"',
        b"\xff",
        b"[" * 100_000,
        b'{"type":NaN}',
        b'{"seq_id":2,"x"',
        b'{"model_id":"%s","seq_id":"2"}' % RUN.encode(),
        b'{"model_id":"","seq_id":2}',
        b'{"model_id":null,"seq_id":2}',
        b'{"model_id":"%s","seq_id":true}' % RUN.encode(),
    ],
)
async def test_a_command_that_does_not_is_refused_at_once(post, worker, sent):
    answer = await post("/optim_step", sent, JSON)
    assert answer.status_code == 400, answer.text
    assert answer.json()["detail"]
    assert worker.asked == []


@pytest.mark.parametrize(
    ("seq_id", "status"),
    [
        (1, 200),
        (MAX_SEQ, 200),
        (MAX_SEQ + 1, 400),
        (0, 400),
        (-1, 400),
        (2**63, 400),
        (10**400, 400),
        (1.5, 400),
    ],
)
async def test_the_range_of_a_sequence_number(post, worker, seq_id, status):
    sent = json.dumps({"model_id": RUN, "seq_id": seq_id}).encode()
    answer = await post("/optim_step", sent, JSON)
    assert answer.status_code == status
    assert len(worker.asked) == (status == 200)


@pytest.mark.parametrize(
    "model_id", ["x", f"{SESSION}:sample:0", ":train:", "s:train:", "s:train:x", "é:train:0"]
)
async def test_a_job_of_what_is_no_run_is_not_found(post, worker, model_id):
    answer = await post("/optim_step", json.dumps({"model_id": model_id, "seq_id": 1}).encode(), JSON)
    assert (answer.status_code, worker.asked) == (404, [])


@pytest.mark.parametrize("path", TRAINING)
async def test_every_training_command_consumes_its_number(post, worker, path):
    sent = json.dumps(BODIES["POST", path])[:-1] + ', "x": NaN}'
    assert (await post(path, sent.encode(), JSON)).status_code == 200
    assert worker.last.invalid
    assert worker.last.body == b""


async def test_a_model_that_cannot_be_made_is_a_job_that_fails(post, worker):
    sent = {"session_id": SESSION, "model_seq_id": 3, "base_model": "x", "lora_config": {"rank": "high"}}
    assert (await post("/create_model", json.dumps(sent).encode(), JSON)).status_code == 200
    asked = worker.last
    assert (asked.model_id, asked.seq_id, asked.model_seq_id) == (f"{SESSION}:train:3", 0, 3)
    assert "$.lora_config.rank" in asked.invalid


@pytest.mark.parametrize("compress", [lambda data: data, zstd, undeclared])
async def test_protobuf_cut_off_or_mangled_consumes_its_number(post, worker, compress):
    headers = (PROTOBUF,) if compress(b"") == b"" else (PROTOBUF, ZSTD)
    whole = protobuf(seq_id=9)
    answer = await post("/forward_backward", compress(whole[:-5]), *headers)
    assert_consumed(worker, answer, "forward_backward", 9, "ForwardBackwardRequest")


@pytest.mark.parametrize(
    "sent", [b"", b"\x0a", b"\xff" * 40, b"\x0a\xff\xff\xff\xff\x0f", b"{}", b"\x0a\x05ab"]
)
async def test_protobuf_that_names_no_job_is_refused(post, worker, sent):
    answer = await post("/forward_backward", sent, PROTOBUF)
    assert (answer.status_code, worker.asked) == (400, [])


@pytest.mark.parametrize("seq_id", [0, -1, -(2**31)])
async def test_the_range_of_a_protobuf_sequence_number(post, worker, seq_id):
    answer = await post("/forward_backward", protobuf(seq_id=seq_id), PROTOBUF)
    assert (answer.status_code, worker.asked) == (400, [])


async def test_a_protobuf_over_the_limit_consumes_its_number(post, worker, monkeypatch):
    monkeypatch.setattr(limits, "MAX_TRAINING_BODY", 100_000)
    sent = protobuf(seq_id=9, loss_fn_config={"x" * 200_000: 1.0})
    answer = await post("/forward_backward", sent, PROTOBUF)
    assert_consumed(worker, answer, "forward_backward", 9, "over the limit of 100000")


# -- zstd -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compress", [zstd, undeclared])
async def test_a_compressed_protobuf_is_passed_on_compressed(post, worker, compress):
    sent = compress(protobuf(seq_id=4))
    assert (await post("/forward_backward", sent, PROTOBUF, ZSTD)).is_success
    assert (worker.last.body, worker.last.codec, worker.last.seq_id) == (sent, "zstd", 4)


async def test_a_compressed_command_is_passed_on_as_its_json(post, worker):
    assert (await post("/optim_step", zstd(OPTIM + b"}"), JSON, ZSTD)).is_success
    assert (worker.last.body, worker.last.codec) == (OPTIM + b"}", "identity")


@pytest.mark.parametrize("compress", [zstd, undeclared])
async def test_a_bomb_that_names_its_job_consumes_its_number(post, worker, compress):
    bomb = compress(protobuf(seq_id=9) + bytes(limits.MAX_TRAINING_BODY + 1))
    assert len(bomb) < 64 * 1024
    answer = await post("/forward_backward", bomb, PROTOBUF, ZSTD)
    assert_consumed(worker, answer, "forward_backward", 9, "decompresses to more than the limit")


@pytest.mark.parametrize(
    ("bomb", "status"),
    [
        (zstd(bytes(256 << 20)), 413),
        (undeclared(bytes(256 << 20)), 413),
        (zstd(zstd(bytes(256 << 20))), 400),
        (zstd(b"")[:3], 400),
        (b"not zstd", 400),
        (b"", 400),
        (zstd(b"{}") + zstd(b"{}"), 400),
        (zstd(b"{}") + b"more", 400),
        (zstd(b"{}" * 1000)[:-1], 400),
    ],
)
@pytest.mark.parametrize("path", ["/optim_step", "/asample", "/create_session"])
async def test_a_bomb_that_names_none_is_refused_and_costs_little(post, worker, bomb, status, path):
    tracemalloc.start()
    try:
        answer = await post(path, bomb, JSON, ZSTD)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (answer.status_code, worker.asked) == (status, []), answer.text
    assert peak < limits.MAX_JSON_BODY + 16 * 1024 * 1024


def test_a_window_larger_than_the_limit_is_refused():
    def frame(window_log):
        """One raw block of one byte, and the wish for so much memory."""
        return (
            bytes.fromhex("28b52ffd00") + bytes([(window_log - 10) << 3]) + bytes.fromhex("090000") + b"x"
        )

    assert expand(Body(frame(24), "zstd"), 100) == b"x"
    with pytest.raises(MalformedRequest, match="zstd"):
        expand(Body(frame(25), "zstd"), limits.MAX_TRAINING_BODY)


def test_a_frame_that_lies_about_its_size_is_counted():
    honest = zstd(b"x" * 100)
    parameters = zstandard.get_frame_parameters(honest)
    assert parameters.content_size == 100
    lying = bytearray(honest)
    lying[5] = 10
    with pytest.raises((MalformedRequest, TooLarge)):
        expand(Body(bytes(lying), "zstd"), 50)


@pytest.mark.parametrize("size", [0, 1, 99, 100])
@pytest.mark.parametrize("compress", [zstd, undeclared])
def test_expand_gives_what_was_compressed_up_to_the_limit(size, compress):
    assert expand(Body(compress(b"x" * size), "zstd"), 100) == b"x" * size
    with pytest.raises(TooLarge):
        expand(Body(compress(b"x" * 101), "zstd"), 100)


def test_the_beginning_of_a_broken_frame_is_what_could_be_read():
    frame = zstd(bytes(range(256)) * 4096)
    assert (
        beginning(Body(frame[: len(frame) - 1], "zstd")) == (bytes(range(256)) * 256)[: limits.PEEK_BYTES]
    )
    assert beginning(Body(b"junk", "zstd")) == b""


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "zstd, zstd", "gzip, zstd", "x"])
async def test_other_encodings_are_not_taken(post, worker, encoding):
    answer = await post("/optim_step", OPTIM + b"}", JSON, {"Content-Encoding": encoding})
    assert (answer.status_code, worker.asked) == (415, [])


# -- media types, streams ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "sent", "media"),
    [
        ("/optim_step", OPTIM + b"}", "text/plain"),
        ("/optim_step", OPTIM + b"}", "application/x-protobuf"),
        ("/forward_backward", protobuf(), "application/json"),
        ("/retrieve_future", b"{}", ""),
    ],
)
async def test_a_wrong_content_type_is_named(post, worker, path, sent, media):
    answer = await post(path, sent, {"Content-Type": media})
    assert (answer.status_code, worker.asked) == (415, [])
    assert media in answer.json()["detail"]


async def test_a_content_type_may_have_parameters(post):
    answer = await post("/optim_step", OPTIM + b"}", {"Content-Type": "Application/JSON; charset=utf-8"})
    assert answer.is_success


async def test_samples_are_refused_at_once_for_they_leave_no_hole(post, worker):
    sent = {**BODIES["POST", "/asample"]}
    for wrong in (
        {"num_samples": 0},
        {"num_samples": limits.MAX_NUM_SAMPLES + 1},
        {"sampling_session_id": None},
        {"seq_id": None},
        {"seq_id": -1},
        {"seq_id": 2**63},
        {"sampling_params": {"temperature": "hot"}},
        {"sampling_params": {"seed": 2**63}},
        {"prompt": {"chunks": [{"type": "encoded_text", "tokens": ["a"]}]}},
    ):
        answer = await post("/asample", json.dumps({**sent, **wrong}).encode(), JSON)
        assert (answer.status_code, worker.asked) == (400, []), wrong


async def test_a_stop_may_be_a_text_texts_or_tokens(post, worker):
    for stop in (None, "\n", ["a", "b"], [1, 2], []):
        params = {"sampling_params": {"stop": stop}, "seq_id": len(worker.asked)}
        answer = await post("/asample", json.dumps({**BODIES["POST", "/asample"], **params}).encode(), JSON)
        assert answer.is_success, stop
    assert worker.last.sampler_id == SAMPLER


class Stream:
    """A sender at the other end of ASGI, who sends `pieces` and then waits, or leaves."""

    def __init__(self, app, path, pieces, *, headers=(), leaves=False):
        self.app = app
        self.scope = {
            "type": "http",
            "method": "POST",
            "path": "/api/v1" + path,
            "query_string": b"",
            "headers": [
                (b"content-type", b"application/json"),
                (b"transfer-encoding", b"chunked"),
                *headers,
            ],
        }
        self.pieces = iter(pieces)
        self.leaves = leaves
        self.taken = 0
        self.status = None
        self.body = b""
        self.answered = trio.Event()

    async def receive(self):
        for piece in self.pieces:
            self.taken += len(piece)
            return {"type": "http.request", "body": piece, "more_body": True}
        if not self.leaves:
            await self.answered.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        self.status = message.get("status", self.status)
        self.body += message.get("body", b"")
        if message["type"] == "http.response.body":
            self.answered.set()

    async def run(self):
        await self.app(self.scope, self.receive, self.send)
        return self.status, json.loads(self.body) if self.body else None


def _endless(piece=b"x" * 65536):
    while True:
        yield piece


async def test_an_endless_upload_is_drained_for_a_while_and_answered(app, worker, autojump_clock):
    stream = Stream(app, "/optim_step", _limited(_endless(), 1 << 30))
    status, answer = await stream.run()
    assert (status, worker.asked) == (413, [])
    assert "over the limit" in answer["detail"]
    # To the limit, then what is drained; what is discarded afterwards ends with the connection.
    assert stream.taken >= limits.MAX_JSON_BODY + limits.DRAIN_BYTES


def _limited(pieces, total):
    for piece in pieces:
        if total <= 0:
            return
        total -= len(piece)
        yield piece


async def test_a_sender_that_falls_silent_is_told_so(app, worker, autojump_clock):
    stream = Stream(app, "/optim_step", [OPTIM])
    status, _ = await stream.run()
    assert (status, worker.asked) == (408, [])
    assert trio.current_time() >= limits.STALL_SECONDS


@pytest.mark.parametrize("path", ["/optim_step", "/forward_backward", "/asample", "/retrieve_future"])
async def test_a_sender_that_leaves_in_the_middle_asked_nothing(app, worker, path, log_output):
    media = b"application/x-protobuf" if path == "/forward_backward" else b"application/json"
    stream = Stream(app, path, [OPTIM], leaves=True)
    stream.scope["headers"][0] = (b"content-type", media)
    assert await stream.run() == (None, None)
    assert worker.asked == []
    assert [entry["log_level"] for entry in log_output.entries] == ["debug"]


async def test_a_body_may_come_byte_by_byte(app, worker):
    sent = OPTIM + b"}"

    def bytes_of():
        yield from (sent[i : i + 1] for i in range(len(sent)))

    stream = Stream(app, "/optim_step", bytes_of())
    pieces = [*bytes_of()]

    async def receive():
        piece = pieces.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

    stream.receive = receive
    status, _ = await stream.run()
    assert (status, worker.last.body) == (200, sent)


LONG = 2 * limits.INLINE_BYTES  # read in a thread


@pytest.mark.parametrize(
    ("path", "content", "headers"),
    [
        ("/forward_backward", b"\xff" * LONG, PROTOBUF),
        ("/forward_backward", protobuf(RUN, 2) + b"\xff" * LONG, PROTOBUF),
        ("/forward_backward", b"no frame" * LONG, PROTOBUF | ZSTD),
        ("/forward_backward", zstd(bytes(limits.MAX_TRAINING_BODY + 1)), PROTOBUF | ZSTD),
        ("/optim_step", b"x" * LONG, JSON),
        ("/optim_step", OPTIM + b"x" * LONG, JSON),
        ("/asample", b"[" * LONG, JSON),
    ],
)
async def test_a_refused_body_is_gone_before_the_collector_comes(
    worker, auth, tmp_path, path, content, headers
):
    """It comes seldom, and a body may have 64 MiB."""
    app = create_app(worker.ask, auth=auth, artifacts=tmp_path, secret=b"", world=World())
    stream = Stream(app, path, [])
    stream.scope["headers"] = [
        (name.lower().encode(), value.encode())
        for name, value in {**headers, "Content-Length": str(len(content))}.items()
    ]
    message = {"type": "http.request", "body": content}

    async def receive():
        return message

    stream.receive = receive
    before = sys.getrefcount(content)
    gc.disable()
    try:
        status, _ = await stream.run()
        await trio.to_thread.run_sync(int)  # the thread forgets its last result with the next one
        left = sys.getrefcount(content) - before
    finally:
        gc.enable()
    assert status >= 400 or worker.last.invalid
    assert left == 0
