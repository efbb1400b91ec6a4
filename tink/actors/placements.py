"""Which server has which adapter version, as the journal tells it. For people: nothing is decided by it,
for a server is asked itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from typing import Literal

from tink.domain import rows
from tink.domain.events import AdapterExported, AdapterPlaced, Entry, Record, Subject
from tink.journal import queries
from tink.journal.journal import Journal

# The one that samples where there is no vLLM, from the artifact folder.
TRAINER = "trainer"

State = Literal["loaded", "refused", "gone"]


def entry(adapter: rows.Adapter, replica: str, state: State, reason: str = "") -> Entry:
    return rows.about(adapter, replica=replica), AdapterPlaced(state=state, reason=reason or None)


def gone(subject: Subject) -> Entry:
    return subject, AdapterPlaced(state="gone")


class Placements:
    """What is journaled as loaded, kept up with each commit. `exported`: versions made since the start."""

    def __init__(self) -> None:
        self._loaded: defaultdict[str, dict[str, Subject]] = defaultdict(dict)
        self.exported = 0

    @classmethod
    async def follow(cls, journal: Journal, servers: Collection[str]) -> Placements:
        """At the start: what was on servers that are not in use any more is on them no more; and what
        lives, the trainer can sample, if it is among them."""
        placements = cls()
        for adapter, replica in await journal.read(queries.placements):
            subject, _ = entry(adapter, replica, "loaded")
            placements._loaded[replica][adapter.adapter_id] = subject
        journal.present.observers.append(placements._observe)
        left = [replica for replica in placements._loaded if replica not in servers]
        entries = [gone(subject) for replica in left for subject in placements.of(replica).values()]
        if TRAINER in servers:
            live = journal.ledger.adapters.values()
            entries += [
                entry(adapter, TRAINER, "loaded")
                for adapter in live
                if adapter.state == "live" and adapter.adapter_id not in placements.of(TRAINER)
            ]
        if entries:
            await journal.append(*entries)
        return placements

    def of(self, replica: str) -> dict[str, Subject]:
        """The versions on it, and whom their events are about."""
        return self._loaded[replica]

    def _observe(self, record: Record) -> None:
        match record.event:
            case AdapterExported():
                self.exported += 1
            case AdapterPlaced(state=state):
                who = Subject(
                    tenant=record.subject.tenant,
                    model_id=record.subject.model_id,
                    adapter_id=record.subject.adapter_id,
                    replica=record.subject.replica,
                )
                placed = self._loaded[str(who.replica)]
                placed.pop(str(who.adapter_id), None)
                if state == "loaded":
                    placed[str(who.adapter_id)] = who
