"""Which server has which adapter version, as the journal tells it. For people: nothing is decided by it,
for a server is asked itself."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from tink.domain import rows
from tink.domain.events import AdapterPlaced, Subject
from tink.journal import upkeep
from tink.journal.journal import Entry, Journal

# The one that samples where there is no vLLM, from the artifact folder.
TRAINER = "trainer"


State = Literal["loaded", "refused", "gone"]


def entry(adapter: rows.Adapter, replica: str, state: State, reason: str = "") -> Entry:
    subject = Subject(
        tenant=adapter.tenant, model_id=adapter.model_id, adapter_id=adapter.adapter_id, replica=replica
    )
    return subject, AdapterPlaced(state=state, reason=reason or None)


async def settle(journal: Journal, servers: Collection[str]) -> None:
    """At the start: what was on servers that are not in use any more is on them no more; and what lives,
    the trainer can sample, if it is among them."""
    placed = await journal.read(upkeep.placements)
    entries = [entry(adapter, replica, "gone") for adapter, replica in placed if replica not in servers]
    if TRAINER in servers:
        has = {adapter.adapter_id for adapter, replica in placed if replica == TRAINER}
        live = journal.ledger.table("adapters", rows.Adapter).values()
        entries += [
            entry(adapter, TRAINER, "loaded")
            for adapter in live
            if adapter.state == "live" and adapter.adapter_id not in has
        ]
    if entries:
        await journal.append(*entries)
