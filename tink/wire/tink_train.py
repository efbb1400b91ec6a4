"""`tink-train/1`: what the worker and a training server say to each other.

The worker's journal is the truth; the trainer is a cache of model state that may vanish. Every
operation on a model carries the trainer's incarnation, a dense `op_no` per model (1, 2, 3, ...) that
the worker gave it when it journaled the job, and the job's id. State, `applied` and the stored
result change together or not at all, so that any call can be sent again:

| the trainer finds | it answers |
|---|---|
| another incarnation in the call | 412 `stale_incarnation` |
| a lease older than one it has seen | 409 `fenced` |
| op_no == applied + 1, or the next one behind ops that are queued | runs it, or queues it: 200 or 202 |
| op_no <= applied, same job_id, result kept | 200 with the stored result, `replayed` true |
| op_no queued or running, same job_id | joins it: 200 or 202 |
| op_no <= applied, result dropped (it was acked) | 410 `result_gone`: it was applied |
| op_no known under another job_id | 422 `op_reused` |
| op_no further ahead | 409 `gap` with `applied` |
| op_no further ahead, of a `remove_model` | runs it, or 429 `busy` while another op of the model is open |
| a model it does not have, and the op does not create it | 404 `no_model` |
| a full queue | 429 `busy` |

A job that fails (bad input, out of memory, a loss that is not finite) is answered 200 with
`state: "failed"`: it changed nothing, but it consumed its op_no, so that the journal and the trainer
agree. Everything here travels as msgpack (`application/msgpack`); weights never do: they are files
under the artifact folder that both sides see, named by relative paths that the worker chose.

Endpoints (health, info and state answer JSON, off the training thread):

    GET  /v1/health                          Health
    GET  /v1/info                            Info             503 while loading
    GET  /v1/state                           State            503 while loading
    POST /v1/ops                             OpRequest -> OpReply (200 ended, 202 still running)
    GET  /v1/ops/{model_id}/{op_no}?wait=S   OpReply          long poll of at most S seconds
    POST /v1/ops/{model_id}/{op_no}/cancel   OpReply          a queued op ends as failed
    POST /v1/samples                         SampleRequest -> SampleReply (200 or 202)
    GET  /v1/samples/{sample_id}?wait=S      SampleReply
    POST /v1/snapshots                       SnapshotRequest -> SnapshotReply
    POST /v1/restores                        RestoreRequest -> RestoreReply

Any error is a `Refusal`, with the HTTP status of the table. Beside the table's there are 400
`malformed`, 401 `unauthorized`, 404 `no_op` and `no_sample` (never sent here), 409 `not_behind` (a
restore onto a model that has applied as much), 413 `too_large`, 503 `loading` and `broken`; a snapshot
or a restore that fails is 400, 404, 500 or 502 `failed`. A lost connection cancels nothing.
"""

from __future__ import annotations

from typing import Literal

import msgspec

PROTOCOL = "tink-train/1"
MEDIA_TYPE = "application/msgpack"


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """What all of them are: frozen, and open to fields that a newer peer adds."""


# -- operations on a model ------------------------------------------------------------------------


class CreateModel(Message, frozen=True, tag="create_model"):
    """A new LoRA on the frozen base, B = 0; or, with `source`, one read from a saved state (its rank,
    alpha and targets then come from there, and its moments too when `optimizer` is true). `export`: a new
    directory for the adapter as it is now, as `export_adapter` writes it; both are done, or neither."""

    rank: int
    alpha: float
    seed: int
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True
    source: str | None = None
    optimizer: bool = False
    export: str | None = None


class Forward(Message, frozen=True, tag="forward"):
    """Log-probabilities and loss; touches no gradient. `body` is the SDK's ForwardBackwardRequest."""

    body: bytes = b""


class ForwardBackward(Message, frozen=True, tag="forward_backward"):
    """Adds the gradient of the summed loss to what the model has accumulated. As Forward's, its body."""

    body: bytes = b""


class OptimStep(Message, frozen=True, tag="optim_step"):
    """AdamW with the accumulated gradient, which is then zero. `grad_clip_norm` 0 clips nothing."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class SaveState(Message, frozen=True, tag="save_state"):
    """Weights and optimizer, into the new directory `path`. Accumulated gradients stay untouched."""

    path: str


class LoadState(Message, frozen=True, tag="load_state"):
    """Weights from `path`, moments and step too when `optimizer` is true (else they start anew).
    Accumulated gradients become zero."""

    path: str
    optimizer: bool


class ExportAdapter(Message, frozen=True, tag="export_adapter"):
    """The adapter in PEFT's format (safetensors), into the new directory `path`."""

    path: str


class RemoveModel(Message, frozen=True, tag="remove_model"):
    """The model is gone; its op numbers stay consumed. What lies between `applied` and this op has not
    been applied, and is not needed: a redo would only be thrown away, or cannot be done."""


class Skip(Message, frozen=True, tag="skip"):
    """Consumes an op_no and does nothing: in a redo, the place of a job that failed or changed no
    state. Also taken for a model that does not exist, and then makes none."""


Op = (
    CreateModel
    | Forward
    | ForwardBackward
    | OptimStep
    | SaveState
    | LoadState
    | ExportAdapter
    | RemoveModel
    | Skip
)


class OpRequest(Message, frozen=True):
    """`acked`: results up to this op_no may be dropped. `lease` grows with every worker that starts;
    an older one is fenced. `wait`: seconds the call may be held before it answers 202."""

    incarnation: str
    lease: int
    model_id: str
    op_no: int
    job_id: str
    op: Op
    acked: int = 0
    wait: float = 20.0


class File(Message, frozen=True):
    """A file of a published directory: name relative to it, size in bytes, sha256 in hex."""

    name: str
    size: int
    sha256: str


class OpResult(Message, frozen=True):
    """What an op gave. `body`: the ForwardBackwardOutput protobuf of forward and forward_backward,
    to be passed on untouched. `tokens`: input tokens. `queued_ms`: for how long the op waited at the server
    for its turn. `idle_ms`: for how long since the end of the op before, of any model, the server had
    nothing to do; 0 for its first. Left out by one that cannot tell. `run_ms`, `queued_ms` and `idle_ms`
    are the only parts that a redo of the same op may change."""

    body: bytes = b""
    metrics: dict[str, float] = {}
    loss: float | None = None
    tokens: int = 0
    files: list[File] = []
    model: ModelInfo | None = None
    run_ms: float = 0.0
    queued_ms: float = 0.0
    idle_ms: float | None = None


class ModelInfo(Message, frozen=True):
    """What a model is made of: the answer to create_model."""

    rank: int
    alpha: float
    seed: int
    train_attn: bool
    train_mlp: bool
    train_unembed: bool


class Failure(Message, frozen=True):
    category: Literal["user", "server"]
    message: str


class OpReply(Message, frozen=True):
    state: Literal["queued", "running", "done", "failed"]
    incarnation: str
    model_id: str
    op_no: int
    applied: int
    replayed: bool = False
    result: OpResult | None = None
    failure: Failure | None = None


# -- sampling -------------------------------------------------------------------------------------


class SampleRequest(Message, frozen=True):
    """`num_samples` continuations of one prompt. A pure function of its fields: sent twice, it gives
    the same answer. `adapter`: an exported directory, or None for the base model. `max_tokens` None:
    what is left of the context. `top_k` -1 and `top_p` 1.0 are off; temperature 0 is greedy.
    `stop_tokens` and `stop_strings` add to the model's end-of-sequence tokens, which `ignore_eos`
    turns off. Sample i draws from (seed, i). `seeded`: the client has named the seed; a server that cannot
    draw by it refuses. `targets`: len(prompt)-1 rows of K token ids, -1 = none."""

    sample_id: str
    prompt: list[int]
    seed: int
    adapter: str | None = None
    num_samples: int = 1
    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    stop_strings: list[str] = []
    stop_tokens: list[int] = []
    ignore_eos: bool = False
    prompt_logprobs: bool = False
    prompt_logprobs_last_n: int | None = None
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    prompt_alt_tokens_k: int = 0
    targets: list[list[int]] | None = None
    wait: float = 20.0
    seeded: bool = False

    @property
    def scores_prompt(self) -> bool:
        """Whether something is asked of the prompt's own tokens."""
        own = self.prompt_logprobs or self.topk_prompt_logprobs or self.prompt_alt_tokens_k
        return bool(own) or self.targets is not None


class SampleReply(Message, frozen=True):
    """`body`: the SampleResponse protobuf, to be passed on untouched."""

    state: Literal["queued", "running", "done", "failed"]
    sample_id: str
    body: bytes = b""
    tokens_in: int = 0
    tokens_out: int = 0
    run_ms: float = 0.0
    failure: Failure | None = None


# -- snapshots ------------------------------------------------------------------------------------


class SnapshotRequest(Message, frozen=True):
    """All of a model's state, between two ops, into the new directory `path`: weights, moments, step,
    accumulated gradients, `applied` and the results not yet acked. Changes nothing."""

    incarnation: str
    lease: int
    model_id: str
    path: str


class SnapshotReply(Message, frozen=True):
    applied: int
    files: list[File]


class RestoreRequest(Message, frozen=True):
    """Puts a snapshot back. Only onto an absent model, or one that has applied less."""

    incarnation: str
    lease: int
    model_id: str
    path: str


class RestoreReply(Message, frozen=True):
    applied: int


# -- what the server says of itself ---------------------------------------------------------------


class Running(Message, frozen=True):
    """What the server computes just now, and for how long: an operation; a snapshot or a restore (its
    `job_id` says which, `op_no` is what the model has applied); a sample (no `model_id`, and its id as
    `job_id`). `idle`: seconds since it last showed progress. A server that cannot tell leaves it out."""

    model_id: str
    op_no: int
    job_id: str
    seconds: float
    idle: float = 0.0


class Health(Message, frozen=True):
    """`state`: loading (not yet serving), ready, or broken (`detail` says why). Busy is healthy."""

    protocol: str
    incarnation: str
    state: Literal["loading", "ready", "broken"]
    detail: str = ""
    running: list[Running] = []


class Info(Message, frozen=True):
    """`base_model` is the name clients use; `base_path` a directory with the tokenizer, when there is
    one on this machine. `base_digest` identifies the frozen weights. `slots`: how many models' ops run at
    once; the others wait, in the order in which they came. None if that is not so, or not known."""

    protocol: str
    incarnation: str
    engine: str
    versions: dict[str, str]
    base_model: str
    base_path: str | None
    base_digest: str
    arch: str
    parameters: int
    vocab_size: int
    max_context: int
    max_rank: int
    losses: list[str]
    capabilities: list[str]
    slots: int | None = None

    @property
    def trains(self) -> bool:
        """Whether it takes operations; else it only samples."""
        return "train" in self.capabilities


class ModelState(Message, frozen=True):
    """`exists`: false for one that was removed, or whose creation failed or is still queued."""

    applied: int
    kept: list[int]
    queued: list[int] = []
    exists: bool = True


class State(Message, frozen=True):
    incarnation: str
    lease: int
    models: dict[str, ModelState]


class Refusal(Message, frozen=True):
    """`error` is the table's word. `retryable`: the same call may be accepted later."""

    error: str
    message: str
    retryable: bool = False
    incarnation: str | None = None
    applied: int | None = None


encode = msgspec.msgpack.Encoder().encode
