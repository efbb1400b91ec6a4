"""Any history that a worker could have written, as Hypothesis strategies: sessions, models, jobs in every
order of their lives, checkpoints, samplers and adapters; each event refers to what was made before it."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from tink.domain import events, ids
from tink.domain.events import AnyEvent, Subject

Entry = tuple[Subject, AnyEvent]

# SQLite keeps text in UTF-8, without lone surrogates; the rest of Unicode may come.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
floats = st.floats(allow_nan=False, allow_infinity=False)
counts = st.integers(0, 2**40)
jsons = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | floats | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
metadata = st.dictionaries(texts, jsons, max_size=2)
strings = st.dictionaries(texts, texts, max_size=2)


class _State:
    """What has been made so far, by the id that later events use."""

    def __init__(self) -> None:
        self.sessions: list[Subject] = []
        self.models: list[Subject] = []
        self.next_seq: dict[str, int] = {}
        self.op_no: dict[str, int] = {}
        self.open: list[tuple[Subject, bool]] = []  # a job, and whether it has been started
        self.adapters: list[Subject] = []
        self.samplers: list[str] = []
        self.checkpoints: list[tuple[Subject, str]] = []
        self.snapshots: list[tuple[Subject, str]] = []
        self.numbers: dict[str, int] = {}

    def number(self, what: str) -> int:
        self.numbers[what] = self.numbers.get(what, -1) + 1
        return self.numbers[what]


@st.composite
def histories(draw: st.DrawFn, max_size: int = 25) -> list[Entry]:
    state = _State()
    found: list[Entry] = []
    for _ in range(draw(st.integers(1, max_size))):
        steps = [_session, _client_failed, _trainer, _pruned]
        if state.sessions:
            steps += [_session_changed, _model, _base_sampler]
        if state.models:
            steps += [_training_job, _training_job, _skipped, _model_made, _export, _save, _snapshot]
        if state.samplers:
            steps += [_sample]
        if state.open:
            steps += [_job_goes_on] * 3
        if state.adapters:
            steps += [_placed, _adapter_sampler, _adapter_deleted]
        if state.snapshots:
            steps += [_snapshot_dropped]
        if state.checkpoints:
            steps += [_checkpoint_changed, _checkpoint_deleted]
        found.append(draw(st.sampled_from(steps))(draw, state))
    return found


def _session(draw: st.DrawFn, state: _State) -> Entry:
    number = state.number("session")
    subject = Subject(tenant=draw(st.sampled_from(["t", "u"])), session_id=f"s{number}")
    state.sessions.append(subject)
    key = f"key-{number}" if draw(st.booleans()) else None
    return subject, events.SessionCreated(
        tags=draw(st.lists(texts, max_size=2)),
        user_metadata=draw(metadata),
        sdk_version=draw(texts),
        project_id=draw(st.none() | texts),
        idempotency_key=key,
    )


def _session_changed(draw: st.DrawFn, state: _State) -> Entry:
    subject = draw(st.sampled_from(state.sessions))
    finished = events.SessionFinished(reason=draw(texts), detail=draw(st.none() | texts))
    return subject, draw(
        st.sampled_from([finished, events.SessionMoved(project_id=draw(st.none() | texts))])
    )


def _client_failed(draw: st.DrawFn, state: _State) -> Entry:
    return Subject(tenant="t"), events.ClientFailed(exception_type=draw(texts))


def _trainer(draw: st.DrawFn, state: _State) -> Entry:
    started = events.TrainerStarted(incarnation=draw(texts), engine="hf", base_model="m", base_digest="d")
    return Subject(replica="trainer"), started


def _model(draw: st.DrawFn, state: _State) -> Entry:
    session = draw(st.sampled_from(state.sessions))
    number = state.number(f"model {session.session_id}")
    model_id = ids.model_id(str(session.session_id), number)
    model = _with(session, model_id=model_id)
    state.models.append(model)
    state.next_seq[model_id] = 1
    subject = _with(model, job_id=ids.job_id(model_id, 0))
    state.open.append((subject, False))
    return subject, events.JobAccepted(
        op="create_model", seq_id=0, model_seq_id=number, request=draw(texts), body_bytes=draw(counts)
    )


def _training_job(draw: st.DrawFn, state: _State) -> Entry:
    model = draw(st.sampled_from(state.models))
    model_id = str(model.model_id)
    seq = state.next_seq[model_id]
    state.next_seq[model_id] += 1
    subject = _with(model, job_id=ids.job_id(model_id, seq))
    state.open.append((subject, False))
    return subject, events.JobAccepted(
        op=draw(st.sampled_from(["forward_backward", "optim_step", "save_weights"])),
        seq_id=seq,
        body_sha256=draw(st.none() | texts),
        body_bytes=draw(counts),
        codec=draw(st.sampled_from(["identity", "zstd"])),
        invalid=draw(st.none() | texts),
        key=draw(st.sampled_from([None, f"key {seq}"])),
    )


def _sample(draw: st.DrawFn, state: _State) -> Entry:
    sampler = draw(st.sampled_from(state.samplers))
    seq = state.number(f"sample {sampler}")
    subject = Subject(tenant="t", session_id=sampler.partition(":")[0], job_id=ids.job_id(sampler, seq))
    state.open.append((subject, False))
    return subject, events.JobAccepted(
        op="sample", seq_id=seq, sampler_id=sampler, seed=draw(counts), num_samples=draw(counts)
    )


def _job_goes_on(draw: st.DrawFn, state: _State) -> Entry:
    index = draw(st.integers(0, len(state.open) - 1))
    subject, started = state.open[index]
    model_id = subject.model_id
    seq = int(str(subject.job_id).rpartition(":")[2])
    if not started and draw(st.booleans()):
        state.open[index] = (subject, True)
        op_no = None
        if model_id is not None:
            op_no = state.op_no[model_id] = state.op_no.get(model_id, 0) + 1
        return subject, events.JobStarted(
            attempt=1,
            backend="trainer",
            op_no=op_no,
            seq_id=seq,
            directory=draw(st.none() | texts),
            queue_ms=draw(st.none() | floats),
        )
    del state.open[index]
    done = events.JobDone(
        result=draw(st.none() | metadata),
        result_sha256=draw(st.none() | texts),
        result_bytes=draw(counts),
        tokens_in=draw(counts),
        tokens_out=draw(counts),
        loss_sum=draw(st.none() | floats),
        metrics=draw(st.dictionaries(texts, floats, max_size=2)),
        run_ms=draw(floats),
        idle_ms=draw(st.none() | floats),
        step=None if model_id is None else draw(st.none() | st.integers(1, 3)),
        learning_rate=draw(st.none() | floats),
    )
    failed = events.JobFailed(
        category=draw(st.sampled_from(["user", "server"])),
        error=draw(texts),
        seq_id=draw(st.sampled_from([None, seq])),
    )
    return subject, draw(st.sampled_from([done, failed, events.JobCancelled()]))


def _skipped(draw: st.DrawFn, state: _State) -> Entry:
    model = draw(st.sampled_from(state.models))
    first = state.next_seq[str(model.model_id)]
    state.next_seq[str(model.model_id)] = first + 3
    return Subject(model_id=model.model_id), events.SeqSkipped(first=first, last=first + 2)


def _model_made(draw: st.DrawFn, state: _State) -> Entry:
    return draw(st.sampled_from(state.models)), events.ModelCreated(
        base_model=draw(texts),
        rank=draw(counts),
        alpha=draw(floats),
        seed=draw(st.integers(0, 2**63 - 1)),
        train_attn=draw(st.booleans()),
        train_mlp=draw(st.booleans()),
        train_unembed=draw(st.booleans()),
        user_metadata=draw(metadata),
        source=draw(st.none() | texts),
    )


def _export(draw: st.DrawFn, state: _State) -> Entry:
    model = draw(st.sampled_from(state.models))
    version = 1 + state.number(f"version {model.model_id}")
    adapter = _with(model, adapter_id=ids.adapter_id(str(model.model_id), version), job_id="j")
    state.adapters.append(adapter)
    return adapter, events.AdapterExported(
        version=version, directory=draw(texts), size_bytes=draw(counts), files=draw(strings)
    )


def _placed(draw: st.DrawFn, state: _State) -> Entry:
    adapter = draw(st.sampled_from(state.adapters))
    where = draw(st.sampled_from(["trainer", "vllm-0"]))
    placed = draw(st.sampled_from(["loading", "loaded", "unloading", "gone"]))
    return _with(adapter, replica=where), events.AdapterPlaced(state=placed)


def _adapter_deleted(draw: st.DrawFn, state: _State) -> Entry:
    adapter = state.adapters.pop(draw(st.integers(0, len(state.adapters) - 1)))
    reason = draw(st.sampled_from(["finished", "idle", "deleted"]))
    return adapter, events.AdapterDeleted(reason=reason)


def _pruned(draw: st.DrawFn, state: _State) -> Entry:
    return Subject(), events.BodiesPruned(
        count=draw(counts), bytes=draw(counts), submitted_before=draw(floats), finished_before=draw(floats)
    )


def _base_sampler(draw: st.DrawFn, state: _State) -> Entry:
    return _sampler(draw, state, draw(st.sampled_from(state.sessions)))


def _adapter_sampler(draw: st.DrawFn, state: _State) -> Entry:
    return _sampler(draw, state, draw(st.sampled_from(state.adapters)))


def _sampler(draw: st.DrawFn, state: _State, who: Subject) -> Entry:
    number = state.number(f"sampler {who.session_id}")
    sampler = ids.sampler_id(str(who.session_id), number)
    state.samplers.append(sampler)
    return who, events.SamplerCreated(
        sampler_id=sampler, sampling_seq_id=number, base_model="m", model_path=draw(st.none() | texts)
    )


def _save(draw: st.DrawFn, state: _State) -> Entry:
    model = draw(st.sampled_from(state.models))
    number = state.number("checkpoint")
    subject = _with(model, job_id=f"saved-{number}")
    state.checkpoints.append((subject, f"saved-{number}"))
    return subject, events.CheckpointSaved(
        checkpoint_kind=draw(st.sampled_from(ids.KINDS)),
        name=f"name-{number}",
        directory=draw(texts),
        size_bytes=draw(counts),
        user_metadata=draw(strings),
        expires_at=draw(st.none() | floats),
    )


def _snapshot(draw: st.DrawFn, state: _State) -> Entry:
    model = draw(st.sampled_from(state.models))
    snapshot = f"snapshot-{state.number('snapshot')}"
    state.snapshots.append((model, snapshot))
    return model, events.SnapshotTaken(
        snapshot_id=snapshot, op_no=draw(counts), directory=draw(texts), size_bytes=draw(counts)
    )


def _snapshot_dropped(draw: st.DrawFn, state: _State) -> Entry:
    subject, snapshot = state.snapshots.pop(draw(st.integers(0, len(state.snapshots) - 1)))
    reason = draw(st.sampled_from(["pruned", "damaged"]))
    return subject, events.SnapshotDropped(snapshot_id=snapshot, reason=reason)


def _checkpoint_changed(draw: st.DrawFn, state: _State) -> Entry:
    subject, checkpoint = draw(st.sampled_from(state.checkpoints))
    return subject, events.CheckpointChanged(
        checkpoint_id=checkpoint, public=draw(st.booleans()), expires_at=draw(st.none() | floats)
    )


def _checkpoint_deleted(draw: st.DrawFn, state: _State) -> Entry:
    subject, checkpoint = state.checkpoints.pop(draw(st.integers(0, len(state.checkpoints) - 1)))
    reason = draw(st.sampled_from(["deleted", "expired", "overwritten"]))
    return subject, events.CheckpointDeleted(checkpoint_id=checkpoint, reason=reason)


def _with(subject: Subject, **more: Any) -> Subject:
    fields = {name: getattr(subject, name) for name in Subject.__struct_fields__}
    return Subject(**fields | more)
