"""Servers that compute nothing, for soaks and benches: a training server and a vLLM server, which have the
worker work as hard as one core can.

    python -m tests.null_servers READY_FILE ARTIFACTS

is both of them in a process of their own, over HTTP. `Direct` is the training server without it: in the
worker's own process, where a call costs a tenth.

What they must get right they do as the real ones: operations are counted by the trainer's own books, which
refuse a gap and answer a repeat from memory, the directories that operations write are there, and so are
the adapters that were loaded. Every result and every sample is another one, for each is to be stored.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import trio
from google.protobuf.message import DecodeError

from tink import files
from tink.backends.endpoint import Endpoint
from tink.backends.trainer import TrainerClient, TrainerRefused
from tink.trainer.books import Books, Outcome, Refused
from tink.wire import tink_train
from tink.wire import tinker_pb2 as pb
from tink.wire.tink_train import (
    CreateModel,
    ExportAdapter,
    File,
    Forward,
    ForwardBackward,
    Health,
    Info,
    ModelInfo,
    OpReply,
    OpRequest,
    OpResult,
    OptimStep,
    SampleReply,
    SampleRequest,
    SaveState,
    SnapshotReply,
    SnapshotRequest,
    State,
)
from tink.world import World

MODEL, CONTEXT, TOKENS = "null/null", 1024, 16
# What each operation says that it took: a model is snapshotted every few steps.
OP_MS = 2500.0
# Models that are no more are remembered by the books; so few that there are as many before it is measured.
TOMBSTONES = 64


class Trainer:
    """What `tink-train/1` asks. Raises Refused, as the protocol's table says."""

    incarnation = "null"

    def __init__(self, artifacts: Path) -> None:
        self._artifacts = artifacts
        self._books = Books(self.incarnation, TOMBSTONES)

    @property
    def health(self) -> Health:
        return Health(tink_train.PROTOCOL, self.incarnation, "ready")

    @property
    def info(self) -> Info:
        return Info(
            protocol=tink_train.PROTOCOL,
            incarnation=self.incarnation,
            engine="null",
            versions={},
            base_model=MODEL,
            base_path=None,
            base_digest="0",
            arch="null",
            parameters=1,
            vocab_size=2**31 - 1,
            max_context=CONTEXT,
            max_rank=64,
            losses=["any"],
            capabilities=["train", "sample"],
        )

    @property
    def state(self) -> State:
        return self._books.state()

    def op(self, request: OpRequest) -> OpReply:
        books, model_id, op_no = self._books, request.model_id, request.op_no
        books.admit(request.incarnation, request.lease)
        books.ack(model_id, min(request.acked, op_no - 1))
        verdict = books.decide(request)
        if verdict == "accept":
            books.accept(request)
            books.start(model_id)
            result = msgspec.structs.replace(self._apply(request.op, request.job_id), run_ms=OP_MS)
            books.finish(model_id, Outcome(request.job_id, "done", result))
        return books.reply(model_id, op_no, replayed=verdict == "replay")

    def _apply(self, op: tink_train.Op, job_id: str) -> OpResult:
        match op:
            case Forward() | ForwardBackward():
                return OpResult(body=logprobs(op.body), loss=1.0, tokens=len(op.body) // 16)
            case OptimStep():
                return OpResult(metrics={"grad_norm": 1.0})
            case CreateModel():
                parts = op.rank, op.alpha, op.seed, op.train_attn, op.train_mlp, op.train_unembed
                written = [] if op.export is None else self._publish(op.export, job_id)
                return OpResult(model=ModelInfo(*parts), files=written)
            case SaveState() | ExportAdapter():
                return OpResult(files=self._publish(op.path, job_id))
        return OpResult()

    def sample(self, request: SampleRequest) -> SampleReply:
        asked = f"{request.adapter} {request.seed} {request.prompt}".encode()
        drawn = hashlib.shake_128(asked).digest(8 * TOKENS)  # of a token, its id and its log-probability
        return SampleReply("done", request.sample_id, drawn, len(request.prompt), TOKENS, run_ms=OP_MS)

    def snapshot(self, request: SnapshotRequest) -> SnapshotReply:
        applied = self._books.book(request.model_id).applied
        return SnapshotReply(applied, self._publish(request.path, request.path))

    def _publish(self, path: str, content: str) -> list[File]:
        """Not synced: that this machine crashes is no part of a soak."""
        directory = self._artifacts / path
        directory.mkdir(parents=True)
        written = []
        for name, text in {"adapter_config.json": '{"r": 8}', "adapter_model.safetensors": content}.items():
            (directory / name).write_text(text)
            written.append(File(name, len(text), hashlib.sha256(text.encode()).hexdigest()))
        return written

    def refused(self) -> Refused:
        return self._books.refused(404, "no_op", "this is nothing that is asked for here")


def logprobs(body: bytes) -> bytes:
    """The result of a batch, as the SDK wants it. Of what is no batch a quarter, as a real one is."""
    try:
        request = pb.ForwardBackwardRequest.FromString(body)
    except DecodeError:
        return body[: len(body) // 4]
    counts = [sum(len(chunk.encoded_text.tokens) for chunk in datum.model_input) for datum in request.data]
    tensor = pb.BatchedTensor(
        data=bytes(sum(counts)),
        offsets=b"".join(end.to_bytes(8, "little") for end in accumulate(counts, initial=0)),
        dtype=pb.DTYPE_FLOAT32,
    )
    record = pb.ArrayRecord(type_tag="ArrayRecord", num_datums=len(counts), fields={"logprobs": tensor})
    metrics = {"loss:sum": float(len(counts))}
    result = pb.ForwardBackwardOutput(
        loss_fn_output_type="ArrayRecord", loss_fn_outputs=[record], metrics=metrics
    )
    return result.SerializeToString()


# -- without HTTP -----------------------------------------------------------------------------------


class Direct(TrainerClient):
    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self.url = trainer, "direct"

    async def health(self) -> Health:
        await trio.lowlevel.checkpoint()
        return self._trainer.health

    async def info(self) -> Info:
        await trio.lowlevel.checkpoint()
        return self._trainer.info

    async def state(self) -> State:
        await trio.lowlevel.checkpoint()
        return self._trainer.state

    async def keep(self, digest: str, body: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self._trainer.keep(digest, body)

    async def op(self, request: OpRequest) -> OpReply:
        await trio.lowlevel.checkpoint()
        try:
            return self._trainer.op(request)
        except Refused as error:
            raise TrainerRefused(error.status, error.refusal) from error

    async def sample(self, request: SampleRequest) -> SampleReply:
        await trio.lowlevel.checkpoint()
        return self._trainer.sample(request)

    async def snapshot(self, request: SnapshotRequest) -> SnapshotReply:
        await trio.lowlevel.checkpoint()
        return self._trainer.snapshot(request)


class DirectEndpoint(Endpoint):
    @asynccontextmanager
    async def connect(self, world: World, slots: int) -> AsyncIterator[TrainerClient]:
        await trio.lowlevel.checkpoint()
        yield Direct(Trainer(Path(self.url)))


# -- over HTTP --------------------------------------------------------------------------------------


class Ports(NamedTuple):
    """Where they listen."""

    trainer: int
    vllm: int


class Answer(NamedTuple):
    """`kind`: of content."""

    body: bytes
    status: int = 200
    kind: str = "application/json"


# Of a path and what came with it.
Handler = Callable[[str, bytes], Answer]


def train(trainer: Trainer, path: str, content: bytes) -> Answer:
    try:
        match path.removeprefix("/v1/").partition("/"):
            case "health", _, _:
                return Answer(msgspec.json.encode(trainer.health))
            case "info", _, _:
                return Answer(msgspec.json.encode(trainer.info))
            case "state", _, _:
                return Answer(msgspec.json.encode(trainer.state))
            case "ops", _, _:
                return Answer(tink_train.encode(trainer.op(_decoded(content, OpRequest))))
            case "snapshots", _, _:
                return Answer(tink_train.encode(trainer.snapshot(_decoded(content, SnapshotRequest))))
        raise trainer.refused()
    except Refused as error:
        return Answer(tink_train.encode(error.refusal), error.status)


def _decoded(content: bytes, kind: Any) -> Any:
    return msgspec.msgpack.decode(content, type=kind)


class Vllm:
    """As much of `vllm serve` as the worker uses."""

    def __init__(self) -> None:
        self._adapters: dict[str, str] = {}
        self._completions = 0

    def answer(self, path: str, content: bytes) -> Answer:
        match path:
            case "/v1/completions":
                return self._complete(json.loads(content))
            case "/health":
                return Answer(b"")
            case "/v1/models":
                return self._models()
            case "/metrics":
                return self._metrics()
            case "/v1/load_lora_adapter":
                return self._load(**json.loads(content))
            case "/v1/unload_lora_adapter":
                return self._unload(json.loads(content)["lora_name"])
        return _said(404, detail="Not Found")

    def _models(self) -> Answer:
        base = {"id": MODEL, "root": MODEL, "parent": None, "max_model_len": CONTEXT}
        loaded = [{"id": name, "root": path, "parent": MODEL} for name, path in self._adapters.items()]
        return _said(data=[base, *loaded])

    def _metrics(self) -> Answer:
        values = {"num_requests_running": 0, "num_requests_waiting": 0}
        values["generation_tokens_total"] = self._completions * TOKENS
        return Answer("".join(f"vllm:{name} {value}\n" for name, value in values.items()).encode())

    def _load(self, lora_name: str, lora_path: str, load_inplace: bool) -> Answer:
        if not (Path(lora_path) / "adapter_config.json").exists():
            return _wrong(404, f"Loading lora {lora_name} failed: No adapter found for {lora_path}")
        self._adapters[lora_name] = lora_path
        return Answer(b"")

    def _unload(self, name: str) -> Answer:
        if self._adapters.pop(name, None) is None:
            return _wrong(404, f"The lora adapter '{name}' cannot be found.")
        return Answer(b"")

    def _complete(self, body: dict[str, Any]) -> Answer:
        model = body["model"]
        if model != MODEL and model not in self._adapters:
            return _wrong(404, f"The model `{model}` does not exist.")
        self._completions += 1
        drawn = hashlib.sha256(f"{model} {body['seed']} {body['prompt']}".encode()).digest()
        tokens = [*drawn[: min(TOKENS, body["max_tokens"])]]
        top = {f"token_id:{token}": -1.5 for token in range(body["logprobs"] or 1)}
        logprobs = {"token_logprobs": [-1.5] * len(tokens), "top_logprobs": [top] * len(tokens)}
        choice = {"token_ids": tokens, "logprobs": logprobs, "finish_reason": "length"}
        return _said(model=model, choices=[{"index": index, **choice} for index in range(body["n"])])


def _said(status: int = 200, **fields: Any) -> Answer:
    return Answer(json.dumps(fields).encode(), status)


def _wrong(status: int, message: str) -> Answer:
    return _said(status, error={"message": message})


async def serve(handler: Handler, stream: trio.SocketStream) -> None:
    """One connection, until the worker closes it, or is killed. It has one call at a time."""
    received = bytearray()
    with contextlib.suppress(trio.BrokenResourceError):
        async for part in stream:
            received += part
            head, found, rest = bytes(received).partition(b"\r\n\r\n")
            first, *lines = head.split(b"\r\n")
            length = next((int(line[15:]) for line in lines if line[:15].lower() == b"content-length:"), 0)
            if not found or len(rest) < length:
                continue
            received.clear()
            path = first.decode().split(" ")[1].partition("?")[0]
            body, status, kind = handler(path, rest)
            answer = f"HTTP/1.1 {status} -\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n"
            await stream.send_all(answer.encode() + body)


async def main(ready: Path, artifacts: Path) -> None:
    ports: list[int] = []
    async with trio.open_nursery() as nursery:
        for handler in partial(train, Trainer(artifacts)), Vllm().answer:
            listen = partial(trio.serve_tcp, partial(serve, handler), 0, host="127.0.0.1", backlog=2048)
            (listener,) = await nursery.start(listen)
            ports.append(listener.socket.getsockname()[1])
        files.write(ready, msgspec.json.encode(Ports(*ports)))


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]), Path(sys.argv[2]))
