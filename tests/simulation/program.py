"""What the clients of a simulation do: a program drawn from a seed, and the client that carries it out."""

from __future__ import annotations

import math
import random
from typing import Any, NamedTuple

import msgspec

from tests.simulation.cluster import Cluster
from tests.simulation.faults import Fault, draw
from tink.domain import ids, keys, messages
from tink.domain.requests import DATA_OPS, OpName
from tink.errors import NotFound

TENANTS = ("alice", "bob")
# How often each comes. `poison` fails. `rival` wants a sampler number that other models want too. `named`
# saves sampler weights under one name, again and again. `keep` is a checkpoint that expires. `hole` is a
# sequence number that is not used. `unseeded` leaves the seed to the worker, `withdrawn` is cancelled.
# `fork` makes another model of the last save.
WEIGHTS = {
    "train": 16,
    "step": 10,
    "forward": 2,
    "poison": 4,
    "save": 2,
    "load": 2,
    "keep": 1,
    "sampler": 2,
    "rival": 1,
    "named": 2,
    "sample": 6,
    "unseeded": 3,
    "withdrawn": 1,
    "fork": 1,
}
RIVALS = 777
YEAR = 365 * 24 * 3600.0


class Op(NamedTuple):
    """`value`: what makes it differ from others of its kind."""

    kind: str
    value: int


class Model(NamedTuple):
    """`unloaded`: at its end. `keyed`: its client counts nothing, and knows its jobs by keys."""

    tenant: str
    ops: list[Op]
    unloaded: bool = False
    keyed: bool = False


class Program(NamedTuple):
    """`loss`, `duplicates`, `slow`, `jump`: see doubles.py. `servers`: vLLM servers that sample; without
    them the trainer does. `registered`: as many adapters are registered at one of them."""

    models: list[Model]
    faults: list[Fault]
    loss: float
    duplicates: float
    slow: float
    jump: float
    snapshot_seconds: float
    retention_hours: float
    servers: int = 0
    registered: int = 1000


def program(seed: int) -> Program:
    rng = random.Random(f"program {seed}")
    kinds, weights = list(WEIGHTS), list(WEIGHTS.values())
    models = []
    chance, keyed = random.Random(f"unloaded {seed}"), random.Random(f"keyed {seed}")
    for _ in range(rng.randint(1, 3)):
        drawn = rng.choices(kinds, weights, k=rng.randint(4, 18))
        if rng.random() < 0.1:
            drawn.insert(rng.randrange(len(drawn)), "hole")
        ops = [Op(kind, rng.randrange(10**6)) for kind in drawn]
        models.append(Model(rng.choice(TENANTS), ops, chance.random() < 0.3, keyed.random() < 0.3))
    # Where nothing is kept that nobody needs, a result stays for an hour of the wall clock: its client must
    # have come for it by then.
    tidy = rng.random() < 0.5
    servers = random.Random(f"servers {seed}")
    return Program(
        models=models,
        faults=draw(rng),
        loss=rng.choice([0.0, 0.0, 0.05, 0.15]),
        duplicates=rng.choice([0.0, 0.0, 0.2]),
        slow=0.0 if tidy else rng.choice([0.0, 0.0, 0.05]),
        jump=300.0 if tidy else YEAR,
        snapshot_seconds=rng.choice([0.03, 0.03, 0.2, 30.0]),
        retention_hours=0.0 if tidy else math.inf,
        servers=servers.choice([0, 0, 1, 2]),
        registered=servers.choice([1, 3, 1000]),
    )


class Gained(NamedTuple):
    """What the client got for a job."""

    job: str
    kind: str
    state: str
    body: bytes | None
    result: str
    error: str

    def differs(self, other: Gained) -> bool:
        """Whether two runs of a program may not give both. What chance decides differs between them: who
        gets the number that all want, a seed that nobody named, whether a sample had begun."""
        if self.kind == "rival" or "cancelled" in (self.state, other.state):
            return (self.job, self.kind) != (other.job, other.kind)
        if self.kind == "unseeded":
            return self._replace(body=None) != other._replace(body=None)
        return self != other


class Client:
    """One model's. Submits like the SDK, some of it twice and some of it out of order."""

    def __init__(self, cluster: Cluster, session: str, number: int, model: Model) -> None:
        self._cluster, self._session, self._number = cluster, session, number
        self._tenant, self._ops, self._unloaded, self._keyed = model
        self._rng = random.Random(f"client {number} {model}")
        self._model = ids.model_id(session, number)
        self._seq = 1
        self._newest = ids.job_id(self._model, 0)
        self._held: list[messages.SubmitTraining] = []
        self._pending: list[tuple[Op, messages.Question, str]] = []
        self._samplers: list[str] = []
        self._holes: list[int] = []
        self._forks = 0

    async def run(self, gained: list[Gained]) -> None:
        rng = self._rng
        await self._cluster.create(self._session, self._number, tenant=self._tenant)
        await self._new_sampler(base_model="sim/model")
        for op in self._ops:
            if op.kind in ("sample", "unseeded", "withdrawn"):
                await self._sample(op)
            elif op.kind == "fork":
                await self._fork(op)
            elif op.kind == "hole":
                if self._keyed:
                    continue
                self._holes.append(self._seq)
                self._seq += 1
            else:
                self._hold(op)
                # Chunks of one call arrive in any order; nothing else overtakes.
                if op.kind != "train" or rng.random() < 0.5:
                    await self._flush()
                if op.kind in ("sampler", "named"):
                    await self._new_weights(op)
        await self._flush()
        if self._unloaded:
            body = msgspec.json.encode({"model_id": self._model})
            ask = self._training("unload_model", body, None, keys.UNLOAD)
            promise: messages.Promise = await self._cluster.ask(ask)
            self._pending.append((Op("unload", 0), ask, promise.request_id))
        for op, question, job in self._pending:
            gained.append(await self._gain(op, question, job))
        for seq in self._holes:
            late = self._training("forward", b"late", seq)
            await self._cluster.ask(late)
            gained.append(await self._gain(Op("hole", 0), late, ids.job_id(self._model, seq)))

    # -- training -----------------------------------------------------------------------------------

    def _hold(self, op: Op) -> None:
        name, body = self._request(op)
        if self._keyed:
            ask = self._training(name, body, None, f"key {self._seq}")
        else:
            ask = self._training(name, body, self._seq)
        self._held.append(ask)
        self._newest = ids.job_id(self._model, self._seq)
        self._pending.append((op, ask, self._newest))
        self._seq += 1

    async def _flush(self) -> None:
        if not self._keyed:  # their order is that of their coming
            self._rng.shuffle(self._held)
        for ask in [*self._held, *(_again(ask) for ask in self._held if self._rng.random() < 0.2)]:
            await self._cluster.ask(ask)
        self._held = []

    def _training(
        self, name: OpName, body: bytes, seq: int | None, key: str | None = None
    ) -> messages.SubmitTraining:
        return messages.SubmitTraining(
            self._tenant,
            op=name,
            session_id=self._session,
            model_id=self._model,
            seq_id=seq,
            body=body,
            key=key,
        )

    def _request(self, op: Op) -> tuple[OpName, bytes]:
        common: dict[str, Any] = {"model_id": self._model, "seq_id": self._seq}

        def command(**fields: Any) -> bytes:
            return msgspec.json.encode(common | fields)

        match op.kind:
            case "train":
                return "forward_backward", f"batch {op.value}".encode()
            case "poison":
                return "forward_backward", b"poison"
            case "forward":
                return "forward", f"batch {op.value}".encode()
            case "step":
                return "optim_step", command(adam_params={"learning_rate": op.value / 10**6})
            case "save":
                return "save_weights", command(path="last", overwrite=True)
            case "keep":
                return "save_weights", command(path=f"keep-{self._seq}", ttl_seconds=1800)
            case "load":
                return "load_weights", command(path=self._last, optimizer=op.value % 2 == 0)
            case "named":
                return "save_weights_for_sampler", command(path="best", overwrite=True)
            case "rival":
                return "save_weights_for_sampler", command(sampling_session_seq_id=RIVALS)
        return "save_weights_for_sampler", command(sampling_session_seq_id=self._sampler_number)

    @property
    def _last(self) -> str:
        return f"tinker://{self._model}/weights/last"

    async def _fork(self, op: Op) -> None:
        """A model of the last save (which may not be there), and a step of it."""
        self._forks += 1
        number = 100 * (self._number + 1) + self._forks
        model = ids.model_id(self._session, number)
        load = msgspec.json.encode({"path": self._last, "optimizer": op.value % 2 == 0})
        step = msgspec.json.encode({"model_id": model, "seq_id": 2})
        await self._flush()
        await self._cluster.outcome(self._newest, tenant=self._tenant)
        asks: list[tuple[OpName, bytes]] = [
            ("load_weights", load),
            ("forward_backward", f"batch {op.value}".encode()),
            ("optim_step", step),
        ]
        for seq, (name, body) in enumerate(asks):
            ask = messages.SubmitTraining(
                self._tenant,
                op=name,
                session_id=self._session,
                model_id=model,
                seq_id=seq,
                model_seq_id=None if seq else number,
                body=body,
            )
            self._pending.append((op, ask, ids.job_id(model, seq)))
            await self._cluster.ask(ask)
        # Before the next save: what it loads must not depend on chance.
        await self._cluster.outcome(ids.job_id(model, 0), tenant=self._tenant)

    # -- sampling -----------------------------------------------------------------------------------

    @property
    def _sampler_number(self) -> int:
        return 1000 * (self._number + 1) + len(self._samplers)

    async def _new_sampler(self, **source: str) -> None:
        number = self._sampler_number
        await self._cluster.ask(messages.CreateSampler(self._tenant, self._session, number, **source))
        self._samplers.append(ids.sampler_id(self._session, number))

    async def _new_weights(self, op: Op) -> None:
        """The SDK waits for them before it samples."""
        outcome = await self._cluster.outcome(self._newest, tenant=self._tenant)
        if op.kind == "named" and outcome.state == "done":
            await self._new_sampler(model_path=f"tinker://{self._model}/sampler_weights/best")
        elif outcome.state == "done":
            self._samplers.append(ids.sampler_id(self._session, self._sampler_number))

    async def _sample(self, op: Op) -> None:
        params = {"max_tokens": 16} | ({} if op.kind == "unseeded" else {"seed": op.value})
        body = {
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": [op.value % 90]}]},
            "sampling_params": params,
        }
        sampler = self._samplers[op.value % len(self._samplers)]
        ask = messages.SubmitSample(self._tenant, sampler, len(self._pending), msgspec.json.encode(body))
        promise: messages.Promise = await self._cluster.ask(ask)
        self._pending.append((op, ask, promise.request_id))
        if op.kind == "withdrawn":
            await self._cluster.ask(messages.CancelJob(self._tenant, promise.request_id))

    # -- what comes of it ---------------------------------------------------------------------------

    async def _gain(self, op: Op, question: messages.Question, job: str) -> Gained:
        outcome = await self._cluster.outcome(job, tenant=self._tenant)
        chance = self._rng.random()
        if chance < 0.1:  # a repeat that comes late
            await self._cluster.ask(_again(question))
            await self._cluster.outcome(job, tenant=self._tenant)
        elif chance < 0.2:
            await self._ask_as_a_stranger(job)
        result = msgspec.json.encode(outcome.result).decode()
        told = (text.replace(self._session, "SESSION") for text in (job, result, outcome.error or ""))
        name, result, error = told
        return Gained(name, op.kind, outcome.state, outcome.body, result, error)

    async def _ask_as_a_stranger(self, job: str) -> None:
        stranger = next(tenant for tenant in TENANTS if tenant != self._tenant)
        try:
            found = await self._cluster.ask(messages.AwaitOutcome(stranger, job))
        except NotFound:
            return
        raise AssertionError(f"S1: {stranger} gets {found} of {job}")


def _again(question: messages.Question) -> messages.Question:
    """As the SDK repeats it: the bytes of a body may be others. One with a key is the same request."""
    counted = isinstance(question, messages.SubmitTraining) and question.key is None
    if counted and question.op in DATA_OPS:
        return msgspec.structs.replace(question, body=question.body + b" again")
    return question
