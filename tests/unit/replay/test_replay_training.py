"""The schedule of a replay: what is sent again, what only consumes its number, where it begins, and what is
refused; and how what comes back is compared."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import msgspec
import pytest

from tink.domain import rows
from tink.domain.events import TrainerStarted
from tink.domain.ledger import Ledger
from tink.errors import StartupError, UserError
from tink.replay.comparison import compare, gives_results
from tink.replay.server import differences
from tink.replay.training import Change, Edits, Schedule, Turn, schedule
from tink.wire import tink_train
from tink.wire import tinker_pb2 as pb

MODEL = "s:train:0"
# Two gradients and a step, three times; the number of each is its place.
OPS = (
    *("create_model", "forward_backward", "forward_backward", "optim_step"),
    *("forward", "save_weights", "forward_backward", "optim_step"),
    *("load_weights", "forward_backward", "optim_step", "forward", "save_weights_for_sampler"),
)
STEPS = {1: 4, 2: 8, 3: 11}


def job(op_no: int, op: str, state: rows.JobState = "done", **more: Any) -> rows.Job:
    fields: dict[str, Any] = {
        "job_id": f"{MODEL}:{op_no - 1}",
        "tenant": "t",
        "op": op,
        "state": state,
        "session_id": "s",
        "model_id": MODEL,
        "sampler_id": None,
        "seq_id": op_no - 1,
        "model_seq_id": None,
        "op_no": op_no,
        "directory": "d/saved" if op == "load_weights" else None,
        "accepted_seq": 1,
        "submitted_at": 1.0,
        "body_sha256": None,
        "body_bytes": 0,
        "codec": "identity",
        "seed": None,
        "num_samples": None,
    }
    return rows.Job(**fields | more)


def run(failed: tuple[int, ...] = ()) -> list[rows.Job]:
    return [job(op_no, op, "failed" if op_no in failed else "done") for op_no, op in enumerate(OPS, 1)]


def snapshot(op_no: int) -> rows.Snapshot:
    return rows.Snapshot(
        snapshot_id=f"{MODEL}#{op_no}",
        tenant="t",
        model_id=MODEL,
        op_no=op_no,
        directory=f"d/{op_no}",
        size_bytes=1,
        created_at=1.0,
    )


def planned(*snapshots: int, jobs: list[rows.Job] | None = None, **options: Any) -> Schedule:
    """`lost`: numbers of operations."""
    lost = {f"{MODEL}:{op_no - 1}": "it is gone" for op_no in options.pop("lost", ())}
    found = [snapshot(op_no) for op_no in snapshots]
    return schedule(run() if jobs is None else jobs, found, lost, model_id=MODEL, **options)


def sent(made: Schedule) -> list[int]:
    return [turn.op_no for turn in made.turns if turn.filler is None]


def by_number(made: Schedule) -> dict[int, Turn]:
    return {turn.op_no: turn for turn in made.turns}


# -- what is sent -----------------------------------------------------------------------------------


def test_each_number_is_sent_in_order_up_to_the_last_step_and_no_further() -> None:
    made = planned()
    assert [turn.op_no for turn in made.turns] == list(range(1, 12))
    assert (made.last, made.step, made.steps, made.begun, made.start) == (11, 3, 3, 0, None)


@pytest.mark.parametrize("step", STEPS)
def test_a_step_counts_the_models_own_optimizer_steps(step: int) -> None:
    made = planned(to=step)
    assert (made.last, made.step) == (STEPS[step], step)
    assert [turn.op_no for turn in made.turns if turn.job.op == "optim_step"] == list(STEPS.values())[:step]


def test_a_step_that_failed_is_none() -> None:
    made = planned(jobs=run(failed=(4,)), to=1)
    assert made.last == STEPS[2]
    assert by_number(made)[4].filler == "failed"


def test_each_operation_belongs_to_the_step_that_it_leads_to() -> None:
    assert [turn.step for turn in planned().turns] == [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]


def test_what_failed_or_changes_nothing_only_consumes_its_number_but_forward_is_done_again() -> None:
    made = planned(jobs=run(failed=(3,)))
    assert sent(made) == [1, 2, 4, 5, 7, 8, 9, 10, 11]
    assert [turn.op_no for turn in made.turns if gives_results(turn)] == [2, 4, 5, 7, 8, 10, 11]


def test_it_reads_the_states_that_are_loaded_and_the_snapshot_that_it_begins_with() -> None:
    assert planned(to=2).directories == []
    assert planned().directories == ["d/saved"]
    assert planned(4, lost=(2,)).directories == ["d/4", "d/saved"]


def test_the_weights_are_what_is_exported_before_they_change() -> None:
    assert planned().export == f"{MODEL}:12"
    assert planned(to=1).export is None
    assert planned(jobs=run(failed=(13,))).export is None
    assert planned(edits=Edits((Change("eps", 1.0),))).export is None


def test_a_journal_with_a_gap_is_not_replayed() -> None:
    with pytest.raises(UserError, match="no operation 3"):
        planned(jobs=[one for one in run() if one.op_no != 3])


@pytest.mark.parametrize(("to", "jobs"), [(4, run()), (1, run()[:3]), (None, []), (None, run()[:3])])
def test_a_step_that_is_not_there_is_refused_with_how_many_there_are(
    to: int | None, jobs: list[rows.Job]
) -> None:
    has = "has 3 optimizer steps" if len(jobs) > 3 else "has no optimizer step"
    with pytest.raises(UserError, match=has):
        planned(jobs=jobs, to=to)


# -- what is lost -----------------------------------------------------------------------------------


def test_it_begins_with_the_first_snapshot_that_covers_what_is_lost() -> None:
    made = planned(2, 4, 8, lost=(2, 3))
    assert made.start == snapshot(4)
    assert [turn.op_no for turn in made.turns] == list(range(5, 12))
    assert made.begun == 1
    assert made.because == f"{MODEL}:1: it is gone; {MODEL}:2: it is gone"


def test_it_begins_with_the_first_operation_where_nothing_is_lost() -> None:
    assert planned(4, 8).start is None
    assert planned(4, 8, lost=(12,)).start is None  # behind the last step


def test_a_snapshot_of_the_step_itself_leaves_nothing_to_do() -> None:
    made = planned(8, lost=(7,), to=2)
    assert (made.turns, made.last, made.begun) == ((), 8, 2)


def test_a_forward_that_is_lost_is_left_out() -> None:
    made = planned(lost=(5,))
    assert (made.start, by_number(made)[5].filler) == (None, "it is gone")


@pytest.mark.parametrize("snapshots", [(), (2,), (11,)])
def test_without_a_snapshot_it_is_refused_and_says_what_is_lost(snapshots: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=f"{MODEL}:6: it is gone; no snapshot covers that") as caught:
        planned(*snapshots, lost=(7,), to=2)
    assert "\n" not in str(caught.value)


def test_from_the_start_means_from_the_start() -> None:
    with pytest.raises(UserError, match="leave --from-start out"):
        planned(4, lost=(2,), from_start=True)
    assert planned(4, from_start=True).start is None


# -- what if ----------------------------------------------------------------------------------------


def operation(made: Schedule, op_no: int, body: bytes = b"") -> tink_train.Op:
    ledger = Ledger()
    ledger.put(
        "models",
        rows.Model(
            model_id=MODEL,
            tenant="t",
            session_id="s",
            model_seq_id=0,
            created_at=1.0,
            last_request_at=1.0,
            rank=4,
            alpha=8.0,
            seed=1,
            train_attn=True,
            train_mlp=True,
            train_unembed=True,
        ),
    )
    return by_number(made)[op_no].operation(body, ledger, made.edits)


ADAM = msgspec.json.encode({"model_id": MODEL, "adam_params": {"learning_rate": 0.5, "beta1": 0.8}})


def test_operations_are_those_of_a_redo_and_forward_itself() -> None:
    made = planned()
    assert operation(made, 1) == tink_train.CreateModel(4, 8.0, 1)
    assert operation(made, 2, b"body") == tink_train.ForwardBackward(b"body")
    assert operation(made, 4, ADAM) == tink_train.OptimStep(learning_rate=0.5, beta1=0.8)
    assert operation(made, 5, b"body") == tink_train.Forward(b"body")
    assert operation(made, 6) == tink_train.Skip()


def test_a_parameter_is_changed_in_one_step_or_in_all() -> None:
    changes = (Change.parse("2:learning_rate=0.25"), Change.parse("eps=1e-3"))
    made = planned(edits=Edits(changes))
    assert operation(made, 4, ADAM) == tink_train.OptimStep(learning_rate=0.5, beta1=0.8, eps=1e-3)
    assert operation(made, 8, ADAM) == tink_train.OptimStep(learning_rate=0.25, beta1=0.8, eps=1e-3)
    plain = msgspec.json.encode({"model_id": MODEL})
    assert operation(made, 11, plain) == tink_train.OptimStep(eps=1e-3)


def test_a_change_that_cannot_be_is_refused_as_the_client_would_be() -> None:
    with pytest.raises(UserError, match="cannot be negative"):
        operation(planned(edits=Edits((Change("learning_rate", -1.0),))), 4, ADAM)


@pytest.mark.parametrize(
    "text", ["", "eps", "eps=", "momentum=1", "0.5:eps=1", "eps=x", "eps=nan", "eps=inf"]
)
def test_what_is_no_change_is_not_read(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Change.parse(text)


def test_what_is_dropped_consumes_its_number_and_needs_no_body() -> None:
    made = planned(edits=Edits(drops=frozenset({f"{MODEL}:1"})), lost=(2,))
    assert by_number(made)[2].filler == "dropped"
    assert made.start is None


@pytest.mark.parametrize(
    ("edits", "reason"),
    [
        (Edits(drops=frozenset({"x"})), "x is none of the operations that are replayed"),
        (Edits(drops=frozenset({f"{MODEL}:9"})), "none of the operations"),
        (Edits(drops=frozenset({f"{MODEL}:0"})), "makes the model"),
        (Edits((Change("eps", 1.0, 3),)), "step 3 is not replayed: 1 to 2 are"),
        (Edits((Change("eps", 1.0, 0),)), "step 0 is not replayed"),
    ],
)
def test_what_is_not_replayed_cannot_be_changed(edits: Edits, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        planned(to=2, edits=edits)


def test_what_a_snapshot_has_in_it_cannot_be_changed() -> None:
    for edits in (Edits((Change("eps", 1.0, 1),)), Edits(drops=frozenset({f"{MODEL}:2"}))):
        with pytest.raises(UserError, match="replayed"):
            planned(4, lost=(2,), edits=edits)


# -- comparing --------------------------------------------------------------------------------------


def output(*logprobs: float, loss: float = 1.5) -> bytes:
    message = pb.ForwardBackwardOutput(metrics={"loss:sum": loss})
    record = message.loss_fn_outputs.add(num_datums=1)
    record.fields["logprobs"].data = struct.pack(f"<{len(logprobs)}f", *logprobs)
    return message.SerializeToString(deterministic=True)


def turn(body: bytes, loss: float = 1.5) -> Turn:
    digest = hashlib.sha256(body).hexdigest()
    return Turn(job(2, "forward_backward", result_sha256=digest, loss_sum=loss), 2, 1)


def reply(body: bytes = b"", loss: float | None = 1.5, **metrics: float) -> tink_train.OpReply:
    result = tink_train.OpResult(body=body, loss=loss, metrics=metrics)
    return tink_train.OpReply("done", "i", MODEL, 2, 2, result=result)


def test_the_same_bits_are_the_same_whether_they_are_still_stored_or_not() -> None:
    body = output(-1.0, -2.0)
    for recorded in (body, None):
        found = compare(turn(body), reply(body), recorded)
        assert (found.same, found.recorded, found.now) == (True, 1.5, 1.5)
        assert not found.exceeds(0.0)


def test_a_difference_has_the_size_of_its_largest_number() -> None:
    then, now = output(-1.0, -2.0, -3.0), output(-1.0, -2.5, -3.25, loss=1.25)
    found = compare(turn(then), reply(now, 1.25), then)
    assert (found.same, found.loss, found.logprobs, found.metrics) == (False, 0.25, 0.5, None)
    assert (found.recorded, found.now) == (1.5, 1.25)
    assert [found.exceeds(tolerance) for tolerance in (0.0, 0.4, 0.5, 1.0)] == [True, True, False, False]


def test_other_bits_of_the_same_size_differ_where_bits_are_asked_for() -> None:
    then, now = output(0.0), output(-0.0)
    found = compare(turn(then), reply(now), then)
    assert (found.logprobs, found.exceeds(0.0), found.exceeds(1e-9)) == (0.0, True, False)


@pytest.mark.parametrize(
    ("recorded", "wrong", "detail"),
    [
        (None, None, "pruned"),
        (None, "it is damaged", "it is damaged"),
        (output(-1.0, -2.0), None, "other shapes"),
        (b"\xff", None, "cannot be read"),
    ],
)
def test_what_cannot_be_measured_differs_by_more_than_any_tolerance(
    recorded: bytes | None, wrong: str | None, detail: str
) -> None:
    found = compare(turn(recorded or output(-1.0)), reply(output(-1.5)), recorded, wrong)
    assert detail in (found.detail or "")
    assert found.exceeds(1e9)


def test_a_recorded_result_that_is_damaged_is_no_match_whatever_its_name() -> None:
    body = output(-1.0)
    assert not compare(turn(body), reply(body), None, "it is damaged").same


def test_a_loss_in_the_journal_that_its_result_does_not_have_is_a_difference() -> None:
    body = output(-1.0)
    found = compare(turn(body, loss=2.0), reply(body), body)
    assert (found.same, found.loss, found.logprobs) == (False, 0.5, 0.0)


def test_metrics_of_a_step_are_compared_by_name() -> None:
    step = Turn(job(4, "optim_step", result={"metrics": {"grad_norm": 2.0, "step": 1.0}}), 4, 1)
    assert compare(step, reply(grad_norm=2.0, step=1.0), None).same
    found = compare(step, reply(grad_norm=2.5, step=1.0), None)
    assert (found.metrics, found.exceeds(0.4), found.exceeds(0.5)) == (0.5, True, False)
    assert compare(step, reply(grad_norm=2.0), None).exceeds(1e9)


def test_what_fails_now_differs() -> None:
    failed = tink_train.OpReply(
        "failed", "i", MODEL, 2, 2, failure=tink_train.Failure("server", "no memory")
    )
    found = compare(turn(output(-1.0)), failed, output(-1.0))
    assert (found.detail, found.exceeds(1e9)) == ("it was done, and fails now: no memory", True)


# -- the server -------------------------------------------------------------------------------------


def info(**more: Any) -> tink_train.Info:
    fields: dict[str, Any] = {
        "protocol": tink_train.PROTOCOL,
        "incarnation": "i",
        "engine": "hf",
        "versions": {"torch": "2", "threads": "1"},
        "base_model": "org/model",
        "base_path": None,
        "base_digest": "d",
        "arch": "x",
        "parameters": 1,
        "vocab_size": 10,
        "max_context": 100,
        "max_rank": 64,
        "losses": [],
        "capabilities": ["train"],
    }
    return tink_train.Info(**fields | more)


def test_another_version_is_told_and_other_weights_are_refused() -> None:
    served = TrainerStarted.of(info())
    assert differences(served, info(incarnation="j")) == {}
    newer = info(versions={"torch": "3", "device": "cpu"}, base_model="other")
    assert differences(served, newer) == {
        "base model": ("org/model", "other"),
        "device": ("none", "cpu"),
        "threads": ("1", "none"),
        "torch": ("2", "3"),
    }
    with pytest.raises(StartupError, match="these are other weights"):
        differences(served, info(base_digest="e"))
