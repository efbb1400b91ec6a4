"""The HTTP side of `tink-train/1`, and of text generation as Megatron-LM has it: decodes, asks, encodes."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import TypeVar

import msgspec
import structlog
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from tink.errors import UNREADABLE, MalformedRequest, TinkError, TooLarge, Unauthorized
from tink.limits import MAX_TRAINER_BODY
from tink.trainer.books import Refused
from tink.trainer.trainer import Trainer
from tink.wire import text_generation
from tink.wire.tink_train import (
    MEDIA_TYPE,
    Message,
    OpReply,
    OpRequest,
    RestoreRequest,
    SampleReply,
    SampleRequest,
    SnapshotRequest,
    encode,
)

log = structlog.get_logger("tink.trainer")

T = TypeVar("T")
Handler = Callable[[Trainer, Request], Awaitable[Response]]
Endpoint = Callable[[Request], Awaitable[Response]]


def application(trainer: Trainer, token: str | None = None) -> Starlette:
    """The ASGI app. With a token, every call but health must carry it as a bearer token."""

    def guarded(handler: Handler) -> Endpoint:
        return _authorized(partial(handler, trainer), token)

    return Starlette(
        routes=[
            Route("/v1/health", partial(health, trainer)),
            *(
                Route(path, guarded(_of_worker(handler)), methods=[method])
                for method, path, handler in ROUTES
            ),
            Route(text_generation.PATH, _plain(guarded(put_text)), methods=["PUT"]),
        ],
        exception_handlers={
            Refused: _refused,
            TinkError: partial(_failed, trainer),
            Exception: partial(_crashed, trainer),
        },
    )


# -- what is asked ----------------------------------------------------------------------------------


async def health(trainer: Trainer, request: Request) -> Response:
    trainer.touch()
    return _json(trainer.health)


async def info(trainer: Trainer, request: Request) -> Response:
    return _json(trainer.info)


async def state(trainer: Trainer, request: Request) -> Response:
    return _json(trainer.lanes.state())


async def post_op(trainer: Trainer, request: Request) -> Response:
    return _reply(await trainer.lanes.submit(await _read(request, OpRequest)))


async def get_op(trainer: Trainer, request: Request) -> Response:
    return _reply(await trainer.lanes.poll(*_op(request), _wait(request)))


async def cancel_op(trainer: Trainer, request: Request) -> Response:
    return _reply(trainer.lanes.cancel(*_op(request)))


async def post_sample(trainer: Trainer, request: Request) -> Response:
    return _reply(await trainer.samples.submit(await _read(request, SampleRequest)))


async def get_sample(trainer: Trainer, request: Request) -> Response:
    return _reply(await trainer.samples.poll(request.path_params["sample_id"], _wait(request)))


async def post_snapshot(trainer: Trainer, request: Request) -> Response:
    return _answer(await trainer.lanes.snapshot(await _read(request, SnapshotRequest)))


async def post_restore(trainer: Trainer, request: Request) -> Response:
    return _answer(await trainer.lanes.restore(await _read(request, RestoreRequest)))


async def put_text(trainer: Trainer, request: Request) -> Response:
    return _json(await trainer.serving.texts.answer(await _body(request)))


# What only a worker asks.
ROUTES: list[tuple[str, str, Handler]] = [
    ("GET", "/v1/info", info),
    ("GET", "/v1/state", state),
    ("POST", "/v1/ops", post_op),
    ("GET", "/v1/ops/{model_id}/{op_no:int}", get_op),
    ("POST", "/v1/ops/{model_id}/{op_no:int}/cancel", cancel_op),
    ("POST", "/v1/samples", post_sample),
    ("GET", "/v1/samples/{sample_id}", get_sample),
    ("POST", "/v1/snapshots", post_snapshot),
    ("POST", "/v1/restores", post_restore),
]


# -- who may ask, and what is wrong -----------------------------------------------------------------


def _authorized(endpoint: Endpoint, token: str | None) -> Endpoint:
    async def call(request: Request) -> Response:
        if token is not None and not _carries(request, token):
            raise Unauthorized("pass TINK_TRAINER_TOKEN as a bearer token")
        try:
            return await endpoint(request)
        except ClientDisconnect:
            return Response()  # to nobody: it has given its request up

    return call


def _of_worker(handler: Handler) -> Handler:
    """A call shows that there is a worker, from its beginning to its end."""

    async def call(trainer: Trainer, request: Request) -> Response:
        trainer.touch()
        try:
            return await handler(trainer, request)
        finally:
            trainer.touch()

    return call


def _plain(endpoint: Endpoint) -> Endpoint:
    """What is wrong is told as Megatron-LM does: a JSON string."""

    async def call(request: Request) -> Response:
        try:
            return await endpoint(request)
        except TinkError as error:
            return _complaint(str(error), error.status)
        except Refused as error:
            return _complaint(error.refusal.message, error.status)

    return call


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return _answer(error.refusal, error.status)


async def _failed(trainer: Trainer, request: Request, error: Exception) -> Response:
    assert isinstance(error, TinkError)
    answer = trainer.books.refused(error.status, _name(error), str(error))
    return _answer(answer.refusal, answer.status)


async def _crashed(trainer: Trainer, request: Request, error: Exception) -> Response:
    log.error("unexpected error", path=request.url.path, exc_info=error)
    return _answer(trainer.books.refused(500, "failed", repr(error)).refusal, 500)


def _carries(request: Request, token: str) -> bool:
    given = request.headers.get("authorization", "")
    return hmac.compare_digest(given.encode(), f"Bearer {token}".encode())


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
