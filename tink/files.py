"""What must still be there after a power cut. A file's content is on the disk once the file is synced, a
name once its folder is: so something is written under another name, synced, renamed, and its new name
synced. All functions block; they raise OSError."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def sync(path: Path) -> None:
    """A file's content, or a folder's names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Everything in it, and its own names."""
    for path, _folders, names in os.walk(folder):
        for name in names:
            sync(Path(path, name))
        sync(Path(path))


def sync_names(path: Path, top: Path | None = None) -> None:
    """The names that lead to `path`, from that of `top` (or of all that may be opened) on. Not only of
    what this process has made: who made the rest may have been killed before it was synced."""
    for folder in path.parents:
        with contextlib.suppress(PermissionError):
            sync(folder)
        if top is not None and not folder.is_relative_to(top):
            break


def write(path: Path, content: bytes) -> None:
    """Makes a file or replaces its content, whole or not at all. It is its owner's alone. Its name is
    still to be synced."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    handle = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(handle)
    scratch.replace(path)
