"""What any sampling server is to the worker: what it serves, how busy it is, and how it fails."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from tink.backends.exchange import HttpAnswer, HttpClient, NoAnswer, exchange
from tink.errors import BackendError


class ReplicaGone(BackendError):
    """This server did not do it: no connection, a broken answer or none in time, a dead engine, an aborted
    request, a server that is shutting down. A sample may be sent to another one, or again."""


class Aborted(ReplicaGone):
    """The server gave the request up by itself: it drains, or somebody told it to. It was not its death."""


class Unsent(ReplicaGone):
    """The server has nothing of the request: it was gone before it could be sent, or did not take it."""


class Silent(ReplicaGone):
    """The server has not answered in time: it hangs, or has too much to do."""


class AdapterMissing(BackendError):
    """The server has no adapter of this name (any more): load it, then ask again."""


class ReplicaRefused(BackendError):
    """The server answered that it will not do this, and would again: an adapter it cannot load, a feature
    that it was started without. The text has its reason and the remedy."""


class Served(NamedTuple):
    """`base_model` is the name that requests use, `root` where the server has it from. `max_context` counts
    the tokens of prompt and answer together. `adapters`: name -> the path it was loaded from."""

    base_model: str
    root: str
    max_context: int
    adapters: Mapping[str, str]


class Load(NamedTuple):
    """Sequences that are computed, and that wait (also for a place for their adapter); and the tokens
    generated since the server's start: if that stands still while sequences run, the server hangs, and it
    never gets less in one life."""

    running: int
    waiting: int
    generated: int


class Probe(NamedTuple):
    """What a short request tells of a server. `mode`: of which distribution its logprobs are, the model's
    own or the one it drew from (after temperature, top_p, ...). `scores`: by token, the log-probabilities
    in nats of those that the base model finds likeliest."""

    mode: Literal["raw", "processed"]
    scores: Mapping[int, float]


async def ask(
    client: HttpClient,
    server: str,
    method: str,
    path: str,
    *,
    seconds: float,
    content: bytes | None = None,
) -> HttpAnswer:
    """Raises ReplicaGone, Unsent or Silent, which call it `server`, if there is no answer."""
    try:
        # Anything here may be done twice, and an idle connection is closed by vLLM after 5 s.
        return await exchange(client, method, path, seconds=seconds, content=content, again=True)
    except NoAnswer as error:
        kind = Silent if error.late else ReplicaGone if error.sent else Unsent
        raise kind(f"{server} does not answer: {error}") from error
