"""Group commit: acknowledgement follows commit, and nobody waits for ever."""

from __future__ import annotations

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock, assert_checkpoints, wait_all_tasks_blocked

from tests.unit.journal.journal_kit import InlineWorld, cancel_at
from tink.errors import JournalUnavailable
from tink.journal.commits import GroupCommit
from tink.limits import SLOW_COMMIT_SECONDS

pytestmark = pytest.mark.on_files


class Disk:
    """Commits in memory; `error` is raised instead, once it is set."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.error: BaseException | None = None
        self.applied = 0

    def commit(self, items: list[str]) -> None:
        if self.error is not None:
            raise self.error
        self.batches.append(list(items))

    def then(self) -> None:
        self.applied += 1

    @property
    def items(self) -> list[str]:
        return [item for batch in self.batches for item in batch]

    def writer(self, world: InlineWorld, *, max_bytes: int = 100, max_items: int = 10) -> GroupCommit[str]:
        return GroupCommit(
            self.commit, world, name="disk", max_bytes=max_bytes, max_items=max_items, then=self.then
        )


async def test_nobody_is_told_before_the_commit_has_ended(autojump_clock: MockClock) -> None:
    disk, world = Disk(), InlineWorld()
    writer = disk.writer(world)
    world.block = trio.Event()
    told: list[str] = []

    async def submit(item: str) -> None:
        await writer.submit([item], 1)
        assert item in disk.items
        assert disk.applied > 0
        told.append(item)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.run)
        async with trio.open_nursery() as clients:
            for item in "abc":
                clients.start_soon(submit, item)
            await wait_all_tasks_blocked()
            await trio.sleep(1000)
            assert (told, disk.items) == ([], [])
            world.block.set()
        assert sorted(told) == ["a", "b", "c"]
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("error", [OSError("disk full"), JournalUnavailable("disk full")])
async def test_a_failed_commit_tells_every_waiter_and_ends_the_writer(
    autojump_clock: MockClock, error: Exception
) -> None:
    """Those in the batch, those in the next one, those who wait for room, and those who come later."""
    disk, world = Disk(), InlineWorld()
    writer = disk.writer(world, max_items=2)
    world.block = trio.Event()
    disk.error = error
    told: list[str] = []

    async def submit(item: str) -> None:
        with pytest.raises(JournalUnavailable, match="disk full"):
            await writer.submit([item], 1)
        told.append(item)

    with pytest.RaisesGroup(JournalUnavailable):
        async with trio.open_nursery() as nursery:
            for item in "abcdef":
                nursery.start_soon(submit, item)
            await wait_all_tasks_blocked()
            nursery.start_soon(writer.run)
            await wait_all_tasks_blocked()
            world.block.set()
    assert sorted(told) == list("abcdef")
    assert disk.items == []
    disk.error = None
    with pytest.raises(JournalUnavailable):
        await writer.submit(["late"], 1)
    assert disk.items == []


async def test_an_interrupted_commit_is_never_taken_for_a_success(autojump_clock: MockClock) -> None:
    disk = Disk()
    writer = disk.writer(InlineWorld())
    disk.error = KeyboardInterrupt()

    async def submit() -> None:
        with pytest.raises(JournalUnavailable), trio.CancelScope(shield=True):
            await writer.submit(["a"], 1)

    with pytest.RaisesGroup(KeyboardInterrupt):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.run)
            nursery.start_soon(submit)


async def test_a_submit_after_the_writer_has_ended_is_refused(autojump_clock: MockClock) -> None:
    disk = Disk()
    writer = disk.writer(InlineWorld())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.run)
        await writer.submit(["a"], 1)
        nursery.cancel_scope.cancel()
    with trio.fail_after(1), pytest.raises(JournalUnavailable):
        await writer.submit(["b"], 1)


async def test_what_was_submitted_before_the_end_is_committed(autojump_clock: MockClock) -> None:
    disk, world = Disk(), InlineWorld()
    writer = disk.writer(world)

    async def submit(item: str) -> None:
        with trio.CancelScope(shield=True):
            await writer.submit([item], 1)

    async with trio.open_nursery() as clients:
        async with trio.open_nursery() as nursery:
            world.block = trio.Event()
            nursery.start_soon(writer.run)
            clients.start_soon(submit, "first")
            await wait_all_tasks_blocked()
            clients.start_soon(submit, "second")  # while the first is being committed
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
            world.block.set()
        assert disk.batches == [["first"], ["second"]]


async def test_many_waiters_need_few_commits(autojump_clock: MockClock) -> None:
    disk = Disk()
    writer = disk.writer(InlineWorld(), max_bytes=10_000, max_items=1000)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.run)
        async with trio.open_nursery() as clients:
            for i in range(500):
                clients.start_soon(writer.submit, [str(i)], 1)
        nursery.cancel_scope.cancel()
    assert sorted(disk.items) == sorted(map(str, range(500)))
    assert len(disk.batches) <= 3


@pytest.mark.parametrize(
    ("limits", "size"), [({"max_items": 5}, 1), ({"max_bytes": 50}, 10)], ids=["rows", "bytes"]
)
async def test_a_full_batch_makes_the_next_one_wait(
    autojump_clock: MockClock, limits: dict[str, int], size: int
) -> None:
    disk, world = Disk(), InlineWorld()
    writer = disk.writer(world, **limits)
    world.block = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.run)
        async with trio.open_nursery() as clients:
            for i in range(23):
                clients.start_soon(writer.submit, [str(i)], size)
            await wait_all_tasks_blocked()
            assert len(writer._open.items) <= 5
            world.block.set()
        nursery.cancel_scope.cancel()
    assert len(disk.items) == 23
    assert max(map(len, disk.batches)) <= 5


async def test_one_that_is_larger_than_a_batch_goes_alone(autojump_clock: MockClock) -> None:
    disk = Disk()
    writer = disk.writer(InlineWorld(), max_bytes=10)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.run)
        with trio.fail_after(10):
            await writer.submit(["large"], 1000)
        nursery.cancel_scope.cancel()
    assert disk.items == ["large"]


async def test_items_of_one_submit_are_in_one_batch(autojump_clock: MockClock) -> None:
    disk = Disk()
    writer = disk.writer(InlineWorld(), max_items=4)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.run)
        async with trio.open_nursery() as clients:
            for name in "abcdefgh":
                clients.start_soon(writer.submit, [f"{name}{i}" for i in range(3)], 1)
        nursery.cancel_scope.cancel()
    for batch in disk.batches:
        for name in {item[0] for item in batch}:
            assert [item for item in batch if item[0] == name] == [f"{name}{i}" for i in range(3)]


async def test_nothing_is_committed_at_once(autojump_clock: MockClock) -> None:
    disk = Disk()
    with assert_checkpoints():
        await disk.writer(InlineWorld()).submit([], 0)
    assert disk.batches == []


async def test_a_submit_that_is_cancelled_anywhere_is_whole_or_nothing_and_the_writer_goes_on(
    autojump_clock: MockClock,
) -> None:
    for step in range(1, 50):
        disk, world = Disk(), InlineWorld()
        writer = disk.writer(world, max_items=2)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.run)
            with trio.fail_after(10):
                async with trio.open_nursery() as clients:
                    # Fills the batch, so that the submit waits for room as well.
                    clients.start_soon(writer.submit, ["x", "y"], 1)
                    clients.start_soon(writer.submit, ["z", "w"], 1)
                    await trio.lowlevel.checkpoint()
                    cancelled = await cancel_at(step, lambda w=writer: w.submit(["a", "b"], 1))
                await writer.submit(["after"], 1)
            nursery.cancel_scope.cancel()
        assert [i for i in disk.items if i in "ab"] in ([], ["a", "b"])
        assert {"after", "x", "y", "z", "w"} <= set(disk.items)
        if not cancelled:
            assert step > 1
            return
    raise AssertionError("it never ran to its end")


async def test_a_writer_that_is_cancelled_anywhere_tells_everyone_the_truth(
    autojump_clock: MockClock,
) -> None:
    for step in range(1, 60):
        disk = Disk()
        writer = disk.writer(InlineWorld(), max_items=2)
        told: dict[str, bool] = {}

        async def submit(
            item: str, writer: GroupCommit[str] = writer, told: dict[str, bool] = told
        ) -> None:
            try:
                await writer.submit([item], 1)
                told[item] = True
            except JournalUnavailable:
                told[item] = False

        async with trio.open_nursery() as nursery:
            for item in "abcdef":
                nursery.start_soon(submit, item)

            async def run(step: int = step, writer: GroupCommit[str] = writer) -> None:
                await cancel_at(step, writer.run)

            with trio.move_on_after(5):
                await run()
            with trio.fail_after(5):
                await wait_all_tasks_blocked()
        assert sorted(told) == list("abcdef")
        assert {item for item, kept in told.items() if kept} <= set(disk.items)


async def test_a_commit_that_hangs_is_told_of_once_while_it_does(autojump_clock: MockClock) -> None:
    disk, world = Disk(), InlineWorld()
    writer = disk.writer(world)
    world.block = trio.Event()
    with capture_logs() as lines:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.run)
            nursery.start_soon(writer.watch)
            nursery.start_soon(writer.submit, ["a"], 1)
            await trio.sleep(0.9 * SLOW_COMMIT_SECONDS)
            assert lines == []
            await trio.sleep(5 * SLOW_COMMIT_SECONDS)
            assert [line["event"] for line in lines] == ["a commit takes long"]
            world.block.set()
            await trio.sleep(5 * SLOW_COMMIT_SECONDS)
            nursery.cancel_scope.cancel()
    assert len(lines) == 1
    assert disk.items == ["a"]
