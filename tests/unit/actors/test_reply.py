"""Replies: each is given once, and nobody answers one who has left."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock, assert_checkpoints

from tink.actors.reply import Reply


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
