"""The Tinker API: what the unmodified `tinker` SDK calls, one module per concern. TABLE has all of it,
below /api/v1."""

from tink.api.call import Table
from tink.api.tinker import checkpoints, client, futures, jobs, runs, samplers, sessions, unsupported

TABLE: Table = {
    **client.TABLE,
    **sessions.TABLE,
    **jobs.TABLE,
    **futures.TABLE,
    **samplers.TABLE,
    **runs.TABLE,
    **checkpoints.TABLE,
    **unsupported.TABLE,
}
