"""The manifest of a published directory: which operation made it, what it holds, and the sha256 of every
file. Training servers write it, and whoever opens the directory reads it. All functions block."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from tink.errors import UNREADABLE, BackendError, StartupError
from tink.wire.tink_train import File

FORMAT = "tink-artifact/1"
NAME = "manifest.json"


class Manifest(msgspec.Struct, frozen=True):
    format: str
    origin: str
    about: dict[str, Any]
    files: list[File]


def write(directory: Path, origin: str, about: dict[str, Any]) -> Manifest:
    """Of all the files that are in it."""
    made = Manifest(FORMAT, origin, about, [_describe(file) for file in sorted(directory.iterdir())])
    encoded = msgspec.json.format(msgspec.json.encode(made), indent=1)
    (directory / NAME).write_bytes(encoded + b"\n")
    return made


def read(directory: Path) -> Manifest:
    """BackendError if there is none that can be read."""
    try:
        manifest = msgspec.json.decode((directory / NAME).read_bytes(), type=Manifest)
    except (OSError, *UNREADABLE) as error:
        raise BackendError(f"{directory} has no readable {NAME}: {error}") from error
    if manifest.format != FORMAT or any("/" in file.name for file in manifest.files):
        raise BackendError(f"{directory} is not a {FORMAT} directory")
    return manifest


def check(directory: Path) -> Manifest:
    """Read, and every file has its size and hash; else BackendError."""
    manifest = read(directory)
    for file in manifest.files:
        path = directory / file.name
        if not path.is_file() or _describe(path) != file:
            raise BackendError(f"{path} is damaged: it is not what was published")
    return manifest


def present(artifacts: Path, directory: str) -> bool:
    """Whether something is published there."""
    return (artifacts / directory / NAME).is_file()


def copy(source: Path, directories: Iterable[str], target: Path) -> None:
    """What was published in one artifact folder, into another. StartupError if it cannot be."""
    for directory in directories:
        if present(target, directory):
            continue
        try:
            shutil.copytree(source / directory, target / directory, dirs_exist_ok=True)
        except (OSError, shutil.Error) as error:
            raise StartupError(f"{source / directory} cannot be copied: {error}") from error


def _describe(file: Path) -> File:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return File(file.name, file.stat().st_size, digest)
