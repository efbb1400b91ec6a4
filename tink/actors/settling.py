"""What the actors that run jobs share: the request of a job, and telling the router that it has ended."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import zstandard

from tink.domain import rows
from tink.errors import BackendError, UserError
from tink.journal.journal import Journal
from tink.limits import MAX_ZSTD_WINDOW

# Called with a job's id: once its terminal event is durable, its waiters may be told; and once nothing is
# left to do with its model, the model's next job may run.
Settle = Callable[[str], Awaitable[None]]
Release = Callable[[str], Awaitable[None]]


async def request_of(journal: Journal, job: rows.Job) -> bytes:
    """The request of a job as its client sent it, decompressed. UserError if it was not a valid one,
    BackendError if it is lost."""
    accepted = await journal.acceptance(job)
    if accepted.invalid is not None:
        raise UserError(accepted.invalid)
    if accepted.request is not None:
        return accepted.request.encode()
    assert accepted.body_sha256 is not None, "a data op has a body"
    try:
        body = await journal.bodies.get(accepted.body_sha256)
    except LookupError as error:
        raise BackendError(f"the request of {job.job_id} is lost: {error}") from error
    if accepted.codec == "identity":
        return body
    # What it decompresses to was counted before it was accepted.
    return zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW).decompressobj().decompress(body)
