"""Every error that reaches a client or a person.

Each class says what causes it and what to do. `status` is its HTTP status when it is answered at
once; `category` is what the SDK is told when the error is the durable result of an accepted job
(`user`: the request is wrong; `server`: Tink or a backend is).

    TinkError
    ├── UserError            the caller's request cannot be served as it is
    │   ├── MalformedRequest     not decodable
    │   ├── Unauthorized         no valid API key
    │   ├── NotFound             no such id, for this tenant
    │   ├── TooLarge             over a limit of tink/limits.py
    │   ├── NotServed            no backend for it in this mode
    │   └── SessionFinished      a heartbeat for a session that its client has closed
    ├── Overloaded           a bounded queue is full; try again
    ├── BackendError         the trainer or a sampling server failed; tink/backends has those that its
    │                        callers tell apart (TrainerGone, ReplicaGone, ReplicaRefused, ...)
    ├── JournalUnavailable   the journal could not commit; the process stops
    └── StartupError         the configuration or the home cannot be used
        └── DatabaseInUse        another worker writes to the database
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, TypeVar

import msgspec

# What msgspec raises for bytes that are not what they should be. Bad UTF-8 and deep nesting have errors of
# their own.
UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


E = TypeVar("E", bound=BaseException)


class TinkError(Exception):
    """The root. Its text is one line for a person: what was wrong, where, what to do."""

    status: ClassVar[int] = 500
    category: ClassVar[str] = "server"
    # What to do, where the text is somebody else's word for word and does not say it.
    remedy: str | None = None


class UserError(TinkError):
    """The request is well formed but cannot be served: the text says why and what would work."""

    status = 400
    category = "user"


class MalformedRequest(UserError):
    """The body is not the JSON or protobuf that the route takes. Nothing was accepted."""


class Unauthorized(UserError):
    """The API key is missing or unknown. Pass one of TINK_API_KEYS as X-API-Key."""

    status = 401


class NotFound(UserError):
    """The id does not exist, or belongs to another tenant (the two are not told apart)."""

    status = 404


class TooLarge(UserError):
    """The body is over its limit, before or after decompression. Send less at a time."""

    status = 413


class NotServed(UserError):
    """No backend is configured for the operation. The remedy says which settings configure one."""

    def __init__(self, text: str, remedy: str) -> None:
        super().__init__(text)
        self.remedy = remedy


class SessionFinished(UserError):
    """The client closed this session; its heartbeat may stop."""

    status = 410


class Overloaded(TinkError):
    """A bounded queue is full, or the worker is stopping. Nothing was accepted: send the same request
    again later. (429: to a 503 the SDK's samples come again as new ones.)"""

    status = 429


class BackendError(TinkError):
    """The trainer or a sampling server failed while it worked on a job."""

    status = 502


class JournalUnavailable(TinkError):
    """The journal's database could not commit. The worker stops: after a failed commit only a
    restart can tell what is on disk. What was acknowledged is safe; an unanswered request may or
    may not have been accepted, and sending it again is harmless. `may_pass`: it may be over in a moment
    with nothing done here, so that whoever can wait tries again."""

    status = 503

    def __init__(self, text: str, *, may_pass: bool = False) -> None:
        super().__init__(text)
        self.may_pass = may_pass


class StartupError(TinkError):
    """Tink cannot start with this configuration. The text names the setting and the remedy. `may_pass`:
    as of JournalUnavailable."""

    def __init__(self, text: str, *, may_pass: bool = False) -> None:
        super().__init__(text)
        self.may_pass = may_pass


class DatabaseInUse(StartupError):
    """Another worker writes to the PostgreSQL database. Stop it, or name another database; `tink serve`
    waits for its turn instead."""

    def __init__(self, text: str) -> None:
        super().__init__(text, may_pass=True)


def tink_error(error: BaseException) -> TinkError | None:
    """The first TinkError in `error`, which may be a group of them; None if a bug is in there too."""
    if isinstance(error, BaseExceptionGroup):
        causes = [tink_error(part) for part in error.exceptions]
        return None if None in causes else causes[0]
    return error if isinstance(error, TinkError) else None


def failed(category: str | None, text: str) -> TinkError:
    """What a job that did not do its work is to its caller: BackendError or, by any other `category`
    than `server`, UserError."""
    return BackendError(text) if category == "server" else UserError(text)


def suggestion(name: str, known: Iterable[str]) -> str:
    """The end of a text about a name that is not known: which one may have been meant, if one may."""
    from difflib import get_close_matches  # it takes a while to import, and is hardly ever needed

    close = get_close_matches(name, sorted(known), 1)
    return f"; did you mean {close[0]}?" if close else ""


def bare(error: E) -> E:
    """The error without where it has passed, for those who keep it, and for one that comes from a thread:
    it would be a cycle with the frames that know it, and what they hold (a request's body) would be there
    until the collector comes."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)
