"""What a sampling server is asked for each request, and what is refused and why."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tink.domain import rows, sampling
from tink.domain.events import JobAccepted
from tink.errors import UserError
from tink.limits import MAX_STOPS, MAX_TOPK
from tink.wire import tink_train


def _sampling(**request: Any) -> tink_train.SampleRequest:
    job = rows.Job(
        job_id="s:sample:0:0",
        tenant="t",
        op="sample",
        session_id="s",
        model_id=None,
        sampler_id="s:sample:0",
        seq_id=0,
        model_seq_id=None,
        accepted_seq=1,
        submitted_at=1.0,
        body_sha256=None,
        body_bytes=0,
        codec="identity",
        seed=None,
        num_samples=None,
    )
    accepted = JobAccepted(op="sample", seq_id=0, sampler_id="s:sample:0", seed=77)
    body = msgspec.json.encode({"prompt": _text([1, 2, 3]), **request})
    return sampling.request_of(job, accepted, body, None)


def _text(*chunks: list[int]) -> dict[str, Any]:
    return {"chunks": [{"type": "encoded_text", "tokens": tokens} for tokens in chunks]}


STOPS = {
    "none": (None, ([], [], False)),
    "a string": ("end", (["end"], [], False)),
    "strings": (["a", "b"], (["a", "b"], [], False)),
    "tokens": ([3, 4], ([], [3, 4], False)),
    "both": (["a", 3], (["a"], [3], False)),
    "an empty list ignores the end of sequence": ([], ([], [], True)),
}


@pytest.mark.parametrize("what", STOPS)
def test_stops(what: str) -> None:
    stop, (strings, tokens, ignore) = STOPS[what]
    request = _sampling(sampling_params={"stop": stop})
    assert (request.stop_strings, request.stop_tokens, request.ignore_eos) == (strings, tokens, ignore)


DENSE = {"data": [5, 6, -1, 7], "shape": [2, 2]}
SPARSE = {
    "data": [5, 6, 7],
    "shape": [2, 2],
    "sparse_crow_indices": [0, 2, 3],
    "sparse_col_indices": [0, 1, 1],
}


@pytest.mark.parametrize("tensor", [DENSE, SPARSE, {**DENSE, "data": [5.0, 6.0, -1.0, 7.0]}])
def test_targets_are_one_row_a_predicted_token(tensor: dict[str, Any]) -> None:
    assert _sampling(target_prompt_logprobs=tensor).targets == [[5, 6], [-1, 7]]


SAMPLES_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an image": ({"prompt": {"chunks": [{"type": "image", "data": "x"}]}}, "'image'.*text only"),
    "a chunk of no tokens": ({"prompt": {"chunks": [{"type": "encoded_text"}]}}, "chunk 0"),
    "an empty stop": ({"sampling_params": {"stop": ["a", ""]}}, "empty stop"),
    "many stops": ({"sampling_params": {"stop": list(range(MAX_STOPS + 1))}}, "too many"),
    "topk": ({"topk_prompt_logprobs": MAX_TOPK + 1}, "topk_prompt_logprobs"),
    "topk below 0": ({"topk_sample_logprobs": -1}, "topk_sample_logprobs"),
    "alternatives": ({"prompt_alt_tokens_k": MAX_TOPK + 1}, "prompt_alt_tokens_k"),
    "stability": ({"record_stability_info": True}, "not supported"),
    "targets of no shape": ({"target_prompt_logprobs": {"data": [1]}}, r"shape \[2, K\]"),
    "targets of another length": (
        {"target_prompt_logprobs": {**DENSE, "shape": [3, 2]}},
        "must have the shape",
    ),
    "targets too few": ({"target_prompt_logprobs": {**DENSE, "data": [1, 2, 3]}}, "3 numbers"),
    "targets too wide": ({"target_prompt_logprobs": {**DENSE, "shape": [2, MAX_TOPK + 1]}}, "K ="),
    "targets of no width": ({"target_prompt_logprobs": {"data": [], "shape": [2, 0]}}, "K = 0"),
    "half a token": ({"target_prompt_logprobs": {**DENSE, "data": [1, 2, 3, 4.5]}}, "token ids"),
    "a row too many": (
        {"target_prompt_logprobs": {**SPARSE, "sparse_crow_indices": [0, 1, 2, 3]}},
        "not a valid CSR",
    ),
    "rows that go back": ({"target_prompt_logprobs": {**SPARSE, "sparse_crow_indices": [0, 4, 3]}}, "CSR"),
    "a column outside": ({"target_prompt_logprobs": {**SPARSE, "sparse_col_indices": [0, 1, 2]}}, "CSR"),
    "a column below 0": ({"target_prompt_logprobs": {**SPARSE, "sparse_col_indices": [0, 1, -1]}}, "CSR"),
    "columns too few": ({"target_prompt_logprobs": {**SPARSE, "sparse_col_indices": [0, 1]}}, "CSR"),
}


@pytest.mark.parametrize("what", SAMPLES_REFUSED)
def test_a_sample_that_cannot_be_served_says_why(what: str) -> None:
    request, reason = SAMPLES_REFUSED[what]
    with pytest.raises(UserError, match=reason):
        _sampling(**request)


def test_a_sample_takes_its_own_seed_or_that_of_its_acceptance() -> None:
    assert _sampling().seed == 77
    assert _sampling(sampling_params={"seed": 0}).seed == 0


def test_chunks_are_one_prompt() -> None:
    assert _sampling(prompt=_text([1, 2], [], [3])).prompt == [1, 2, 3]
