"""Clients of a bench, in a process of their own: so many connections of plain HTTP, each with one request
at a time.

    python -m tests.bench.load       (a `Load` as JSON on its standard input, a `Report` on its output)

It is kept as cheap as can be, for it shares the machine with what it asks."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from typing import Literal

import msgspec
import uvloop

LINES = ("POST /api/v1/{path} HTTP/1.1", "Host: bench", "Content-Type: {kind}", "Content-Length: {length}")
HEAD = "\r\n".join([*LINES, "", ""])
JSON, PROTOBUF = "application/json", "application/x-protobuf"
ADAM = {"learning_rate": 1e-4}


class Load(msgspec.Struct, kw_only=True):
    """`requests`: of all connections together. `rate`: a second, of all; 0 is as fast as they are answered.
    `what`: an optim_step of `model_id` with the numbers from `first` on, a forward_backward of `size`
    bytes, a sample of `sampler_id` up to its result, a poll for `job_id`, or a heartbeat of
    `session_id`."""

    port: int
    what: Literal["optim_step", "step", "forward_backward", "sample", "poll", "heartbeat"]
    connections: int
    requests: int
    rate: float = 0.0
    model_id: str = ""
    sampler_id: str = ""
    session_id: str = ""
    job_id: str = ""
    first: int = 0
    size: int = 0


class Report(msgspec.Struct):
    """`seconds`: of each request, from its first byte to the last of its answer. `took`: of all."""

    seconds: list[float]
    took: float


class Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def post(self, path: str, content: bytes, kind: str = JSON) -> tuple[int, bytes]:
        head = HEAD.format(path=path, kind=kind, length=len(content))
        self._writer.write(head.encode() + content)
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.partition("content-length: ")[2].partition("\r\n")[0])
        return int(head[9:12]), await self._reader.readexactly(length)

    async def done(self, path: str, content: bytes, kind: str = JSON) -> bytes:
        status, answer = await self.post(path, content, kind)
        if status != 200:
            raise SystemExit(f"{path}: {status} {answer[:300]!r}")
        return answer


async def ask(connection: Connection, load: Load, number: int) -> None:
    match load.what:
        case "optim_step" | "step":
            fields = {"model_id": load.model_id, "seq_id": number, "adam_params": ADAM}
            promise = msgspec.json.decode(await connection.done("optim_step", msgspec.json.encode(fields)))
            if load.what == "step":
                await poll(connection, promise["request_id"])
        case "forward_backward":
            await connection.done("forward_backward", batch(load.model_id, number, load.size), PROTOBUF)
        case "heartbeat":
            await connection.done("session_heartbeat", msgspec.json.encode({"session_id": load.session_id}))
        case "sample":
            chunks = [{"type": "encoded_text", "tokens": [7] * 32}]
            fields = {
                "sampling_session_id": load.sampler_id,
                "seq_id": number,
                "prompt": {"chunks": chunks},
            }
            fields |= {"sampling_params": {"max_tokens": 16}, "num_samples": 1}
            promise = msgspec.json.decode(await connection.done("asample", msgspec.json.encode(fields)))
            await poll(connection, promise["request_id"])
        case "poll":
            await poll(connection, load.job_id)


async def poll(connection: Connection, job_id: str) -> None:
    """Until the job has ended."""
    content = msgspec.json.encode({"request_id": job_id, "allow_metadata_only": False})
    while (answer := await connection.post("retrieve_future", content))[0] == 408:
        pass
    if answer[0] != 200:
        raise SystemExit(f"retrieve_future: {answer}")


def batch(model_id: str, number: int, size: int) -> bytes:
    """A ForwardBackwardRequest whose data nobody here looks into: one field of so many random bytes."""
    from tink.wire import tinker_pb2 as pb

    request = pb.ForwardBackwardRequest(model_id=model_id, seq_id=number, loss_fn="cross_entropy")
    tensor = pb.Tensor(dense=os.urandom(size), dtype=pb.DTYPE_FLOAT32)
    request.data.add(loss_fn_inputs={"weights": tensor})
    return request.SerializeToString()


async def run(load: Load) -> Report:
    seconds: list[float] = []
    numbers = iter(range(load.first, load.first + load.requests))
    connections = [
        Connection(*await asyncio.open_connection("127.0.0.1", load.port)) for _ in range(load.connections)
    ]
    began = time.perf_counter()

    async def user(connection: Connection) -> None:
        for number in numbers:
            if load.rate:
                due = began + (number - load.first) / load.rate
                await asyncio.sleep(due - time.perf_counter())
            asked = time.perf_counter()
            await ask(connection, load, number)
            seconds.append(time.perf_counter() - asked)

    await asyncio.gather(*map(user, connections))
    return Report(seconds, time.perf_counter() - began)


def main() -> None:
    load = msgspec.json.decode(sys.stdin.buffer.read(), type=Load)
    report = uvloop.run(run(load))
    with open(1, "wb") as output:  # sys.stdout may be one that does not write all
        output.write(msgspec.json.encode(report))


if __name__ == "__main__":
    main()
