"""A server that answers the SDK at once, and does nothing: what is left is the SDK's own time.

python -m tests.bench.instant READY_FILE

It knows what a client asks that trains a model and samples it, one after the other or at once; every result
is ready when it is asked for the first time.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import trio

from tests.null_servers import MODEL, TOKENS, Answer, logprobs, serve
from tink import files
from tink.wire import samples
from tink.wire import tinker_pb2 as pb

SESSION = "5" * 32


class Instant:
    def __init__(self) -> None:
        self._numbers = count()
        # request_id -> the result of a batch; the others' are made when they are asked for.
        self._results: dict[str, bytes] = {}
        sequence = samples.sequence([7] * TOKENS, [-1.5] * TOKENS, stopped=False)
        self._sampled = pb.SampleResponse(sequences=[sequence]).SerializeToString()

    def answer(self, path: str, content: bytes) -> Answer:
        match path.removeprefix("/api/v1/"):
            case "create_session":
                return _said(session_id=SESSION)
            case "get_server_capabilities":
                return _said(supported_models=[{"model_name": MODEL}])
            case "telemetry":
                return _said(status="accepted")
            case "get_info":
                return _said(model_id=json.loads(content)["model_id"], model_data={"model_name": MODEL})
            case "create_sampling_session":
                return _said(sampling_session_id=f"{SESSION}:sample:0")
            case "forward_backward":
                return self._promise("forward_backward", logprobs(content))
            case "asample":
                return self._promise("asample")
            case "create_model" | "optim_step" as op:
                return self._promise(op)
            case "retrieve_future":
                return self._result(json.loads(content)["request_id"])
        return _said()

    def _promise(self, op: str, result: bytes | None = None) -> Answer:
        request_id = f"{op}-{next(self._numbers)}"
        if result is not None:
            self._results[request_id] = result
        return _said(
            request_id=request_id,
            model_id=f"{SESSION}:train:0",
            sample_sequence_ids=[f"{request_id}:0"],
        )

    def _result(self, request_id: str) -> Answer:
        match request_id.partition("-")[0]:
            case "forward_backward":
                return Answer(self._results.pop(request_id), kind="application/x-protobuf")
            case "asample":
                return Answer(self._sampled, kind="application/x-protobuf")
            case "create_model":
                return _said(model_id=f"{SESSION}:train:0", type="create_model")
        return _said(metrics={"grad_norm": 1.0})


def _said(**fields: Any) -> Answer:
    return Answer(json.dumps(fields).encode())


async def main(ready: Path) -> None:
    async with trio.open_nursery() as nursery:
        handler = partial(serve, Instant().answer)
        (listener,) = await nursery.start(
            partial(trio.serve_tcp, handler, 0, host="127.0.0.1", backlog=2048)
        )
        files.write(ready, msgspec.json.encode(listener.socket.getsockname()[1]))


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]))
