"""This machine: settings, folders, disk, journal, clock, versions. Nothing is changed but for files that
are made and deleted again, to see that they can be."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import tink
from tink import pretrained
from tink.doctor.findings import Finding, ok, warning, wrong
from tink.domain.routing import HOW_TO_SAMPLE, NO_SAMPLING
from tink.errors import StartupError
from tink.home import Home
from tink.journal import queries, revisions
from tink.journal.database import database
from tink.journal.reader import open_snapshot
from tink.limits import CLOCK_SLACK_SECONDS, DISK_FEW_BYTES, DISK_LEAST_BYTES
from tink.settings import Reading, Settings
from tink.trainer import engines
from tink.world import World

# SQLite's write-ahead log needs shared memory and locks that all processes see.
NETWORKED = (
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "9p",
    "afs",
    "ceph",
    "glusterfs",
    "lustre",
    "fuse.sshfs",
)
SDK = "0.38"
SHOWN = ("tinker", "torch", "transformers", "megatron-core")


def settings(reading: Reading, problems: list[str]) -> Iterator[Finding]:
    """`problems`: of settings that can be read, why a start would fail here."""
    for problem in [*reading.problems, *problems]:
        yield wrong("settings", problem, "correct it; 'tink config' shows all of them")
    found = reading.settings
    if found.routes.sampling is None:
        yield wrong("settings", NO_SAMPLING, HOW_TO_SAMPLE)
    elif not reading.problems and not problems:
        yield ok("settings", f"{found.routes.mode}; {len(reading.sources)} set, the rest are defaults")


def engine(settings: Settings) -> Iterator[Finding]:
    """The embedded one, where it is used."""
    if "hf" not in settings.routes:
        return
    try:
        engines.check("hf")
    except StartupError:  # so that it cannot start: told with the settings
        return
    try:
        if settings.hf_model.startswith("/"):
            config = pretrained.Config.load(Path(settings.hf_model))
            yield ok("engine", f"HuggingFace engine, {config.model_type} in {settings.hf_model}")
        elif settings.hf_model:
            yield from _of_a_hub(settings.hf_model)
        else:
            yield ok("engine", "HuggingFace engine, with the built-in model")
    except StartupError as error:
        yield wrong("engine", str(error))


def _of_a_hub(model: str) -> Iterator[Finding]:
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(model, "config.json"), str):
        yield ok("engine", f"HuggingFace engine, {model} from the hub's cache here")
    else:
        yield warning(
            "engine",
            f"{model} is not in the hub's cache here: the first start downloads it",
            f"hf download {model}",
        )


def folders(settings: Settings) -> Iterator[Finding]:
    """The home and the artifact folder: whether files can be made there, and how much room is left."""
    seen: set[int] = set()
    named = {"home": settings.home, "artifacts": settings.artifact_root}
    for name, folder in named.items():
        there = _first_that_is_there(folder)
        try:
            with tempfile.NamedTemporaryFile(dir=there, prefix=".tink-doctor-") as file:
                file.write(b"\0")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            variable = "TINK_HOME" if name == "home" else "TINK_ARTIFACTS"
            reason = error.strerror or str(error)
            yield wrong(
                name, f"no file can be made in {there}: {reason}", f"chown or chmod it, or set {variable}"
            )
            continue
        kind = _file_system(there)
        if name == "home" and kind in NETWORKED and not settings.database_url:
            yield wrong(
                name,
                f"{folder} is on a network ({kind}): the journal's locks do not hold there",
                "set TINK_HOME to a folder on a local disk; TINK_ARTIFACTS may be on a network",
            )
        else:
            made = "" if folder.is_dir() else ", which 'tink serve' makes"
            yield ok(name, f"{folder}{made}")
        if (device := there.stat().st_dev) not in seen:
            seen.add(device)
            yield _room(there)


def _room(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    detail = f"{free / 1e9:.1f} GB free at {folder}"
    remedy = "make room: 'tink status' tells what takes it; 'tink gc --dry-run' what can go"
    if free < DISK_LEAST_BYTES:
        return wrong("disk", detail, remedy)
    return warning("disk", detail, remedy) if free < DISK_FEW_BYTES else ok("disk", detail)


def journal(home: Home, world: World) -> Iterator[Finding]:
    """Whether this Tink can read it, and the clock that its times were made by."""
    if wrong_place := home.misplaced():
        yield wrong("journal", wrong_place)
        return
    journal = database(home, "journal")
    try:
        there = journal.exists()
    except StartupError as error:
        remedy = "start the server, or correct TINK_DATABASE_URL; the worker waits for it meanwhile"
        yield wrong("journal", str(error), remedy)
        return
    if not there:
        yield ok("journal", "none yet: 'tink serve' makes it")
        yield ok("clock", "nothing to compare it with yet")
        return
    try:
        with open_snapshot(journal) as connection:
            found = revisions.look(connection, "journal")
            if problem := found.problem(journal.place):
                told = warning if found.kind in ("none", "older") else wrong  # a start upgrades it
                yield told("journal", *problem)
                return
            count, newest = queries.count_events(connection), queries.newest_event_at(connection)
    except StartupError as error:
        yield wrong("journal", str(error), "tink db check, and restore a backup if it finds damage")
        return
    yield ok("journal", f"{count:,} events in {journal.place}")
    behind = 0.0 if newest is None else newest - world.now()
    if behind > CLOCK_SLACK_SECONDS:
        yield wrong(
            "clock", f"it is {behind:.0f} s behind the journal's newest event", "timedatectl set-ntp true"
        )
    else:
        yield ok("clock", "not behind the journal")


def versions() -> Finding:
    found = {"tink": tink.__version__, "python": platform.python_version()}
    for name in SHOWN:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    detail = ", ".join(f"{name} {number}" for name, number in found.items())
    if not f"{found.get('tinker', SDK)}.".startswith(f"{SDK}."):
        return warning(
            "versions",
            detail,
            f"Tink is tested with tinker {SDK}: pip install 'tinker~={SDK}.0'",
        )
    return ok("versions", detail)


def port(settings: Settings, world: World) -> Finding:
    """Where no worker runs that has it."""
    where = f"{settings.host}:{settings.port}"
    try:
        with world.listen(settings.host, settings.port):
            return ok("port", f"{where} is free")
    except StartupError as error:
        return wrong("port", str(error), "end who has it, or set TINK_PORT")


def _first_that_is_there(folder: Path) -> Path:
    return next((one for one in (folder, *folder.parents) if one.is_dir()), Path("/"))


def _file_system(folder: Path) -> str:
    """The kind that Linux says; empty elsewhere."""
    found, longest = "", -1
    try:
        mounts = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return ""
    for line in mounts:
        _, place, kind, *_ = line.split(" ")
        place = place.replace("\\040", " ")
        if folder.resolve().is_relative_to(place) and len(place) >= longest:
            found, longest = kind, len(place)
    return found
