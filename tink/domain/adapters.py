"""Adapter versions as sampling servers know them: by which name, and which ones a server should have."""

from __future__ import annotations

import hashlib

from tink.domain import retention, rows
from tink.domain.ledger import Ledger


def served_name(home_id: str, adapter: rows.Adapter) -> str:
    """What a server has the version as. No two workers' names are alike (`home_id`), and no two contents:
    vLLM's caches go by name, and a journal that was put back from a backup counts its versions again. Nor
    two directories: what a save that failed has left on a server is read from there until it is gone."""
    content = hashlib.sha256(repr((adapter.directory, sorted(adapter.files.items()))).encode()).hexdigest()
    return f"{prefix(home_id)}{adapter.adapter_id}-{content[:8]}"


def prefix(home_id: str) -> str:
    """Of every name of this home's adapters."""
    return f"tink/{home_id[:12]}/"


def wanted(ledger: Ledger) -> list[rows.Adapter]:
    """The versions that a server should have before it gets requests, the one that was made last at the
    end: the newest one of each model of an open session, and those that open jobs sample from. Any other
    is loaded when it is asked for."""
    sessions, models = ledger.sessions, ledger.models
    sampled = retention.sampled(ledger)
    found = []
    for adapter in ledger.adapters.values():
        model = models[(adapter.model_id,)]
        is_newest = adapter.version == model.versions and model.state != "removed"
        in_use = is_newest and sessions[(model.session_id,)].state == "open"
        if adapter.state == "live" and (in_use or adapter.adapter_id in sampled):
            found.append(adapter)
    return sorted(found, key=lambda adapter: adapter.created_at)


def needed(ledger: Ledger) -> set[str]:
    """The versions that may stay on a server which has them: the wanted ones, and those with a sampler of
    an open session; of a model that was unloaded only what was saved by name."""
    models, saved = ledger.models, retention.saved(ledger)
    found = {adapter.adapter_id for adapter in wanted(ledger)}
    for adapter in ledger.adapters.values():
        lasts = models[(adapter.model_id,)].state != "removed" or adapter.adapter_id in saved
        if adapter.state == "live" and lasts and any(ledger.samplers_of(adapter.adapter_id)):
            found.add(adapter.adapter_id)
    return found
