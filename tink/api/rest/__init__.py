"""Tink's own REST API, for clients that have HTTP and nothing else: no sessions, no numbers, JSON alone.
Requests are translated to those of the SDK here; nothing behind `ask` knows which client sent one.

API has what is below /api/v1, SHORT what is at the root."""

from tink.api.call import Table
from tink.api.rest import about, results
from tink.api.rest.operations import OPERATIONS, PROMISED
from tink.api.rest.promises import later, sync

JOBS: Table = {
    **{f"/{name}": {"POST": sync(operation.submit)} for name, operation in OPERATIONS.items()},
    **{f"/{name}": {"POST": later(operation.submit)} for name, operation in PROMISED.items()},
}

API: Table = {**JOBS, **results.TABLE, "/list_loss_functions": about.TABLE["/list_loss_functions"]}

SHORT: Table = {**JOBS, **results.TABLE, **about.TABLE}
