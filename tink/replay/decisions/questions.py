"""What a client must have asked for the worker to have journaled an event. Pure."""

from __future__ import annotations

from tink.domain import messages, requests
from tink.domain.events import (
    CheckpointChanged,
    CheckpointDeleted,
    ClientFailed,
    JobAccepted,
    JobCancelled,
    Record,
    SamplerCreated,
    SessionCreated,
    SessionFinished,
    SessionMoved,
)
from tink.domain.ledger import Ledger
from tink.replay.decisions.journal import Passed


def question_of(record: Record, ledger: Ledger, sample: bytes) -> messages.Question:
    """`ledger`: before the event. `sample`: the request of one. Raises UserError for a request that cannot
    be read today."""
    tenant, session_id = str(record.subject.tenant), str(record.subject.session_id)
    match record.event:
        case SessionCreated() as created:
            return messages.CreateSession(
                tenant,
                tags=created.tags,
                user_metadata=created.user_metadata,
                sdk_version=created.sdk_version,
                project_id=created.project_id,
                display_name=created.display_name,
                idempotency_key=created.idempotency_key,
            )
        case SessionFinished() as finished:
            return messages.FinishSession(tenant, session_id, finished.reason, finished.detail)
        case SessionMoved(project_id=project_id):
            return messages.MoveSession(tenant, session_id, project_id)
        case ClientFailed(exception_type=exception_type):
            return messages.ReportClientFailure(tenant, exception_type, record.subject.session_id)
        case JobAccepted(op="sample"):
            return _sample(record.event, tenant, sample)
        case JobAccepted():
            return _training(record.event, record)
        case JobCancelled():
            return messages.CancelJob(tenant, str(record.subject.job_id))
        case SamplerCreated() as sampler:
            return messages.CreateSampler(
                tenant, session_id, sampler.sampling_seq_id, sampler.base_model, sampler.model_path
            )
        case CheckpointChanged() as changed:
            checkpoint = ledger.checkpoints[(changed.checkpoint_id,)]
            ttl = None if changed.expires_at is None else max(1, round(changed.expires_at - record.at))
            return messages.ChangeCheckpoint(
                tenant,
                checkpoint.address,
                public=changed.public,
                set_ttl=changed.expires_at != checkpoint.expires_at,
                ttl_seconds=None if changed.expires_at == checkpoint.expires_at else ttl,
            )
        case CheckpointDeleted(checkpoint_id=checkpoint_id):
            return messages.DeleteCheckpoint(tenant, ledger.checkpoints[(checkpoint_id,)].address)
    raise AssertionError(f"no question makes {record.event}")


def _training(accepted: JobAccepted, record: Record) -> messages.SubmitTraining:
    """A number that has a key was given by the Router, unless the job makes its model."""
    body: bytes = Passed.of(accepted.body_sha256, accepted.body_bytes)
    if accepted.request is not None:
        body = accepted.request.encode()
    # One that the Router found wrong has a size, one that did not come to it has none.
    refused_before = accepted.invalid is not None and not accepted.body_bytes
    counted = accepted.key is None or accepted.model_seq_id is not None
    return messages.SubmitTraining(
        str(record.subject.tenant),
        op=accepted.op,
        session_id=str(record.subject.session_id),
        model_id=str(record.subject.model_id),
        seq_id=accepted.seq_id if counted else None,
        body=body,
        codec="zstd" if accepted.codec == "zstd" else "identity",
        model_seq_id=accepted.model_seq_id,
        invalid=accepted.invalid if refused_before else None,
        key=accepted.key,
    )


def _sample(accepted: JobAccepted, tenant: str, body: bytes) -> messages.SubmitSample:
    sent: requests.Sample = requests.decode(body, requests.Sample)
    named = sent.sampling_params.seed
    return messages.SubmitSample(
        tenant,
        sampler_id=str(accepted.sampler_id),
        seq_id=accepted.seq_id if accepted.key is None else None,
        body=body,
        num_samples=sent.num_samples,
        seed=named if named == accepted.seed else None,
        key=accepted.key,
    )
