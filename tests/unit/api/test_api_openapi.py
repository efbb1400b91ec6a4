"""The REST API's description: it is served, it is OpenAPI, and whatever it lets a client send is answered
as it says, with no 5xx."""

from __future__ import annotations

import struct
from datetime import timedelta

import httpx
import pytest
import schemathesis
import trio
from api_double import RUN, SAMPLER, StillWorld, Worker
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from tink.api import rest
from tink.api.app import create_app
from tink.api.auth import Auth
from tink.api.rest import openapi
from tink.domain import messages
from tink.errors import NotFound
from tink.wire import tinker_pb2 as pb

SCHEMA = schemathesis.openapi.from_dict(openapi.document())
OPERATIONS = [result.ok() for result in SCHEMA.get_all_operations()]
# A GET has nothing that could be wrong.
CASES = [
    (operation, mode)
    for operation in OPERATIONS
    for mode in GenerationMode
    if mode is GenerationMode.POSITIVE or operation.method == "post"
]
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]


class Fast(Worker):
    """Whose jobs are done as soon as somebody asks."""

    def __init__(self):
        super().__init__()
        self.ops = {f"{RUN}:0": "create_model"}

    async def ask(self, question):
        if isinstance(question, messages.AwaitOutcome):
            if question.job_id not in self.ops:
                raise NotFound("there is no such job")
            return _done(self.ops[question.job_id])
        answer = await super().ask(question)
        if isinstance(question, messages.SubmitTraining):
            self.ops[answer.request_id] = question.op
        elif isinstance(question, messages.SubmitSample):
            self.ops[answer.request_id] = "sample"
        return answer


def _done(op):
    if op == "sample":
        drawn = pb.SampleResponse()
        logprobs = struct.pack("<2f", float("-inf"), -1.0)
        drawn.sequences.add(tokens=bytes(8), logprobs=logprobs, stop_reason=pb.STOP_REASON_STOP)
        return messages.Outcome(op, "done", body=drawn.SerializeToString())
    if op in ("forward", "forward_backward"):
        output = pb.ForwardBackwardOutput(metrics={"loss:sum": float("nan")})
        record = output.loss_fn_outputs.add(num_datums=1)
        offsets = struct.pack("<2q", 0, 8)
        record.fields["logprobs"].CopyFrom(
            pb.BatchedTensor(data=struct.pack("<2f", 1, 2), offsets=offsets, dtype=pb.DTYPE_FLOAT32)
        )
        return messages.Outcome(op, "done", body=output.SerializeToString())
    result = {"path": "tinker://a/weights/b", "metrics": {"step": 1.0}, "type": "t"}
    if op == "save_weights_for_sampler":
        result["sampling_session_id"] = SAMPLER
    return messages.Outcome(op, "done", result=result)


async def _send(app, case):
    sent = {k: v for k, v in case.as_transport_kwargs(base_url="http://tink").items() if k != "cookies"}
    headers = {str(name): str(value) for name, value in sent.pop("headers").items()}
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport) as client:
        body = {"json": sent["json"]} if "json" in sent else {"content": sent.get("data")}
        answer = await client.request(
            sent["method"], sent["url"], headers=headers, params=sent.get("params"), **body
        )
        answer.elapsed = timedelta()
        return answer


@pytest.mark.parametrize(
    ("operation", "mode"), CASES, ids=[f"{operation.label} {mode.name}" for operation, mode in CASES]
)
def test_whatever_the_description_allows_is_answered_as_it_says(operation, mode):
    statuses = set()

    @given(data=st.data())
    @settings(max_examples=20, deadline=None, suppress_health_check=[*HealthCheck])
    def check(data):
        case = data.draw(operation.as_strategy(generation_mode=mode))
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
            _aim(operation, case.body, data.draw)
        app = create_app(Fast().ask, auth=Auth(), artifacts="/nowhere", secret=b"s", world=StillWorld())
        answer = trio.run(_send, app, case)
        case.validate_response(answer, checks=CHECKS)
        statuses.add(answer.status_code)

    check()
    # Else it would have found nothing out.
    assert (200 in statuses) == (mode is GenerationMode.POSITIVE)


def _aim(operation, body, draw):
    """At what is there; and a sample at one of what excludes each other."""
    there = {"model_id": RUN, "model_path": f"tinker://{RUN}/sampler_weights/a", "request_id": f"{RUN}:0"}
    if operation.path in ("/sample", "/sample_async", "/asample"):
        for names in (("model_id", "model_path", "base_model"), ("prompt", "prompts", "messages")):
            kept = draw(st.sampled_from([name for name in names if body.get(name)] or names[:1]))
            body.setdefault(kept, [1])
            for name in {*names} - {kept}:
                body.pop(name, None)
        if "messages" not in body and draw(st.booleans()):
            body.pop("prompts", None)
            body["prompt"] = [1]
    body.update({name: value for name, value in there.items() if name in body})


async def test_the_description_is_served_to_everyone_and_has_every_path(client):
    answer = await client.get("/openapi.json")
    assert answer.json() == openapi.document()
    assert answer.json()["openapi"].startswith("3.1")
    paths = {path: {method.lower() for method in methods} for path, methods in rest.SHORT.items()}
    assert {path: {*methods} for path, methods in answer.json()["paths"].items()} == paths
