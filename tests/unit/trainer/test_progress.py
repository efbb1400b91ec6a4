"""A long operation that goes on can be told from one that hangs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import trio
from trainer_kit import body, supervised

from tink.trainer import progress
from tink.trainer.engines.lora_engine import LoraEngine
from tink.wire.tink_train import CreateModel, ForwardBackward, SampleRequest


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_server_is_idle_between_its_works_and_not_before_the_first(clock: Clock) -> None:
    idleness = progress.Idleness(clock)
    clock.now = 10.0
    with idleness.interrupted():
        assert idleness.take() == 0.0
        clock.now = 11.0
        with idleness.interrupted():  # beside it
            clock.now = 12.0
    clock.now = 15.0
    with idleness.interrupted():  # a snapshot, say
        clock.now = 20.0
    clock.now = 21.0
    with idleness.interrupted():
        assert idleness.take() == 3.0 + 1.0
        assert idleness.take() == 0.0


@pytest.fixture
def beats(clock: Clock) -> Iterator[list[float]]:
    """One for each sign of life."""
    found: list[float] = []

    class Counting(progress.Work):
        def beat(self) -> None:
            super().beat()
            found.append(clock())

    with progress.working(Counting(clock, "m", 1, "j")):
        yield found


def test_work_is_idle_since_its_last_beat_or_its_begin(clock: Clock) -> None:
    work = progress.Work(clock, "m", 3, "j")
    clock.now = 5.0
    assert work.running().idle == 5.0
    with progress.working(work):
        progress.beat()
    clock.now = 7.0
    running = work.running()
    assert (running.model_id, running.op_no, running.job_id) == ("m", 3, "j")
    assert (running.seconds, running.idle) == (7.0, 2.0)


def test_a_beat_outside_of_any_work_is_nothing() -> None:
    progress.beat()


async def test_a_thread_beats_for_the_work_that_started_it_and_no_other(clock: Clock) -> None:
    one, other = (progress.Work(clock, name, 1, name) for name in ("one", "other"))
    clock.now = 4.0

    async def run(work: progress.Work, beating: bool) -> None:
        with progress.working(work):
            await trio.to_thread.run_sync(progress.beat if beating else int)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, one, True)
        nursery.start_soon(run, other, False)
    assert (one.running().idle, other.running().idle) == (0.0, 4.0)


def test_the_engine_beats_with_each_micro_batch_and_each_token(
    engine: LoraEngine, beats: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.create("m", CreateModel(rank=4, alpha=8.0, seed=1))
    assert beats == []
    monkeypatch.setattr(engine, "_micro_batch_tokens", 32)
    engine.forward_backward("m", ForwardBackward(body(supervised(lengths=(20, 20, 20)))))
    assert len(beats) == 3
    before = len(beats)
    engine.sample(SampleRequest("s", [1, 2], seed=0, max_tokens=7, ignore_eos=True))
    assert len(beats) - before == 7
