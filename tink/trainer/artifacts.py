"""Directories of files that are published whole or not at all, with a manifest of their hashes.

The worker, the trainer and the vLLM hosts see one artifact folder; operations name directories in it
by relative paths. A directory is written under `.tmp/`, synced, and renamed into place, so that a
path either has everything or does not exist; it is never changed afterwards. Its `manifest.json` says
which operation made it (`origin`), what it holds (`about`) and the sha256 of every file.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Any

from tink import crash, files, manifest
from tink.domain import ids
from tink.errors import BackendError, NotFound, UserError
from tink.manifest import Manifest
from tink.wire.tink_train import File


class Artifacts:
    """The folder. `writer` makes names under `.tmp/` this process's own: its incarnation. What a process
    that has died left there is removed by the worker."""

    def __init__(self, root: Path, writer: str) -> None:
        self.root = root.resolve()
        self._scratch = self.root / ids.SCRATCH
        self._names = (f"{writer}-{number}" for number in count())

    def locate(self, path: str) -> Path:
        """Where a relative path leads. UserError if it could lead out of the folder, by its spelling
        or through a symbolic link."""
        pure = PurePosixPath(path)
        if not pure.parts or pure.is_absolute() or ".." in pure.parts or "\0" in path:
            raise UserError(f"{path!r} is not a relative path inside the artifact folder")
        target = self.root / pure
        if not target.resolve().is_relative_to(self.root) or target.is_relative_to(self._scratch):
            raise UserError(f"{path!r} leads out of the artifact folder")
        return target

    def publish(
        self, path: str, origin: str, about: dict[str, Any], fill: Callable[[Path], None]
    ) -> list[File]:
        """Makes the directory `path` of what `fill` writes into an empty one. When `path` exists and
        was made by the same origin (a redo after a crash), it is left as it is: others may have it
        open. Made by another origin it is an error, and nothing is written."""
        target = self.locate(path)
        if target.exists():
            there = manifest.read(target)
            if there.origin == origin:
                # Whoever published it may have been killed before the names were synced.
                files.sync_names(target, self.root)
                return there.files
            raise BackendError(f"{path} exists already, made by {there.origin}")
        scratch = self._scratch / next(self._names)
        scratch.mkdir(parents=True)
        try:
            fill(scratch)
            made = manifest.write(scratch, origin, about)
            files.sync_tree(scratch)
            target.parent.mkdir(parents=True, exist_ok=True)
            crash.point("trainer.synced")
            scratch.rename(target)
            files.sync_names(target, self.root)
            crash.point("trainer.renamed")
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        return made.files

    def open(self, path: str) -> tuple[Path, Manifest]:
        """A published directory, every file of which has its size and hash. NotFound if there is
        none; BackendError if it is not what was published."""
        target = self.locate(path)
        if not target.is_dir():
            raise NotFound(f"{path} is not in the artifact folder of this trainer")
        return target, manifest.check(target)
