"""Shows when SQLite writes and syncs, by listening in on its file system layer.

    python -m tests.simulation.vfs FOLDER       prints {level: {step: [[call, file], ...]}}

A process of its own: it changes the functions of the SQLite library in place. Exits with 5 where the
interpreter has SQLite built in, out of reach.
"""

from __future__ import annotations

import ctypes
import json
import sqlite3
import sys
from ctypes import c_char_p, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

NO_LIBRARY = 5

# https://sqlite.org/c3ref/vfs.html and io_methods.html, as far as they are needed.
_Open = ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p, c_void_p, c_int, c_void_p)
_Write = ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p, c_int, c_int64)
_Sync = ctypes.CFUNCTYPE(c_int, c_void_p, c_int)


class _Vfs(ctypes.Structure):
    _fields_ = (
        ("numbers", c_int * 3),
        ("next", c_void_p),
        ("name", c_char_p),
        ("data", c_void_p),
        ("open", _Open),
    )


class _Methods(ctypes.Structure):
    _fields_ = (
        ("version", c_int),
        ("close", c_void_p),
        ("read", c_void_p),
        ("write", _Write),
        ("truncate", c_void_p),
        ("sync", _Sync),
        ("others", c_void_p * 13),
    )


def listen(library: Any, heard: list[tuple[str, str]]) -> list[Any]:
    """From now on `heard` gets every write and sync. Keep what it returns: SQLite points to it."""
    library.sqlite3_vfs_find.restype = ctypes.POINTER(_Vfs)
    vfs = library.sqlite3_vfs_find(None).contents
    really_open = _copy(_Open, vfs.open)
    kept: list[Any] = []

    def open_(of: int, name: int | None, file: int, flags: int, out: int) -> int:
        status = int(really_open(of, name, file, flags, out))
        if status == 0 and name:
            slot = ctypes.cast(file, ctypes.POINTER(ctypes.POINTER(_Methods)))
            path = Path(ctypes.string_at(name).decode()).name
            methods = _Methods.from_buffer_copy(slot[0].contents)
            write, sync = _copy(_Write, methods.write), _copy(_Sync, methods.sync)

            def heard_write(*call: Any) -> int:
                heard.append(("write", path))
                return int(write(*call))

            def heard_sync(*call: Any) -> int:
                heard.append(("sync", path))
                return int(sync(*call))

            methods.write, methods.sync = _Write(heard_write), _Sync(heard_sync)
            kept.append(methods)
            slot[0] = ctypes.pointer(methods)
        return status

    vfs.open = _Open(open_)
    kept.append(vfs.open)
    return kept


def _copy(kind: Any, function: Any) -> Any:
    return kind(ctypes.cast(function, c_void_p).value)


def trace(folder: Path, level: str, heard: list[tuple[str, str]]) -> dict[str, list[tuple[str, str]]]:
    connection = sqlite3.connect(folder / f"{level}.db", isolation_level=None)
    steps: dict[str, list[tuple[str, str]]] = {}

    def step(name: str, statement: str) -> None:
        heard.clear()
        connection.execute(statement)
        steps[name] = list(heard)

    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute(f"PRAGMA synchronous={level}")
    connection.execute("CREATE TABLE t (x)")
    step("commit", "INSERT INTO t VALUES (1)")
    step("checkpoint", "PRAGMA wal_checkpoint(PASSIVE)")
    connection.close()
    return steps


def main(folder: Path) -> int:
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    library = next((line.split()[-1] for line in lines if "libsqlite3" in line), None)
    if library is None:
        return NO_LIBRARY
    heard: list[tuple[str, str]] = []
    kept = listen(ctypes.CDLL(library), heard)
    print(json.dumps({level: trace(folder, level, heard) for level in ("OFF", "NORMAL", "FULL")}))
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
