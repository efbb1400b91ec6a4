"""Which operations each model has had, and what a call about one deserves: the table of tink_train.

Pure bookkeeping: no IO, no clock, no ids. `decide` looks and answers; `accept`, `start`, `finish` and
the rest change the books, each in one step. The server (lanes.py) does what they say.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from tink.errors import TinkError, UserError
from tink.limits import TRAINER_AHEAD, TRAINER_KEPT, TRAINER_QUEUE, TRAINER_TOMBSTONES
from tink.wire.tink_train import (
    CreateModel,
    Failure,
    ModelState,
    OpReply,
    OpRequest,
    OpResult,
    Refusal,
    RemoveModel,
    Skip,
    State,
)


class Refused(Exception):
    """The call is answered with this status and Refusal; nothing was changed."""

    def __init__(self, status: int, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.status = status
        self.refusal = refusal


class Outcome(msgspec.Struct, frozen=True):
    """How an operation ended."""

    job_id: str
    state: Literal["done", "failed"]
    result: OpResult | None = None
    failure: Failure | None = None


class Book(msgspec.Struct, frozen=True):
    """What a snapshot carries of a model's operations."""

    applied: int
    kept: dict[int, Outcome]


CANCELLED = Failure("user", "cancelled before it ran")


def failure_of(error: Exception) -> Failure:
    """What the caller is told of an operation that raised."""
    if isinstance(error, TinkError):
        return Failure("user" if isinstance(error, UserError) else "server", str(error))
    return Failure("server", f"{type(error).__name__}: {error}")


@dataclass
class Open:
    """An operation that has not ended."""

    request: OpRequest
    running: bool = False
    cancelled: bool = False


@dataclass
class Account:
    """A model's operations: 1 to `applied` have ended, those in `open` follow without a gap, and at
    most the first of these runs; a removal may stand alone in `open`, across a gap. `exists`: after
    `applied`, the engine has the model."""

    applied: int = 0
    exists: bool = False
    kept: dict[int, Outcome] = field(default_factory=dict)
    open: deque[Open] = field(default_factory=deque)

    @property
    def next(self) -> int:
        return (self.open[-1].request.op_no if self.open else self.applied) + 1

    @property
    def will_exist(self) -> bool:
        """After all that is open, if it goes well."""
        exists = self.exists
        for entry in self.open:
            if isinstance(entry.request.op, CreateModel):
                exists = True
            elif isinstance(entry.request.op, RemoveModel):
                exists = False
        return exists

    def at(self, op_no: int) -> Open | None:
        return next((entry for entry in self.open if entry.request.op_no == op_no), None)

    @property
    def crosses_a_gap(self) -> bool:
        """Whether what is open would leave out operations, once it is done."""
        return bool(self.open) and self.open[0].request.op_no != self.applied + 1


class Books:
    def __init__(self, incarnation: str, tombstones: int = TRAINER_TOMBSTONES) -> None:
        """`tombstones`: removed models that are remembered."""
        self.incarnation, self._tombstones = incarnation, tombstones
        self.lease = 0
        self._accounts: dict[str, Account] = {}
        # How many operations have not ended: the accounts are of all models that there were, too.
        self._open = 0
        self._restoring: set[str] = set()

    # -- deciding -----------------------------------------------------------------------------------

    def admit(self, incarnation: str, lease: int) -> None:
        """Every call that could change something passes here first. Raises Refused."""
        if incarnation != self.incarnation:
            raise self.refused(
                412, "stale_incarnation", f"this trainer is {self.incarnation}, not {incarnation}"
            )
        if lease < self.lease:
            raise self.refused(409, "fenced", f"lease {lease} was superseded by {self.lease}")
        self.lease = lease

    def decide(self, request: OpRequest) -> Literal["accept", "join", "replay"]:
        """What to do with an admitted request. Raises Refused."""
        account = self._accounts.get(request.model_id, Account())
        op_no, applied = request.op_no, account.applied
        if op_no < 1:
            raise self.refused(400, "malformed", "op numbers begin with 1")
        if op_no <= applied:
            return self._replay(account, op_no, request.job_id)
        entry = account.at(op_no)
        if entry is not None:
            self._check_job(entry.request.job_id, request.job_id, op_no, applied)
            return "join"
        if request.model_id in self._restoring:
            raise self._busy(f"model {request.model_id} is being restored", applied)
        if not (account.will_exist or isinstance(request.op, CreateModel | Skip)):
            raise self._no_model(request.model_id, applied)
        removes = isinstance(request.op, RemoveModel)
        if account.crosses_a_gap or (removes and account.open and op_no > account.next):
            raise self._busy(f"ops of model {request.model_id} are to end first", applied)
        if op_no > account.next and not removes:
            raise self.refused(409, "gap", f"op {op_no} came, op {account.next} is next", applied=applied)
        self._check_room(account)
        return "accept"

    def _replay(self, account: Account, op_no: int, job_id: str) -> Literal["replay"]:
        outcome = account.kept.get(op_no)
        if outcome is None:
            raise self.refused(
                410, "result_gone", f"op {op_no} ended; its result was acked", account.applied
            )
        self._check_job(outcome.job_id, job_id, op_no, account.applied)
        return "replay"

    def _check_job(self, known: str, job_id: str, op_no: int, applied: int) -> None:
        if known != job_id:
            raise self.refused(422, "op_reused", f"op {op_no} is job {known}, not {job_id}", applied)

    def _check_room(self, account: Account) -> None:
        busy = None
        if len(account.open) > TRAINER_AHEAD:
            busy = f"{TRAINER_AHEAD} ops of this model are waiting already"
        elif self._open >= TRAINER_QUEUE:
            busy = f"{TRAINER_QUEUE} ops are waiting already"
        elif len(account.kept) >= TRAINER_KEPT:
            busy = f"{TRAINER_KEPT} results of this model wait to be acked"
        if busy:
            raise self._busy(busy, account.applied)

    def refused(
        self,
        status: int,
        error: str,
        message: str,
        applied: int | None = None,
        retryable: bool = False,
    ) -> Refused:
        refusal = Refusal(error, message, retryable, self.incarnation, applied)
        return Refused(status, refusal)

    def _busy(self, message: str, applied: int) -> Refused:
        return self.refused(429, "busy", message, applied, retryable=True)

    def _no_model(self, model_id: str, applied: int = 0) -> Refused:
        return self.refused(404, "no_model", f"model {model_id} is not here", applied)

    # -- changing -----------------------------------------------------------------------------------

    def accept(self, request: OpRequest) -> None:
        """Queues what `decide` said to accept."""
        account = self._accounts.setdefault(request.model_id, Account())
        assert request.op_no == account.next or isinstance(request.op, RemoveModel)
        account.open.append(Open(request))
        self._open += 1

    def ack(self, model_id: str, acked: int) -> None:
        """Drops the results up to `acked`. What has not ended cannot be acked, and stays."""
        if account := self._accounts.get(model_id):
            for op_no in [op_no for op_no in account.kept if op_no <= acked]:
                del account.kept[op_no]

    def head(self, model_id: str) -> OpRequest | None:
        """The operation whose turn it is."""
        account = self._accounts.get(model_id)
        return account.open[0].request if account and account.open else None

    def start(self, model_id: str) -> bool:
        """The head's turn has come. False when it was cancelled: it must not run, only finish."""
        entry = self._accounts[model_id].open[0]
        assert not entry.running
        entry.running = not entry.cancelled
        return entry.running

    def finish(self, model_id: str, outcome: Outcome) -> None:
        """The head has ended: `applied` and its result change together."""
        account = self._accounts[model_id]
        crossed = account.crosses_a_gap
        request = account.open.popleft().request
        self._open -= 1
        account.kept[request.op_no] = outcome
        if crossed and outcome.state == "failed":
            return  # nothing was left out
        account.applied = request.op_no
        if outcome.state == "done":
            if isinstance(request.op, CreateModel):
                account.exists = True
            elif isinstance(request.op, RemoveModel):
                account.exists = False
        if not account.exists:
            self._bury()

    def cancel(self, model_id: str, op_no: int) -> None:
        """A queued operation ends as failed, in its turn; one that runs or has ended is left alone."""
        entry = self._account(model_id).at(op_no)
        if entry is not None and not entry.running:
            entry.cancelled = True

    @contextmanager
    def restoring(self, model_id: str, book: Book) -> Iterator[None]:
        """Around the engine's restore, with the snapshot's book: new operations are kept out until it
        has succeeded or failed. Raises Refused unless the model is absent, or idle and behind."""
        account = self._accounts.get(model_id, Account())
        if account.open or model_id in self._restoring:
            raise self._busy(f"model {model_id} is busy", account.applied)
        if account.applied >= book.applied:
            raise self.refused(
                409,
                "not_behind",
                f"model {model_id} is at op {account.applied}, the snapshot at {book.applied}",
                account.applied,
            )
        self._restoring.add(model_id)
        try:
            yield
            self._accounts[model_id] = Account(book.applied, True, dict(book.kept))
        finally:
            self._restoring.remove(model_id)

    def _bury(self) -> None:
        """Models that are no more are remembered to answer repeats, the oldest forgotten first."""
        dead = [name for name, one in self._accounts.items() if not one.exists and not one.open]
        for name in dead[: max(len(dead) - self._tombstones, 0)]:
            del self._accounts[name]

    # -- reading ------------------------------------------------------------------------------------

    def reply(self, model_id: str, op_no: int, replayed: bool = False) -> OpReply:
        """What is known of an operation. Raises Refused."""
        account = self._account(model_id)
        state: Literal["queued", "running", "done", "failed"] = "queued"
        result = failure = None
        if entry := account.at(op_no):
            if entry.running:
                state = "running"
            elif entry.cancelled:
                state, failure = "failed", CANCELLED
        elif outcome := account.kept.get(op_no):
            state, result, failure = outcome.state, outcome.result, outcome.failure
        elif 1 <= op_no <= account.applied:
            raise self.refused(
                410, "result_gone", f"op {op_no} ended; its result was acked", account.applied
            )
        else:
            raise self.refused(404, "no_op", f"op {op_no} was never sent", account.applied)
        return OpReply(state, self.incarnation, model_id, op_no, account.applied, replayed, result, failure)

    def book(self, model_id: str) -> Book:
        """For a snapshot. Raises Refused when there is no such model."""
        account = self._account(model_id)
        if not account.exists:
            raise self._no_model(model_id, account.applied)
        return Book(account.applied, dict(account.kept))

    def state(self) -> State:
        return State(
            incarnation=self.incarnation,
            lease=self.lease,
            models={
                name: ModelState(
                    applied=account.applied,
                    kept=sorted(account.kept),
                    queued=[entry.request.op_no for entry in account.open],
                    exists=account.exists,
                )
                for name, account in self._accounts.items()
            },
        )

    def _account(self, model_id: str) -> Account:
        account = self._accounts.get(model_id)
        if account is None:
            raise self._no_model(model_id)
        return account
