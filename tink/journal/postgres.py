"""A PostgreSQL server. The worker that writes there holds a lock for as long as its connection lives, and
commits on that connection alone: whoever has lost it cannot commit any more, however late he wakes up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from sqlalchemy import (
    URL,
    Connection,
    Engine,
    ExceptionContext,
    NullPool,
    create_engine,
    event,
    inspect,
    make_url,
    text,
)
from sqlalchemy.exc import ArgumentError, DBAPIError

from tink.addresses import NO_DATABASE_URL, is_database_url
from tink.errors import DatabaseInUse, JournalUnavailable, StartupError
from tink.journal import revisions, schema
from tink.journal.database import JSON, Database, Writer, database_errors, driver_error, reading
from tink.journal.revisions import Schema
from tink.limits import (
    DATABASE_CLOSED_SECONDS,
    DATABASE_CONNECT_SECONDS,
    DATABASE_ENDED_SECONDS,
    DATABASE_LOST_SECONDS,
    DATABASE_READ_SECONDS,
    LOCK_SECONDS,
    READ_CONNECTIONS,
)

# The first number of the locks that workers take: any that others are unlikely to. Every database of a
# server has locks of its own. The second one says of what it is.
LOCK = 0x74696E6B
_NUMBERS: dict[Schema, int] = {"journal": 1, "bodies": 2}

# How one that migrates names its connection: it may be silent for long.
MIGRATING = "tink migrates"

# With these a commit that was answered may be lost: setting -> the value.
_UNSAFE = {"synchronous_commit": "off", "fsync": "off", "full_page_writes": "off"}

_LOCKS = """
FROM pg_locks l
WHERE l.locktype = 'advisory' AND l.granted AND l.classid = :lock AND l.objid = :number AND l.objsubid = 2
  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""
# The state is not for every role to see, and not every server keeps it.
_HOLDER = text(f"""
SELECT h.pid, a.application_name AS name, coalesce(host(a.client_addr), 'this machine') AS host,
       CASE WHEN a.state = 'active' THEN 0 WHEN a.state <> 'disabled'
            THEN extract(epoch FROM clock_timestamp() - coalesce(a.state_change, a.backend_start))
       END AS silent
FROM (SELECT l.pid {_LOCKS}) h LEFT JOIN pg_stat_activity a ON a.pid = h.pid
""")  # noqa: S608  of two texts that are here
_HELD = text(f"SELECT EXISTS (SELECT 1 {_LOCKS} AND l.pid = pg_backend_pid())")
_PUT_OUT = text(f"SELECT pg_terminate_backend(l.pid, :milliseconds) {_LOCKS} AND l.pid = :pid")


class Holder(NamedTuple):
    """The connection of the worker that writes. `silent`: for how many seconds it has asked the server for
    nothing; 0 while the server works for it, and None if that is not to be seen."""

    pid: int
    name: str
    host: str
    silent: float | None

    def __str__(self) -> str:
        who = "a worker" if self.name.startswith("tink ") else self.name or "another program"
        return f"{who} on {self.host}"


class PostgreSQL(Database):
    contended = True

    def __init__(self, url: str, schema: Schema) -> None:
        self._url, self.schema = parse(url), schema
        self._number = _NUMBERS[schema]
        self.place = shown(url)

    def exists(self) -> bool:
        with self._asking() as connection:
            return inspect(connection).has_table(revisions.version_table(self.schema))

    def writer(self) -> Writer:
        """Of the bodies: whoever still has them has lost the journal, and is put out."""
        return _Session(self)

    def reader(self) -> Engine:
        engine = self.engine(
            f"tink reads the {self.schema}",
            pool_size=READ_CONNECTIONS,
            max_overflow=0,
            pool_pre_ping=True,
            isolation_level="REPEATABLE READ",
        )

        @event.listens_for(engine, "connect")
        def _configure(connection: Any, _record: object) -> None:
            _set(
                connection,
                default_transaction_read_only="on",
                statement_timeout=f"{DATABASE_READ_SECONDS:g}s",
            )

        return engine

    def begin_snapshot(self, connection: Connection) -> None:
        """The first read begins it: such is REPEATABLE READ."""

    def unbounded(self, connection: Connection) -> None:
        for limit in ("statement_timeout", "idle_in_transaction_session_timeout"):
            connection.exec_driver_sql(f"SET LOCAL {limit} = 0")

    def begin_schema(self, connection: Connection, *, whole: bool) -> None:
        """To make an index takes as long as there are rows; and while all of a long journal is compared the
        server hears nothing."""
        self.unbounded(connection)
        connection.exec_driver_sql(f"SET application_name = '{MIGRATING}'")

    def settle(self, connection: Connection) -> None:
        """What is copied here is there at its end or not at all."""

    def check_file(self, connection: Connection, *, quick: bool) -> tuple[str, list[str]]:
        """A server keeps its own house."""
        version = connection.exec_driver_sql("SHOW server_version").scalar_one()
        detail = f"PostgreSQL {version}, whose files are its own to check (pg_amcheck)"
        return detail, list(unsafe(connection))

    def bytes(self) -> int:
        tables = schema.metadata if self.schema == "journal" else schema.bodies_metadata
        query = """
SELECT coalesce(sum(pg_total_relation_size(to_regclass(name))), 0) FROM unnest(CAST(:names AS text[])) name
"""
        with self._asking() as connection:
            return int(connection.execute(text(query), {"names": list(tables.tables)}).scalar_one())

    def is_damage(self, error: JournalUnavailable) -> bool:
        return _state(error.__cause__) in ("XX001", "XX002")

    def engine(self, name: str, **options: Any) -> Engine:
        """Connections that notice when the server is gone. StartupError without the driver."""
        try:
            engine = create_engine(
                self._url,
                hide_parameters=True,
                connect_args={
                    "application_name": name,
                    "connect_timeout": DATABASE_CONNECT_SECONDS,
                    "keepalives_idle": DATABASE_LOST_SECONDS // 2,
                    "keepalives_interval": 1,
                    "keepalives_count": DATABASE_LOST_SECONDS // 2,
                    "tcp_user_timeout": DATABASE_LOST_SECONDS * 1000,
                },
                **JSON,
                **options,
            )
        except ModuleNotFoundError as error:
            raise StartupError("TINK_DATABASE_URL needs psycopg: pip install 'tink[postgres]'") from error
        event.listen(engine, "handle_error", _say_if_it_may_pass)
        return engine

    @contextmanager
    def _asking(self) -> Iterator[Connection]:
        """A connection for one question. StartupError if there is no answer."""
        engine = self.engine("tink asks", poolclass=NullPool)
        seconds = f"{2 * DATABASE_CONNECT_SECONDS}s"
        event.listen(engine, "connect", lambda one, _record: _set(one, statement_timeout=seconds))
        with reading(self.place), engine.connect() as connection:
            yield connection

    # -- whose turn it is ---------------------------------------------------------------------------

    def holder(self) -> Holder | None:
        """Who writes here. StartupError if the server cannot be asked."""
        with self._asking() as connection:
            return self.holder_on(connection)

    def holder_on(self, connection: Connection) -> Holder | None:
        """The same, asked on that connection."""
        row = connection.execute(_HOLDER, {"lock": LOCK, "number": self._number}).first()
        return (
            None
            if row is None
            else Holder(
                row.pid, row.name or "", row.host, None if row.silent is None else float(row.silent)
            )
        )

    def put_out(self, holder: Holder) -> bool:
        """Ends its connection, and with it whatever it was about to commit. False if that is not allowed:
        it is to the same role, and to superusers. StartupError if the server cannot be asked."""
        with self._asking() as connection:
            return self.put_out_on(connection, holder)

    def put_out_on(self, connection: Connection, holder: Holder) -> bool:
        """The same, asked on that connection."""
        milliseconds = int(DATABASE_ENDED_SECONDS * 1000)
        asked = {"lock": LOCK, "number": self._number, "pid": holder.pid, "milliseconds": milliseconds}
        try:
            with connection.begin_nested():
                return all(connection.execute(_PUT_OUT, asked).scalars())
        except DBAPIError as error:
            if _state(error) != "42501":  # insufficient_privilege
                raise
            return False

    def holds(self, connection: Connection) -> bool:
        """Whether that connection has the lock."""
        asked = {"lock": LOCK, "number": self._number}
        return bool(connection.execute(_HELD, asked).scalar_one())

    def lock(self, connection: Connection) -> bool:
        """For the life of the connection. Whoever has just closed his own has it for a moment yet."""
        asked = {"lock": LOCK, "number": self._number}
        try:
            with connection.begin_nested():
                connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{DATABASE_CLOSED_SECONDS:g}s'")
                connection.execute(text("SELECT pg_advisory_lock(:lock, :number)"), asked)
        except DBAPIError as error:
            if _state(error) != "55P03":  # lock_not_available
                raise
            return False
        return True


class _Session(Writer):
    def __init__(self, database: PostgreSQL) -> None:
        self._place, self._database = database.place, database
        self._warned: str | None = None
        self._connected = False
        self._engine = database.engine(f"tink writes the {database.schema}", poolclass=NullPool)
        event.listen(self._engine, "do_connect", self._refuse_another)
        event.listen(self._engine, "connect", self._configure)
        try:
            with database_errors(f"{database.place} cannot be opened"):
                self.connection = self._engine.connect()
            self._begin(database)
        except BaseException:
            self.close()
            raise

    def _refuse_another(self, *_: object) -> None:
        """SQLAlchemy would get a new one in place of one that is lost, and that would not have the lock."""
        if self._connected:
            told = f"the connection to {self._place} is lost, and its lock with it"
            raise JournalUnavailable(told, may_pass=True)
        self._connected = True

    def _configure(self, connection: Any, _record: object) -> None:
        names = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout")
        _set(connection, **dict.fromkeys(names, f"{LOCK_SECONDS:g}s"))
        connection.add_notice_handler(self._hear)

    def _hear(self, notice: Any) -> None:
        if notice.severity_nonlocalized == "WARNING":
            self._warned = str(notice.message_primary)

    def _begin(self, database: PostgreSQL) -> None:
        connection = self.connection
        with database_errors(f"{self._place} cannot be opened"), connection.begin():
            for problem in unsafe(connection):
                raise StartupError(f"{self._place}: {problem}")
            if connection.exec_driver_sql("SELECT pg_is_in_recovery()").scalar_one():
                told = f"{self._place} is a replica, which cannot be written"
                raise JournalUnavailable(told, may_pass=True)  # it may take over
            if database.lock(connection):
                return
            holder = database.holder_on(connection)
            mine = database.schema == "bodies"
            if mine and holder and database.put_out_on(connection, holder) and database.lock(connection):
                return
        who = holder or "another worker"
        raise DatabaseInUse(f"{self._place} is in use: {who} writes the {database.schema}")

    def check(self) -> None:
        """The server may answer a commit with a warning: that it is on no replica, say."""
        if self._warned is not None:
            raise JournalUnavailable(f"{self._place} warns: {self._warned}")

    def beat(self) -> None:
        with database_errors(f"{self._place} is lost"), self.connection.begin():
            if not self._database.holds(self.connection):
                raise JournalUnavailable(
                    f"{self._place} has no lock of this worker any more: is there a pooler that does not "
                    "keep sessions?"
                )

    def close(self) -> None:
        if hasattr(self, "connection"):
            self.connection.close()
        self._engine.dispose()


def unsafe(connection: Connection) -> Iterator[str]:
    """What is set so that a commit which was answered may be lost."""
    for name, value in _UNSAFE.items():
        if connection.exec_driver_sql(f"SHOW {name}").scalar_one() == value:
            yield (
                f"{name} is {value}, so what was committed may be lost: set it to on (for the server, the "
                "database or the role)"
            )


def _set(connection: Any, **settings: str) -> None:
    """For the life of the connection."""
    connection.autocommit = True
    for name, value in settings.items():
        connection.execute("SELECT set_config(%s, %s, false)", (name, value))
    connection.autocommit = False


def parse(url: str) -> URL:
    """StartupError for what names no PostgreSQL database."""
    if not is_database_url(url):
        raise StartupError(f"TINK_DATABASE_URL: {NO_DATABASE_URL}")
    try:
        return make_url(url).set(drivername="postgresql+psycopg")
    except (ArgumentError, ValueError):  # whose text may have the password in it
        raise StartupError(f"TINK_DATABASE_URL: {NO_DATABASE_URL}") from None


# Of a URL's options those that tell where it is.
_SHOWN = ("host", "port", "sslmode", "target_session_attrs")


def shown(url: str) -> str:
    """The URL as people may see it: without its password, in whichever part."""
    whole = parse(url)
    query = {name: value for name, value in whole.query.items() if name in _SHOWN}
    part = URL.create("postgresql", whole.username, None, whole.host, whole.port, whole.database, query)
    return part.render_as_string(hide_password=False)


# In what libpq says of a server that may be had in a moment, and in what that says to those it does not let
# in: neither comes with an SQLSTATE.
_MAY_PASS = (
    *("refused", "timeout", "timed out", "unreachable", "reset by peer", "closed the connection", "lost"),
    *("starting up", "shutting down", "too many", "remaining connection slots", "No space left"),
    "Temporary failure",
)


def _say_if_it_may_pass(context: ExceptionContext) -> None:
    """Of the driver's errors. A server that ends a connection, or lets none in, says so in any language."""
    if not isinstance(context.sqlalchemy_exception, DBAPIError):
        return
    error: Any = context.original_exception
    ended = (getattr(error, "sqlstate", None) or "").startswith("57P0")
    error.may_pass = ended or any(words in str(error) for words in _MAY_PASS)


def _state(error: BaseException | None) -> str | None:
    """The SQLSTATE of what the driver has raised."""
    found: str | None = getattr(driver_error(error), "sqlstate", None)
    return found
