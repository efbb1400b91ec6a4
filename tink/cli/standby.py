"""A worker whose journal is in PostgreSQL: it serves while the database is its own, waits for its turn
while another worker has it, and for the server while that is away. Each time it begins anew from the
journal: nothing that it had in memory before is used again."""

from __future__ import annotations

import signal

import structlog
import trio

from tink import http_server
from tink.cli.serving import Past, serve
from tink.errors import JournalUnavailable, StartupError, tink_error
from tink.home import Home
from tink.journal.postgres import MIGRATING, PostgreSQL, shown
from tink.limits import DATABASE_LOOK_SECONDS, DATABASE_READ_SECONDS, DATABASE_SILENT_SECONDS
from tink.logs import configure_logs
from tink.settings import Settings
from tink.world import World

log = structlog.get_logger()


def keep_serving(settings: Settings, home: Home, world: World) -> None:
    """Until it is told to stop. The caller holds the home's lock. Raises StartupError for what waiting does
    not mend, and JournalUnavailable if the database was lost while it stopped."""
    configure_logs(settings.log_level)
    database, past = PostgreSQL(settings.database_url, "journal"), Past()
    port, pause = settings.port, 0.0
    former = {number: signal.signal(number, past.stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        while not past.stopped and trio.run(_await_turn, database, world, past, pause):
            try:
                _note(database, home)
                # Only now: a port that is open says that somebody serves there.
                with world.listen(settings.host, port) as listener:
                    port = listener.getsockname()[1]  # if any would do: clients come back to this one
                    http_server.run(serve, settings, home, world, listener, past)
                return
            except Exception as raised:
                pause = _pause(raised, past)
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _pause(raised: Exception, past: Past) -> float:
    """For how long to wait before the next try. Raises what waiting does not mend."""
    error = tink_error(raised)
    if past.stopped or not isinstance(error, JournalUnavailable | StartupError):
        raise raised
    if isinstance(error, StartupError) and not error.may_pass:
        raise raised
    if past.serving:
        past.serving = False
        log.warning("the journal's database is lost: nothing is taken until it is back", why=str(error))
        return 0.0
    if not past.served and not error.may_pass:  # at the first start it would not help to wait
        raise StartupError(str(error)) from error
    log.warning("the journal cannot be opened", why=str(error))
    return DATABASE_LOOK_SECONDS


async def _await_turn(database: PostgreSQL, world: World, past: Past, pause: float) -> bool:
    """True once nobody writes to the database, at least `pause` seconds from now; False if this process is
    told to stop before. Raises StartupError if it has never served and will not be let in."""
    async with trio.open_nursery() as nursery:
        turn = False

        async def look() -> None:
            nonlocal turn
            told = ""
            await trio.sleep(pause)
            while not turn:
                try:
                    why = await _in_the_way(database, world)
                except StartupError as error:
                    if not past.served and not error.may_pass:
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
                past.stop()
                nursery.cancel_scope.cancel()
    return turn and not past.stopped


async def _in_the_way(database: PostgreSQL, world: World) -> str:
    """Who or what is; empty if it is this worker's turn. StartupError if the server cannot be asked."""
    holder = await world.run_sync(database.holder)
    if holder is None:
        return ""
    if holder.silent is None:
        return (
            f"{holder} has it, and whether it is alive is not to be seen: give both workers one role, and "
            "the server track_activities = on"
        )
    patience = DATABASE_READ_SECONDS if holder.name == MIGRATING else DATABASE_SILENT_SECONDS
    if holder.silent < patience:
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
