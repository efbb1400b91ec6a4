"""Submits. Only the envelope of a job is decoded here: whose it is, and its number. What the job says
is read by whoever runs it, and what is wrong with it is its result.

A body that cannot be served but has readable ids is accepted too, to fail with the reason: a refusal
here would leave a hole in the model's sequence, at which the jobs after it would wait.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec
from google.protobuf.message import DecodeError

from tink import limits
from tink.api.body import Body, beginning, expand
from tink.api.call import MEDIA_JSON, MEDIA_PROTOBUF, Call, Handler, Table, identifier, natural
from tink.api.tinker.peek import json_members, protobuf_ids
from tink.domain import ids, keys, messages, requests
from tink.domain.requests import OpName
from tink.errors import MalformedRequest, NotFound, TooLarge, bare
from tink.wire.tinker_pb2 import ForwardBackwardRequest

MAX_PROTO_SEQ = 2**31 - 1


class Place(NamedTuple):
    """Where in a session a training job belongs. With a `model_seq_id`, it makes the model."""

    session_id: str
    model_id: str
    seq_id: int
    model_seq_id: int | None = None

    @classmethod
    def of(cls, fields: dict[str, Any], most: int) -> Place | None:
        """None when the ids are not there. Raises MalformedRequest for those that cannot be."""
        match fields:
            case {"model_id": str(model_id), "seq_id": int(seq_id)} if model_id:
                return cls.of_model(model_id, natural("seq_id", seq_id, least=1, most=most))
            case {"session_id": str(session_id), "model_seq_id": int(number)}:
                identifier(session_id)
                model_id = ids.model_id(session_id, natural("model_seq_id", number))
                return cls(session_id, model_id, 0, number)
        return None

    @classmethod
    def of_model(cls, model_id: str, seq_id: int) -> Place:
        found = ids.Place.of_model(model_id)
        if found is None:
            raise NotFound(f"{model_id[:80]!r} is not a training run's id")
        return cls(identifier(found.session_id), identifier(model_id), seq_id)


def command(op: OpName, kind: type[requests.Request]) -> Handler:
    """The handler of a job whose request is JSON."""

    async def submit(call: Call) -> dict[str, Any]:
        body = await call.body(MEDIA_JSON, limits.MAX_JSON_BODY)
        text, invalid = b"", None
        try:
            text = await call.text(body)
            fields = msgspec.structs.asdict(requests.decode(text, kind))
        except (MalformedRequest, TooLarge) as error:
            invalid = bare(error)
            fields = json_members(beginning(body))
        return await _submit(call, op, fields, Body(text), invalid)

    return submit


async def forward_backward(call: Call) -> dict[str, Any]:
    body = await call.body(MEDIA_PROTOBUF, limits.MAX_TRAINING_BODY)
    op: OpName = "forward_backward"
    invalid = None
    try:
        envelope = await call.offload(body, _parse, body)
        fields: dict[str, Any] = {"model_id": envelope.model_id, "seq_id": envelope.seq_id}
        if envelope.forward_only:
            op = "forward"
    except (MalformedRequest, TooLarge) as error:
        invalid = bare(error)
        fields = protobuf_ids(beginning(body))
    return await _submit(call, op, fields, body, invalid, MAX_PROTO_SEQ)


def _parse(body: Body) -> ForwardBackwardRequest:
    try:
        return ForwardBackwardRequest.FromString(expand(body, limits.MAX_TRAINING_BODY))
    except DecodeError as error:
        raise MalformedRequest(f"the body is not a valid ForwardBackwardRequest: {error}") from None


async def _submit(
    call: Call,
    op: OpName,
    fields: dict[str, Any],
    body: Body,
    invalid: MalformedRequest | TooLarge | None,
    most: int = limits.MAX_SEQ,
) -> dict[str, Any]:
    place = Place.of(fields, most)
    if place is None:
        raise invalid or MalformedRequest(f"{op} needs a model_id and a seq_id")
    promise: messages.Promise = await call.ask(
        messages.SubmitTraining(
            tenant=call.tenant,
            op=op,
            session_id=place.session_id,
            model_id=place.model_id,
            seq_id=place.seq_id,
            body=b"" if invalid else body.data,
            codec="identity" if invalid else body.codec,
            model_seq_id=place.model_seq_id,
            invalid=None if invalid is None else str(invalid),
        )
    )
    return {"request_id": promise.request_id, "model_id": promise.model_id}


async def unload_model(call: Call) -> dict[str, Any]:
    """The SDK gives it no number."""
    sent = await call.json(requests.UnloadModel)
    place = Place.of_model(sent.model_id, 1)
    promise: messages.Promise = await call.ask(
        messages.SubmitTraining(
            tenant=call.tenant,
            op="unload_model",
            session_id=place.session_id,
            model_id=place.model_id,
            seq_id=None,
            body=msgspec.json.encode(sent),
            key=keys.UNLOAD,
        )
    )
    return {"request_id": promise.request_id, "model_id": promise.model_id}


async def sample(call: Call) -> dict[str, Any]:
    """The samples of a sampler have numbers for identity, not for order: one that is refused here
    leaves no hole."""
    body = await call.body(MEDIA_JSON, limits.MAX_JSON_BODY)
    text = await call.text(body)
    sent: requests.Sample = await call.offload(body, requests.decode, text, requests.Sample)
    if sent.sampling_session_id is None or sent.seq_id is None:
        raise MalformedRequest(
            "a sample needs a sampling_session_id (of create_sampling_session) and a seq_id"
        )
    promise: messages.Promise = await call.ask(
        messages.SubmitSample(
            tenant=call.tenant,
            sampler_id=identifier(sent.sampling_session_id),
            seq_id=natural("seq_id", sent.seq_id),
            body=text,
            num_samples=sent.num_samples,
            seed=sent.sampling_params.seed,
        )
    )
    return {"request_id": promise.request_id, "sample_sequence_ids": promise.sample_sequence_ids}


TABLE: Table = {
    "/create_model": {"POST": command("create_model", requests.CreateModel)},
    "/forward_backward": {"POST": forward_backward},
    "/optim_step": {"POST": command("optim_step", requests.OptimStep)},
    "/save_weights": {"POST": command("save_weights", requests.SaveWeights)},
    "/save_weights_for_sampler": {
        "POST": command("save_weights_for_sampler", requests.SaveWeightsForSampler)
    },
    "/save_weights_external": {"POST": command("save_weights_external", requests.SaveWeightsExternal)},
    "/load_weights": {"POST": command("load_weights", requests.LoadWeights)},
    "/unload_model": {"POST": unload_model},
    "/asample": {"POST": sample},
}
