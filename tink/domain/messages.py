"""What the Router is asked, and what it answers: the one narrow interface between the HTTP side and
the worker. Each question names its tenant, and an id of another tenant is NotFound. An error is
raised to the asker as the TinkError that it is."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from tink.domain import rows
from tink.domain.requests import OpName


class Ask(msgspec.Struct, frozen=True):
    tenant: str


# -- sessions ---------------------------------------------------------------------------------------


class CreateSession(Ask, frozen=True, tag="create_session"):
    """-> Created. The same `idempotency_key` gives the same session."""

    tags: list[str] = []
    user_metadata: dict[str, Any] = {}
    sdk_version: str = ""
    project_id: str | None = None
    display_name: str | None = None
    idempotency_key: str | None = None


class Heartbeat(Ask, frozen=True, tag="heartbeat"):
    """-> None. SessionFinished once the client has finished it."""

    session_id: str


class FinishSession(Ask, frozen=True, tag="finish_session"):
    """-> None. The first reason stays."""

    session_id: str
    reason: str
    detail: str | None = None


class MoveSession(Ask, frozen=True, tag="move_session"):
    """-> None. Sets the session's project."""

    session_id: str
    project_id: str | None


class GetSession(Ask, frozen=True, tag="get_session"):
    """-> SessionView"""

    session_id: str


class ListSessions(Ask, frozen=True, tag="list_sessions"):
    """-> list[rows.Session], newest first."""


class ReportClientFailure(Ask, frozen=True, tag="report_client_failure"):
    """-> None. From the SDK's telemetry."""

    exception_type: str
    session_id: str | None = None


# -- jobs -------------------------------------------------------------------------------------------


class SubmitTraining(Ask, frozen=True, tag="submit_training"):
    """-> Promise, once the job is durable. A job of `model_id`; `model_seq_id` is set when it makes the
    model. `seq_id` None: its client counts nothing, and it comes behind all that have come. `body` is the
    request as received (`codec` identity or zstd); its JSON for a command. `invalid`: why the body cannot
    be served; the job is accepted and fails with that, for its number must be consumed.

    The same (model_id, seq_id) is the same job, whatever the body. So is the same (model_id, key); there
    another request is a UserError."""

    op: OpName
    session_id: str
    model_id: str
    seq_id: int | None
    body: bytes
    codec: Literal["identity", "zstd"] = "identity"
    model_seq_id: int | None = None
    invalid: str | None = None
    key: str | None = None


class SubmitSample(Ask, frozen=True, tag="submit_sample"):
    """-> Promise, once the job is durable. `seq_id` None: its client counts nothing.

    The same (sampler_id, seq_id) is the same job, whatever the body. So is the same key of the tenant's
    samples, whatever the sampler; there another request is a UserError."""

    sampler_id: str
    seq_id: int | None
    body: bytes
    num_samples: int = 1
    seed: int | None = None
    key: str | None = None


class AwaitOutcome(Ask, frozen=True, tag="await_outcome"):
    """-> Outcome, when the job has ended: the asker brings its own deadline."""

    job_id: str


class CancelJob(Ask, frozen=True, tag="cancel_job"):
    """-> None. Withdraws a job that has not been sent to a backend; any other stays as it is."""

    job_id: str


# -- models, samplers, checkpoints ------------------------------------------------------------------


class GetModel(Ask, frozen=True, tag="get_model"):
    """-> ModelView of a live model"""

    model_id: str


class ListModels(Ask, frozen=True, tag="list_models"):
    """-> list[ModelView], newest first; live models only."""

    project_id: str | None = None


class GetWeights(Ask, frozen=True, tag="get_weights"):
    """-> rows.Job: the last one that came which changes the model's weights, or saves them for samplers.
    NotServed where nothing is sampled."""

    model_id: str


class GetSample(Ask, frozen=True, tag="get_sample"):
    """-> rows.Job of the tenant's sample that came under this key, None if there is none."""

    key: str


class CreateSampler(Ask, frozen=True, tag="create_sampler"):
    """-> Created. Of the base model, or of the weights at `model_path`, which wins when both are there.
    The same (session, sampling_seq_id) gives the same sampler."""

    session_id: str
    sampling_seq_id: int
    base_model: str | None = None
    model_path: str | None = None


class GetSampler(Ask, frozen=True, tag="get_sampler"):
    """-> rows.Sampler"""

    sampler_id: str


class ListCheckpoints(Ask, frozen=True, tag="list_checkpoints"):
    """-> list[rows.Checkpoint], newest first, live ones only; of one model or of the tenant."""

    model_id: str | None = None


class GetCheckpoint(Ask, frozen=True, tag="get_checkpoint"):
    """-> CheckpointView. Public ones of other tenants too."""

    address: str


class ForkCheckpoint(Ask, frozen=True, tag="fork_checkpoint"):
    """Publishes the state that a replay of the model left in the scratch folder as `ids.fork(fork_id)`:
    after operation `op_no`, which is optimizer step `step`, with these `edits`. A repeat with the same id
    is the same fork. -> rows.Checkpoint."""

    model_id: str
    name: str
    fork_id: str
    op_no: int
    step: int
    edits: list[str] = []


class ChangeCheckpoint(Ask, frozen=True, tag="change_checkpoint"):
    """-> None. Idempotent. `ttl_seconds` counts from now; `set_ttl` says that it is meant, for None
    removes it."""

    address: str
    public: bool | None = None
    set_ttl: bool = False
    ttl_seconds: int | None = None


class DeleteCheckpoint(Ask, frozen=True, tag="delete_checkpoint"):
    """-> None. The files go once no sampler needs them."""

    address: str


class GetHealth(Ask, frozen=True, tag="get_health"):
    """-> Health, at once, whatever the trainer does. Concerns no tenant."""


class GetMetrics(Ask, frozen=True, tag="get_metrics"):
    """-> bytes, in Prometheus's text format. Concerns no tenant, and names none."""


class GetCapabilities(Ask, frozen=True, tag="get_capabilities"):
    """-> Capabilities"""


class GetTokenizer(Ask, frozen=True, tag="get_tokenizer"):
    """-> the directory of the served model's tokenizer, or its name on the hub; None if nothing says.
    `use`: what it is for. Waits until a server has said what it serves, and raises NotServed where that
    is not served. None: as far as is known now."""

    use: Literal["training", "sampling"] | None = None


Question = (
    CreateSession
    | Heartbeat
    | FinishSession
    | MoveSession
    | GetSession
    | ListSessions
    | ReportClientFailure
    | SubmitTraining
    | SubmitSample
    | AwaitOutcome
    | CancelJob
    | GetModel
    | ListModels
    | GetWeights
    | GetSample
    | CreateSampler
    | GetSampler
    | ListCheckpoints
    | GetCheckpoint
    | ForkCheckpoint
    | ChangeCheckpoint
    | DeleteCheckpoint
    | GetHealth
    | GetMetrics
    | GetCapabilities
    | GetTokenizer
)


# -- answers ----------------------------------------------------------------------------------------


class Answer(msgspec.Struct, frozen=True):
    pass


class Created(Answer, frozen=True):
    id: str


class Promise(Answer, frozen=True):
    request_id: str
    model_id: str | None = None
    sample_sequence_ids: list[str] | None = None


class Outcome(Answer, frozen=True):
    """A job's end. Done: `result` (JSON) or `body` (protobuf). Failed: `category` and `error`."""

    op: str
    state: rows.JobState
    result: dict[str, Any] | None = None
    body: bytes | None = None
    category: str | None = None
    error: str | None = None


class ModelView(Answer, frozen=True):
    """A live model; `tokenizer`: a directory or hub id that clients can load, if there is one."""

    row: rows.Model
    arch: str
    tokenizer: str | None
    last_checkpoint: rows.Checkpoint | None
    last_sampler_checkpoint: rows.Checkpoint | None


class SessionView(Answer, frozen=True):
    row: rows.Session
    model_ids: list[str]
    sampler_ids: list[str]


class CheckpointView(Answer, frozen=True):
    """`files`: relative name -> size, of the published directory; `model`: what it was saved from."""

    row: rows.Checkpoint
    model: rows.Model
    files: dict[str, int]


class ServedModel(Answer, frozen=True):
    name: str
    max_context: int
    trainable: bool
    sampleable: bool


class Capabilities(Answer, frozen=True):
    models: list[ServedModel]


class Health(Answer, frozen=True):
    """`servers`: what serves, the trainer and vLLM servers by their URL, and how each is: `ready`, or why
    it is waited for. Without them jobs are accepted, and wait."""

    mode: str
    servers: dict[str, str]
