"""A journal as a worker leaves it after a long time, written in bulk by the journal's own code.

Training runs side by side, supervised and reinforcement learning, with all that belongs to them, and worker
after worker; then clients whose jobs are open. The same arguments give the same journal.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec
from sqlalchemy import Connection

from tink.domain import events, ids
from tink.domain.events import AnyEvent, Record, Subject
from tink.domain.requests import DATA_OPS, OpName
from tink.home import Home
from tink.journal import chain, schema, store
from tink.journal.database import database, upsert
from tink.journal.journal import prepare

Entry = tuple[Subject, AnyEvent]
# Keeps a body and returns its sha256.
Put = Callable[[bytes], str]

TENANTS, BASE = ("default", "lab", "eval"), "tink/qwen3-tiny"
# A million events are six days: younger than what retention takes away.
EVENT_SECONDS = 0.5
# Events of one transaction.
BATCH = 5_000
# Clients of each kind at a time, and what each of them does.
SIDE_BY_SIDE, STEPS, SUPERVISED_PER_REINFORCED, SAMPLES_PER_STEP = 8, 50, 4, 8
STEPS_PER_SNAPSHOT, STEPS_PER_CHECKPOINT, SNAPSHOTS_KEPT = 5, 10, 2
REQUEST_BYTES, RESULT_BYTES = 800, 400
# One training job in so many is started twice, one sample in so many fails.
JOBS_PER_RETRY, SAMPLES_PER_FAILURE = 500, 300
# Open jobs of one client: half are its model's, half are samples. Some models have one at the trainer.
OPEN_PER_CLIENT, RUNNING = 250, 4


def write(home: Home, *, wanted: int, open_jobs: int, until: float, seed: int = 0) -> int:
    """Makes the journal and the bodies in an empty home; returns how many events it has: `wanted`, or up
    to a training step more. The last one is of the time `until`."""
    home.make()
    prepare(home)
    rng = random.Random(seed)
    new: dict[str, bytes] = {}

    def put(content: bytes) -> str:
        digest = hashlib.sha256(content).hexdigest()
        new[digest] = content
        return digest

    with (
        contextlib.closing(database(home, "journal").writer()) as journal,
        contextlib.closing(database(home, "bodies").writer()) as bodies,
    ):
        began = until - wanted * EVENT_SECONDS
        numbered = _records(_history(rng, put, wanted, open_jobs), began)
        written, last = 0, chain.START
        while batch := list(itertools.islice(numbered, BATCH)):
            with bodies.connection.begin():  # first, as the worker does
                _write_bodies(bodies.connection, new, batch[0].at)
            with journal.connection.begin():
                last = store.write(journal.connection, batch, last)
            written = batch[-1].seq
        return written


def _write_bodies(connection: Connection, new: dict[str, bytes], at: float) -> None:
    stored = [
        {"sha256": digest, "size": len(content), "stored_at": at, "content": content}
        for digest, content in new.items()
    ]
    if stored:
        insert = upsert(connection.dialect.name, schema.bodies)
        connection.execute(insert.on_conflict_do_nothing(), stored)
    new.clear()


def _records(entries: Iterable[Entry], began: float) -> Iterator[Record]:
    incarnation = 0
    for seq, (subject, event) in enumerate(entries, 1):
        incarnation += isinstance(event, events.IncarnationStarted)
        yield Record(seq, began + seq * EVENT_SECONDS, incarnation, subject, event)


def _history(rng: random.Random, put: Put, wanted: int, open_jobs: int) -> Iterator[Entry]:
    clients = (_Client(rng, put) for _ in itertools.count())
    left = list(_open_ends(clients, open_jobs))
    room = wanted - len(left)
    for entries in _ended(clients):
        if room <= 0:
            break
        room -= len(entries)
        yield from entries
    yield from left


def _ended(clients: Iterator[_Client]) -> Iterator[list[Entry]]:
    """What has happened, bit by bit, without end."""
    for boot in itertools.count(1):
        yield _boot(boot)
        supervised, reinforced = (list(itertools.islice(clients, SIDE_BY_SIDE)) for _ in range(2))
        both = supervised + reinforced
        yield _together(client.begin() for client in both)
        for step in range(1, 1 + STEPS):
            for _ in range(SUPERVISED_PER_REINFORCED):
                yield _together(client.supervised_step() for client in supervised)
            yield _together(client.reinforced_step() for client in reinforced)
            if step % STEPS_PER_SNAPSHOT == 0:
                yield _together(client.snapshot() for client in both)
            if step % STEPS_PER_CHECKPOINT == 0:
                yield _together(client.save(f"step-{step}") for client in both)


def _together(parts: Iterable[list[Entry]]) -> list[Entry]:
    """The first entry of each, then the second of each, and so on."""
    return [entry for entries in itertools.zip_longest(*parts) for entry in entries if entry is not None]


def _boot(number: int) -> list[Entry]:
    started = events.IncarnationStarted(
        number=number, boot_id=f"{number:032x}", version="0.1.0", settings_digest="d1ge57"
    )
    trainer = events.TrainerStarted(
        incarnation=f"{number:032x}", engine="hf", base_model=BASE, base_digest="ba5e"
    )
    return [(Subject(), started), (Subject(replica="trainer"), trainer)]


def _open_ends(clients: Iterator[_Client], count: int) -> Iterator[Entry]:
    """`count` open jobs of clients that wait for them."""
    while count > 0:
        client = next(clients)
        yield from client.begin()
        yield from client.base_sampler()
        for number in range(min(count, OPEN_PER_CLIENT)):
            yield from client.open_job(sample=number % 2 == 1, running=number < RUNNING)
        count -= OPEN_PER_CLIENT


class _Client:
    """One session with one model. Each method does one thing and gives its events."""

    def __init__(self, rng: random.Random, put: Put) -> None:
        self._rng, self._put = rng, put
        self._session = f"{rng.getrandbits(128):032x}"
        self._tenant = TENANTS[int(self._session, 16) % len(TENANTS)]
        self._steps = 0
        self._model = ids.model_id(self._session, 0)
        self._seq = self._op_no = self._versions = self._samplers = self._samples = 0
        self._snapshots: list[str] = []

    def begin(self) -> list[Entry]:
        created = events.SessionCreated(tags=["bench"], sdk_version="0.38.0", idempotency_key=self._session)
        made = events.ModelCreated(
            base_model=BASE, rank=8, alpha=32.0, seed=1, train_attn=True, train_mlp=True, train_unembed=True
        )
        request = {
            "session_id": self._session,
            "model_seq_id": 0,
            "base_model": BASE,
            "lora_config": {"rank": 8},
        }
        job = self._training("create_model", request, result={"model_id": self._model}, model_seq_id=0)
        return [(self._who(model=False), created), *job, (self._who(), made)]

    def supervised_step(self) -> list[Entry]:
        self._steps += 1
        grad_norm = self._rng.random()
        return self._training("forward_backward", step=self._steps) + self._training(
            "optim_step",
            {"adam_params": {"learning_rate": 1e-4}},
            result={"metrics": {"grad_norm": grad_norm}},
            step=self._steps,
            grad_norm=grad_norm,
        )

    def reinforced_step(self) -> list[Entry]:
        """Weights for a sampler, its samples, and a step on them."""
        sampler, entries = self._export()
        for number in range(SAMPLES_PER_STEP):
            entries += self._sample(sampler, number)
        return entries + self.supervised_step()

    def save(self, name: str) -> list[Entry]:
        op_no = self._op_no + 1
        job = self._training("save_weights", {"path": name}, result={"path": name})
        saved = events.CheckpointSaved(
            checkpoint_kind="weights",
            name=name,
            directory=ids.directory(self._model, op_no, "save_weights"),
            size_bytes=1_000_000,
            step=self._steps,
        )
        return [*job, (job[-1][0], saved)]

    def snapshot(self) -> list[Entry]:
        name = f"{self._model}#{self._op_no}"
        directory = ids.directory(self._model, self._op_no, "snapshot")
        taken = events.SnapshotTaken(
            snapshot_id=name, op_no=self._op_no, directory=directory, size_bytes=1_000_000
        )
        entries: list[Entry] = [(self._who(), taken)]
        self._snapshots.append(name)
        if len(self._snapshots) > SNAPSHOTS_KEPT:
            dropped = events.SnapshotDropped(snapshot_id=self._snapshots.pop(0), reason="pruned")
            entries.append((self._who(), dropped))
        return entries

    def base_sampler(self) -> list[Entry]:
        return [(self._who(model=False), self._new_sampler())]

    def open_job(self, *, sample: bool, running: bool) -> list[Entry]:
        if sample:
            return self._sample(ids.sampler_id(self._session, 0), self._samples)[: 1 + running]
        # At most one of a model: the first.
        return self._training("forward_backward")[: 1 + (running and self._seq == 2)]

    # -- jobs ---------------------------------------------------------------------------------------

    def _training(
        self,
        op: OpName,
        request: dict[str, Any] | None = None,
        *,
        result: dict[str, Any] | None = None,
        model_seq_id: int | None = None,
        step: int | None = None,
        grad_norm: float | None = None,
    ) -> list[Entry]:
        """Accepted, started (at times after a redo once more), done."""
        who = self._who(job=ids.job_id(self._model, self._seq))
        accepted = events.JobAccepted(
            op=op,
            seq_id=self._seq,
            model_seq_id=model_seq_id,
            request=None if op in DATA_OPS else msgspec.json.encode(request).decode(),
            body_sha256=self._body(REQUEST_BYTES) if op in DATA_OPS else None,
            body_bytes=REQUEST_BYTES,
        )
        self._op_no += 1
        started = events.JobStarted(attempt=1, backend="trainer", op_no=self._op_no, seq_id=self._seq)
        self._seq += 1
        begun: list[Entry] = [(who, started)]
        if self._rng.randrange(JOBS_PER_RETRY) == 0:
            redone = events.Redone(first=1, last=self._op_no - 1, run_ms=1234.5)
            begun += [(who, redone), (who, msgspec.structs.replace(started, attempt=2))]
        data = op in DATA_OPS
        done = events.JobDone(
            result=result,
            result_sha256=self._body(RESULT_BYTES) if data else None,
            result_bytes=RESULT_BYTES if data else 0,
            tokens_in=1000 if data else 0,
            loss_sum=self._rng.random() if data else None,
            run_ms=50.0,
            step=step,
            learning_rate=None if grad_norm is None else 1e-4,
            metrics={} if grad_norm is None else {"grad_norm": grad_norm},
        )
        return [(who, accepted), *begun, (who, done)]

    def _sample(self, sampler: str, number: int) -> list[Entry]:
        self._samples += 1
        who = self._who(job=ids.job_id(sampler, number), model=False)
        accepted = events.JobAccepted(
            op="sample",
            seq_id=number,
            sampler_id=sampler,
            body_sha256=self._body(REQUEST_BYTES),
            body_bytes=REQUEST_BYTES,
            seed=self._rng.getrandbits(31),
            num_samples=1,
        )
        started = events.JobStarted(attempt=1, backend="trainer")
        if self._rng.randrange(SAMPLES_PER_FAILURE) == 0:
            failed = events.JobFailed(category="server", error="the server has gone")
            return [(who, accepted), (who, started), (who, failed)]
        done = events.JobDone(
            result_sha256=self._body(RESULT_BYTES),
            result_bytes=RESULT_BYTES,
            tokens_in=100,
            tokens_out=100,
            run_ms=200.0,
        )
        return [(who, accepted), (who, started), (who, done)]

    def _export(self) -> tuple[str, list[Entry]]:
        """An adapter version, and the sampler that it is for."""
        op_no = self._op_no + 1
        job = self._training("save_weights_for_sampler", {"sampling_session_seq_id": self._samplers})
        self._versions += 1
        who = self._who(job=job[0][0].job_id, adapter=ids.adapter_id(self._model, self._versions))
        exported = events.AdapterExported(
            version=self._versions,
            directory=ids.directory(self._model, op_no, "save_weights_for_sampler"),
            size_bytes=500_000,
            step=self._steps,
            files={
                name: f"{self._rng.getrandbits(256):064x}"
                for name in ("adapter_config.json", "adapter_model.safetensors")
            },
        )
        placed = msgspec.structs.replace(who, replica="trainer"), events.AdapterPlaced(state="loaded")
        sampler = self._new_sampler()
        return sampler.sampler_id, [*job, (who, exported), placed, (who, sampler)]

    def _new_sampler(self) -> events.SamplerCreated:
        number = self._samplers
        self._samplers += 1
        return events.SamplerCreated(
            sampler_id=ids.sampler_id(self._session, number), sampling_seq_id=number, base_model=BASE
        )

    def _who(self, *, job: str | None = None, model: bool = True, adapter: str | None = None) -> Subject:
        return Subject(
            tenant=self._tenant,
            session_id=self._session,
            model_id=self._model if model else None,
            job_id=job,
            adapter_id=adapter,
        )

    def _body(self, size: int) -> str:
        return self._put(self._rng.randbytes(size))
