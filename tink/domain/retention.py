"""What may go: which bodies, adapters and directories nothing needs any more. Pure: rows and times come
in, names come out; tink/actors/retention.py deletes what they name.

Everything here errs to one side: what is not known to be useless stays for the next pass. What has ended
may still be in the ledger, or not any more.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

from tink.domain import ids, rows
from tink.domain.ledger import Ledger
from tink.domain.requests import MUTATING
from tink.limits import LEAST_KEPT_SECONDS, SNAPSHOTS_KEPT

Spare = tuple[rows.Adapter, Literal["finished", "idle", "deleted", "removed"]]


class Kept(NamedTuple):
    """For how long what nothing needs stays at least, by kind, in seconds (inf: for ever). `requests`: of
    jobs, since they were last received: what a replay needs and no redo does. `results`: of jobs, since
    they ended: for the polls of their clients. `adapters`: samplers' weights, since their last request.
    `damaged`: snapshots, since they were found to be: for people."""

    requests: float
    results: float
    adapters: float
    damaged: float

    @classmethod
    def asked(cls, requests: float, *others: float) -> Kept:
        """The times that were asked for, but none that is too short for a client to notice what it has."""
        # A request that no redo needs is nobody's but a replay's: it may go at once.
        return cls(requests, *(max(seconds, LEAST_KEPT_SECONDS) for seconds in others))


class Cutoffs(NamedTuple):
    """Of each kind, what belongs to the time before is kept only if something needs it."""

    requests: float
    results: float
    adapters: float
    damaged: float

    @classmethod
    def at(cls, now: float, kept: Kept) -> Cutoffs:
        # For ever is since 1970: they are journaled, and JSON has no infinity.
        return cls(*(max(0.0, now - seconds) for seconds in kept))

    @property
    def bodies(self) -> float:
        """A body that was stored later is no old request, and no old result."""
        return max(self.requests, self.results)


class Load(NamedTuple):
    """An operation that has put a saved state into a model."""

    model_id: str
    op_no: int
    directory: str


# States of models that are trained no more.
ENDED = frozenset({"failed", "removed"})

# -- redo -------------------------------------------------------------------------------------------


def covered(ledger: Ledger) -> dict[str, int]:
    """For each model that may be redone, the last operation that no redo applies again: the one in the
    oldest of the snapshots that are kept, for the newer one may turn out to be damaged; 0 as long as
    there are fewer."""
    taken: defaultdict[str, list[int]] = defaultdict(list)
    for snapshot in ledger.snapshots.values():
        if snapshot.state == "live":
            taken[snapshot.model_id].append(snapshot.op_no)
    return {
        model.model_id: sorted([0] * SNAPSHOTS_KEPT + taken[model.model_id])[-SNAPSHOTS_KEPT]
        for model in ledger.models.values()
        if model.state not in ENDED
    }


def may_be_redone(job: rows.Job, covers: Mapping[str, int]) -> bool:
    """Whether a redo could apply the job again. `covers` is what `covered` gave."""
    return (
        job.state == "done"
        and job.op in MUTATING
        and job.op_no is not None
        and job.op_no > covers.get(str(job.model_id), math.inf)
    )


# -- bodies -----------------------------------------------------------------------------------------


def bodies_needed(
    jobs: Iterable[rows.Job], stored_at: Mapping[str, float], covers: Mapping[str, int], cutoffs: Cutoffs
) -> set[str]:
    """The sha256 of each body that one of these jobs needs: as its request, which may have to be sent
    (again), or as its result, which its client may fetch (again). `stored_at`: of these bodies, when each
    was last received."""
    needed: set[str] = set()
    for job in jobs:
        if job.body_sha256 is not None and (
            job.state in rows.OPEN
            or max(job.submitted_at, stored_at.get(job.body_sha256, 0.0)) >= cutoffs.requests
            or may_be_redone(job, covers)
        ):
            needed.add(job.body_sha256)
        if job.result_sha256 is not None and (job.finished_at or 0.0) >= cutoffs.results:
            needed.add(job.result_sha256)
    return needed


# -- adapters ---------------------------------------------------------------------------------------


def quiet_samplers(ledger: Ledger, before: float, last_requests: Mapping[str, float]) -> list[str]:
    """The samplers that alone keep their version, and may have had no request since `before`, as far as
    `last_requests` (by sampler) tells: it is worth looking up when the last one was."""
    return [
        sampler.sampler_id
        for _, samplers in _unnamed(ledger)
        for sampler in samplers
        if last_requests.get(sampler.sampler_id, sampler.created_at) < before
    ]


def spare_adapters(ledger: Ledger, before: float, last_requests: Mapping[str, float]) -> Iterator[Spare]:
    """The live versions that nobody will sample from, and why. One with a live checkpoint or an open job
    stays, and so does, while its model is there, one that has a sampler of an open session with a request
    since `before`; a sampler that is not in `last_requests` counts as such."""
    made_for_one = {
        sampler.adapter_id for sampler in ledger.samplers.values() if sampler.model_path is None
    }
    models, sessions = ledger.models, ledger.sessions
    for adapter, samplers in _unnamed(ledger):
        if models[(adapter.model_id,)].state == "removed":
            yield adapter, "removed"
            continue
        if any(last_requests.get(sampler.sampler_id, math.inf) >= before for sampler in samplers):
            continue
        model = models[(adapter.model_id,)]
        if adapter.version == 0:  # what the model is registered with when it is made
            is_open = sessions[(model.session_id,)].state == "open"
            if not (is_open and model.versions == 0 and model.last_request_at >= before):
                yield adapter, "idle" if is_open else "finished"
            continue
        if adapter.adapter_id not in made_for_one:
            yield adapter, "deleted"
        else:
            yield adapter, "idle" if samplers else "finished"


def _unnamed(ledger: Ledger) -> Iterator[tuple[rows.Adapter, list[rows.Sampler]]]:
    """The live versions without a live checkpoint and an open job, with their samplers of open sessions."""
    used = sampled(ledger) | saved(ledger)
    for adapter in ledger.adapters.values():
        if adapter.state == "live" and adapter.adapter_id not in used:
            yield adapter, list(ledger.samplers_of(adapter.adapter_id))


def leaving(ledger: Ledger) -> bool:
    """Whether a live version waits for nothing but open jobs: its model was unloaded."""
    models, named = ledger.models, saved(ledger)
    return any(
        adapter.state == "live"
        and models[(adapter.model_id,)].state == "removed"
        and adapter.adapter_id not in named
        for adapter in ledger.adapters.values()
    )


def saved(ledger: Ledger) -> set[str]:
    """The versions that have a live checkpoint."""
    checkpoints = ledger.checkpoints.values()
    return {one.adapter_id for one in checkpoints if one.state == "live" and one.adapter_id is not None}


def sampled(ledger: Ledger) -> set[str]:
    """The versions that open jobs sample from."""
    samplers = ledger.samplers
    jobs = ledger.jobs.values()
    found = {
        samplers[(job.sampler_id,)].adapter_id
        for job in jobs
        if job.sampler_id is not None and job.state in rows.OPEN
    }
    return {adapter_id for adapter_id in found if adapter_id is not None}


# -- directories ------------------------------------------------------------------------------------


def directories_kept(ledger: Ledger) -> set[str]:
    """The directories that rows of the ledger need: of checkpoints, adapters and snapshots that live, and
    of open jobs. Not in the ledger is what a redo would load (`loads_needed`)."""
    models = ledger.models
    kept: set[str] = set()
    for job in ledger.jobs.values():
        if job.state in rows.OPEN and job.directory is not None:
            kept.add(job.directory)
        makes_a_model = job.op in ("create_model", "load_weights") and job.op_no is not None
        if job.state in rows.OPEN and makes_a_model:
            kept.add(ids.first_adapter(str(job.model_id), job.op_no or 0))
    for checkpoint in ledger.checkpoints.values():
        if checkpoint.state == "live":
            kept.add(checkpoint.directory)
    for adapter in ledger.adapters.values():
        if adapter.state == "live":
            kept.add(adapter.directory)
    for snapshot in ledger.snapshots.values():
        if snapshot.state == "live" and models[(snapshot.model_id,)].state not in ENDED:
            kept.add(snapshot.directory)
    return kept


def loads_needed(loads: Iterable[Load], covers: Mapping[str, int]) -> set[str]:
    """The directories of those loads that a redo could do again."""
    return {load.directory for load in loads if load.op_no > covers.get(load.model_id, math.inf)}
