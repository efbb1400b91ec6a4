"""What an operation gives now, beside what it gave then. Pure."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Collection, Iterable, Mapping
from itertools import chain, starmap
from typing import Any

import msgspec
from google.protobuf.message import DecodeError

from tink.domain.requests import DATA_OPS
from tink.replay.training import Turn
from tink.wire import tink_train
from tink.wire import tinker_pb2 as pb

LOSS, LOGPROBS = "loss:sum", "logprobs"


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Of one job that was done again. `same`: bit for bit. `recorded` and `now`: the summed loss of a
    forward or a forward_backward. `loss`, `logprobs` and `metrics` (of an optimizer step) are the largest
    absolute differences, None where there is none or it is not known; `detail` says in words why not."""

    job_id: str
    op: str
    op_no: int
    step: int
    same: bool
    recorded: float | None = None
    now: float | None = None
    loss: float | None = None
    logprobs: float | None = None
    metrics: float | None = None
    detail: str | None = None

    def exceeds(self, tolerance: float) -> bool:
        """Whether it differs by more; 0 asks for the same bits. What is not known to be near is not."""
        if self.same:
            return False
        known = [size for size in (self.loss, self.logprobs, self.metrics) if size is not None]
        return self.detail is not None or tolerance <= 0 or max(known, default=math.inf) > tolerance


def gives_results(turn: Turn) -> bool:
    """Whether there is something to compare."""
    return turn.filler is None and (turn.job.op == "optim_step" or turn.job.op in DATA_OPS)


def pruned_results(turns: Iterable[Turn], stored: Collection[str]) -> int:
    """How many of them gave a result that is not there any more. `stored`: the sha256 of those that are."""
    results = (turn.job.result_sha256 for turn in turns if gives_results(turn))
    return sum(digest is not None and digest not in stored for digest in results)


def compare(
    turn: Turn, reply: tink_train.OpReply, recorded: bytes | None, wrong: str | None = None
) -> Comparison:
    """`recorded`: the result that the job had, if that is one that is stored, and was not pruned; then its
    sha256 alone is compared. `wrong`: why it cannot be read, though it should."""
    job = turn.job
    result = reply.result
    made = Comparison(
        job_id=job.job_id, op=job.op, op_no=turn.op_no, step=turn.step, same=False, recorded=job.loss_sum
    )
    if result is None:
        message = reply.failure.message if reply.failure else reply.state
        return msgspec.structs.replace(made, detail=f"it was done, and fails now: {message}")
    made = msgspec.structs.replace(made, now=result.loss, detail=wrong)
    if job.op == "optim_step":
        then = (job.result or {}).get("metrics", {})
        if then == result.metrics:
            return msgspec.structs.replace(made, same=True)
        return msgspec.structs.replace(made, metrics=_furthest(then, result.metrics))
    digest = hashlib.sha256(result.body).hexdigest()
    if wrong is None and digest == job.result_sha256 and result.loss == job.loss_sum:
        return msgspec.structs.replace(made, same=True)
    made = msgspec.structs.replace(made, loss=_furthest({LOSS: job.loss_sum}, {LOSS: result.loss}))
    if wrong is not None:
        return made
    if recorded is None:
        return msgspec.structs.replace(
            made, detail="the recorded result was pruned, and had another sha256"
        )
    try:
        return msgspec.structs.replace(made, **_sizes(made, recorded, result.body))
    except (DecodeError, struct.error, ValueError) as error:
        return msgspec.structs.replace(made, detail=f"a result cannot be read: {error}")


def _sizes(made: Comparison, recorded: bytes, now: bytes) -> dict[str, Any]:
    """The fields of a Comparison that two ForwardBackwardOutputs tell."""
    then, today = pb.ForwardBackwardOutput.FromString(recorded), pb.ForwardBackwardOutput.FromString(now)
    found: dict[str, Any] = {}
    if LOSS in then.metrics:  # the row of the job may say another one
        found["recorded"] = then.metrics[LOSS]
        found["loss"] = max(made.loss or 0.0, _furthest(then.metrics, today.metrics) or 0.0)
    before, after = _logprobs(then), _logprobs(today)
    if [len(one) for one in before] != [len(one) for one in after]:
        return found | {"detail": "the log-probabilities are of other shapes"}
    pairs = zip(chain.from_iterable(before), chain.from_iterable(after), strict=True)
    return found | {"logprobs": max(starmap(_apart, pairs), default=0.0)}


def _logprobs(output: pb.ForwardBackwardOutput) -> list[list[float]]:
    """Of each record, those of all its data together."""
    fields = (record.fields[LOGPROBS] for record in output.loss_fn_outputs)
    return [[value for (value,) in struct.iter_unpack("<f", field.data)] for field in fields]


def _furthest(then: Mapping[str, float | None], now: Mapping[str, float | None]) -> float | None:
    """The largest difference of what has the same name; None if a name is on one side only."""
    sizes = []
    for name in then.keys() | now.keys():
        before, after = then.get(name), now.get(name)
        if before is None or after is None:
            return None
        sizes.append(_apart(before, after))
    return max(sizes, default=0.0)


def _apart(one: float, other: float) -> float:
    return 0.0 if one == other or (math.isnan(one) and math.isnan(other)) else abs(one - other)
