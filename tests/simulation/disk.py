"""What a power cut leaves of a folder that Python code writes to, by what POSIX promises and no more: a
file's content is on the disk as of its last fsync, and a folder's names as of its own. Everything since
then may be there or not, each name for itself.

    disk = Disk(root)
    with disk.recorded():
        ...                     # mkdir, write, fsync, rename, unlink
    for left in disk.cuts(rng, folder):
        ...                     # a copy of `root` as a cut at some moment may have left it
"""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

# The calls at which it looks what has changed; what is written between two of them is one change.
_CALLS = ("fsync", "mkdir", "rename", "replace", "unlink", "remove", "rmdir", "link")


class Killed(BaseException):
    """The process ends before the call that it was about to make."""


@dataclass
class State:
    """Names and contents, by numbers of files and folders: as a process sees them, and as synced."""

    names: dict[int, dict[str, int]] = field(default_factory=dict)
    contents: dict[int, bytes] = field(default_factory=dict)
    synced_names: dict[int, dict[str, int]] = field(default_factory=dict)
    synced_contents: dict[int, bytes] = field(default_factory=dict)


class Disk:
    """`states`: after each call. What is there at first is on the disk."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._numbers: dict[int, int] = {}
        self._count = 0
        self._now = State()
        self._look()
        self._now.synced_names = copy.deepcopy(self._now.names)
        self._now.synced_contents = dict(self._now.contents)
        self.states = [copy.deepcopy(self._now)]
        self.calls: list[str] = []
        self.syncs = 0

    @contextmanager
    def recorded(self, *, kill_at: int | None = None, without_sync: int | None = None) -> Iterator[None]:
        """`kill_at`: raises Killed instead of the call of that number. `without_sync`: the fsync of that
        number does nothing."""
        first = len(self.calls)

        def watched(name: str) -> Callable[..., Any]:
            really = getattr(os, name)

            def call(*args: Any, **kwargs: Any) -> Any:
                self._remember()
                if len(self.calls) - first == kill_at:
                    raise Killed
                self.calls.append(name)
                if name == "fsync":
                    number = self._numbers.get(os.fstat(args[0]).st_ino)
                    if number is not None:  # else it is beside the root
                        self.syncs += 1
                    if self.syncs - 1 != without_sync:
                        self._sync(number)
                    return None
                try:
                    return really(*args, **kwargs)
                finally:
                    self._remember()

            return call

        with pytest.MonkeyPatch.context() as patch:
            for name in _CALLS:
                patch.setattr(os, name, watched(name))
            yield
        self._remember()

    def cuts(self, rng: random.Random, folder: Path, *, last_only: bool = False) -> Iterator[Path]:
        """The root as it may be after a cut at each moment, or in the end: with nothing of what was not
        synced; with the names and not the contents; with all of it; and with some."""
        for number, state in enumerate(self.states[-1:] if last_only else self.states):
            for kind in ("synced", "names", "all", "some", "some"):
                target = folder / f"{number}-{kind}-{rng.getrandbits(64):x}"
                target.mkdir(parents=True)
                self._rebuild(state, self._numbers[self._root.stat().st_ino], target, kind, rng)
                yield target

    # -- looking ------------------------------------------------------------------------------------

    def _remember(self) -> None:
        self._look()
        self.states.append(copy.deepcopy(self._now))

    def _look(self) -> None:
        """Numbers of its own: the file system gives that of a dead file to the next one."""
        seen: dict[int, int] = {}
        names: dict[int, dict[str, int]] = {}
        contents: dict[int, bytes] = {}

        def number_of(path: Path) -> int:
            inode = path.stat().st_ino
            if inode not in seen:
                if inode not in self._numbers:
                    self._count += 1
                seen[inode] = self._numbers.get(inode, self._count)
            return seen[inode]

        for path, folders, files in os.walk(self._root):
            here = names.setdefault(number_of(Path(path)), {})
            for name in [*folders, *files]:
                here[name] = number_of(Path(path, name))
            for name in files:
                contents[here[name]] = Path(path, name).read_bytes()
        self._numbers = seen
        self._now.names, self._now.contents = names, contents

    def _sync(self, number: int | None) -> None:
        if number in self._now.contents:
            self._now.synced_contents[number] = self._now.contents[number]
        elif number in self._now.names:
            self._now.synced_names[number] = dict(self._now.names[number])
        self.states.append(copy.deepcopy(self._now))

    # -- after a cut --------------------------------------------------------------------------------

    def _rebuild(self, state: State, number: int, target: Path, kind: str, rng: random.Random) -> None:
        synced, now = state.synced_names.get(number, {}), state.names.get(number, {})
        for name in sorted(synced.keys() | now.keys()):
            kept = {"synced": synced, "names": now, "all": now}.get(kind) or rng.choice([synced, now])
            child = kept.get(name)
            if child is None:
                continue
            if child in state.contents or child in state.synced_contents:
                (target / name).write_bytes(self._content(state, child, kind, rng))
            else:
                (target / name).mkdir()
                self._rebuild(state, child, target / name, kind, rng)

    def _content(self, state: State, number: int, kind: str, rng: random.Random) -> bytes:
        synced = state.synced_contents.get(number, b"")
        now = state.contents.get(number, synced)
        if kind == "all":
            return now
        if kind == "some" and synced != now:
            return rng.choice([synced, now, now[: rng.randint(0, len(now))], bytes(len(now))])
        return synced
