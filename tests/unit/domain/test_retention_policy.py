"""What may go, decided from rows and times: nothing that a redo, a client or a sampler needs."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tink.domain import adapters, ids, retention, rows
from tink.domain.ledger import Ledger
from tink.domain.requests import MUTATING
from tink.domain.retention import Cutoffs, Kept, Load
from tink.limits import LEAST_KEPT_SECONDS

SESSION = "s"
MODEL = ids.model_id(SESSION, 0)
NOW = 1_000_000.0
# So long ago that nothing is kept for its youth.
OLD = 10.0


def _cutoffs(seconds: float) -> Cutoffs:
    """With one time for all kinds."""
    return Cutoffs.at(NOW, Kept.asked(seconds, seconds, seconds, seconds))


def _ledger(*more: tuple[str, rows.Row], session: str = "open", model: str = "live") -> Ledger:
    ledger = Ledger()
    ledger.put(
        "sessions",
        rows.Session(
            session_id=SESSION,
            tenant="t",
            state=session,  # type: ignore[arg-type]
            tags=[],
            user_metadata={},
            sdk_version="",
            project_id=None,
            display_name=None,
            idempotency_key=None,
            created_at=OLD,
        ),
    )
    made = rows.Model(
        model_id=MODEL,
        tenant="t",
        session_id=SESSION,
        model_seq_id=0,
        state=model,  # type: ignore[arg-type]
        created_at=OLD,
        last_request_at=OLD,
    )
    ledger.put("models", made)
    for table, row in more:
        ledger.put(table, row)
    return ledger


def _snapshot(op_no: int, state: Any = "live", dropped_at: float | None = None) -> tuple[str, rows.Row]:
    return "snapshots", rows.Snapshot(
        snapshot_id=f"{MODEL}#{op_no}",
        tenant="t",
        model_id=MODEL,
        op_no=op_no,
        state=state,
        directory=f"snapshot-{op_no}",
        size_bytes=1,
        created_at=OLD,
        dropped_at=dropped_at,
    )


def _job(number: int, op: str = "forward_backward", state: Any = "done", **more: Any) -> rows.Job:
    fields: dict[str, Any] = {
        "job_id": f"{MODEL}:{number}",
        "tenant": "t",
        "op": op,
        "state": state,
        "session_id": SESSION,
        "model_id": MODEL,
        "sampler_id": None,
        "seq_id": number,
        "model_seq_id": None,
        "op_no": number,
        "accepted_seq": 1,
        "submitted_at": OLD,
        "finished_at": OLD,
        "body_sha256": f"body-{number}",
        "body_bytes": 1,
        "codec": "identity",
        "seed": None,
        "num_samples": None,
    }
    return rows.Job(**fields | more)


def _adapter(number: int = 1, state: Any = "live") -> tuple[str, rows.Row]:
    return "adapters", rows.Adapter(
        adapter_id=f"a{number}",
        tenant="t",
        model_id=MODEL,
        version=number,
        job_id="j",
        state=state,
        directory=f"adapter-{number}",
        size_bytes=1,
        files={},
        created_at=OLD,
    )


def _sampler(
    number: int = 0, adapter: str | None = "a1", created_at: float = OLD, path: str | None = None
) -> tuple[str, rows.Row]:
    return "samplers", rows.Sampler(
        sampler_id=f"sampler-{number}",
        tenant="t",
        session_id=SESSION,
        sampling_seq_id=number,
        base_model="m",
        model_path=path,
        adapter_id=adapter,
        created_at=created_at,
    )


def _checkpoint(state: Any = "live", adapter: str | None = "a1") -> tuple[str, rows.Row]:
    return "checkpoints", rows.Checkpoint(
        checkpoint_id="c",
        tenant="t",
        model_id=MODEL,
        kind="sampler_weights",
        name="n",
        state=state,
        directory="checkpoint",
        size_bytes=1,
        adapter_id=adapter,
        user_metadata={},
        created_at=OLD,
        expires_at=None,
    )


# -- redo -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("snapshots", "covered"),
    [
        ([], 0),
        ([_snapshot(5)], 0),
        ([_snapshot(5), _snapshot(9)], 5),
        ([_snapshot(9), _snapshot(5), _snapshot(2)], 5),
        ([_snapshot(2), _snapshot(5, "pruned"), _snapshot(9, "damaged")], 0),
        ([_snapshot(2, "pruned"), _snapshot(5), _snapshot(7, "damaged"), _snapshot(9)], 5),
    ],
)
def test_a_model_is_covered_up_to_the_older_of_its_two_newest_live_snapshots(
    snapshots: list[tuple[str, rows.Row]], covered: int
) -> None:
    assert retention.covered(_ledger(*snapshots)) == {MODEL: covered}


def test_a_model_that_was_never_made_and_one_that_is_gone_are_never_redone() -> None:
    assert retention.covered(_ledger(model="failed")) == {}
    for covers in ({}, {"another": 0}):
        assert not retention.may_be_redone(_job(1), covers)


@given(
    st.lists(st.integers(1, 30), max_size=5, unique=True),
    st.lists(
        st.tuples(
            st.sampled_from([*sorted(MUTATING), "forward", "save_weights"]),
            st.sampled_from(["done", "failed"]),
        ),
        max_size=30,
    ),
    st.booleans(),
)
def test_the_bodies_of_every_redo_that_may_come_stay_and_no_other_old_ones(
    taken: list[int], ops: list[tuple[str, str]], damaged: bool
) -> None:
    jobs = [_job(number, op, state) for number, (op, state) in enumerate(ops, 1)]
    covers = retention.covered(_ledger(*map(_snapshot, taken)))
    needed = retention.bodies_needed(jobs, {}, covers, _cutoffs(0.0))
    # A redo begins behind the newest snapshot, or if that is damaged behind the one before it.
    begins = [0, 0, *sorted(taken)][-2 if damaged else -1]
    changed = [job for job in jobs if job.state == "done" and job.op in MUTATING]
    read = {job.body_sha256 for job in changed if job.seq_id > begins}
    assert read == needed if damaged else read <= needed


# -- bodies -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("job", "needed"),
    [
        (_job(1), set()),
        (_job(6), {"body-6"}),
        (_job(6, "forward"), set()),
        (_job(6, state="failed"), set()),
        (_job(1, state="accepted", op_no=None), {"body-1"}),
        (_job(1, state="running"), {"body-1"}),
        (_job(1, "sample", "cancelled", model_id=None, op_no=None), set()),
        (_job(1, "sample", "done", model_id=None, op_no=None), set()),
        (_job(1, body_sha256=None), set()),
        (_job(1, submitted_at=NOW - 7200), {"body-1"}),
        (_job(1, submitted_at=NOW - 7201), set()),
        (_job(1, result_sha256="result", finished_at=NOW - 7200), {"result"}),
        (_job(1, result_sha256="result", finished_at=NOW - 7201), set()),
        (_job(6, result_sha256="result"), {"body-6"}),
    ],
)
def test_a_body_is_needed_by_what_is_open_may_be_redone_or_is_young(
    job: rows.Job, needed: set[str]
) -> None:
    covers = retention.covered(_ledger(_snapshot(5), _snapshot(9)))
    assert retention.bodies_needed([job], {}, covers, _cutoffs(7200)) == needed


def test_one_job_of_many_is_enough_to_keep_a_body() -> None:
    jobs = [_job(1, body_sha256="same"), _job(2, body_sha256="same", state="running")]
    assert retention.bodies_needed(jobs, {}, {MODEL: 9}, _cutoffs(0.0)) == {"same"}
    assert retention.bodies_needed(jobs[:1], {}, {MODEL: 9}, _cutoffs(0.0)) == set()


@pytest.mark.parametrize(("received", "needed"), [(NOW - 100, {"body-1"}), (NOW - 101, set())])
def test_a_request_that_was_received_again_is_as_young_as_if_it_were_new(
    received: float, needed: set[str]
) -> None:
    """Though its job is old, and though results go sooner."""
    cutoffs = Cutoffs.at(NOW, Kept(100, 0, 0, 0))
    assert retention.bodies_needed([_job(1)], {"body-1": received}, {MODEL: 9}, cutoffs) == needed


def test_requests_and_results_go_by_times_of_their_own() -> None:
    young = NOW - LEAST_KEPT_SECONDS - 1
    job = _job(1, submitted_at=young, finished_at=young, result_sha256="result")
    day = 24 * 3600.0

    def needed(kept: Kept) -> set[str]:
        return retention.bodies_needed([job], {}, {MODEL: 9}, Cutoffs.at(NOW, kept))

    assert needed(Kept(day, 0, 0, 0)) == {"body-1"}
    assert needed(Kept(0, day, 0, 0)) == {"result"}
    assert needed(Kept(0, 0, day, day)) == set()
    assert needed(Kept(math.inf, math.inf, 0, 0)) == {"body-1", "result"}


def test_no_body_is_looked_at_that_is_too_young_for_both_kinds() -> None:
    day = 24 * 3600.0
    assert Cutoffs.at(NOW, Kept(day, math.inf, 0, 0)).bodies == NOW - day
    assert Cutoffs.at(NOW, Kept(math.inf, day, 0, 0)).bodies == NOW - day
    assert Cutoffs.at(NOW, Kept(math.inf, math.inf, 0, 0)).bodies == 0.0


@pytest.mark.parametrize("kept", [0.0, 7200.0, math.inf])
def test_what_a_redo_needs_and_what_is_open_stays_however_short_the_times_are(kept: float) -> None:
    jobs = [_job(6), _job(7, state="running"), _job(8, "sample", "accepted", model_id=None, op_no=None)]
    for times in (Kept(0, kept, kept, kept), Kept(kept, 0, 0, 0)):
        needed = retention.bodies_needed(jobs, {}, {MODEL: 5}, Cutoffs.at(NOW, times))
        assert needed == {"body-6", "body-7", "body-8"}


def test_a_retention_time_of_nothing_leaves_results_an_hour_and_one_without_end_leaves_all() -> None:
    hour_ago = NOW - LEAST_KEPT_SECONDS
    assert _cutoffs(0.0) == (NOW, hour_ago, hour_ago, hour_ago)
    assert _cutoffs(7200.0) == (NOW - 7200,) * 4
    assert _cutoffs(math.inf) == (0.0,) * 4


# -- adapters ---------------------------------------------------------------------------------------


def _spare(*more: tuple[str, rows.Row], asked: dict[str, float], session: str = "open") -> list[str]:
    ledger = _ledger(_adapter(), *more, session=session)
    return [reason for _, reason in retention.spare_adapters(ledger, NOW, asked)]


SAMPLE = (
    "jobs",
    _job(0, "sample", "accepted", job_id="j", model_id=None, sampler_id="sampler-0", op_no=None),
)


@pytest.mark.parametrize(
    ("more", "session", "reasons"),
    [
        ([_sampler()], "open", ["idle"]),
        ([_sampler()], "finished", ["finished"]),
        ([_sampler(), SAMPLE], "finished", []),
        ([_sampler(), _checkpoint()], "finished", []),
        ([_sampler(path="tinker://"), _checkpoint("overwritten")], "finished", ["deleted"]),
        ([_sampler(path="tinker://")], "open", ["deleted"]),
        ([_checkpoint("expired")], "open", ["deleted"]),
        ([_sampler(), _sampler(1)], "open", []),
        ([_sampler(), _sampler(1)], "finished", ["finished"]),
    ],
)
def test_an_adapter_is_spare_once_nobody_can_want_it(
    more: list[tuple[str, rows.Row]], session: str, reasons: list[str]
) -> None:
    assert _spare(*more, asked={"sampler-0": NOW - 1, "sampler-1": NOW}, session=session) == reasons


def test_a_sampler_of_which_nothing_is_known_keeps_its_adapter() -> None:
    assert _spare(_sampler(), asked={}) == []


@pytest.mark.parametrize(
    ("session", "versions", "last_request_at", "reasons"),
    [
        ("open", 0, NOW, []),
        ("open", 0, OLD, ["idle"]),
        ("open", 1, NOW, ["idle"]),
        ("finished", 0, NOW, ["finished"]),
        ("finished", 1, NOW, ["finished"]),
    ],
)
def test_version_0_stays_while_its_model_is_used_and_has_no_newer_one(
    session: str, versions: int, last_request_at: float, reasons: list[str]
) -> None:
    ledger = _ledger(_adapter(0), session=session)
    model = ledger.models[(MODEL,)]
    model.versions, model.last_request_at = versions, last_request_at
    assert [reason for _, reason in retention.spare_adapters(ledger, NOW, {})] == reasons


@pytest.mark.parametrize(
    ("more", "spare", "leaving", "needed"),
    [
        ([_sampler()], ["removed"], True, set()),
        ([_sampler(), SAMPLE], [], True, {"a1"}),
        ([_checkpoint()], [], False, set()),
        ([_checkpoint(), _sampler()], [], False, {"a1"}),
        ([_checkpoint("deleted"), _sampler()], ["removed"], True, set()),
    ],
)
def test_of_an_unloaded_model_stays_what_has_a_name_and_for_its_time_what_is_sampled(
    more: list[tuple[str, rows.Row]], spare: list[str], leaving: bool, needed: set[str]
) -> None:
    ledger = _ledger(_adapter(), *more, model="removed")
    assert [reason for _, reason in retention.spare_adapters(ledger, NOW, {"sampler-0": NOW})] == spare
    assert retention.leaving(ledger) == leaving
    assert adapters.needed(ledger) == needed


def test_what_a_server_may_keep_is_told_without_a_walk_through_all_samplers_ever_made() -> None:
    class NotWalked(dict[Any, Any]):
        def values(self) -> Any:
            raise AssertionError

    ledger = _ledger(_adapter(), _sampler())
    ledger.samplers = NotWalked(ledger.samplers)
    assert adapters.needed(ledger) == {"a1"}


def test_an_adapter_that_was_deleted_is_not_deleted_again() -> None:
    ledger = _ledger(_adapter(state="idle"), _sampler())
    assert list(retention.spare_adapters(ledger, NOW, {"sampler-0": OLD})) == []
    assert retention.quiet_samplers(ledger, NOW, {}) == []


def test_a_sampler_is_asked_after_only_if_its_adapter_hangs_on_it_and_it_may_be_idle() -> None:
    young, old = _sampler(0, created_at=NOW), _sampler(1)
    base = _sampler(2, adapter=None)
    assert retention.quiet_samplers(_ledger(_adapter(), young, old, base), NOW, {}) == ["sampler-1"]
    assert retention.quiet_samplers(_ledger(_adapter(), old), NOW, {"sampler-1": NOW}) == []
    assert retention.quiet_samplers(_ledger(_adapter(), old, _checkpoint()), NOW, {}) == []
    assert retention.quiet_samplers(_ledger(_adapter(), old, session="finished"), NOW, {}) == []


# -- directories ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "kept"),
    [
        (_checkpoint(), {"checkpoint"}),
        (_checkpoint("deleted"), set()),
        (_checkpoint("overwritten"), set()),
        (_adapter(), {"adapter-1"}),
        (_adapter(state="idle"), set()),
        (_snapshot(1), {"snapshot-1"}),
        (_snapshot(1, "pruned", NOW), set()),
        (_snapshot(1, "damaged", NOW), set()),
        (("jobs", _job(1, "save_weights", "running", directory="d")), {"d"}),
        (("jobs", _job(1, "load_weights", "running", directory="d")), {"d", "s/0/00000001-adapter"}),
        (("jobs", _job(1, "create_model", "running", directory=None)), {"s/0/00000001-adapter"}),
        (("jobs", _job(1, "forward", "running", directory=None)), set()),
        (("jobs", _job(1, "save_weights", "failed", directory="d")), set()),
    ],
)
def test_a_directory_is_kept_by_what_lives_or_is_open(row: tuple[str, rows.Row], kept: set[str]) -> None:
    assert retention.directories_kept(_ledger(row)) == kept


def test_what_is_sampled_from_is_told_by_the_open_jobs() -> None:
    done = ("jobs", _job(1, "sample", model_id=None, sampler_id="sampler-1", op_no=None))
    base = ("jobs", _job(2, "sample", "running", model_id=None, sampler_id="sampler-2", op_no=None))
    samplers = [_sampler(), _sampler(1, "a2"), _sampler(2, None)]
    assert retention.sampled(_ledger(*samplers, SAMPLE, done, base)) == {"a1"}


def test_a_snapshot_of_a_model_that_was_never_made_is_not_kept() -> None:
    assert retention.directories_kept(_ledger(_snapshot(1), model="failed")) == set()


def test_what_was_loaded_is_kept_until_no_redo_can_load_it() -> None:
    loads = [Load(MODEL, n, f"d{n}") for n in (5, 6)]
    assert retention.loads_needed(loads, {MODEL: 5}) == {"d6"}
    assert retention.loads_needed(loads, {MODEL: 0}) == {"d5", "d6"}
    assert retention.loads_needed(loads, {}) == set()
