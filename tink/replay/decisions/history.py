"""What has to be known of a record before it is gone through: what its settings and servers were, as far as
its events tell, and what of it cannot be replayed."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from tink.actors.placements import TRAINER
from tink.domain import requests
from tink.domain.events import (
    AdapterExported,
    AdapterPlaced,
    Diverged,
    JobAccepted,
    JobFailed,
    JobStarted,
    ModelCreated,
    Record,
    SamplerCreated,
)
from tink.errors import UserError
from tink.journal.recording import Recording
from tink.replay.decisions.comparison import is_end

# What a trainer can take at most is nowhere but in its refusals.
_REFUSED_RANK = re.compile(r"rank -?\d+ cannot be used: 1 to (\d+) can")


@dataclass
class Settings:
    """Of one incarnation. `alpha`: of models whose clients named none. `vllm`: samples go to vLLM, and a
    new model's adapter with them."""

    alpha: float = 0.0
    vllm: bool = False


@dataclass
class History:
    """`base_model`: that of the samplers. `lost`: samples whose requests were pruned. `overtaken`: by a job
    that was given a number, the one with the number before it, if that was still on its way then."""

    events: int = 0
    jobs: int = 0
    max_rank: int = sys.maxsize
    base_model: str = ""
    lost: set[str] = field(default_factory=set)
    overtaken: dict[str, Record] = field(default_factory=dict)
    settings: dict[int, Settings] = field(default_factory=lambda: defaultdict(Settings))


def look(recording: Recording) -> History:
    """Goes through all of it once."""
    history = History()
    unnamed: set[str] = set()  # jobs that make models without an alpha
    numbered: dict[tuple[str, int], Record] = {}  # by model and number: those that the Router numbered
    for record in recording.records():
        history.events += 1
        job_id = str(record.subject.job_id)
        settings = history.settings[record.incarnation]
        match record.event:
            case JobAccepted() as accepted:
                history.jobs += 1
                if accepted.op == "sample":
                    if not recording.stored({str(accepted.body_sha256)}):
                        history.lost.add(job_id)
                    continue
                if accepted.op == "create_model" and not _names_alpha(accepted):
                    unnamed.add(job_id)
                model_id = str(record.subject.model_id)
                next_one = numbered.get((model_id, accepted.seq_id + 1))
                if accepted.key is not None and accepted.model_seq_id is None:
                    numbered[model_id, accepted.seq_id] = record
                elif next_one is not None and next_one.incarnation == record.incarnation:
                    history.overtaken[str(next_one.subject.job_id)] = record
            case ModelCreated(alpha=alpha) if job_id in unnamed:
                settings.alpha = alpha
            case AdapterExported(version=0):
                settings.vllm = True
            case AdapterPlaced(state="loaded") if record.subject.replica != TRAINER:
                settings.vllm = True
            case JobStarted(backend=backend) if backend != TRAINER:
                settings.vllm = True
            case SamplerCreated(base_model=base_model):
                history.base_model = history.base_model or base_model
            case JobFailed(error=error) if (refused := _REFUSED_RANK.fullmatch(error)) is not None:
                history.max_rank = int(refused[1])
    return history


def decisions(records: Iterable[Record]) -> Iterator[Sequence[Record]]:
    """The records, those together that were committed as one decision: the end of a job, and what comes
    with it; and its acceptance, if it began with that."""
    group: list[Record] = []
    for record in records:
        if group and not _belongs(record, group[0]):
            yield group
            group = []
        group.append(record)
    if group:
        yield group


def _belongs(record: Record, first: Record) -> bool:
    if isinstance(record.event, JobStarted):
        # What is begun later is begun by somebody who saw it accepted, in another commit.
        accepted = isinstance(first.event, JobAccepted) and first.subject.job_id == record.subject.job_id
        return accepted and first.at == record.at
    return (
        is_end(first.event)
        and first.subject.job_id == record.subject.job_id
        and first.incarnation == record.incarnation
        and not isinstance(record.event, Diverged)
    )


def _names_alpha(accepted: JobAccepted) -> bool:
    try:
        request = requests.decode((accepted.request or "").encode(), requests.CreateModel)
    except UserError:
        return True
    assert isinstance(request, requests.CreateModel)
    return request.lora_config.alpha is not None
