"""The protocol's table, row by row, and its invariants under any sequence of calls."""

from __future__ import annotations

from collections import defaultdict

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tink.limits import TRAINER_AHEAD, TRAINER_KEPT
from tink.trainer.books import CANCELLED, Book, Books, Outcome, Refused
from tink.wire.tink_train import CreateModel, Op, OpRequest, OpResult, OptimStep, RemoveModel, Skip

CREATE = CreateModel(rank=4, alpha=8.0, seed=1)


def request(op_no: int, op: Op | None = None, **fields: object) -> OpRequest:
    op = op or (CREATE if op_no == 1 else OptimStep())
    defaults = {"incarnation": "i", "lease": 1, "model_id": "m", "job_id": f"j{op_no}"}
    return OpRequest(op_no=op_no, op=op, **defaults | fields)


def done(one: OpRequest) -> Outcome:
    return Outcome(one.job_id, "done", OpResult(metrics={"op": float(one.op_no)}))


def run(books: Books, *requests: OpRequest) -> None:
    for one in requests:
        assert books.decide(one) == "accept"
        books.accept(one)
        assert books.start(one.model_id)
        books.finish(one.model_id, done(one))


def refusal(call: object, *args: object) -> tuple[int, str, int | None]:
    with pytest.raises(Refused) as caught:
        call(*args)
    return caught.value.status, caught.value.refusal.error, caught.value.refusal.applied


@pytest.fixture
def books() -> Books:
    return Books("i")


def test_another_incarnation_is_stale(books: Books) -> None:
    with pytest.raises(Refused) as caught:
        books.admit("before", 1)
    assert (caught.value.status, caught.value.refusal.error) == (412, "stale_incarnation")
    assert caught.value.refusal.incarnation == "i"


def test_an_older_lease_is_fenced(books: Books) -> None:
    books.admit("i", 5)
    assert refusal(books.admit, "i", 4)[:2] == (409, "fenced")
    books.admit("i", 5)


def test_ops_run_in_order_and_repeats_are_replayed(books: Books) -> None:
    run(books, request(1), request(2))
    assert books.decide(request(1)) == "replay"
    reply = books.reply("m", 2, replayed=True)
    assert (reply.state, reply.applied, reply.replayed) == ("done", 2, True)
    assert reply.result == OpResult(metrics={"op": 2.0})


def test_an_open_op_is_joined(books: Books) -> None:
    books.accept(request(1))
    books.accept(request(2))
    books.start("m")
    assert [books.decide(request(n)) for n in (1, 2)] == ["join", "join"]
    assert [books.reply("m", n).state for n in (1, 2)] == ["running", "queued"]


def test_an_acked_result_is_gone(books: Books) -> None:
    run(books, request(1), request(2))
    books.ack("m", 1)
    assert refusal(books.decide, request(1)) == (410, "result_gone", 2)
    assert refusal(books.reply, "m", 1) == (410, "result_gone", 2)
    assert books.decide(request(2)) == "replay"


def test_an_op_number_belongs_to_one_job(books: Books) -> None:
    run(books, request(1))
    books.accept(request(2))
    assert refusal(books.decide, request(1, job_id="x")) == (422, "op_reused", 1)
    assert refusal(books.decide, request(2, job_id="x")) == (422, "op_reused", 1)


def test_a_gap_tells_what_was_applied(books: Books) -> None:
    run(books, request(1))
    books.accept(request(2))
    assert refusal(books.decide, request(4)) == (409, "gap", 1)
    assert books.decide(request(3)) == "accept"


def test_a_model_that_is_not_there(books: Books) -> None:
    assert refusal(books.decide, request(1, OptimStep()))[:2] == (404, "no_model")
    assert refusal(books.decide, request(2, CREATE)) == (409, "gap", 0)
    assert refusal(books.reply, "m", 1)[:2] == (404, "no_model")
    assert refusal(books.book, "m")[:2] == (404, "no_model")


def test_a_removed_model_stays_removed_and_its_numbers_consumed(books: Books) -> None:
    run(books, request(1), request(2, RemoveModel()))
    assert books.decide(request(2, RemoveModel())) == "replay"
    assert refusal(books.decide, request(3)) == (404, "no_model", 2)
    assert not books.state().models["m"].exists


def test_a_removal_leaves_out_what_was_not_applied(books: Books) -> None:
    run(books, request(1))
    books.accept(request(2))
    assert refusal(books.decide, request(5, RemoveModel()))[:2] == (429, "busy")
    books.start("m")
    books.finish("m", Outcome("j2", "done"))
    assert books.decide(request(5, RemoveModel())) == "accept"
    books.accept(request(5, RemoveModel()))
    assert books.decide(request(5, RemoveModel())) == "join"
    assert refusal(books.decide, request(6, CREATE))[:2] == (429, "busy")
    books.start("m")
    books.finish("m", Outcome("j5", "done"))
    assert books.state().models["m"].applied == 5
    assert refusal(books.decide, request(3))[:2] == (410, "result_gone")
    run(books, request(6, CREATE))


def test_a_removal_across_a_gap_that_fails_has_left_nothing_out(books: Books) -> None:
    run(books, request(1))
    books.accept(request(3, RemoveModel()))
    books.cancel("m", 3)
    assert not books.start("m")
    books.finish("m", Outcome("j3", "failed", failure=CANCELLED))
    assert books.reply("m", 3).state == "failed"
    assert books.state().models["m"].applied == 1
    run(books, request(2), request(3, Skip()))
    assert books.state().models["m"].applied == 3


def test_a_failed_op_consumes_its_number(books: Books) -> None:
    books.accept(request(1))
    books.start("m")
    books.finish("m", Outcome("j1", "failed", failure=CANCELLED))
    assert books.reply("m", 1).state == "failed"
    # Its creation failed, so there is no model; a later creation may succeed.
    assert refusal(books.decide, request(2)) == (404, "no_model", 1)
    run(books, request(2, CREATE), request(3))


def test_a_skip_needs_no_model_and_makes_none(books: Books) -> None:
    run(books, request(1, Skip()))
    assert books.state().models["m"].applied == 1
    assert refusal(books.decide, request(2)) == (404, "no_model", 1)
    run(books, request(2, CREATE))


def test_a_full_queue_is_busy(books: Books) -> None:
    run(books, request(1))
    for n in range(TRAINER_AHEAD + 1):
        books.accept(request(2 + n))
    with pytest.raises(Refused) as caught:
        books.decide(request(TRAINER_AHEAD + 3))
    assert (caught.value.status, caught.value.refusal.retryable) == (429, True)
    assert books.decide(request(2)) == "join"


def test_a_worker_that_never_acks_is_held_back(books: Books) -> None:
    run(books, *(request(n) for n in range(1, TRAINER_KEPT + 1)))
    assert refusal(books.decide, request(TRAINER_KEPT + 1))[:2] == (429, "busy")
    books.ack("m", TRAINER_KEPT - 1)
    assert books.decide(request(TRAINER_KEPT + 1)) == "accept"


def test_a_cancelled_op_fails_in_its_turn(books: Books) -> None:
    books.accept(request(1))
    books.accept(request(2))
    assert books.start("m")
    books.cancel("m", 1)
    books.cancel("m", 2)
    assert books.reply("m", 1).state == "running"
    assert books.reply("m", 2).failure == CANCELLED
    books.finish("m", done(request(1)))
    assert not books.start("m"), "it must not run"


def test_an_op_that_was_never_sent(books: Books) -> None:
    run(books, request(1))
    assert refusal(books.reply, "m", 2) == (404, "no_op", 1)


def test_restoring_onto_an_absent_or_older_model_only(books: Books) -> None:
    book = Book(3, {3: done(request(3))})
    with books.restoring("m", book):
        assert refusal(books.decide, request(1))[:2] == (429, "busy")
    assert books.decide(request(3)) == "replay"
    assert refusal(books.restoring("m", book).__enter__) == (409, "not_behind", 3)
    run(books, request(4))
    assert refusal(books.restoring("m", book).__enter__) == (409, "not_behind", 4)
    with books.restoring("m", Book(9, {})):
        pass
    assert books.state().models["m"].applied == 9


def test_a_failed_restore_changes_nothing(books: Books) -> None:
    run(books, request(1))
    with pytest.raises(OSError, match="disk"), books.restoring("m", Book(5, {})):
        raise OSError("disk")
    assert books.decide(request(2)) == "accept"


def test_a_book_survives_its_encoding(books: Books) -> None:
    run(books, request(1), request(2))
    book = books.book("m")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(book), type=Book) == book


class AnyCalls(RuleBasedStateMachine):
    """Two models, repeats, wrong numbers, failures, acks, cancels, snapshots and crashes, in any order.

    A job's number is chosen once, as the worker's journal does; `journal` holds what each job must be."""

    def __init__(self) -> None:
        super().__init__()
        self.books = Books("i")
        self.runs: dict[tuple[str, int], int] = defaultdict(int)
        self.ended: dict[tuple[str, int], Outcome] = {}
        self.acked: dict[str, int] = defaultdict(int)
        self.snapshots: dict[str, Book] = {}

    models = st.sampled_from(["a", "b"])

    def applied(self, model: str) -> int:
        state = self.books.state().models.get(model)
        return state.applied if state else 0

    @rule(model=models, ahead=st.integers(-3, 8), same_job=st.booleans(), create=st.booleans())
    def send(self, model: str, ahead: int, same_job: bool, create: bool) -> None:
        op_no = self.applied(model) + ahead
        op: Op = CREATE if create else OptimStep()
        job = f"j{op_no}" if same_job else "other"
        one = request(op_no, op, model_id=model, job_id=job)
        before = self.books.state()
        try:
            verdict = self.books.decide(one)
        except Refused as refused:
            assert self.books.state() == before, "a refusal changes nothing"
            if refused.refusal.error == "op_reused":
                assert not same_job
            return
        if verdict == "accept":
            self.books.accept(msgspec.structs.replace(one, job_id=f"j{op_no}"))
        elif verdict == "replay":
            found = self.books.reply(model, op_no)
            expected = self.ended[model, op_no]
            assert (found.state, found.result, found.failure) == (
                expected.state,
                expected.result,
                expected.failure,
            )
        assert verdict == "accept" or same_job

    @rule(model=models, fails=st.booleans())
    def work(self, model: str, fails: bool) -> None:
        head = self.books.head(model)
        if head is None:
            return
        if self.books.start(model):
            self.runs[model, head.op_no] += 1
            outcome = Outcome(head.job_id, "failed", failure=CANCELLED) if fails else done(head)
        else:
            outcome = Outcome(head.job_id, "failed", failure=CANCELLED)
        assert head.op_no == self.applied(model) + 1
        self.books.finish(model, outcome)
        assert self.applied(model) == head.op_no
        self.ended[model, head.op_no] = outcome

    @rule(model=models, back=st.integers(0, 3))
    def ack(self, model: str, back: int) -> None:
        up_to = max(self.applied(model) - back, 0)
        self.books.ack(model, up_to)
        self.acked[model] = max(self.acked[model], up_to)

    @rule(model=models, ahead=st.integers(0, 4))
    def cancel(self, model: str, ahead: int) -> None:
        if model in self.books.state().models:
            self.books.cancel(model, self.applied(model) + ahead)

    @rule(model=models)
    def snapshot(self, model: str) -> None:
        state = self.books.state().models.get(model)
        if state and state.exists:
            self.snapshots[model] = self.books.book(model)

    @precondition(lambda self: self.snapshots)
    @rule()
    def crash_and_restore(self) -> None:
        """What was applied after the snapshot is gone on both sides, and may run again."""
        self.books = Books("i")
        self.acked.clear()
        for model in ("a", "b"):
            applied = 0
            if book := self.snapshots.get(model):
                with self.books.restoring(model, book):
                    pass
                applied = book.applied
                self.acked[model] = min((*book.kept, applied + 1)) - 1
            for key in [key for key in self.ended if key[0] == model and key[1] > applied]:
                del self.ended[key]
                self.runs.pop(key, None)

    @invariant()
    def no_op_runs_twice(self) -> None:
        assert all(count == 1 for count in self.runs.values())

    @invariant()
    def ended_is_dense_and_kept_until_acked(self) -> None:
        for model, state in self.books.state().models.items():
            ended = {number for name, number in self.ended if name == model}
            assert ended == set(range(1, state.applied + 1))
            assert state.kept == list(range(self.acked[model] + 1, state.applied + 1))
            assert state.queued == list(range(state.applied + 1, state.applied + 1 + len(state.queued)))
            assert len(state.queued) <= TRAINER_AHEAD + 1


TestAnyCalls = AnyCalls.TestCase
TestAnyCalls.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
