"""Whatever a training server does, its client raises TrainerGone or TrainerRefused, and nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import httpx
import msgspec
import pytest
import trio
from hypothesis import example, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from tink.backends import exchange
from tink.backends.trainer import TrainerClient, TrainerGone, TrainerRefused
from tink.limits import GRACE_SECONDS
from tink.wire import tink_train
from tink.wire.tink_train import OpReply, OpRequest, OpResult, Refusal, SampleReply, SampleRequest
from tink.world import World

Answer = Callable[[httpx.Request], httpx.Response]

OP = OpRequest(incarnation="i1", lease=1, model_id="s:train:0", op_no=3, job_id="j", op=tink_train.Skip())
SAMPLE = SampleRequest(sample_id="s:sample:0:0", prompt=[1], seed=0)
HEALTH = tink_train.Health(tink_train.PROTOCOL, "i1", "ready")


class OneServer(World):
    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    def http_transport(self, origin: str, max_slots: int) -> httpx.AsyncBaseTransport:
        return httpx.MockTransport(self._answer)


@asynccontextmanager
async def talking_to(answer: Answer, token: str = "") -> AsyncIterator[TrainerClient]:
    async with TrainerClient.connect("http://trainer", OneServer(answer), slots=1, token=token) as client:
        yield client


def packed(message: object, status: int = 200) -> httpx.Response:
    return httpx.Response(status, content=tink_train.encode(message))


def reply(state: str, *, incarnation: str = "i1") -> OpReply:
    result = OpResult(tokens=7) if state == "done" else None
    return OpReply(state, incarnation, OP.model_id, OP.op_no, OP.op_no, result=result)  # type: ignore[arg-type]


async def every_call(client: TrainerClient) -> list[BaseException | None]:
    """What each call raises."""
    found: list[BaseException | None] = []
    calls = (client.health, client.info, client.state, lambda: client.op(OP), lambda: client.sample(SAMPLE))
    for call in calls:
        try:
            await call()
        except Exception as error:
            found.append(error)
        else:
            found.append(None)
    return found


async def test_an_op_is_sent_once_and_then_polled_by_its_number_until_it_ends(
    autojump_clock: MockClock,
) -> None:
    asked: list[str] = []
    states = iter(["queued", "running", "running", "done"])

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(f"{request.method} {request.url.raw_path.decode()}")
        state = next(states)
        return packed(reply(state), 200 if state == "done" else 202)

    async with talking_to(answer) as client:
        ended = await client.op(OP)
    assert ended.result == OpResult(tokens=7)
    poll = f"GET /v1/ops/{OP.model_id}/3?wait=20.0"
    assert asked == ["POST /v1/ops", poll, poll, poll]


async def test_a_sample_is_polled_in_the_same_way(autojump_clock: MockClock) -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.method)
        state = "done" if len(asked) == 3 else "running"
        return packed(SampleReply(state, SAMPLE.sample_id, body=b"x"), 200 if state == "done" else 202)  # type: ignore[arg-type]

    async with talking_to(answer) as client:
        assert (await client.sample(SAMPLE)).body == b"x"
    assert asked == ["POST", "GET", "GET"]


async def test_a_server_of_another_life_in_a_poll_is_a_lost_call(autojump_clock: MockClock) -> None:
    replies = iter([packed(reply("running"), 202), packed(reply("done", incarnation="i2"))])
    async with talking_to(lambda request: next(replies)) as client:
        with pytest.raises(TrainerGone, match="restarted while it worked"):
            await client.op(OP)


@pytest.mark.parametrize("status", [400, 401, 404, 409, 410, 412, 422, 429, 500, 503])
async def test_a_refusal_is_told_with_its_reason(status: int) -> None:
    refusal = Refusal("gap", "there is a gap", applied=2, incarnation="i1")
    async with talking_to(lambda request: packed(refusal, status)) as client:
        for error in await every_call(client):
            assert isinstance(error, TrainerRefused)
            assert (error.answered, error.refusal, str(error)) == (status, refusal, "there is a gap")


def _half() -> bytes:
    whole = tink_train.encode(reply("done"))
    return whole[: len(whole) // 2]


GARBAGE: dict[str, httpx.Response | Exception] = {
    "nothing": httpx.Response(200),
    "half an answer": httpx.Response(200, content=_half()),
    "HTML": httpx.Response(200, text="<html>It works!</html>"),
    "another message": packed({"state": "done"}),
    "a wrong type": packed(
        {"state": "sideways", "incarnation": 1, "model_id": [], "op_no": "x", "applied": 0}
    ),
    "text that is not UTF-8": httpx.Response(200, content=b'{"state": "\xff"}'),
    "msgpack text that is not UTF-8": httpx.Response(200, content=b"\x81\xa5state\xa1\xff"),
    "deep JSON": httpx.Response(200, content=b'{"x":' + b"[" * 100_000),
    "deep msgpack": httpx.Response(200, content=b"\x81\xa1x" + b"\x91" * 100_000),
    "a proxy's error": httpx.Response(502, text="Bad Gateway"),
    "a bare 500": httpx.Response(500),
    "a bare 401": httpx.Response(401, json={"detail": "who are you?"}),
    "a redirect": httpx.Response(302, headers={"Location": "http://elsewhere/"}),
    "no content": httpx.Response(204),
    "refused": httpx.ConnectError("refused"),
    "reset": httpx.ReadError("reset"),
    "cut off": httpx.RemoteProtocolError("peer closed connection"),
    "slow": httpx.ReadTimeout("slow"),
    "a bad encoding": httpx.DecodingError("not gzip"),
}


@pytest.mark.parametrize("what", GARBAGE)
async def test_garbage_is_a_lost_call(what: str) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        found = GARBAGE[what]
        if isinstance(found, Exception):
            raise found
        return httpx.Response(found.status_code, headers=found.headers, content=found.content)

    async with talking_to(answer) as client:
        for error in await every_call(client):
            assert type(error) is TrainerGone, repr(error)
            assert "http://trainer" in str(error)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([200, 202, 404, 500]), st.binary(max_size=40))
@example(200, b"\x81\xa5state\xa1\xff")
def test_no_bytes_make_another_error(status: int, content: bytes) -> None:
    async def main() -> None:
        async with talking_to(lambda request: httpx.Response(status, content=content)) as client:
            for error in await every_call(client):
                assert error is None or type(error) in (TrainerGone, TrainerRefused)

    trio.run(main)


async def test_a_server_that_says_nothing_is_given_up_after_the_wait_and_its_grace(
    autojump_clock: MockClock,
) -> None:
    class Silent(World):
        def http_transport(self, origin: str, max_slots: int) -> httpx.AsyncBaseTransport:
            return SilentTransport()

    class SilentTransport(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            await trio.sleep_forever()
            raise AssertionError

    async with TrainerClient.connect("http://trainer", Silent(), slots=1) as client:
        began = trio.current_time()
        with pytest.raises(TrainerGone, match="does not answer"):
            await client.op(OP)
        assert trio.current_time() - began == pytest.approx(OP.wait + GRACE_SECONDS)


async def test_a_trickle_of_bytes_does_not_hold_a_call_for_ever(autojump_clock: MockClock) -> None:
    class Drip(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            while True:
                await trio.sleep(1)
                yield b"\x00"

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, stream=Drip())

    async with talking_to(answer) as client:
        with trio.fail_after(60), pytest.raises(TrainerGone):
            await client.op(OP)


@pytest.mark.parametrize("first", ["running", "done"])
@pytest.mark.parametrize(
    "wrong", [{"model_id": "s:train:1"}, {"op_no": 4}, {"incarnation": "i2"}, {"result": None}]
)
async def test_an_answer_for_another_op_or_without_its_result_is_a_lost_call(
    autojump_clock: MockClock, first: str, wrong: dict[str, object]
) -> None:
    replies = iter([reply(first), reply("done")] if first == "running" else [reply("done")])
    answers = [*replies]
    answers[-1] = msgspec.structs.replace(answers[-1], **wrong)
    left = iter(answers)
    async with talking_to(lambda request: packed(next(left))) as client:
        with pytest.raises(TrainerGone):
            await client.op(OP)


async def test_an_answer_for_another_sample_is_a_lost_call() -> None:
    async with talking_to(lambda request: packed(SampleReply("done", "another"))) as client:
        with pytest.raises(TrainerGone, match="answered for another"):
            await client.sample(SAMPLE)


async def test_an_answer_over_its_limit_is_read_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "MAX_ANSWER", 10_000)
    sent = 0

    class Flood(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            nonlocal sent
            while True:
                await trio.lowlevel.checkpoint()
                sent += 1000
                yield bytes(1000)

    async with talking_to(lambda request: httpx.Response(200, stream=Flood())) as client:
        for error in await every_call(client):
            assert type(error) is TrainerGone
            assert "longer than 10000 bytes" in str(error)
    assert sent <= 5 * 12_000


async def test_polls_that_are_not_held_are_paced(autojump_clock: MockClock) -> None:
    asked = 0

    def answer(request: httpx.Request) -> httpx.Response:
        nonlocal asked
        asked += 1
        return packed(reply("running"), 202)

    async with talking_to(answer) as client:
        with trio.move_on_after(60.0):
            await client.op(OP)
    assert asked <= 61


async def test_a_call_through_a_link_that_was_closed_is_a_lost_call() -> None:
    """The link gives a server up while a job's poll is about to ask again."""
    async with talking_to(lambda request: packed(reply("done"))) as client:
        pass
    assert {type(error) for error in await every_call(client)} == {TrainerGone}


async def test_the_token_is_sent_and_proxies_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    seen: list[str | None] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers.get("Authorization"))
        return httpx.Response(200, content=msgspec.json.encode(HEALTH))

    async with talking_to(answer, token="secret") as client:
        assert await client.health() == HEALTH
    async with talking_to(answer) as client:
        await client.health()
    assert seen == ["Bearer secret", None]
