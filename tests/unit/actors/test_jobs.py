"""An actor's jobs: each once, in order, so many at a time, and none that was taken back."""

from __future__ import annotations

from functools import partial

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tink.actors.exposures import Exposures
from tink.actors.jobs import Jobs


class Runs:
    """Runs jobs until `gate` opens, and remembers them."""

    def __init__(self, jobs: Jobs) -> None:
        self.jobs, self.begun, self.gate = jobs, list[str](), trio.Event()

    async def __call__(self, job_id: str) -> None:
        self.begun.append(job_id)
        await self.gate.wait()
        if job_id == "bug":
            raise ValueError


async def test_jobs_run_in_order_and_no_more_than_there_are_slots(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    jobs = Jobs(2)
    runs = Runs(jobs)
    for name in "abcd":
        jobs.send(name)
    nursery.start_soon(jobs.run, runs)
    await wait_all_tasks_blocked()
    # Trio starts tasks of one moment in any order.
    assert sorted(runs.begun) == ["a", "b"]
    runs.gate.set()
    await wait_all_tasks_blocked()
    assert sorted(runs.begun[2:]) == ["c", "d"]


async def test_a_job_that_is_sent_twice_runs_once(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    jobs = Jobs(1)
    runs = Runs(jobs)
    nursery.start_soon(jobs.run, runs)
    for name in ("a", "b", "a", "b"):
        jobs.send(name)
        await wait_all_tasks_blocked()
    runs.gate.set()
    await wait_all_tasks_blocked()
    assert runs.begun == ["a", "b"]


async def test_what_waits_can_be_withdrawn_and_what_runs_cannot(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    jobs = Jobs(1)
    runs = Runs(jobs)
    nursery.start_soon(jobs.run, runs)
    for name in "abc":
        jobs.send(name)
    await wait_all_tasks_blocked()
    assert [jobs.withdraw(name) for name in ("a", "b", "b", "nobody")] == [False, True, False, False]
    runs.gate.set()
    await wait_all_tasks_blocked()
    assert runs.begun == ["a", "c"]


async def test_a_job_that_steps_aside_leaves_its_slot_to_others(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    jobs = Jobs(1)
    runs = Runs(jobs)
    nursery.start_soon(jobs.run, runs)
    for name in "abc":
        jobs.send(name)
    await wait_all_tasks_blocked()
    jobs.step_aside("a")
    jobs.send("a")  # it still runs
    await wait_all_tasks_blocked()
    assert runs.begun == ["a", "b"]
    jobs.step_aside("nobody")
    await wait_all_tasks_blocked()
    assert runs.begun == ["a", "b"]
    runs.gate.set()
    await wait_all_tasks_blocked()
    assert runs.begun == ["a", "b", "c"]


async def test_after_a_crash_the_same_jobs_can_be_run_again(autojump_clock: MockClock) -> None:
    jobs = Jobs(2)
    runs = Runs(jobs)
    for name in ("bug", "a", "b"):
        jobs.send(name)
    runs.gate.set()
    with pytest.raises(ExceptionGroup):
        await jobs.run(runs)
    jobs.clear()
    jobs.send("a")
    with trio.move_on_after(1.0):
        await jobs.run(runs)
    assert runs.begun[-1] == "a"


# -- calls that may be the server's death -----------------------------------------------------------


async def test_a_suspect_gets_its_turn_however_busy_the_others_are(autojump_clock: MockClock) -> None:
    exposures = Exposures()
    out: set[int] = set()

    async def neighbour(number: int) -> None:
        await trio.sleep(0.5 * number)
        while True:
            async with exposures.one(alone=False):
                out.add(number)
                await trio.sleep(1.0)
                out.discard(number)
            await trio.sleep(0.05)

    async with trio.open_nursery() as nursery:
        for number in range(3):
            nursery.start_soon(neighbour, number)
        await trio.sleep(10.0)
        for _ in range(5):
            with trio.move_on_after(0.3):  # one that gives up leaves nothing behind
                async with exposures.one(alone=True):
                    pass
            with trio.fail_after(2.0):
                async with exposures.one(alone=True):
                    assert out == set()
                    await trio.sleep(1.0)
                    assert out == set()
        await trio.sleep(1.1)
        assert out, "the others go on"
        nursery.cancel_scope.cancel()


async def test_jobs_that_cannot_run_yet_are_coming_and_those_expected_come_last(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    jobs = Jobs(1)
    runs = Runs(jobs)
    jobs.send("a")
    assert jobs.coming() == []  # it can
    nursery.start_soon(jobs.run, runs)
    await wait_all_tasks_blocked()
    jobs.expect("a2")
    jobs.send("b")
    jobs.expect("b")
    assert jobs.coming() == ["b", "a2"]
    await wait_all_tasks_blocked()
    assert runs.begun == ["a"]
    runs.gate.set()
    await wait_all_tasks_blocked()
    assert runs.begun == ["a", "b"]  # an expected one is not run before it is sent
    jobs.send("a2")
    assert jobs.coming() == []
    await wait_all_tasks_blocked()
    assert runs.begun == ["a", "b", "a2"]


async def test_whoever_waits_for_a_change_hears_of_each(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    jobs = Jobs(1)
    heard = 0

    async def listen() -> None:
        nonlocal heard
        while True:
            await jobs.changed()
            heard += 1

    nursery.start_soon(listen)
    await wait_all_tasks_blocked()
    for change in (partial(jobs.send, "a"), partial(jobs.expect, "b")):
        before = heard
        change()
        await wait_all_tasks_blocked()
        assert heard == before + 1
