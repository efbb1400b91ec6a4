"""The adapter that a replay has come to, as a directory of the user's own, in PEFT's format."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from tink import files
from tink.errors import StartupError
from tink.wire.tink_train import File


def check_free(target: Path, home: Path) -> None:
    """StartupError if a directory cannot be made there, or something is there already."""
    if target.is_relative_to(home.resolve()):
        raise StartupError(f"--output {target} is in the home {home}, where a replay writes nothing")
    if target.exists() and not target.is_dir():
        raise StartupError(f"--output {target} is a file: name a new directory")
    if target.is_dir() and any(target.iterdir()):
        raise StartupError(f"--output {target} is not empty: name a new directory")
    if not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
        raise StartupError(f"--output {target}: {target.parent} is no folder that can be written")


def publish(source: Path, names: Iterable[str], target: Path) -> None:
    """Copies these files: all are there, and synced, or `target` is as it was. Blocks. StartupError."""
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        scratch.mkdir()
        try:
            for name in names:
                shutil.copyfile(source / name, scratch / name)
            files.sync_tree(scratch)
            scratch.rename(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        files.sync_names(target)
    except OSError as error:
        raise StartupError(f"{target} cannot be written: {error.strerror or error}") from error


def others(recorded: Mapping[str, str], made: Iterable[File]) -> list[str]:
    """The files that are not those of a recorded export (name -> sha256)."""
    now = {file.name: file.sha256 for file in made}
    return sorted(name for name in recorded.keys() | now.keys() if recorded.get(name) != now.get(name))
