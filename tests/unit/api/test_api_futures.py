"""retrieve_future: what is held, for how long, for whom, and what comes of it."""

from __future__ import annotations

import pytest
import trio
from api_double import RUN, SAMPLER
from trio.testing import wait_all_tasks_blocked

from tink import limits
from tink.domain import messages
from tink.errors import NotFound, TinkError

PATH = "/api/v1/retrieve_future"
JOB = f"{RUN}:1"
POLL = {"request_id": JOB, "allow_metadata_only": True}


async def test_a_json_result_is_the_answer(client, worker):
    await worker.end(JOB, messages.Outcome("optim_step", "done", result={"metrics": {"norm": 1.5}}))
    answer = await client.post(PATH, json=POLL)
    assert (answer.status_code, answer.json()) == (200, {"metrics": {"norm": 1.5}})


@pytest.mark.parametrize("op", ["forward", "forward_backward", "sample"])
async def test_a_protobuf_result_is_passed_through(client, worker, op):
    await worker.end(JOB, messages.Outcome(op, "done", body=b"\x0a\x00"))
    answer = await client.post(PATH, json=POLL, headers={"Accept": "application/x-protobuf"})
    assert (answer.status_code, answer.content) == (200, b"\x0a\x00")
    assert answer.headers["Content-Type"] == "application/x-protobuf"


@pytest.mark.parametrize("category", ["user", "server"])
async def test_a_failed_job_is_a_result_too(client, worker, category):
    await worker.end(JOB, messages.Outcome("optim_step", "failed", category=category, error="because"))
    answer = await client.post(PATH, json=POLL)
    assert (answer.status_code, answer.json()) == (200, {"error": "because", "category": category})


async def test_a_cancelled_job_was_the_users_wish(client, worker):
    await worker.end(JOB, messages.Outcome("sample", "cancelled"))
    answer = await client.post(PATH, json=POLL)
    assert answer.json() == {"error": "the job was cancelled", "category": "user"}


async def test_a_result_can_be_fetched_again(client, worker):
    await worker.end(JOB, messages.Outcome("optim_step", "done", result={"a": 1}))
    answers = [await client.post(PATH, json=POLL) for _ in range(3)]
    assert [answer.json() for answer in answers] == [{"a": 1}] * 3


async def test_a_poll_is_held_and_then_told_to_ask_again(client, worker, autojump_clock):
    started = trio.current_time()
    answer = await client.post(PATH, json=POLL)
    assert trio.current_time() - started == pytest.approx(limits.POLL_HOLD)
    assert answer.status_code == 408
    assert answer.json() == {"type": "try_again", "request_id": JOB, "queue_state": "active"}
    assert worker.waiting == 0


async def test_a_result_that_comes_during_the_hold_is_answered_at_once(client, worker, autojump_clock):
    started = trio.current_time()
    async with trio.open_nursery() as nursery:

        async def finish():
            await trio.sleep(3)
            await worker.end(JOB, messages.Outcome("optim_step", "done", result={"a": 1}))

        nursery.start_soon(finish)
        answer = await client.post(PATH, json=POLL)
    assert (answer.json(), trio.current_time() - started) == ({"a": 1}, pytest.approx(3))


@pytest.mark.parametrize("request_id", ["", "x" * 300, "a b", "é", "../x"])
async def test_what_cannot_be_an_id_is_not_looked_up(client, worker, request_id):
    answer = await client.post(PATH, json={"request_id": request_id})
    assert answer.status_code == 404
    assert worker.asked == []


@pytest.mark.parametrize(("error", "status"), [(NotFound("no such job"), 404), (TinkError("broken"), 429)])
async def test_an_error_of_the_wait_is_answered_as_itself(client, worker, error, status):
    worker.script(messages.AwaitOutcome, error)
    answer = await client.post(PATH, json=POLL)
    assert (answer.status_code, answer.json()) == (status, {"detail": str(error)})


async def test_a_poller_that_leaves_frees_its_task_and_not_the_result(app, client, worker, autojump_clock):
    left = trio.Event()
    scope = {
        "type": "http",
        "method": "POST",
        "path": PATH,
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"content-length", b"9")],
    }
    sent = []
    inbox = [{"type": "http.request", "body": b'{"request_id":"%s"}' % JOB.encode(), "more_body": False}]

    async def receive():
        if inbox:
            return inbox.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    started = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(app, scope, receive, send)
        await wait_all_tasks_blocked()
        assert worker.waiting == 1
        left.set()
    assert trio.current_time() == started
    assert worker.waiting == 0
    assert sent == []
    await worker.end(JOB, messages.Outcome("optim_step", "done", result={"a": 1}))
    assert (await client.post(PATH, json=POLL)).json() == {"a": 1}


async def test_a_thousand_polls_are_all_answered_once(client, worker, autojump_clock):
    answers = []

    async def poll(i):
        answer = await client.post(PATH, json={**POLL, "request_id": f"{SAMPLER}:{i}"})
        answers.append((i, answer.json()))

    async with trio.open_nursery() as nursery:
        for i in range(1000):
            nursery.start_soon(poll, i)
        await wait_all_tasks_blocked()
        assert worker.waiting == 1000
        for i in range(1000):
            await worker.end(f"{SAMPLER}:{i}", messages.Outcome("sample", "done", result={"n": i}))
    assert sorted(answers) == [(i, {"n": i}) for i in range(1000)]


async def test_cancel_future(client, worker):
    answer = await client.post("/api/v1/cancel_future", json={"request_id": f"{SAMPLER}:0"})
    assert answer.status_code == 204
    assert worker.asked == [messages.CancelJob("default", f"{SAMPLER}:0")]
