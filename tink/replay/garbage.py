"""What retention takes from the disk, counted by kind; and the replays that end by it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

import msgspec

from tink.actors.retention import Directory, Gone
from tink.domain import ids, rows
from tink.journal import queries
from tink.journal.bodies import Stored
from tink.journal.recording import Recording
from tink.replay.reach import reach, remains


class Amount(msgspec.Struct):
    """`bytes`: of the bodies as they were received, or of the files."""

    count: int = 0
    bytes: int = 0

    def add(self, size: int) -> None:
        self.count += 1
        self.bytes += size


class Garbage(msgspec.Struct, kw_only=True):
    """`unnamed_...`: what no job or row names: it was left by a crash. `unfinished`: what was being written
    or removed when its process died. `expired`, `given_up`: the checkpoints and adapter versions that end
    with this; their files are counted above, if they go now."""

    requests: Amount = msgspec.field(default_factory=Amount)
    results: Amount = msgspec.field(default_factory=Amount)
    unnamed_bodies: Amount = msgspec.field(default_factory=Amount)
    adapters: Amount = msgspec.field(default_factory=Amount)
    checkpoints: Amount = msgspec.field(default_factory=Amount)
    snapshots: Amount = msgspec.field(default_factory=Amount)
    unnamed_directories: Amount = msgspec.field(default_factory=Amount)
    unfinished: Amount = msgspec.field(default_factory=Amount)
    expired: list[str] = []
    given_up: list[str] = []

    @property
    def amounts(self) -> dict[str, Amount]:
        found = {name: getattr(self, name) for name in self.__struct_fields__}
        return {name: amount for name, amount in found.items() if isinstance(amount, Amount)}


class Change(msgspec.Struct, frozen=True):
    """Of a model's replay. `now`, `then`: as Reach tells it, before and after. `because`: why not from the
    start, then."""

    model_id: str
    now: str
    then: str
    because: str | None


def sort(recording: Recording, gone: Collection[Gone]) -> Garbage:
    """Blocks. `recording`: of before it goes or after, for rows stay."""
    found = Garbage()
    requests, results = queries.named_bodies(
        recording.journal, [one.sha256 for one in gone if isinstance(one, Stored)]
    )
    tables = queries.named_directories(recording.journal)
    for one in gone:
        match one:
            case Stored(sha256=digest, size=size):
                result = found.results if digest in results else found.unnamed_bodies
                (found.requests if digest in requests else result).add(size)
            case Directory(name=name, size=size) if name.startswith(f"{ids.SCRATCH}/"):
                found.unfinished.add(size)
            case Directory(name=name, size=size):
                found.amounts.get(tables.get(name, ""), found.unnamed_directories).add(size)
            case rows.Checkpoint():
                found.expired.append(one.address)
            case rows.Adapter():
                found.given_up.append(one.adapter_id)
    return found


def changes(recording: Recording, artifacts: Path, gone: Iterable[Gone]) -> list[Change]:
    """The models of which a replay cannot begin where it could, once this has gone. Blocks.
    `recording`: of before it goes."""
    digests, directories = set[str](), set[str]()
    for one in gone:
        match one:
            case Stored():
                digests.add(one.sha256)
            case Directory():
                directories.add(one.name)
    without = digests | directories
    found = []
    for model_id in sorted(_touched(recording, digests, directories)):
        model = queries.model(recording.journal, model_id)
        assert model is not None, "its jobs refer to it"
        now = reach(model, remains(recording, artifacts, model))
        then = reach(model, remains(recording, artifacts, model, without=without))
        if now is not None and then is not None and then.told != now.told:
            found.append(Change(model_id, now.told, then.told, then.because))
    return found


def _touched(recording: Recording, digests: set[str], directories: set[str]) -> set[str]:
    """The models whose operations need one of these."""
    loads = queries.loads(recording.journal)
    found = {load.model_id for load in loads if load.directory in directories}
    found |= queries.trained_with(recording.journal, digests)
    return found | queries.snapshotted_in(recording.journal, directories)
