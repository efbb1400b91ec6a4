"""A bundle: one file with all that a replay of a model needs, to be taken to another machine.

A tar archive, compressed with zstandard. `bundle.json` says what is in it; the rest is a home that has only
this model: its events as they were written, with their hashes; their tables; the bodies that they name; and
the published states that the model has loaded. The base model is not in it, but named with its digest.
"""

from __future__ import annotations

import os
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import zstandard

import tink
from tink import manifest
from tink.domain.events import JobAccepted, TrainerStarted
from tink.domain.requests import OpName
from tink.errors import UNREADABLE, StartupError, UserError
from tink.home import Home
from tink.journal import chain, copies, queries, revisions, store
from tink.journal.bodies import decompressed
from tink.journal.journal import prepare
from tink.journal.recording import Recording, open_recording
from tink.limits import BUNDLE_LEVEL
from tink.replay.shapes import Part, shape

FORMAT = "tink-bundle/1"
# Of a redacted bundle, a line for each body.
SHAPES = "shapes.jsonl"
PARTS: dict[str, Part] = {"body_sha256": "request", "result_sha256": "result"}


class About(msgspec.Struct, frozen=True, kw_only=True):
    """`before`: for each event whose predecessor is left out, by its number, the predecessor's hash (hex):
    so every event of the bundle can be held against its own. `pruned`: of the bodies that its events name,
    those that were not there any more."""

    format: str
    version: str
    revision: str
    model_id: str
    exported_at: float
    head: str
    redacted: bool
    events: int
    bodies: int
    pruned: int
    directories: list[str]
    trainer: TrainerStarted | None
    before: dict[int, str]


def write(home: Home, artifacts: Path, model_id: str, file: Path, *, redact: bool, now: float) -> About:
    """Exports a model into `file`, whole or not at all. Blocks. UserError for a model that is not there,
    and for a file that is; StartupError for what cannot be read or written."""
    if file.exists():
        raise UserError(f"{file} is there already: name another file, or delete it")
    try:
        with (
            open_recording(home) as recording,
            tempfile.TemporaryDirectory(prefix=".tink-export-", dir=_folder(file)) as folder,
        ):
            return _write(recording, artifacts, model_id, file, Path(folder), redact=redact, now=now)
    except LookupError as error:
        raise StartupError(f"{home.root} is damaged: {error}; 'tink db check' tells more") from error
    except OSError as error:
        raise StartupError(f"{file} cannot be written: {error.strerror or error}") from error


def _write(
    recording: Recording,
    artifacts: Path,
    model_id: str,
    file: Path,
    scratch: Path,
    *,
    redact: bool,
    now: float,
) -> About:
    if queries.model(recording.journal, model_id) is None:
        raise UserError(f"there is no model {model_id} in this journal: 'tink status' lists them")
    made = Home(scratch / "home")
    made.make()
    prepare(made)
    events = _Events(recording, model_id)
    with copies.write_part(made) as part:
        part.events(events)
        stored = sorted(recording.stored(events.named))
        if redact:
            _write_shapes(recording, made, {digest: events.named[digest] for digest in stored})
        else:
            part.bodies((digest, recording.body(digest)) for digest in stored)
    directories = _directories(recording, artifacts, model_id)
    about = About(
        format=FORMAT,
        version=tink.__version__,
        revision=revisions.HEADS["journal"],
        model_id=model_id,
        exported_at=now,
        head=str(chain.head(recording.journal)),
        redacted=redact,
        events=events.count,
        bodies=len(stored),
        pruned=len(events.named) - len(stored),
        directories=directories,
        trainer=store.last_trainer(recording.journal),
        before=events.before,
    )
    encoded = msgspec.json.format(msgspec.json.encode(about), indent=1)
    made.bundle.write_bytes(encoded + b"\n")
    _pack(made, artifacts, directories, scratch / "packed")
    os.link(scratch / "packed", file)  # not over one that has come meanwhile
    return about


@contextmanager
def opened(file: Path) -> Iterator[Home]:
    """The home that is in a bundle, in a folder of its own for as long as this is open. Blocks.
    StartupError, in one line, for what is no bundle, or one of another format or schema."""
    with tempfile.TemporaryDirectory(prefix="tink-bundle-") as folder:
        home = Home(Path(folder))
        try:
            with zstandard.open(file, "rb") as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
                archive.extractall(folder, filter="data")
        except (OSError, EOFError, tarfile.TarError, zstandard.ZstdError) as error:
            raise StartupError(f"{file} is no bundle of 'tink export': {error}") from error
        found = about(home)
        if found is None:
            raise StartupError(f"{file} is no bundle of 'tink export': it has no bundle.json")
        if found.revision != revisions.HEADS["journal"]:
            prepare(home)
        yield home


def about(home: Home) -> About | None:
    """What a home that came out of a bundle says of itself; None for any other home. StartupError for a
    bundle of another format."""
    try:
        content = home.bundle.read_bytes()
        kind = msgspec.json.decode(content, type=dict[str, Any])["format"]
        if kind != FORMAT:
            raise StartupError(f"the bundle has format {kind!r}: this Tink reads {FORMAT}")
        return msgspec.json.decode(content, type=About)
    except FileNotFoundError:
        return None
    except (KeyError, *UNREADABLE) as error:
        raise StartupError(f"the bundle.json cannot be read: {error}") from error


def broken(home: Home, found: About) -> Iterator[str]:
    """One line for each event of a bundle that is not what was written, as far as their hashes tell."""
    with open_recording(home) as recording:
        for _, _, problem in chain.walk(store.raw_events(recording.journal), found.before):
            if problem is not None:
                yield problem


# A body, what it is of a job, and how it is compressed.
Named = dict[str, tuple[OpName, Part, str]]


class _Events:
    """A model's, with what is to be known of them once all were read: how many there are, the hashes of
    predecessors that are left out, and the bodies that they name."""

    def __init__(self, recording: Recording, model_id: str) -> None:
        self._recording, self._model_id = recording, model_id
        self.count = 0
        self.before: dict[int, str] = {}
        self.named: Named = {}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        last, ops = 0, dict[str, OpName]()
        for row in store.raw_events(self._recording.journal, model=self._model_id):
            if row["seq"] != last + 1:
                self.before[row["seq"]] = chain.hash_of(self._recording.journal, row["seq"] - 1).hex()
            last = row["seq"]
            self.count += 1
            event, job_id = store.decoded(row).event, row["job_id"]
            if isinstance(event, JobAccepted):
                ops[job_id] = event.op
            for name, part in PARTS.items():
                digest: str | None = getattr(event, name, None)
                if digest is not None:
                    self.named[digest] = ops[job_id], part, getattr(event, "codec", "identity")
            yield row


def _write_shapes(recording: Recording, made: Home, named: Named) -> None:
    with (made.root / SHAPES).open("wb") as file:
        for digest, (op, part, codec) in named.items():
            content = decompressed(recording.body(digest), codec)
            found = {"sha256": digest, "op": op, "part": part, "bytes": len(content)}
            file.write(msgspec.json.encode({**found, "shape": shape(content, op, part)}) + b"\n")


def _directories(recording: Recording, artifacts: Path, model_id: str) -> list[str]:
    """What a replay of the model reads of the artifacts: the states that it loaded, and its snapshots."""
    loads = [load.directory for load in queries.loads(recording.journal) if load.model_id == model_id]
    snapshots = [one.directory for one in queries.snapshots(recording.journal, model_id)]
    found = dict.fromkeys(loads + snapshots)
    return [directory for directory in found if manifest.present(artifacts, directory)]


def _pack(made: Home, artifacts: Path, directories: list[str], file: Path) -> None:
    with (
        zstandard.open(file, "wb", cctx=zstandard.ZstdCompressor(level=BUNDLE_LEVEL)) as stream,
        tarfile.open(fileobj=stream, mode="w|") as archive,
    ):
        for path in (made.bundle, made.journal, made.bodies, made.root / SHAPES):
            if path.exists():
                archive.add(path, path.name, filter=_anonymous)
        for directory in directories:
            try:
                archive.add(artifacts / directory, f"artifacts/{directory}", filter=_anonymous)
            except OSError as error:
                if error.filename is None:  # it is not the source
                    raise
                raise StartupError(
                    f"{error.filename} cannot be read: {error.strerror}; if its checkpoint was deleted "
                    "meanwhile, export once more"
                ) from error


def _anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without who wrote it, and when."""
    info.uid = info.gid = info.mtime = 0
    info.uname = info.gname = ""
    return info


def _folder(file: Path) -> Path:
    folder = file.resolve().parent
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder} to write {file.name} in")
    return folder
