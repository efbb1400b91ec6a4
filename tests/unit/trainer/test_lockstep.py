"""What the leader of several ranks does, alone in a group of one. With others: test_megatron.py."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from structlog.testing import capture_logs

from tink.errors import UserError
from tink.trainer import progress
from tink.trainer.engines import lockstep
from tink.wire.tink_train import (
    CreateModel,
    Forward,
    ForwardBackward,
    LoadState,
    OptimStep,
    SampleRequest,
)

megatron = pytest.importorskip("tink.trainer.engines.megatron", exc_type=ModuleNotFoundError)

STEP = OptimStep()


class Engine:
    """Its step does what it is told to; the rest is nobody's."""

    def __init__(self) -> None:
        self.does: Any = lambda: {"step": 1.0}

    def optim_step(self, model_id: str, op: OptimStep) -> dict[str, float]:
        assert (model_id, op) == ("m", STEP)
        return self.does()

    def snapshot(self, model_id: str, path: str, book: bytes, origin: str) -> list[Any]:
        return [model_id, path, book, origin]


class Ended(BaseException):
    pass


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The exit statuses with which the process would have ended."""
    statuses: list[int] = []

    def end(status: int) -> None:
        statuses.append(status)
        raise Ended

    monkeypatch.setattr(lockstep.os, "_exit", end)
    return statuses


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the others are told, as they understand it."""
    found: list[Any] = []
    honest = lockstep._tell

    def tell(group: Any, message: bytes) -> None:
        found.append(lockstep._understand(message))
        honest(group, message)

    monkeypatch.setattr(lockstep, "_tell", tell)
    return found


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def lock() -> threading.Lock:
    return threading.Lock()


@pytest.fixture
def leader(engine: Engine, lock: threading.Lock) -> lockstep.Leader:
    megatron.join()
    return lockstep.Leader(engine, lockstep.gather(), lock)


def test_the_others_are_told_what_is_done(leader: lockstep.Leader, told: list[Any]) -> None:
    assert leader.optim_step("m", STEP) == {"step": 1.0}
    assert told == [("optim_step", ("m", STEP))]


def test_every_kind_of_call_can_be_told(
    leader: lockstep.Leader, engine: Any, told: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [
        ("create", ("m", CreateModel(4, 8.0, 7, source="s"))),
        ("forward", ("m", Forward(b"\x00data"))),
        ("forward_backward", ("m", ForwardBackward(b""))),
        ("load_state", ("m", LoadState("p", optimizer=True))),
        ("remove", ("m",)),
        ("restore", ("m", "p")),
        ("sample", (SampleRequest("s", [1, 2], 1, adapter="a", temperature=0.5),)),
    ]
    for name, args in calls:

        def perform(*_: Any) -> None: ...

        perform.__name__ = name
        monkeypatch.setattr(engine, name, perform, raising=False)
        getattr(leader, name)(*args)
    assert told == calls


def test_what_is_written_is_written_once(leader: lockstep.Leader, told: list[Any]) -> None:
    assert leader.snapshot("m", "path", b"book", "origin") == ["m", "path", b"book", "origin"]
    assert told == []


def test_what_the_user_did_wrong_is_raised_and_ends_nothing(
    leader: lockstep.Leader, engine: Engine, lock: threading.Lock
) -> None:
    def fail() -> None:
        raise UserError("no such step")

    engine.does = fail
    with pytest.raises(UserError, match="no such step"):
        leader.optim_step("m", STEP)
    assert not lock.locked()


@pytest.mark.parametrize("error", [RuntimeError("connection closed"), MemoryError()])
def test_anything_else_ends_the_process(
    leader: lockstep.Leader, engine: Engine, ended: list[int], error: Exception
) -> None:
    def fail() -> None:
        raise error

    engine.does = fail
    with capture_logs() as logs, pytest.raises(Ended):
        leader.optim_step("m", STEP)
    assert ended == [1]
    assert [(line["event"], line["exc_info"]) for line in logs] == [("a rank has failed", error)]


def test_who_disagrees_with_the_others_ends_the_process(
    leader: lockstep.Leader, ended: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lockstep, "_gather", lambda mine: [mine, "another"])
    with capture_logs() as logs, pytest.raises(Ended):
        leader.optim_step("m", STEP)
    assert ended == [1]
    assert [(line["event"], line["method"]) for line in logs] == [("the ranks disagree", "optim_step")]


def test_a_rank_whose_leader_is_gone_ends_at_once_and_well(
    engine: Engine, ended: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the interpreter's own way out, gloo's threads sometimes abort the process."""

    def hear(group: Any) -> bytes:
        raise RuntimeError("Connection closed by peer\nand more")

    monkeypatch.setattr(lockstep, "_hear", hear)
    with capture_logs() as logs, pytest.raises(Ended):
        lockstep.follow(engine, None)
    assert ended == [0]
    assert [line["reason"] for line in logs] == ["Connection closed by peer"]


def test_one_call_at_a_time_and_who_waits_is_alive(
    leader: lockstep.Leader, lock: threading.Lock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lockstep, "TURN_BEAT_SECONDS", 0.001)
    beaten = threading.Event()

    class Waiting(progress.Work):
        def beat(self) -> None:
            beaten.set()

    def call() -> None:
        with progress.working(Waiting(Clock(), "m", 1, "j")):
            found.append(leader.optim_step("m", STEP))

    found: list[Any] = []
    thread = threading.Thread(target=call)
    with lock:
        thread.start()
        assert beaten.wait(20)
        assert found == []
    thread.join(20)
    assert found == [{"step": 1.0}]
