"""Requests: what a newer client adds is ignored, what cannot be read is MalformedRequest."""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tink.domain import requests
from tink.domain.requests import Request
from tink.errors import MalformedRequest, UserError
from tink.limits import MAX_NUM_SAMPLES

# The least that each takes.
LEAST: dict[type[Request], dict[str, Any]] = {
    requests.CreateModel: {
        "session_id": "s",
        "model_seq_id": 0,
        "base_model": "m",
        "lora_config": {"rank": 8},
    },
    requests.OptimStep: {"model_id": "m"},
    requests.SaveWeights: {"model_id": "m"},
    requests.SaveWeightsForSampler: {"model_id": "m"},
    requests.SaveWeightsExternal: {"model_id": "m"},
    requests.LoadWeights: {"path": "tinker://m/weights/a"},
    requests.Sample: {},
}
kinds = pytest.mark.parametrize("kind", LEAST, ids=lambda kind: kind.__name__)


@kinds
def test_what_a_newer_client_adds_is_ignored(kind: type[Request]) -> None:
    least = requests.decode(msgspec.json.encode(LEAST[kind]), kind)
    more = {**LEAST[kind], "added_in_2031": {"deep": [1, None, "x"]}}
    assert requests.decode(msgspec.json.encode(more), kind) == least


@kinds
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b'{"model_id": "\xff"}',
        b'{"model_id": "\\ud800"}',
        b'{"x": NaN}',
        b'{"x": Infinity}',
        b"{'x': 1}",
        b'{"x": 1,}',
        b'{"x":' + b"[" * 200_000,
        b"[" * 200_000,
        b"\x00",
    ],
    ids=lambda body: repr(body[:20]),
)
def test_what_is_not_the_json_of_a_request_is_malformed(kind: type[Request], body: bytes) -> None:
    with pytest.raises(MalformedRequest, match=kind.__name__):
        requests.decode(body, kind)


@kinds
def test_a_required_field_that_is_missing_or_of_another_type_is_named(kind: type[Request]) -> None:
    for field in LEAST[kind]:
        without = {name: value for name, value in LEAST[kind].items() if name != field}
        with pytest.raises(MalformedRequest, match=field):
            requests.decode(msgspec.json.encode(without), kind)
        with pytest.raises(MalformedRequest, match=rf"\$\.{field}"):
            requests.decode(msgspec.json.encode({**LEAST[kind], field: [[]]}), kind)


@kinds
def test_a_job_that_is_not_counted_has_no_number_and_one_that_is_has_a_number(kind: type[Request]) -> None:
    body = msgspec.json.encode(LEAST[kind])
    if "seq_id" in kind.__struct_fields__:
        assert requests.decode(body, kind).seq_id is None
        with pytest.raises(MalformedRequest, match=r"\$\.seq_id"):
            requests.decode(msgspec.json.encode({**LEAST[kind], "seq_id": "1"}), kind)


@kinds
@given(body=st.binary(max_size=60))
def test_no_bytes_make_another_error(kind: type[Request], body: bytes) -> None:
    with contextlib.suppress(MalformedRequest):
        assert isinstance(requests.decode(body, kind), kind)


@pytest.mark.parametrize("count", [0, -1, MAX_NUM_SAMPLES + 1, 2**63])
def test_num_samples_is_bounded(count: int) -> None:
    with pytest.raises(MalformedRequest, match=r"num_samples|range"):
        requests.decode(msgspec.json.encode({"num_samples": count}), requests.Sample)


@pytest.mark.parametrize(
    "params",
    [
        {"learning_rate": "fast"},
        {"beta1": None},
        {"eps": True},
    ],
)
def test_numbers_are_numbers(params: dict[str, Any]) -> None:
    body = {"model_id": "m", "seq_id": 1, "adam_params": params}
    with pytest.raises(MalformedRequest, match="adam_params"):
        requests.decode(msgspec.json.encode(body), requests.OptimStep)


def test_malformed_is_the_users_error() -> None:
    assert issubclass(MalformedRequest, UserError)


def test_defaults_are_the_sdks() -> None:
    adam = requests.AdamParams()
    assert (adam.learning_rate, adam.beta1, adam.beta2, adam.eps) == (1e-4, 0.9, 0.95, 1e-12)
    params = requests.SamplingParams()
    assert (params.temperature, params.top_k, params.top_p, params.max_tokens) == (1.0, -1, 1.0, None)
