"""Mailboxes and replies: bounded, in order, and nobody answers one who has left."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock, assert_checkpoints, wait_all_tasks_blocked

from tink.actors.mailbox import Mailbox, Reply


async def test_messages_come_in_the_order_they_were_sent(autojump_clock: MockClock) -> None:
    mailbox: Mailbox[int] = Mailbox(10)
    for i in range(5):
        with assert_checkpoints():
            await mailbox.send(i)
    assert await _receive(mailbox, 5) == [0, 1, 2, 3, 4]


async def test_a_full_mailbox_makes_its_senders_wait(autojump_clock: MockClock) -> None:
    mailbox: Mailbox[int] = Mailbox(2)
    sent: list[int] = []

    async def send(i: int) -> None:
        await mailbox.send(i)
        sent.append(i)

    async with trio.open_nursery() as nursery:
        for i in range(5):
            nursery.start_soon(send, i)
        await wait_all_tasks_blocked()
        assert len(sent) == 2
        found = await _receive(mailbox, 5)
    assert sorted(found) == sorted(sent) == [0, 1, 2, 3, 4]


async def _receive(mailbox: Mailbox[int], count: int) -> list[int]:
    return [await anext(mailbox) for _ in range(count)]


async def test_a_reply_is_given_once_and_the_first_counts(autojump_clock: MockClock) -> None:
    reply: Reply[int] = Reply()
    reply.set(1)
    reply.set(2)
    reply.fail(ValueError())
    with assert_checkpoints():
        assert await reply.wait() == 1
    failed: Reply[int] = Reply()
    failed.fail(KeyError("x"))
    failed.set(1)
    with assert_checkpoints(), pytest.raises(KeyError):
        await failed.wait()


async def test_a_reply_that_nobody_waits_for_any_more_says_so(autojump_clock: MockClock) -> None:
    reply: Reply[int] = Reply()
    assert not reply.abandoned
    with trio.move_on_after(1):
        await reply.wait()
    assert reply.abandoned
    reply.set(1)  # and to answer it is harmless
