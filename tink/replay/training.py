"""Which of a model's operations are sent again to reach one of its optimizer steps, and what is changed in
them if it is asked "what if". Pure: what was journaled and what is still there comes in, a schedule goes
out."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Self

import msgspec

from tink.domain import plans, requests, rows
from tink.domain.ledger import Ledger
from tink.errors import UserError
from tink.limits import NAMED
from tink.wire import tink_train

OPTIMIZER = tink_train.OptimStep.__struct_fields__
_CHANGE = re.compile(r"(?:(?P<step>\d+):)?(?P<name>\w+)=(?P<value>.+)")


class Change(msgspec.Struct, frozen=True):
    """Another value of a parameter of the optimizer, in one step or (None) in each."""

    name: str
    value: float
    step: int | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """`NAME=VALUE` or `STEP:NAME=VALUE`. ValueError for anything else."""
        found = _CHANGE.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is not NAME=VALUE or STEP:NAME=VALUE")
        if found["name"] not in OPTIMIZER:
            raise ValueError(
                f"{found['name']!r} is no parameter of the optimizer: {', '.join(OPTIMIZER)} are"
            )
        value = float(found["value"])
        if not math.isfinite(value):
            raise ValueError(f"{found['name']} cannot be {value}")
        return cls(found["name"], value, None if found["step"] is None else int(found["step"]))


class Edits(msgspec.Struct, frozen=True):
    """What is not done as it was. With none the replay is what happened, and is compared with it."""

    changes: tuple[Change, ...] = ()
    drops: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.changes or self.drops)

    def said(self) -> Iterator[str]:
        """In words."""
        for change in self.changes:
            where = "every step" if change.step is None else f"step {change.step}"
            yield f"{change.name} {change.value:g} in {where}"
        for job_id in sorted(self.drops):
            yield f"without {job_id}"

    def optimizer(self, step: int, body: bytes) -> bytes:
        """The request of an optimizer step, changed."""
        changed = {change.name: change.value for change in self.changes if change.step in (None, step)}
        if not changed:
            return body
        request = requests.decode(body, requests.OptimStep)
        adam = msgspec.structs.replace(request.adam_params or requests.AdamParams(), **changed)
        return msgspec.json.encode(msgspec.structs.replace(request, adam_params=adam))


UNCHANGED = Edits()


class Turn(msgspec.Struct, frozen=True):
    """One operation number. `step`: of the optimizer, that it leads to or is. `filler`: why the number is
    only consumed; None: the job is done again."""

    job: rows.Job
    op_no: int
    step: int
    filler: str | None = None

    def operation(self, body: bytes, ledger: Ledger, edits: Edits) -> tink_train.Op:
        """What is sent: as a redo would send it, and `forward` too, which a redo leaves out. `ledger` has
        the model. UserError for a change of the optimizer that cannot be."""
        if self.filler is not None:
            return tink_train.Skip()
        if self.job.op == "forward":
            return tink_train.Forward(body)
        if self.job.op == "optim_step":
            body = edits.optimizer(self.step, body)
        return plans.again(self.job, body, ledger)


class Schedule(msgspec.Struct, frozen=True):
    """`turns` in order, without a gap, up to operation `last`, which is the `step`-th of the model's
    `steps` optimizer steps. They begin behind `start`, which has `begun` of them (None: with the first
    operation); `because`: why. `export`: the job that exported the weights which the last turn leaves, if
    one did."""

    model_id: str
    turns: tuple[Turn, ...]
    last: int
    step: int
    steps: int
    begun: int
    edits: Edits = UNCHANGED
    start: rows.Snapshot | None = None
    because: str | None = None
    export: str | None = None

    @property
    def directories(self) -> list[str]:
        """What it reads of the run's artifacts."""
        starts = [] if self.start is None else [self.start.directory]
        loads = (t.job.directory for t in self.turns if t.filler is None and t.job.op == "load_weights")
        return list(dict.fromkeys([*starts, *(directory for directory in loads if directory is not None)]))


def schedule(
    jobs: Sequence[rows.Job],
    snapshots: Sequence[rows.Snapshot],
    lost: Mapping[str, str],
    *,
    model_id: str,
    to: int | None = None,
    from_start: bool = False,
    edits: Edits = UNCHANGED,
) -> Schedule:
    """`jobs`: all of the model that have a number, in order. `snapshots`: those that can be used, the
    oldest first. `lost`: by job, what of it is not there any more. `to`: the optimizer step, None for the
    last.

    Where something is lost that is needed, it begins with the first snapshot that covers it, unless
    `from_start`. UserError, in one line, for what cannot be replayed."""
    turns = _turns(jobs, lost, edits)
    steps = steps_of(jobs)
    if to is None:
        to = steps
    if not 1 <= to <= steps:
        has = f"{steps} optimizer step{'s' * (steps != 1)}" if steps else "no optimizer step that was done"
        raise UserError(f"the model {model_id} has {has}: it cannot be replayed to step {to or 1}")
    end = next(index for index, turn in enumerate(turns, 1) if turn.step == to and _steps(turn.job))
    needed = turns[:end]
    last = needed[-1].op_no
    missing = [turn for turn in needed if turn.filler is None and turn.job.job_id in lost]
    start = because = None
    if missing:
        because = _why(missing, lost)
        start = next((s for s in snapshots if missing[-1].op_no <= s.op_no <= last), None)
        if start is None or from_start:
            rest = "no snapshot covers that" if start is None else "leave --from-start out"
            raise UserError(f"the model {model_id} cannot be replayed to step {to}: {because}; {rest}")
        needed = [turn for turn in needed if turn.op_no > start.op_no]
    begun = needed[0].step - 1 if needed else to
    _check(edits, needed, range(begun + 1, to + 1))
    return Schedule(
        model_id=model_id,
        turns=tuple(needed),
        last=last,
        step=to,
        steps=steps,
        begun=begun,
        edits=edits,
        start=start,
        because=because,
        export=None if edits else _export(turns[end:]),
    )


def steps_of(jobs: Sequence[rows.Job]) -> int:
    """How many optimizer steps they made."""
    return sum(_steps(job) for job in jobs)


def _turns(jobs: Sequence[rows.Job], lost: Mapping[str, str], edits: Edits) -> list[Turn]:
    turns, step = [], 1
    for expected, job in enumerate(jobs, 1):
        if job.op_no != expected:
            raise UserError(
                f"the journal has no operation {expected} of {job.model_id}: 'tink db check' tells more"
            )
        turns.append(Turn(job, expected, step, _filler(job, lost, edits)))
        step += _steps(job)
    return turns


def _steps(job: rows.Job) -> bool:
    return job.op == "optim_step" and job.state == "done"


def _filler(job: rows.Job, lost: Mapping[str, str], edits: Edits) -> str | None:
    if job.job_id in edits.drops:
        return "dropped"
    if job.state != "done":
        return job.state
    if job.op == "forward":  # it changes nothing: the rest can do without
        return lost.get(job.job_id)
    return None if job.op in requests.MUTATING else "changes nothing"


def _export(behind: Sequence[Turn]) -> str | None:
    """The first that exported the weights before anything changed them."""
    for turn in behind:
        if turn.job.state != "done":
            continue
        if turn.job.op == "save_weights_for_sampler":
            return turn.job.job_id
        if turn.job.op in ("optim_step", "load_weights"):
            break
    return None


def _why(missing: Sequence[Turn], lost: Mapping[str, str]) -> str:
    named = "; ".join(f"{turn.job.job_id}: {lost[turn.job.job_id]}" for turn in missing[:NAMED])
    more = len(missing) - NAMED
    return named if more <= 0 else f"{named}; and {more} more"


def _check(edits: Edits, turns: Sequence[Turn], steps: range) -> None:
    """What is not replayed, and what a snapshot has in it already, is as it was."""
    unknown = edits.drops - {turn.job.job_id for turn in turns}
    if unknown:
        raise UserError(f"{min(unknown)} is none of the operations that are replayed: it cannot be dropped")
    if edits.drops and turns[0].op_no == 1 and turns[0].filler == "dropped":
        raise UserError(f"{turns[0].job.job_id} makes the model: it cannot be dropped")
    for change in edits.changes:
        if change.step is not None and change.step not in steps:
            raise UserError(
                f"optimizer step {change.step} is not replayed: {steps.start} to {steps.stop - 1} are"
            )
