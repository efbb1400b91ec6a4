"""Plans: what the trainer is asked for each request, what is refused and why, and that a redo asks the
same again."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tink.domain import events, ids, plans, requests, rows
from tink.domain.events import JobAccepted, Record, Subject
from tink.domain.ledger import Ledger, fold
from tink.domain.plans import Context, Plan
from tink.domain.projection import project
from tink.errors import UserError
from tink.limits import MAX_METADATA_BYTES
from tink.wire import tink_train

MODEL = "s:train:0"
SERVED = tink_train.Info(
    tink_train.PROTOCOL, "i", "hf", {}, "org/model", "/models/m", "d", "x", 1, 10, 100, 64, [], []
)
WHO = Subject(tenant="t", session_id="s", model_id=MODEL)


def _ledger(*more: tuple[Subject, events.AnyEvent]) -> Ledger:
    """A session with a live model of rank 8 and a checkpoint of each kind."""
    made = events.ModelCreated(
        base_model="org/model",
        rank=8,
        alpha=16.0,
        seed=5,
        train_attn=True,
        train_mlp=True,
        train_unembed=False,
    )
    entries: list[tuple[Subject, events.AnyEvent]] = [
        (Subject(tenant="t", session_id="s"), events.SessionCreated()),
        (_who(f"{MODEL}:0"), JobAccepted(op="create_model", seq_id=0, model_seq_id=0)),
        (_who(f"{MODEL}:0"), events.JobStarted(attempt=1, backend="trainer", op_no=1, seq_id=0)),
        (WHO, made),
        (_who(f"{MODEL}:0"), events.JobDone()),
    ]
    for number, kind in enumerate(ids.KINDS):
        saved = events.CheckpointSaved(checkpoint_kind=kind, name="a", directory=f"d/{kind}", size_bytes=1)
        entries.append((_who(f"saved-{number}"), saved))
    return fold(Record(seq, 1.0, 1, *entry) for seq, entry in enumerate([*entries, *more], 1))


def _who(job: str, **more: Any) -> Subject:
    return Subject(**msgspec.structs.asdict(WHO) | {"job_id": job} | more)


def _job(op: str, seq: int = 5, model: str = MODEL, **more: Any) -> rows.Job:
    fields: dict[str, Any] = {
        "job_id": f"{model}:{seq}",
        "tenant": "t",
        "op": op,
        "session_id": "s",
        "model_id": model,
        "sampler_id": None,
        "seq_id": seq,
        "model_seq_id": None,
        "accepted_seq": 1,
        "submitted_at": 1.0,
        "body_sha256": None,
        "body_bytes": 0,
        "codec": "identity",
        "seed": None,
        "num_samples": None,
    }
    return rows.Job(**fields | more)


def _plan(op: str, seq: int = 5, ledger: Ledger | None = None, tenant: str = "t", **request: Any) -> Plan:
    context = Context(ledger or _ledger(), SERVED, 16.0, exports=False)
    model = request.pop("model", MODEL)
    if op != "load_weights":
        request = {"model_id": model, "seq_id": seq, **request}
    return plans.training(_job(op, seq, model, tenant=tenant), msgspec.json.encode(request), 7, context)


def _create(**request: Any) -> Plan:
    config = request.pop("lora_config", {"rank": 8})
    fields = {"session_id": "s", "model_seq_id": 1, "base_model": "org/model", "lora_config": config}
    return _plan("create_model", 0, model="s:train:1", **fields | request)


# -- what is refused ----------------------------------------------------------------------------------

LARGE = {"k": "x" * MAX_METADATA_BYTES}
REFUSED: dict[str, tuple[Any, str]] = {
    "rank 0": (lambda: _create(lora_config={"rank": 0}), "rank 0 cannot be used: 1 to 64"),
    "rank over the server's": (lambda: _create(lora_config={"rank": 65}), "1 to 64"),
    "nothing to train": (
        lambda: _create(
            lora_config={"rank": 1, "train_attn": False, "train_mlp": False, "train_unembed": False}
        ),
        "nothing to train",
    ),
    "another base model": (lambda: _create(base_model="org/other"), "'org/model' is"),
    "another optimizer": (lambda: _create(optimizer_config={"type": "muon"}), "'muon' is not supported"),
    "large metadata": (lambda: _create(user_metadata=LARGE), "user_metadata is over"),
    "optimizer_params": (lambda: _plan("optim_step", optimizer_params={"type": "sgd"}), "'sgd'"),
    "a negative rate": (lambda: _plan("optim_step", adam_params={"learning_rate": -1}), "negative"),
    "a negative decay": (lambda: _plan("optim_step", adam_params={"weight_decay": -0.1}), "negative"),
    "a negative clip": (lambda: _plan("optim_step", adam_params={"grad_clip_norm": -1}), "negative"),
    "beta1 1": (lambda: _plan("optim_step", adam_params={"beta1": 1.0}), "beta1 and beta2"),
    "beta2 below 0": (lambda: _plan("optim_step", adam_params={"beta2": -0.1}), "beta1 and beta2"),
    "eps 0": (lambda: _plan("optim_step", adam_params={"eps": 0}), "eps above 0"),
    "ttl 0": (lambda: _plan("save_weights", path="b", ttl_seconds=0), "ttl_seconds 0"),
    "ttl below 0": (lambda: _plan("save_weights_for_sampler", path="b", ttl_seconds=-5), "ttl_seconds -5"),
    "ttl of ages": (
        lambda: _plan("save_weights_external", path="b", ttl_seconds=plans.LONGEST_TTL + 1),
        "ttl_seconds",
    ),
    "a name that is a path": (lambda: _plan("save_weights", path="../b"), "cannot be used"),
    "a name that is taken": (lambda: _plan("save_weights", path="a"), "exists already"),
    "large metadata of a checkpoint": (
        lambda: _plan("save_weights", path="b", user_metadata=LARGE),
        "over",
    ),
    "encrypted exports": (
        lambda: _plan("save_weights_external", path="b", age_encryption_recipients=["age1"]),
        "not supported",
    ),
    "ephemeral weights of no sampler": (
        lambda: _plan("save_weights_for_sampler"),
        "sampling_session_seq_id",
    ),
    "sampler weights to train on": (
        lambda: _plan("load_weights", path=f"tinker://{MODEL}/sampler_weights/a"),
        "cannot be trained on",
    ),
    "no such checkpoint": (
        lambda: _plan("load_weights", path=f"tinker://{MODEL}/weights/none"),
        "no check",
    ),
    "no address": (lambda: _plan("load_weights", path="weights/a"), "not a checkpoint address"),
    "another tenant's checkpoint": (
        lambda: _plan("load_weights", tenant="u", path=f"tinker://{MODEL}/weights/a"),
        "no checkpoint",
    ),
    "a sample as training": (lambda: _plan("sample"), "not a training operation"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_request_that_cannot_be_served_says_why(what: str) -> None:
    plan, reason = REFUSED[what]
    with pytest.raises(UserError, match=reason) as caught:
        plan()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "op", ["forward", "forward_backward", "optim_step", "save_weights", "load_weights"]
)
def test_a_model_that_was_never_made_serves_nothing(op: str) -> None:
    other = Subject(tenant="t", session_id="s", model_id="s:train:9", job_id="s:train:9:0")
    ledger = _ledger(
        (other, JobAccepted(op="create_model", seq_id=0, model_seq_id=9)),
        (other, events.JobFailed(category="user", error="x", seq_id=0)),
    )
    with pytest.raises(UserError, match="never made"):
        _plan(op, ledger=ledger, model="s:train:9", path=f"tinker://{MODEL}/weights/a")


# -- what is served -----------------------------------------------------------------------------------


def test_a_model_is_made_as_asked_and_its_seed_is_the_same_in_every_life() -> None:
    asked = _create(lora_config={"rank": 64, "seed": 3, "train_unembed": False}).op
    assert asked == tink_train.CreateModel(64, 16.0, 3, train_unembed=False)
    unseeded = _create(base_model="/models/m").op
    assert unseeded == _create().op
    assert isinstance(unseeded, tink_train.CreateModel)
    assert 0 <= unseeded.seed < 2**63


def test_an_optimizer_step_without_parameters_takes_the_sdks_defaults() -> None:
    assert _plan("optim_step").op == tink_train.OptimStep()


@pytest.mark.parametrize(
    ("op", "kind"),
    [
        ("save_weights", tink_train.SaveState),
        ("save_weights_for_sampler", tink_train.ExportAdapter),
        ("save_weights_external", tink_train.ExportAdapter),
    ],
)
def test_a_save_goes_to_a_new_directory_that_the_server_names(op: str, kind: Any) -> None:
    plan = _plan(op, path="b")
    directory = f"s/0/00000007-{op}"
    export = directory if op == "save_weights_for_sampler" else None
    assert (plan.op, plan.directory, plan.export) == (kind(directory), directory, export)


def test_overwriting_changes_the_address_never_the_files() -> None:
    assert (
        _plan("save_weights", path="a", overwrite=True).directory
        == _plan("save_weights", path="b").directory
    )


def test_a_public_checkpoint_may_be_loaded_by_others() -> None:
    changed = events.CheckpointChanged(checkpoint_id="saved-0", public=True, expires_at=None)
    plan = _plan(
        "load_weights",
        ledger=_ledger((WHO, changed)),
        tenant="u",
        path=f"tinker://{MODEL}/weights/a",
        optimizer=True,
    )
    assert (plan.op, plan.directory) == (tink_train.LoadState("d/weights", True), "d/weights")


def test_a_model_made_from_a_checkpoint_has_its_shape() -> None:
    plan = _plan("load_weights", 0, model="s:train:1", path=f"tinker://{MODEL}/weights/a", optimizer=True)
    assert plan.op == tink_train.CreateModel(
        8, 16.0, 5, train_unembed=False, source="d/weights", optimizer=True
    )


# -- a redo -------------------------------------------------------------------------------------------

BODIES: dict[str, dict[str, Any]] = {
    "create_model": {
        "session_id": "s",
        "model_seq_id": 0,
        "base_model": "org/model",
        "lora_config": {"rank": 8, "seed": 5, "train_unembed": False},
    },
    "forward": {},
    "forward_backward": {},
    "optim_step": {"model_id": MODEL, "seq_id": 5, "adam_params": {"learning_rate": 0.5}},
    "load_weights": {"path": f"tinker://{MODEL}/weights/a", "optimizer": True},
    "save_weights": {"model_id": MODEL, "seq_id": 5, "path": "b"},
    "save_weights_for_sampler": {"model_id": MODEL, "seq_id": 5, "path": "b"},
    "save_weights_external": {"model_id": MODEL, "seq_id": 5, "path": "b"},
}


@pytest.mark.parametrize("op", BODIES)
@pytest.mark.parametrize("state", ["done", "failed"])
def test_a_redo_is_the_same_operation_or_none_whatever_has_happened_since(op: str, state: str) -> None:
    ledger = _ledger()
    body = msgspec.json.encode(BODIES[op])
    seq = 0 if op == "create_model" else 5
    first = plans.training(_job(op, seq), body, 7, Context(ledger, SERVED, 16.0, exports=False))
    # The checkpoint is deleted, its address used for another one; the server is configured differently.
    for number, event in enumerate(
        [
            events.CheckpointDeleted(checkpoint_id="saved-0", reason="overwritten"),
            events.CheckpointSaved(checkpoint_kind="weights", name="a", directory="other", size_bytes=1),
        ]
    ):
        ledger.apply(project(Record(99 + number, 2.0, 2, _who(f"later-{number}"), event)))
    job = _job(op, seq, state=state, op_no=7, directory=first.directory)
    again = plans.again(job, body, ledger)
    if state == "failed" or op not in requests.MUTATING:
        assert again == tink_train.Skip()
    else:
        assert again == first.op


def test_what_a_redo_leaves_out_changes_no_state() -> None:
    changing = {"create_model", "load_weights", "forward_backward", "optim_step"}
    assert changing == requests.MUTATING
    assert changing <= set(BODIES)


# -- how a job ends -----------------------------------------------------------------------------------

NOTHING = tink_train.OpResult()
STEP = tink_train.OpResult(metrics={"unclipped_grad_l2:mean": 1.0})
MADE = tink_train.OpResult(model=tink_train.ModelInfo(8, 16.0, 5, True, True, False))
SAVED = tink_train.OpResult(files=[tink_train.File("adapter_model.safetensors", 10, "0" * 64)])
LOADED = f"tinker://{MODEL}/weights/a"
# The request, what the trainer gave, the answer in JSON, and the events beside the job's own.
ENDS: dict[str, tuple[str, dict[str, Any], tink_train.OpResult, Any, list[type[events.AnyEvent]]]] = {
    "data": ("forward_backward", {}, NOTHING, None, []),
    "a step": ("optim_step", {}, STEP, {"metrics": STEP.metrics}, []),
    "a model": ("create_model", BODIES["create_model"], MADE, {"model_id": MODEL}, [events.ModelCreated]),
    "an unloaded model": (
        "unload_model",
        {},
        NOTHING,
        {"model_id": MODEL, "type": "unload_model"},
        [events.ModelRemoved, events.SnapshotDropped],
    ),
    "a loaded state": ("load_weights", {"path": LOADED}, NOTHING, {"path": LOADED, "model_id": MODEL}, []),
    "a state": (
        "save_weights",
        {"path": "b"},
        SAVED,
        {"path": f"tinker://{MODEL}/weights/b"},
        [events.CheckpointSaved],
    ),
    "a state without a name": (
        "save_weights",
        {},
        SAVED,
        {"path": f"tinker://{MODEL}/weights/seq-000005"},
        [events.CheckpointSaved],
    ),
    "a state in another one's place": (
        "save_weights",
        {"path": "a", "overwrite": True},
        SAVED,
        {"path": LOADED},
        [events.CheckpointDeleted, events.CheckpointSaved],
    ),
    "an export": (
        "save_weights_external",
        {"path": "b"},
        SAVED,
        {"path": f"tinker://{MODEL}/external_weights/b", "size_bytes": 10},
        [events.CheckpointSaved],
    ),
    "named sampler weights": (
        "save_weights_for_sampler",
        {"path": "b"},
        SAVED,
        {"path": f"tinker://{MODEL}/sampler_weights/b"},
        [events.CheckpointSaved],
    ),
    "a sampler's weights": (
        "save_weights_for_sampler",
        {"sampling_session_seq_id": 3},
        SAVED,
        {"path": None, "sampling_session_id": "s:sample:3"},
        [events.SamplerCreated],
    ),
}


@pytest.mark.parametrize("what", ENDS)
def test_a_done_job_answers_what_its_client_reads_and_journals_what_came_of_it(what: str) -> None:
    op, request, result, expected, kinds = ENDS[what]
    answer, entries = _conclusion(op, _plan(op, **request), result)
    assert answer == expected
    assert [type(event) for _, event in entries] == kinds
    version = f"{MODEL}@1" if op == "save_weights_for_sampler" else None
    assert {subject.adapter_id for subject, _ in entries} <= {version}


def test_a_model_that_was_made_from_a_checkpoint_names_it() -> None:
    plan = _plan("load_weights", 0, path=LOADED, user_metadata={"a": 1})
    answer, ((_, made),) = _conclusion("load_weights", plan, MADE, seq=0)
    assert answer == {"path": LOADED, "model_id": MODEL}
    assert isinstance(made, events.ModelCreated)
    assert (made.source, made.user_metadata, made.rank) == (LOADED, {"a": 1}, 8)


def test_a_checkpoints_time_runs_from_when_it_was_saved() -> None:
    plan = _plan("save_weights", path="b", ttl_seconds=60, user_metadata={"a": "b"})
    _, ((_, saved),) = _conclusion("save_weights", plan, SAVED)
    assert isinstance(saved, events.CheckpointSaved)
    assert (saved.expires_at, saved.size_bytes, saved.directory) == (160.0, 10, plan.directory)
    assert saved.user_metadata == {"a": "b"}


def test_a_samplers_number_that_was_taken_meanwhile_is_refused() -> None:
    plan = _plan("save_weights_for_sampler", sampling_session_seq_id=3)
    taken = events.SamplerCreated(sampler_id="s:sample:3", sampling_seq_id=3, base_model="org/model")
    with pytest.raises(UserError, match="exists already"):
        _conclusion("save_weights_for_sampler", plan, SAVED, (WHO, taken))


def _conclusion(
    op: str,
    plan: Plan,
    result: tink_train.OpResult,
    *meanwhile: tuple[Subject, events.AnyEvent],
    seq: int = 5,
) -> tuple[dict[str, Any] | None, list[events.Entry]]:
    """100 s after the epoch, of a model with a snapshot."""
    snapshot = events.SnapshotTaken(snapshot_id="x", op_no=1, directory="d/x", size_bytes=1)
    context = Context(_ledger((WHO, snapshot), *meanwhile), SERVED, 16.0, exports=False)
    job = _job(op, seq)
    adapter = plans.exported(job, plan, result, context, 100.0)
    return plans.conclusion(job, plan, result, context, 100.0, adapter)
