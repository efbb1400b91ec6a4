"""The artifact folder as the worker sees it. Training servers publish directories in it, whole or not at
all; the worker takes them away, whole or not at all, and never one that somebody is about to use."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import stat
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import structlog
import trio

from tink import crash, files, manifest
from tink.domain import ids, rows
from tink.errors import BackendError, NotFound
from tink.limits import FORK_LEFT_SECONDS
from tink.world import World

# A directory on its way out, under the scratch folder.
REMOVED = "removed-"

_NAME = re.compile(r"(\d{8,})-[a-z_]+(?:-[0-9a-f]{32})?")

log = structlog.get_logger()


class _Stamp(NamedTuple):
    """Of a file: whoever writes to it changes it."""

    size: int
    changed_ns: int
    inode: int


class ArtifactFolder:
    """Directories are named relative to `root`, as in the journal."""

    def __init__(self, root: Path, world: World) -> None:
        self.root, self._world = root, world
        self._scratch = root / ids.SCRATCH
        self._used: Counter[str] = Counter()
        self._going: set[str] = set()
        # Files whose hash was right, as they were then.
        self._checked: dict[str, dict[str, _Stamp]] = {}

    @contextmanager
    def use(self, directory: str | None) -> Iterator[None]:
        """Around the time in which a directory is read or written and the journal does not say so yet: it
        is not removed meanwhile. BackendError if it is being removed just now. None: there is none."""
        if directory is None:
            yield
            return
        if directory in self._going:
            raise BackendError(f"{directory} is left over from before, and is being removed: try again")
        self._used[directory] += 1
        try:
            yield
        finally:
            self._used[directory] -= 1
            if not self._used[directory]:
                del self._used[directory]

    @property
    def used(self) -> set[str]:
        return set(self._used)

    async def models(self) -> list[str]:
        """The models that have a folder, whosever they are."""

        def look() -> list[str]:
            return [
                ids.model_id(session, int(number))
                for session in _names(self.root)
                if ids.is_session(session)
                for number in _names(self.root / session)
                if number.isdecimal()
            ]

        return await self._world.run_sync(look)

    async def published(self, models: Collection[rows.Model]) -> list[str]:
        """The directories that operations of these models have made. Nothing else in the folder, which
        others may use too, is anybody's business: nor what has a number that a model has not come to, for
        a journal that knows more than this one must have it."""

        def look() -> list[str]:
            found = []
            for model in models:
                parent = ids.model_directory(model.model_id)
                for name in _names(self.root / parent):
                    match = _NAME.fullmatch(name)
                    if match is not None and int(match[1]) <= model.op_no:
                        found.append(f"{parent}/{name}")
            return found

        return await self._world.run_sync(look)

    async def files(self, directory: str) -> dict[str, int] | None:
        """The files of a published directory and their sizes in bytes; None if it is not there."""

        def look() -> dict[str, int] | None:
            try:
                entries = sorted((self.root / directory).iterdir())
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
            except OSError:
                return None

        return await self._world.run_sync(look)

    async def check(self, directory: str, files: Mapping[str, str]) -> None:
        """Raises BackendError if a published directory does not have these files (name -> sha256) any more.
        What was right is read again only if it was written to since."""

        known = self._checked.get(directory, {})
        self._checked[directory] = await self._world.run_sync(_check, self.root / directory, files, known)

    async def adopt(self, scratch: str, directory: str) -> int:
        """Publishes what lies in the scratch folder under the name `scratch`, complete and with a manifest.
        A repeat finds it published. Returns its size in bytes. NotFound if it is in neither place;
        BackendError if it is not what was written. `use` has to be around it."""
        return await self._world.run_sync(_adopt, self.root, self._scratch / scratch, directory)

    async def remove(self, directory: str) -> bool:
        """Removes a directory that nothing in the journal needs; False if it cannot be, or somebody is
        using it. It is renamed first: whatever dies meanwhile, it is there whole or not at all."""
        if directory in self._used or directory in self._going:
            await trio.lowlevel.checkpoint()
            return False
        self._going.add(directory)
        self._checked.pop(directory, None)
        try:
            removed = self._scratch / f"{REMOVED}{self._world.new_id()}"
            return await self._world.run_sync(_remove, self.root / directory, removed)
        finally:
            self._going.discard(directory)

    async def remove_empty(self, folders: Collection[str]) -> None:
        """Those of them in which there is nothing."""

        def remove() -> None:
            for folder in folders:
                with contextlib.suppress(OSError):
                    (self.root / folder).rmdir()

        await self._world.run_sync(remove)

    async def unfinished(self, dead: Collection[str]) -> list[str]:
        """What is left under the scratch folder of removals that were cut short, of forks that nobody has
        come for, and of training servers whose incarnations are `dead`. A server of another worker is not
        among them."""
        past = self._world.now() - FORK_LEFT_SECONDS

        def look() -> list[str]:
            return [
                f"{ids.SCRATCH}/{name}"
                for name in _names(self._scratch)
                if name.startswith(REMOVED)
                or name.rpartition("-")[0] in dead
                or (name.startswith(ids.FORK) and _older(self._scratch / name, past))
            ]

        return await self._world.run_sync(look)

    async def clear(self, unfinished: str) -> None:
        """Removes one of these."""
        await self._world.run_sync(partial(shutil.rmtree, self.root / unfinished, ignore_errors=True))

    async def size(self, directory: str) -> int:
        """Bytes, of all that is in it; 0 if it is not there."""

        def look() -> int:
            # Who else removes it meanwhile is no trouble to os.walk.
            found = os.walk(self.root / directory)
            return sum(_size(Path(folder) / name) for folder, _, names in found for name in names)

        return await self._world.run_sync(look)


def _check(directory: Path, files: Mapping[str, str], known: Mapping[str, _Stamp]) -> dict[str, _Stamp]:
    """The files as they are, once each has its hash; those that are as `known` have."""
    stamps = {}
    for name, digest in files.items():
        path = directory / name
        try:
            stat = path.stat()
            stamps[name] = _Stamp(stat.st_size, stat.st_mtime_ns, stat.st_ino)
            if known.get(name) == stamps[name]:
                continue
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise BackendError(f"{path} cannot be read: {error.strerror}") from error
        if found != digest:
            raise BackendError(f"{path} is damaged: it is not what was published")
    return stamps


def _adopt(root: Path, scratch: Path, directory: str) -> int:
    target = root / directory
    if not target.is_dir():
        if not scratch.is_dir():
            raise NotFound(f"{scratch} is not there: is that the artifact folder of this worker?")
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch.rename(target)
    crash.point("worker.adopted")
    files.sync_names(target, root)
    return sum(file.size for file in manifest.check(target).files)


def _remove(directory: Path, removed: Path) -> bool:
    try:
        removed.parent.mkdir(parents=True, exist_ok=True)
        directory.rename(removed)
    except FileNotFoundError:
        return False
    except OSError as error:
        log.warning("directory not removed", directory=str(directory), reason=str(error))
        return False
    crash.point("worker.removing")
    shutil.rmtree(removed, ignore_errors=True)
    return True


def _size(path: Path) -> int:
    try:
        found = path.lstat()
    except OSError:  # it has gone meanwhile
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else 0


def _older(path: Path, than: float) -> bool:
    try:
        return path.stat().st_mtime < than
    except OSError:
        return False


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:  # not there (yet)
        return []
