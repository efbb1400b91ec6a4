"""From a journaled sampling job to what a sampling server is asked, and what none can do. Pure."""

from __future__ import annotations

import math

from tink.domain import requests, rows
from tink.domain.events import JobAccepted
from tink.errors import UserError
from tink.limits import HOLD_SECONDS, MAX_NUM_SAMPLES, MAX_STOPS, MAX_TOPK, MAX_TOPK_CELLS
from tink.wire.tink_train import SampleRequest

# Why the weights of a sampler are there no more.
_GONE = {
    "finished": "its session was finished",
    "removed": "their model was unloaded",
    "idle": "it had no request for TINK_KEEP_ADAPTERS_HOURS",
    "deleted": "their checkpoint was deleted, and it had no request for TINK_KEEP_ADAPTERS_HOURS since",
}


def request_of(
    job: rows.Job, accepted: JobAccepted, body: bytes, adapter: rows.Adapter | None
) -> SampleRequest:
    """The trainer's request for a sample of the adapter version, None for the base model. Raises UserError
    if it cannot be served."""
    request = requests.decode(body, requests.Sample)
    if adapter is not None and adapter.state != "live":
        raise UserError(
            f"the weights of the sampler {job.sampler_id} were deleted: {_GONE[adapter.state]}; save them "
            "again (save_weights_for_sampler) and make a new one; what is saved with a name stays"
        )
    params = request.sampling_params
    prompt = request.prompt.tokens
    for name, value in (
        ("topk_prompt_logprobs", request.topk_prompt_logprobs),
        ("topk_sample_logprobs", request.topk_sample_logprobs),
        ("prompt_alt_tokens_k", request.prompt_alt_tokens_k),
    ):
        if not 0 <= value <= MAX_TOPK:
            raise UserError(f"{name} {value} cannot be used: 0 to {MAX_TOPK} can")
    if request.record_stability_info:
        raise UserError("record_stability_info is not supported: leave it out")
    strings, tokens, ignore_eos = _stops(params.stop)
    targets = None
    if request.target_prompt_logprobs is not None:
        targets = _targets(request.target_prompt_logprobs, len(prompt) - 1)
    return SampleRequest(
        sample_id=job.job_id,
        prompt=prompt,
        seed=params.seed if params.seed is not None else int(accepted.seed or 0),
        adapter=adapter.directory if adapter else None,
        num_samples=request.num_samples,
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        stop_strings=strings,
        stop_tokens=tokens,
        ignore_eos=ignore_eos,
        prompt_logprobs=bool(request.prompt_logprobs),
        prompt_logprobs_last_n=request.prompt_logprobs_last_n,
        topk_prompt_logprobs=request.topk_prompt_logprobs,
        topk_sample_logprobs=request.topk_sample_logprobs,
        prompt_alt_tokens_k=request.prompt_alt_tokens_k,
        targets=targets,
        wait=HOLD_SECONDS,
        seeded=params.seed is not None,
    )


def _stops(stop: str | list[str] | list[int] | None) -> tuple[list[str], list[int], bool]:
    """Strings, tokens, and whether the model's own end of sequence is ignored: an empty list says so."""
    if stop is None:
        return [], [], False
    if isinstance(stop, str):
        stop = [stop]
    if len(stop) > MAX_STOPS:
        raise UserError(f"{len(stop)} stops are too many: {MAX_STOPS} at most")
    strings = [part for part in stop if isinstance(part, str)]
    if any(part == "" for part in strings):
        raise UserError("an empty stop string would stop at once: leave it out")
    return strings, [part for part in stop if isinstance(part, int)], not stop


def _targets(tensor: requests.TensorData, length: int) -> list[list[int]]:
    """len(prompt)-1 rows of K token ids; -1 asks for nothing, and so does an unlisted cell of a CSR."""
    shape = tensor.shape
    if shape is None or len(shape) != 2 or shape[0] != length:
        raise UserError(f"target_prompt_logprobs must have the shape [{length}, K], not {shape}")
    rows_, width = shape
    if not 1 <= width <= MAX_TOPK:
        raise UserError(f"target_prompt_logprobs has K = {width}: 1 to {MAX_TOPK} can be asked for")
    if any(value != int(value) for value in tensor.data):
        raise UserError("target_prompt_logprobs must hold token ids")
    data = [int(value) for value in tensor.data]
    if tensor.sparse_crow_indices is None or tensor.sparse_col_indices is None:
        if len(data) != rows_ * width:
            raise UserError(f"target_prompt_logprobs has {len(data)} numbers for the shape {shape}")
        return [data[i * width : (i + 1) * width] for i in range(rows_)]
    crow, col = tensor.sparse_crow_indices, tensor.sparse_col_indices
    if len(crow) != rows_ + 1 or crow[0] != 0 or crow[-1] != len(data) or len(col) != len(data):
        raise UserError("target_prompt_logprobs is not a valid CSR tensor")
    table = [[-1] * width for _ in range(rows_)]
    for i in range(rows_):
        if not 0 <= crow[i] <= crow[i + 1] <= len(data):
            raise UserError("target_prompt_logprobs is not a valid CSR tensor")
        for position in range(crow[i], crow[i + 1]):
            if not 0 <= col[position] < width:
                raise UserError("target_prompt_logprobs is not a valid CSR tensor")
            table[i][col[position]] = data[position]
    return table


def room(request: SampleRequest, context: int) -> int:
    """How many tokens may be generated in a context of so many. A prompt that fills it still gets one, for
    that one is never fed back."""
    left = max(context - len(request.prompt), 1)
    return left if request.max_tokens is None else min(request.max_tokens, left)


def most(request: SampleRequest, context: int) -> int:
    """How many tokens a server is asked for at most that cannot give none: then one, which is dropped."""
    return max(room(request, context), 1)


def distinct(request: SampleRequest) -> int:
    """How many of its samples can differ. Greedy ones are all the same one, and so are empty ones: where a
    server draws one, it stands for all."""
    return 1 if request.temperature == 0 or request.max_tokens == 0 else request.num_samples


def check(request: SampleRequest, context: int, vocabulary: int | None = None) -> None:
    """Raises UserError, which names the field, for what no server of such a model can do. The prompt, which
    may be of 1 to `context` tokens, is looked at before."""
    most = MAX_TOPK if vocabulary is None else min(MAX_TOPK, vocabulary)
    _check_range("num_samples", request.num_samples, 1, MAX_NUM_SAMPLES)
    _check_range("max_tokens", request.max_tokens or 0, 0, None)
    _check_range("top_k", request.top_k, -1, None)
    _check_range("topk_prompt_logprobs", request.topk_prompt_logprobs, 0, most)
    _check_range("topk_sample_logprobs", request.topk_sample_logprobs, 0, most)
    _check_range("prompt_alt_tokens_k", request.prompt_alt_tokens_k, 0, most)
    cells = request.num_samples * room(request, context) * request.topk_sample_logprobs
    if cells > MAX_TOPK_CELLS:
        raise UserError(
            f"topk_sample_logprobs of {cells} tokens do not fit an answer: ask for {MAX_TOPK_CELLS} at most"
        )
    if not 0 <= request.temperature < math.inf:
        raise UserError(f"temperature is {request.temperature}: it must be 0 or more")
    if not 0 < request.top_p <= 1:
        raise UserError(f"top_p is {request.top_p}: it must be above 0 and at most 1")
    if len(request.stop_strings) + len(request.stop_tokens) > MAX_STOPS:
        raise UserError(f"more than {MAX_STOPS} stops")
    if "" in request.stop_strings:
        raise UserError("an empty stop string ends everything: leave it out")
    last = request.prompt_logprobs_last_n
    if last is not None:
        if not request.prompt_logprobs:
            raise UserError("prompt_logprobs_last_n needs prompt_logprobs")
        _check_range("prompt_logprobs_last_n", last, 1, len(request.prompt) - 1)


def _check_range(name: str, value: int, low: int, high: int | None) -> None:
    if value < low or (high is not None and value > high):
        bound = f"{low} or more" if high is None else f"{low} to {high}"
        raise UserError(f"{name} is {value}: it must be {bound}")
