"""What of the journal a worker need not have in memory: sessions, models and samplers that have come to
their end, once nothing that lives goes back to them. When somebody asks for one of them, it is read again.
Pure."""

from __future__ import annotations

from collections.abc import Container, Iterator

from tink.domain import messages, retention
from tink.domain.ledger import Ledger

# A table, and the id of a row there.
RowId = tuple[str, str]

_FIELDS = {"session_id": "sessions", "model_id": "models", "sampler_id": "samplers"}


def named(ask: messages.Question) -> list[RowId]:
    """The rows that a question is about, if they are there."""
    makes = isinstance(ask, messages.SubmitTraining) and ask.model_seq_id is not None
    found = ((table, getattr(ask, field, None)) for field, table in _FIELDS.items())
    return [(table, id_) for table, id_ in found if id_ is not None and not (makes and table == "models")]


def forgettable(ledger: Ledger, used: Container[RowId]) -> Iterator[RowId]:
    """What may go now, but for what is `used`. The ledger is a worker's: it has the jobs that are open, and
    the adapters, checkpoints and snapshots that live. (schema.py says the same in SQL.)"""
    sessions, adapters = ledger.sessions, ledger.adapters
    living = adapters.values(), ledger.checkpoints.values(), ledger.snapshots.values()
    needed = {row.model_id for table in living for row in table}
    needed.update(job.model_id for job in ledger.jobs.values() if job.model_id is not None)
    sampled = {job.sampler_id for job in ledger.jobs.values()}
    of_sessions: set[str] = set()
    for sampler in ledger.samplers.values():
        session = sessions.get((sampler.session_id,))
        if sampler.adapter_id is None:
            lasts = session is not None and session.state == "open"
        else:
            lasts = (sampler.adapter_id,) in adapters
        row_id = "samplers", sampler.sampler_id
        if lasts or sampler.sampler_id in sampled or row_id in used:
            of_sessions.add(sampler.session_id)
        else:
            yield row_id
    for model in ledger.models.values():
        row_id = "models", model.model_id
        if model.state not in retention.ENDED or model.model_id in needed or row_id in used:
            of_sessions.add(model.session_id)
        else:
            yield row_id
    for session in sessions.values():
        row_id = "sessions", session.session_id
        if not (session.state == "open" or session.session_id in of_sessions or row_id in used):
            yield row_id
