"""What becomes of a job, in JSON: a result, or the error as the HTTP answer's."""

from __future__ import annotations

import math
import struct
from contextlib import suppress
from typing import Any, Literal

from tink.api import waiting
from tink.api.call import Call, Table, identifier
from tink.api.refusals import JSON
from tink.api.rest import answers
from tink.api.rest.forms import Future
from tink.domain import messages
from tink.errors import NotFound, UserError, failed
from tink.limits import MAX_PROMPTS, REST_POLL_HOLD
from tink.pretrained import Text
from tink.wire import tinker_pb2 as pb

# Between the ids of one request's jobs.
SEPARATOR = ","
_FORMATS: dict[pb.DType.ValueType, tuple[str, Literal["float32", "int64"]]] = {
    pb.DTYPE_FLOAT32: ("<f", "float32"),
    pb.DTYPE_INT64: ("<q", "int64"),
}
_STOPS: dict[pb.StopReason.ValueType, Literal["stop", "length"]] = {
    pb.STOP_REASON_STOP: "stop",
    pb.STOP_REASON_LENGTH: "length",
}


async def retrieve(call: Call) -> Any:
    sent = await call.json(Future)
    jobs = sent.request_id.split(SEPARATOR)[: MAX_PROMPTS + 1]
    return await of(call, [identifier(job) for job in jobs], REST_POLL_HOLD)


async def of(call: Call, jobs: list[str], hold: float) -> Any:
    """The jobs' result, once all have ended, or after `hold` seconds for each of them that it is pending.
    Raises the error of the first that failed."""
    outcomes = []
    for job in jobs:
        outcome = await waiting.outcome(call, job, hold)
        if outcome is None:
            return JSON(answers.Pending(), 202)
        if outcome.state != "done":
            text = outcome.error or "the job was cancelled"
            raise failed(outcome.category, text)
        outcomes.append(outcome)
    first = outcomes[0]
    if len(outcomes) > 1 and any(one.op != "sample" for one in outcomes):
        raise NotFound("no request has these jobs: a request_id is used as it was given")
    if first.op == "sample":
        return await _samples(call, outcomes)
    if first.body is not None:
        return await call.service.world.run_sync(_training, first.body)
    return answers.of(first.op, first.result or {}, jobs[0].rpartition(":")[0])


def _training(body: bytes) -> answers.Trained:
    output = pb.ForwardBackwardOutput.FromString(body)
    data: list[dict[str, answers.Tensor]] = []
    for record in output.loss_fn_outputs:
        data += [
            {name: _tensor(field, number) for name, field in record.fields.items()}
            for number in range(record.num_datums)
        ]
    metrics: dict[str, float | None] = dict(output.metrics)
    return answers.Trained(metrics.get("loss:sum"), metrics, data)


def _tensor(batched: pb.BatchedTensor, number: int) -> answers.Tensor:
    begin, end = struct.unpack_from("<2q", batched.offsets, struct.calcsize("<q") * number)
    form, dtype = _FORMATS[batched.dtype]
    trailing = list(batched.trailing_shape)
    values = [value for (value,) in struct.iter_unpack(form, batched.data[begin:end])]
    return answers.Tensor(values, dtype, [len(values) // max(1, math.prod(trailing)), *trailing])


async def _samples(call: Call, outcomes: list[messages.Outcome]) -> answers.Sampled:
    """With text where the worker has the tokenizer: no result waits for a server that says which it is."""
    known: str | None = await call.ask(messages.GetTokenizer(tenant=call.tenant))
    text: Text | None = None
    if known is not None:
        with suppress(UserError):
            text, _ = await call.service.texts.of(known)
    return await call.service.world.run_sync(_sequences, [one.body or b"" for one in outcomes], text)


def _sequences(bodies: list[bytes], text: Text | None) -> answers.Sampled:
    """`bodies`: one for each prompt."""
    sequences = []
    for number, body in enumerate(bodies):
        for drawn in pb.SampleResponse.FromString(body).sequences:
            tokens = _numbers(drawn.tokens, "<i")
            plain = None if text is None else text.plain(tokens)
            logprobs = _numbers(drawn.logprobs, "<f")
            reason = _STOPS[drawn.stop_reason]
            sequences.append(answers.Sequence(number, tokens, plain, logprobs, reason))
    return answers.Sampled(sequences)


def _numbers(packed: bytes, form: str) -> list[Any]:
    return [value for (value,) in struct.iter_unpack(form, packed)]


TABLE: Table = {"/retrieve_future": {"POST": retrieve}}
