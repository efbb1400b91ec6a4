"""The jobs' requests, as the SDK sends them in JSON. Fields that a newer client adds are ignored.

A request is journaled as it was received and decoded from there again, so these types may only grow
by defaulted fields. The `seq_id` of a training job is its client's, and is None where the client counts
nothing: what counts is that of the job.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from tink.errors import UNREADABLE, MalformedRequest, UserError
from tink.limits import MAX_NUM_SAMPLES

OpName = Literal[
    "create_model",
    "forward",
    "forward_backward",
    "optim_step",
    "save_weights",
    "save_weights_for_sampler",
    "save_weights_external",
    "load_weights",
    "unload_model",
    "sample",
]

# Bodies that are data, not commands: kept in the body store, pruned by retention.
DATA_OPS: frozenset[OpName] = frozenset({"forward", "forward_backward", "sample"})
# What a redo applies again; the other operations change no state.
MUTATING: frozenset[OpName] = frozenset({"create_model", "load_weights", "forward_backward", "optim_step"})

# What a column and the trainer can hold. JSON has larger ones, and one of them must not get as far as a
# commit: a commit that fails stops the worker.
Int = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class Request(msgspec.Struct, frozen=True):
    pass


class LoraConfig(Request, frozen=True):
    """`alpha` None: the server's (TINK_LORA_ALPHA)."""

    rank: Int
    seed: Int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True
    alpha: float | None = None


class OptimizerConfig(Request, frozen=True):
    type: str = "adamw"


class CreateModel(Request, frozen=True):
    session_id: str
    model_seq_id: Int
    base_model: str
    lora_config: LoraConfig
    user_metadata: dict[str, Any] | None = None
    optimizer_config: OptimizerConfig = OptimizerConfig()


class AdamParams(Request, frozen=True):
    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class OptimStep(Request, frozen=True):
    model_id: str
    seq_id: Int | None = None
    adam_params: AdamParams | None = None
    optimizer_params: dict[str, Any] | None = None


class SaveWeights(Request, frozen=True):
    model_id: str
    seq_id: Int | None = None
    path: str | None = None
    ttl_seconds: Int | None = None
    overwrite: bool = False
    user_metadata: dict[str, str] | None = None


class SaveWeightsForSampler(Request, frozen=True):
    """Without `path` the weights are ephemeral: they belong to a sampler of the model's session."""

    model_id: str
    seq_id: Int | None = None
    path: str | None = None
    sampling_session_seq_id: Int | None = None
    kind: str = "snapshot"
    ttl_seconds: Int | None = None
    overwrite: bool = False
    user_metadata: dict[str, str] | None = None


class SaveWeightsExternal(Request, frozen=True):
    model_id: str
    seq_id: Int | None = None
    path: str | None = None
    ttl_seconds: Int | None = None
    age_encryption_recipients: list[str] | None = None


class LoadWeights(Request, frozen=True):
    """Either of a live model (`model_id`, `seq_id`), or one that makes a model (`session_id`,
    `model_seq_id`)."""

    path: str
    optimizer: bool = False
    model_id: str | None = None
    seq_id: Int | None = None
    session_id: str | None = None
    model_seq_id: Int | None = None
    base_model: str | None = None
    user_metadata: dict[str, Any] | None = None
    optimizer_config: OptimizerConfig | None = None


class UnloadModel(Request, frozen=True):
    """The client gives it no number: it comes after all that have come."""

    model_id: str


class Chunk(Request, frozen=True):
    """Of the four kinds only `encoded_text` is served; the others are refused by their name."""

    type: str
    tokens: list[Int] | None = None


class Prompt(Request, frozen=True):
    chunks: list[Chunk]

    @property
    def tokens(self) -> list[int]:
        """Raises UserError for what is no text."""
        tokens: list[int] = []
        for index, chunk in enumerate(self.chunks):
            if chunk.type != "encoded_text" or chunk.tokens is None:
                raise UserError(
                    f"chunk {index} is of type {chunk.type[:80]!r}: this server takes text only "
                    "(encoded_text with tokens)"
                )
            tokens += chunk.tokens
        return tokens


class SamplingParams(Request, frozen=True):
    max_tokens: Int | None = None
    seed: Int | None = None
    stop: str | list[str | Int] | None = None
    temperature: float = 1.0
    top_k: Int = -1
    top_p: float = 1.0


class TensorData(Request, frozen=True):
    data: list[float | Int]
    dtype: str = "int64"
    shape: list[Int] | None = None
    sparse_crow_indices: list[Int] | None = None
    sparse_col_indices: list[Int] | None = None


class Sample(Request, frozen=True):
    sampling_session_id: str | None = None
    seq_id: Int | None = None
    prompt: Prompt = Prompt([])
    sampling_params: SamplingParams = SamplingParams()
    num_samples: Int = 1
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: Int = 0
    topk_sample_logprobs: Int = 0
    prompt_alt_tokens_k: Int = 0
    prompt_logprobs_last_n: Int | None = None
    target_prompt_logprobs: TensorData | None = None
    record_stability_info: bool = False
    base_model: str | None = None
    model_path: str | None = None

    def __post_init__(self) -> None:
        # Checked here because the promise names one id per sample.
        if not 1 <= self.num_samples <= MAX_NUM_SAMPLES:
            raise ValueError(f"num_samples must be 1 to {MAX_NUM_SAMPLES}, not {self.num_samples}")


def decode(body: bytes, kind: type[Request]) -> Any:
    """`body` as a `kind`. Raises MalformedRequest with the path of the field that is wrong."""
    try:
        # As text: msgspec does not look at the bytes of fields that it skips, but they are journaled.
        return msgspec.json.decode(body.decode(), type=kind)
    except UNREADABLE as error:
        raise MalformedRequest(f"the body is not a valid {kind.__name__}: {error}") from None
