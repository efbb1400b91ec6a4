"""The HTTP side of `tink-train/1`, and of text generation as Megatron-LM has it: decodes, asks, encodes.

Engines are built in a thread (`Trainer.load`), and everything that computes runs in threads, so health
is answered at once whatever goes on.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import asdict, dataclass
from typing import TypeVar

import msgspec
import structlog
import trio
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from tink.errors import UNREADABLE, MalformedRequest, TinkError, TooLarge, Unauthorized
from tink.limits import MAX_TRAINER_BODY
from tink.trainer.books import Books, Refused
from tink.trainer.engines.interface import Engine, Facts
from tink.trainer.lanes import Lanes
from tink.trainer.samples import Samples
from tink.trainer.text_generation import TextGeneration
from tink.wire import text_generation
from tink.wire.tink_train import (
    BODIES,
    MEDIA_TYPE,
    PROTOCOL,
    Health,
    Info,
    Message,
    OpReply,
    OpRequest,
    RestoreRequest,
    SampleReply,
    SampleRequest,
    SnapshotRequest,
    encode,
)
from tink.world import World

log = structlog.get_logger("tink.trainer")

T = TypeVar("T")
Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Serving:
    """What there is once the engine has been built."""

    facts: Facts
    lanes: Lanes
    samples: Samples
    texts: TextGeneration


class Trainer:
    """What the routes serve. `slots`: how many models may compute at once on a CPU. `nursery` owns the
    work."""

    def __init__(self, world: World, slots: int, nursery: trio.Nursery) -> None:
        self.incarnation = world.new_id()
        self.books = Books(self.incarnation)
        self.called_at = world.monotonic()
        self._world = world
        self._slots = slots
        self._nursery = nursery
        self._broken: str | None = None
        self._serving: Serving | None = None

    async def load(self, build: Callable[[], Engine]) -> None:
        """Builds the engine. If that fails, health says why, for as long as the process is left."""
        try:
            engine = await self._world.run_sync(build)
        except Exception as error:
            log.exception("the engine could not be built")
            self._broken = f"{type(error).__name__}: {error}"
            return
        # A GPU has room for the activations of one model, and is no faster with two.
        slots = self._slots if engine.facts.versions.get("device", "cpu") == "cpu" else 1
        samples = Samples(self._world, engine, self.books.refused, self._nursery)
        self._serving = Serving(
            engine.facts,
            Lanes(self._world, engine, self.books, slots, self._nursery),
            samples,
            TextGeneration(self._world, samples, engine.facts),
        )
        log.info("ready", base_model=engine.facts.base_model, incarnation=self.incarnation)

    def touch(self) -> None:
        """A worker has called."""
        self.called_at = self._world.monotonic()

    async def finish(self) -> None:
        """Lets what runs end; what is queued stays queued. Returns when no operation computes."""
        if self._serving:
            await self._serving.lanes.finish()
            await self._serving.samples.finish()

    @property
    def health(self) -> Health:
        if self._broken is not None:
            return Health(PROTOCOL, self.incarnation, "broken", self._broken)
        if self._serving is None:
            return Health(PROTOCOL, self.incarnation, "loading")
        running = [*self._serving.lanes.running(), *self._serving.samples.running()]
        return Health(PROTOCOL, self.incarnation, "ready", running=running)

    @property
    def serving(self) -> Serving:
        """Raises Refused while there is nothing to serve."""
        if self._broken is not None:
            raise self.books.refused(503, "broken", self._broken)
        if self._serving is None:
            raise self.books.refused(503, "loading", "the model is being loaded", retryable=True)
        return self._serving

    @property
    def info(self) -> Info:
        facts = asdict(self.serving.facts)
        facts["capabilities"] = [*facts["capabilities"], BODIES]
        return Info(PROTOCOL, self.incarnation, **facts)

    async def keep(self, digest: str, body: bytes) -> None:
        """Keeps the body of an operation to come. MalformedRequest if that is not its sha256."""
        lanes = self.lanes
        # In a thread: a long one would be felt here.
        if await self._world.run_sync(_sha256, body) != digest:
            raise MalformedRequest(f"these {len(body)} bytes are not the body {digest}")
        lanes.bodies.keep(digest, body)

    @property
    def lanes(self) -> Lanes:
        return self.serving.lanes

    @property
    def samples(self) -> Samples:
        return self.serving.samples


def application(trainer: Trainer, token: str | None = None) -> Starlette:
    """The ASGI app. With a token, every call but health must carry it as a bearer token."""

    async def health(request: Request) -> Response:
        trainer.touch()
        return _json(trainer.health)

    async def info(request: Request) -> Response:
        return _json(trainer.info)

    async def state(request: Request) -> Response:
        return _json(trainer.lanes.state())

    async def post_op(request: Request) -> Response:
        return _reply(await trainer.lanes.submit(await _read(request, OpRequest)))

    async def get_op(request: Request) -> Response:
        return _reply(await trainer.lanes.poll(*_op(request), _wait(request)))

    async def cancel_op(request: Request) -> Response:
        return _reply(trainer.lanes.cancel(*_op(request)))

    async def put_body(request: Request) -> Response:
        await trainer.keep(request.path_params["sha256"], bytes(await _body(request)))
        return Response()

    async def post_sample(request: Request) -> Response:
        return _reply(await trainer.samples.submit(await _read(request, SampleRequest)))

    async def get_sample(request: Request) -> Response:
        sample_id = request.path_params["sample_id"]
        return _reply(await trainer.samples.poll(sample_id, _wait(request)))

    async def post_snapshot(request: Request) -> Response:
        return _answer(await trainer.lanes.snapshot(await _read(request, SnapshotRequest)))

    async def post_restore(request: Request) -> Response:
        return _answer(await trainer.lanes.restore(await _read(request, RestoreRequest)))

    async def put_text(request: Request) -> Response:
        return _json(await trainer.serving.texts.answer(await _body(request)))

    def plain(handler: Handler) -> Handler:
        """What is wrong is told as Megatron-LM does: a JSON string."""

        async def call(request: Request) -> Response:
            try:
                return await handler(request)
            except TinkError as error:
                return _complaint(str(error), error.status)
            except Refused as error:
                return _complaint(error.refusal.message, error.status)

        return call

    def authorized(handler: Handler) -> Handler:
        async def call(request: Request) -> Response:
            if token is not None and not _carries(request, token):
                raise Unauthorized("pass TINK_TRAINER_TOKEN as a bearer token")
            try:
                return await handler(request)
            except ClientDisconnect:
                return Response()  # to nobody: it has given its request up

        return call

    def guarded(handler: Handler) -> Handler:
        """For workers."""

        async def call(request: Request) -> Response:
            trainer.touch()
            try:
                return await handler(request)
            finally:
                trainer.touch()

        return authorized(call)

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return _answer(error.refusal, error.status)

    async def failed(request: Request, error: Exception) -> Response:
        assert isinstance(error, TinkError)
        answer = trainer.books.refused(error.status, _name(error), str(error))
        return _answer(answer.refusal, answer.status)

    async def crashed(request: Request, error: Exception) -> Response:
        log.error("unexpected error", path=request.url.path, exc_info=error)
        return _answer(trainer.books.refused(500, "failed", repr(error)).refusal, 500)

    return Starlette(
        routes=[
            Route("/v1/health", health),
            Route("/v1/info", guarded(info)),
            Route("/v1/state", guarded(state)),
            Route("/v1/ops", guarded(post_op), methods=["POST"]),
            Route("/v1/ops/{model_id}/{op_no:int}", guarded(get_op)),
            Route("/v1/ops/{model_id}/{op_no:int}/cancel", guarded(cancel_op), methods=["POST"]),
            Route("/v1/bodies/{sha256}", guarded(put_body), methods=["PUT"]),
            Route("/v1/samples", guarded(post_sample), methods=["POST"]),
            Route("/v1/samples/{sample_id}", guarded(get_sample)),
            Route("/v1/snapshots", guarded(post_snapshot), methods=["POST"]),
            Route("/v1/restores", guarded(post_restore), methods=["POST"]),
            Route(text_generation.PATH, plain(authorized(put_text)), methods=["PUT"]),
        ],
        exception_handlers={Refused: refused, TinkError: failed, Exception: crashed},
    )


def _carries(request: Request, token: str) -> bool:
    given = request.headers.get("authorization", "")
    return hmac.compare_digest(given.encode(), f"Bearer {token}".encode())


def _sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


async def _body(request: Request) -> bytearray:
    """Read no further than its limit."""
    body = bytearray()
    async with aclosing(request.stream()) as stream:
        async for chunk in stream:
            body += chunk
            if len(body) > MAX_TRAINER_BODY:
                raise TooLarge(f"the body is over {MAX_TRAINER_BODY} bytes")
    return body


async def _read(request: Request, kind: type[T]) -> T:
    try:
        return msgspec.msgpack.decode(await _body(request), type=kind)
    except UNREADABLE as error:
        raise MalformedRequest(f"not a {kind.__name__}: {error}") from error


def _op(request: Request) -> tuple[str, int]:
    return request.path_params["model_id"], request.path_params["op_no"]


def _wait(request: Request) -> float:
    try:
        return float(request.query_params.get("wait", 0.0))
    except ValueError as error:
        raise MalformedRequest("wait is not a number of seconds") from error


def _name(error: TinkError) -> str:
    """The Refusal's word for errors that are not in the protocol's table."""
    names: dict[type[TinkError], str] = {
        MalformedRequest: "malformed",
        Unauthorized: "unauthorized",
        TooLarge: "too_large",
    }
    return names.get(type(error), "failed")


def _reply(reply: OpReply | SampleReply) -> Response:
    return _answer(reply, 200 if reply.state in ("done", "failed") else 202)


def _answer(message: Message, status: int = 200) -> Response:
    return Response(encode(message), status, media_type=MEDIA_TYPE)


def _json(message: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(message), media_type="application/json")


def _complaint(text: str, status: int) -> Response:
    return Response(msgspec.json.encode(text), status, media_type="application/json")
