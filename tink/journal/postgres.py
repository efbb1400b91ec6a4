"""A PostgreSQL server. The worker that writes there holds a lock for as long as its connection lives, and
commits on that connection alone: whoever has lost it cannot commit any more, however late he wakes up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from sqlalchemy import URL, Connection, Engine, NullPool, create_engine, event, inspect, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from tink.errors import DatabaseInUse, JournalUnavailable, StartupError
from tink.journal import revisions, schema
from tink.journal.database import JSON, Database, Writer, database_errors, one_line
from tink.journal.revisions import Schema
from tink.limits import (
    DATABASE_CONNECT_SECONDS,
    DATABASE_LOST_SECONDS,
    DATABASE_READ_SECONDS,
    LOCK_SECONDS,
    READ_CONNECTIONS,
)

# The first number of the locks that workers take: any that others are unlikely to. Every database of a
# server has locks of its own. The second one says of what it is.
LOCK = 0x74696E6B
_NUMBERS: dict[Schema, int] = {"journal": 1, "bodies": 2}

# With these a commit that was answered may be lost: setting -> the value.
_UNSAFE = {"synchronous_commit": "off", "fsync": "off", "full_page_writes": "off"}

_HOLDER = text("""
SELECT a.pid, a.application_name AS name, coalesce(host(a.client_addr), 'this machine') AS host,
       CASE WHEN a.state = 'active' THEN 0
            ELSE extract(epoch FROM clock_timestamp() - coalesce(a.state_change, a.backend_start))
       END AS silent
FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
WHERE l.locktype = 'advisory' AND l.granted AND l.classid = :lock AND l.objid = :number AND l.objsubid = 2
  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
""")


class Holder(NamedTuple):
    """The connection of the worker that writes. `silent`: for how many seconds it has asked the server for
    nothing; 0 while the server works for it."""

    pid: int
    name: str
    host: str
    silent: float

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
            return create_engine(
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

    @contextmanager
    def _asking(self) -> Iterator[Connection]:
        """A connection for one question. StartupError if there is no answer."""
        engine = self.engine("tink asks", poolclass=NullPool)
        try:
            with engine.connect() as connection:
                yield connection
        except SQLAlchemyError as error:
            raise StartupError(f"{self.place} cannot be read: {one_line(cause(error))}") from error

    # -- whose turn it is ---------------------------------------------------------------------------

    def holder(self, connection: Connection | None = None) -> Holder | None:
        """Who writes here. StartupError if the server cannot be asked."""
        if connection is None:
            with self._asking() as connection:
                return self.holder(connection)
        row = connection.execute(_HOLDER, {"lock": LOCK, "number": self._number}).first()
        return None if row is None else Holder(row.pid, row.name, row.host, float(row.silent))

    def put_out(self, holder: Holder, connection: Connection | None = None) -> bool:
        """Ends its connection, and with it whatever it was about to commit. False if that is not allowed:
        it is to the same role, and to superusers. StartupError if the server cannot be asked."""
        if connection is None:
            with self._asking() as connection:
                return self.put_out(holder, connection)
        try:
            with connection.begin_nested():
                connection.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": holder.pid})
        except DBAPIError as error:
            if _state(error) != "42501":  # insufficient_privilege
                raise
            return False
        return True

    def lock(self, connection: Connection) -> bool:
        """For the life of the connection."""
        query = text("SELECT pg_try_advisory_lock(:lock, :number)")
        return bool(connection.execute(query, {"lock": LOCK, "number": self._number}).scalar_one())


class _Session(Writer):
    def __init__(self, database: PostgreSQL) -> None:
        self._place = database.place
        # Without a pool: nobody gets another connection, which would not have the lock.
        self._engine = database.engine(f"tink writes the {database.schema}", poolclass=NullPool)
        event.listen(self._engine, "connect", _configure_writer)
        try:
            with database_errors(f"{database.place} cannot be opened"):
                self.connection = self._engine.connect()
            self._begin(database)
        except BaseException:
            self.close()
            raise

    def _begin(self, database: PostgreSQL) -> None:
        connection = self.connection
        with database_errors(f"{self._place} cannot be opened"), connection.begin():
            for problem in unsafe(connection):
                raise StartupError(f"{self._place}: {problem}")
            if connection.exec_driver_sql("SELECT pg_is_in_recovery()").scalar_one():
                raise JournalUnavailable(f"{self._place} is a replica, which cannot be written")
            if database.lock(connection):
                return
            holder = database.holder(connection)
            mine = database.schema == "bodies"
            if mine and holder and database.put_out(holder, connection) and database.lock(connection):
                return
        who = holder or "another worker"
        raise DatabaseInUse(f"{self._place} is in use: {who} writes the {database.schema}")

    def check(self) -> None:
        """A commit that was answered is one that the lock was held for."""

    def beat(self) -> None:
        with database_errors(f"{self._place} is lost"), self.connection.begin():
            self.connection.exec_driver_sql("SELECT 1")

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


def _configure_writer(connection: Any, _record: object) -> None:
    names = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout")
    _set(connection, **dict.fromkeys(names, f"{LOCK_SECONDS:g}s"))


def _set(connection: Any, **settings: str) -> None:
    """For the life of the connection."""
    connection.autocommit = True
    for name, value in settings.items():
        connection.execute("SELECT set_config(%s, %s, false)", (name, value))
    connection.autocommit = False


def parse(url: str) -> URL:
    """StartupError for what names no PostgreSQL database."""
    try:
        parsed = make_url(url)
    except ArgumentError:
        parsed = None
    if parsed is None or parsed.get_backend_name() not in ("postgresql", "postgres"):
        raise StartupError(
            "TINK_DATABASE_URL: it is not like postgresql+psycopg://USER:PASSWORD@HOST/DATABASE "
            "(without it the journal is in SQLite files)"
        )
    return parsed.set(drivername="postgresql+psycopg")


def shown(url: str) -> str:
    """The URL as people may see it: without its password, in whichever part."""
    whole = parse(url)
    query = {name: value for name, value in whole.query.items() if "password" not in name}
    part = URL.create("postgresql", whole.username, None, whole.host, whole.port, whole.database, query)
    return part.render_as_string(hide_password=False)


def cause(error: SQLAlchemyError) -> object:
    return getattr(error, "orig", None) or error


def _state(error: BaseException | None) -> str | None:
    """The SQLSTATE of what the driver has raised."""
    found: str | None = getattr(getattr(error, "orig", None), "sqlstate", None)
    return found
