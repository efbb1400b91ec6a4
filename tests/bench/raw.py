"""Rows as large as the journal's events, written by a database's own driver: what nobody can do better."""

from __future__ import annotations

import sqlite3
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import psycopg

COLUMNS = "seq, at, incarnation, kind, tenant, session_id, model_id, job_id, data, hash"
TABLE = """CREATE TABLE events (seq BIGINT PRIMARY KEY, at DOUBLE PRECISION, incarnation BIGINT, kind TEXT,
    tenant TEXT, session_id TEXT, model_id TEXT, job_id TEXT, data TEXT, hash TEXT)"""
INDEXES = ("CREATE INDEX by_job ON events (job_id, seq)", "CREATE INDEX by_kind ON events (kind, seq)")
DATA = '{"exception_type": "builtins.ValueError"}'


class Written(NamedTuple):
    """Of one event: events a second, and microseconds of CPU in this process."""

    rate: float
    cpu: float


def sqlite(batch: int, events: int) -> Written:
    with (
        tempfile.TemporaryDirectory(prefix="tink-bench-") as folder,
        closing(sqlite3.connect(Path(folder) / "raw.sqlite", isolation_level=None)) as connection,
    ):
        for statement in ("PRAGMA journal_mode=WAL", "PRAGMA synchronous=FULL", TABLE, *INDEXES):
            connection.execute(statement)
        insert = f"INSERT INTO events ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"

        def write(rows: list[tuple[object, ...]]) -> None:
            connection.execute("BEGIN")
            connection.executemany(insert, rows)
            connection.execute("COMMIT")

        return _written(batch, events, write)


def postgres(batch: int, events: int, url: str) -> Written:
    with psycopg.connect(url.replace("+psycopg", "")) as connection:
        for statement in (TABLE, *INDEXES):
            connection.execute(statement)
        connection.commit()
        insert = f"INSERT INTO events ({COLUMNS}) VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)"

        def write(rows: list[tuple[object, ...]]) -> None:
            with connection.cursor() as cursor:
                cursor.executemany(insert, rows)
            connection.commit()

        return _written(batch, events, write)


def _written(batch: int, events: int, write: Callable[[list[tuple[object, ...]]], None]) -> Written:
    began, cpu = time.monotonic(), time.process_time()
    for first in range(0, events, batch):
        now = time.time()
        write([_row(seq, now) for seq in range(first, first + batch)])
    done = (events + batch - 1) // batch * batch
    return Written(done / (time.monotonic() - began), (time.process_time() - cpu) / done * 1e6)


def _row(seq: int, now: float) -> tuple[object, ...]:
    names = ("s", "s:train:0", "s:train:0:1")
    return (seq, now, 1, "client_failed", "bench", *names, DATA, f"{seq:064x}")
