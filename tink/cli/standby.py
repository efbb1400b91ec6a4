"""A worker whose journal is in PostgreSQL: it serves while the database is its own, waits for its turn
while another worker has it, and for the server while that is away. Each time it begins anew from the
journal: nothing that it had in memory before is used again."""

from __future__ import annotations

import signal

import structlog
import trio

from tink.cli.serving import Past, serve
from tink.errors import DatabaseInUse, JournalUnavailable, StartupError, tink_error
from tink.home import Home
from tink.journal.postgres import PostgreSQL, shown
from tink.limits import DATABASE_LOOK_SECONDS, DATABASE_SILENT_SECONDS
from tink.logs import configure_logs
from tink.settings import Settings
from tink.world import World

log = structlog.get_logger()

# In what the driver says of a server that is there and does not let us in: to wait would not help.
_PERMANENT = ("does not exist", "authentication failed", "pg_hba.conf", "permission denied", "resolve host")


def keep_serving(settings: Settings, home: Home, world: World) -> None:
    """Until it is told to stop. The caller holds the home's lock. Raises StartupError for what waiting does
    not mend."""
    configure_logs(settings.log_level)
    database, past = PostgreSQL(settings.database_url, "journal"), Past()
    first, port = True, settings.port
    while trio.run(_await_turn, database, world, first):
        if first:
            _note(database, home)
            first = False
        try:
            # Only now: a port that is open says that somebody serves there.
            with world.listen(settings.host, port) as listener:
                port = listener.getsockname()[1]  # if any would do: clients come back to this one
                trio.run(serve, settings, home, world, listener, past)
            return
        except Exception as raised:
            error = tink_error(raised)
            if not isinstance(error, JournalUnavailable | DatabaseInUse):
                raise
            log.warning("the journal's database is lost: nothing is taken until it is back", why=str(error))


async def _await_turn(database: PostgreSQL, world: World, first: bool) -> bool:
    """True once nobody writes to the database; False if this process is told to stop before. `first`:
    raises StartupError if it is not let in."""
    async with trio.open_nursery() as nursery:
        turn = False

        async def look() -> None:
            nonlocal turn
            told = ""
            while not turn:
                try:
                    why = await _in_the_way(database, world)
                except StartupError as error:
                    if first and any(words in str(error) for words in _PERMANENT):
                        raise
                    why = str(error)
                turn = not why
                if not turn and why != told:
                    log.info("waiting for the database", why=why)
                    told = why
                if not turn:
                    await trio.sleep(DATABASE_LOOK_SECONDS)
            nursery.cancel_scope.cancel()

        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            nursery.start_soon(look)
            async for _ in signals:
                nursery.cancel_scope.cancel()
    return turn


async def _in_the_way(database: PostgreSQL, world: World) -> str:
    """Who or what is; empty if it is this worker's turn. StartupError if the server cannot be asked."""
    holder = await world.run_sync(database.holder)
    if holder is None:
        return ""
    if holder.silent < DATABASE_SILENT_SECONDS:
        return f"{holder} has it, and this one takes its place when it ends"
    if await world.run_sync(database.put_out, holder):
        log.warning("put out a worker that was silent", who=str(holder), seconds=round(holder.silent))
        return ""
    return f"{holder} is silent and has the database, and this role may not end its connection"


def _note(database: PostgreSQL, home: Home) -> None:
    """In the home, for the commands and for whoever starts it without the setting. StartupError if that
    would begin a new journal in place of one that is there."""
    noted, here = home.noted_database(), shown(home.database_url)
    if noted not in (None, here) and not database.exists():
        raise StartupError(
            f"the journal of {home.root} is in {noted}, and {here} has none: correct TINK_DATABASE_URL, or "
            f"delete {home.database} to begin a new one"
        )
    if noted != here:
        home.note_database(here)
