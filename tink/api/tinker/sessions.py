"""Sessions: what a client opens first, and keeps alive."""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec

from tink import limits
from tink.api.call import Call, Table, identifier, natural
from tink.api.tinker.views import moment, strings
from tink.domain import messages, rows
from tink.domain.requests import Request
from tink.errors import TooLarge


class CreateSession(Request, frozen=True):
    tags: list[str] = msgspec.field(default_factory=list)
    user_metadata: dict[str, Any] | None = None
    sdk_version: str = ""
    project_id: str | None = None
    display_name: str | None = None

    def __post_init__(self) -> None:
        if len(msgspec.json.encode(self)) > limits.MAX_METADATA_BYTES:
            raise ValueError(f"a session's tags and metadata may have {limits.MAX_METADATA_BYTES} bytes")


class Heartbeat(Request, frozen=True):
    session_id: str


class FinishReason(Request, frozen=True):
    type: Literal["success", "errored", "interrupted"]


class FinishSession(Request, frozen=True):
    reason: FinishReason
    detail: str | None = None


class MoveSession(Request, frozen=True):
    project_id: str | None = None


class Owner(Request, frozen=True):
    type: Literal["own", "accessible", "user"] = "own"
    owner_urns: list[str] = msgspec.field(default_factory=list)


class Status(Request, frozen=True):
    type: Literal["active", "cancelled", "failed", "client_finished"]
    reasons: list[str] | None = None

    def fits(self, session: rows.Session) -> bool:
        if session.state == "open":
            return self.type == "active"
        return self.type == "client_finished" and (
            self.reasons is None or session.finish_reason in self.reasons
        )


class SearchCursor(Request, frozen=True):
    last_created_at: Annotated[datetime, msgspec.Meta(tz=True)]
    last_session_id: str


class SearchSessions(Request, frozen=True):
    session_id: str | None = None
    project_ids: list[str] | None = None
    user_metadata: dict[str, str] = msgspec.field(default_factory=dict)
    display_name: str | None = None
    owner: Owner = Owner()
    statuses: list[Status] | None = None
    limit: int = 50
    cursor: SearchCursor | None = None

    def fits(self, session: rows.Session) -> bool:
        return (
            self._named(session)
            and (self.project_ids is None or session.project_id in self.project_ids)
            and self.user_metadata.items() <= strings(session.user_metadata).items()
            and (self.owner.type != "user" or session.tenant in self.owner.owner_urns)
            and (self.statuses is None or any(status.fits(session) for status in self.statuses))
            and (self.cursor is None or _position(session) < msgspec.structs.astuple(self.cursor))
        )

    def _named(self, session: rows.Session) -> bool:
        """A session id and a name are alternatives; of a name, every word must be there."""
        if self.session_id is None and self.display_name is None:
            return True
        if self.session_id == session.session_id:
            return True
        name = (session.display_name or "").lower()
        words = (self.display_name or "").lower().split()
        return bool(words) and all(word in name for word in words)


async def create(call: Call) -> dict[str, Any]:
    sent = await call.json(CreateSession)
    created: messages.Created = await call.ask(
        messages.CreateSession(
            tenant=call.tenant,
            tags=sent.tags,
            user_metadata=sent.user_metadata or {},
            sdk_version=sent.sdk_version,
            project_id=sent.project_id,
            display_name=sent.display_name,
            idempotency_key=_idempotency_key(call),
        )
    )
    return {"type": "create_session", "session_id": created.id}


def _idempotency_key(call: Call) -> str | None:
    key = call.request.headers.get("x-idempotency-key")
    if key is not None and len(key) > limits.MAX_NAME:
        raise TooLarge(f"X-Idempotency-Key may have {limits.MAX_NAME} characters")
    return key


async def heartbeat(call: Call) -> dict[str, Any]:
    sent = await call.json(Heartbeat)
    await call.ask(messages.Heartbeat(tenant=call.tenant, session_id=identifier(sent.session_id)))
    return {"type": "session_heartbeat"}


async def finish(call: Call) -> None:
    sent = await call.json(FinishSession)
    await call.ask(
        messages.FinishSession(
            tenant=call.tenant,
            session_id=call.id("session_id"),
            reason=sent.reason.type,
            detail=sent.detail and sent.detail[:1000],
        )
    )


async def move(call: Call) -> None:
    sent = await call.json(MoveSession)
    await call.ask(
        messages.MoveSession(
            tenant=call.tenant, session_id=call.id("session_id"), project_id=sent.project_id
        )
    )


async def index(call: Call) -> dict[str, Any]:
    call.check_scope()
    page = call.page(20)
    found: list[rows.Session] = await call.ask(messages.ListSessions(tenant=call.tenant))
    return {"sessions": [session.session_id for session in page.of(found)]}


async def show(call: Call) -> dict[str, Any]:
    call.check_scope()
    view: messages.SessionView = await call.ask(
        messages.GetSession(tenant=call.tenant, session_id=call.id("session_id"))
    )
    return {
        "training_run_ids": view.model_ids,
        "sampler_ids": view.sampler_ids,
        "user_metadata": strings(view.row.user_metadata),
        "display_name": view.row.display_name,
    }


async def search(call: Call) -> dict[str, Any]:
    sent = await call.json(SearchSessions)
    natural("limit", sent.limit, least=1, most=limits.MAX_SEARCH_PAGE)
    every: list[rows.Session] = await call.ask(messages.ListSessions(tenant=call.tenant))
    saved: list[rows.Checkpoint] = await call.ask(messages.ListCheckpoints(tenant=call.tenant))
    count = Counter(checkpoint.model_id.partition(":")[0] for checkpoint in saved)
    found = sorted(filter(sent.fits, every), key=_position, reverse=True)
    page = found[: sent.limit]
    cursor = None
    if len(found) > len(page):
        cursor = SearchCursor(*_position(page[-1]))
    return {
        "sessions": [_summary(session, count[session.session_id]) for session in page],
        "next_cursor": cursor,
    }


def _position(session: rows.Session) -> tuple[datetime, str]:
    return moment(session.created_at), session.session_id


def _summary(session: rows.Session, checkpoints: int) -> dict[str, Any]:
    status: dict[str, Any] = {"type": "active"}
    if session.state == "finished":
        status = {"type": "client_finished", "reason": {"type": session.finish_reason}}
    return {
        "session_id": session.session_id,
        "created_at": moment(session.created_at),
        "owner": session.tenant,
        "project_id": session.project_id or "",
        "status": status,
        "checkpoints_count": checkpoints,
        "display_name": session.display_name,
        "user_metadata": strings(session.user_metadata),
    }


TABLE: Table = {
    "/create_session": {"POST": create},
    "/session_heartbeat": {"POST": heartbeat},
    "/sessions": {"GET": index},
    "/sessions/search": {"POST": search},
    "/sessions/{session_id}": {"GET": show},
    "/sessions/{session_id}/finish": {"POST": finish},
    "/sessions/{session_id}/project": {"PUT": move},
}
