"""One request, from its key to its answer: what every route has in common is here, once."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

import structlog
import trio
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from tink import limits
from tink.api.auth import Auth
from tink.api.body import Body, Upload, expand
from tink.api.downloads import Downloads
from tink.api.refusals import JSON, internal_error, refusal
from tink.api.texts import Texts
from tink.domain import messages, requests
from tink.errors import MalformedRequest, NotFound, TinkError, bare
from tink.world import World

Ask = Callable[[messages.Question], Awaitable[Any]]
Handler = Callable[["Call"], Awaitable[Any]]
Method = Literal["GET", "POST", "PUT", "DELETE"]
# path -> method -> handler
Table = Mapping[str, Mapping[Method, Handler]]

RequestT = TypeVar("RequestT", bound=requests.Request)
T = TypeVar("T")

MEDIA_JSON = "application/json"
MEDIA_PROTOBUF = "application/x-protobuf"
# Every number of the API is stored as a signed 64-bit one.
MAX_INT = 2**63 - 1
# What Tink's ids are made of. Whatever else comes cannot be one, and need not be looked up.
_ID = re.compile(r"[A-Za-z0-9:._-]{1,256}")

log = structlog.get_logger("tink.api")


class Service(NamedTuple):
    """What the routes need from the rest of the worker."""

    ask: Ask
    auth: Auth
    world: World
    downloads: Downloads
    texts: Texts


class Page(NamedTuple):
    limit: int
    offset: int

    def of(self, items: list[T]) -> list[T]:
        return items[self.offset : self.offset + self.limit]

    def cursor(self, items: list[Any]) -> dict[str, int]:
        return {"offset": self.offset, "limit": self.limit, "total_count": len(items)}


class Call:
    """A request as its handler sees it: whose it is, what was sent, and the way to the worker.
    `tenant` is empty on a public route, whose questions concern no tenant."""

    def __init__(self, service: Service, request: Request, upload: Upload, tenant: str) -> None:
        self.service = service
        self.request = request
        self.tenant = tenant
        self._upload = upload
        self._read: Body | None = None

    async def ask(self, question: messages.Question) -> Any:
        return await self.service.ask(question)

    # -- what was sent ------------------------------------------------------------------------------

    async def body(self, media: str, limit: int) -> Body:
        """The body as it came; `whole` says whether it kept to the limit. Asked again, it is the same."""
        sent = self.request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if sent != media:
            raise HTTPException(415, f"the Content-Type must be {media}, not {sent[:80] or 'absent'}")
        if self._read is None:
            self._read = await self._upload.read(limit)
        return self._read

    async def json(self, kind: type[RequestT]) -> RequestT:
        body = await self.body(MEDIA_JSON, limits.MAX_JSON_BODY)
        decoded: RequestT = requests.decode(await self.text(body), kind)
        return decoded

    async def text(self, body: Body, limit: int = limits.MAX_JSON_BODY) -> bytes:
        """The JSON of `body`: UTF-8 all over, which msgspec does not look at in fields that it skips."""
        return await self.offload(body, _text, body, limit)

    async def offload(self, body: Body, work: Callable[..., T], *args: Any) -> T:
        """`work(*args)`, off the event loop when `body` makes it long."""
        if body.codec == "identity" and len(body.data) <= limits.INLINE_BYTES:
            return work(*args)
        return await self.service.world.run_sync(work, *args)

    def path(self, name: str) -> str:
        value: str = self.request.path_params[name]
        return value

    def id(self, name: str) -> str:
        """The id in the path. Raises NotFound for what cannot be one."""
        return identifier(self.path(name))

    def page(self, default: int) -> Page:
        limit = self._number("limit", default)
        return Page(min(limit, limits.MAX_PAGE), self._number("offset", 0))

    def check_scope(self) -> None:
        """`accessible` would add what others share. Here a tenant shares checkpoints only, which are
        reached by their address: both scopes list the same."""
        if self.request.query_params.get("access_scope", "owned") not in ("owned", "accessible"):
            raise MalformedRequest("access_scope must be owned or accessible")

    def _number(self, name: str, default: int) -> int:
        text = self.request.query_params.get(name, str(default))
        if not (text.isascii() and text.isdigit() and len(text) < 19):
            raise MalformedRequest(f"{name} must be a whole number, not {text[:40]!r}")
        return int(text)


def _text(body: Body, limit: int) -> bytes:
    data = expand(body, limit)
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise MalformedRequest(f"the body is not UTF-8: {error}") from None
    # PostgreSQL has no text with a NUL: it would be found out in a commit, which stops the worker.
    if b"\\u0000" in data:
        raise MalformedRequest("the body has a NUL character (\\u0000) in a text: leave it out")
    return data


def identifier(text: str) -> str:
    if not _ID.fullmatch(text):
        raise NotFound(f"there is no {text[:80]!r} here")
    return text


def natural(name: str, value: int, *, least: int = 0, most: int = MAX_INT) -> int:
    """`value`, if it is a number in range."""
    if value is True or value is False or not least <= value <= most:
        raise MalformedRequest(f"{name} must be from {least} to {most}, not {str(value)[:40]}")
    return value


class Endpoint:
    """The ASGI app of one path. A handler returns a Response, or what becomes the JSON of one, or
    None when there is nothing to say. Every error ends here: one that Tink raised is its caller's
    business and is answered; any other is a bug and is logged, under the request's id."""

    def __init__(self, service: Service, handlers: Mapping[Method, Handler], public: bool) -> None:
        self._service = service
        self._handlers: dict[str, Handler] = {str(method): run for method, run in handlers.items()}
        if "GET" in handlers:
            self._handlers["HEAD"] = handlers["GET"]
        self._public = public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send)
        upload = Upload(request)
        try:
            response = await self._respond(request, upload)
            if upload.abandoned:
                await upload.drain(limits.PEEK_BYTES if response.status_code == 401 else limits.DRAIN_BYTES)
        except ClientDisconnect:
            return
        if upload.abandoned:
            await _answer_over(upload, response(scope, receive, send))
        else:
            await response(scope, receive, send)

    async def _respond(self, request: Request, upload: Upload) -> Response:
        try:
            handler = self._handler(request)
            tenant = "" if self._public else self._service.auth.tenant(request.headers)
            answer = await handler(Call(self._service, request, upload, tenant))
        except ClientDisconnect:
            raise
        except (TinkError, HTTPException) as error:
            return refusal(bare(error))
        except Exception:
            request_id: str = request.scope["tink.request_id"]
            log.exception("internal error", request_id=request_id, route=route_of(request.scope))
            await trio.sleep(limits.BUG_PAUSE)
            return internal_error(request_id)
        if isinstance(answer, Response):
            return answer
        return Response(status_code=204) if answer is None else JSON(answer)

    def _handler(self, request: Request) -> Handler:
        handler = self._handlers.get(request.method)
        if handler is None:
            allowed = {"Allow": ", ".join(self._handlers)}
            raise HTTPException(405, f"{_shown(request)} does not take {request.method[:20]}", allowed)
        return handler


class Nowhere(Endpoint):
    """The app of every other path."""

    def __init__(self, service: Service) -> None:
        super().__init__(service, {}, public=True)

    def _handler(self, request: Request) -> Handler:
        raise HTTPException(404, f"there is no {_shown(request)} here")


def route_of(scope: Scope) -> str | None:
    """The template of the path, which has no ids in it."""
    return getattr(scope.get("route"), "path", None)


def _shown(request: Request) -> str:
    """The path, for people. Not `request.url`, which wants the query to be UTF-8."""
    path: str = request.scope["path"]
    return path[:200]


async def _answer_over(upload: Upload, answering: Awaitable[None]) -> None:
    """Answer a sender that has not stopped sending. The server closes the connection after that, and
    gets its reader back once everything is discarded."""
    with trio.move_on_after(limits.DRAIN_SECONDS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(upload.discard)
            await answering


def routes(service: Service, table: Table, *, prefix: str = "", public: bool = False) -> list[Route]:
    return [Route(prefix + path, Endpoint(service, handlers, public)) for path, handlers in table.items()]
