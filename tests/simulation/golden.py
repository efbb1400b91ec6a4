"""A golden journal: what a worker of one version decided, in a simulation that meets everything it decides
on. It is replayed with every version after it.

    tools/golden            writes tests/golden/VERSION, of this Tink
"""

from __future__ import annotations

import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import trio
import zstandard
from trio.testing import MockClock

import tink
from tests.simulation.chaos import quiet, trio_determinism
from tests.simulation.cluster import Cluster
from tests.simulation.scenario import json
from tests.simulation.users import up
from tests.vllm.double import VllmDouble
from tink.domain import ids, keys, messages
from tink.domain.requests import OpName
from tink.errors import UserError
from tink.home import Home
from tink.journal.journal import prepare
from tink.journal.recording import open_recording
from tink.limits import MAX_COMMAND_BODY, MAX_METADATA_BYTES, SAMPLE_SLOTS, SEQ_GAP_SECONDS
from tink.replay.decisions.history import look
from tink.replay.decisions.replay import replay

GOLDEN = Path(__file__).parent.parent / "golden"
# What is sent to servers, by job: no journal holds it.
SENT = "sent.json.zst"

ALICE, BOB = "alice", "bob"
LONG = 40.0  # seconds: longer than anything that runs


class Client:
    """One model's, which counts its jobs."""

    def __init__(self, cluster: Cluster, tenant: str, session: str, number: int) -> None:
        self.cluster, self.tenant, self.session, self.number = cluster, tenant, session, number
        self.model = ids.model_id(session, number)
        self.seq = 0

    async def make(self, op: OpName, **fields: Any) -> str:
        body = {"session_id": self.session, "model_seq_id": self.number, **fields}
        return await self._submit(op, msgspec.json.encode(body), 0, model_seq_id=self.number)

    async def create(self, **fields: Any) -> str:
        return await self.make("create_model", **({"base_model": "sim/model"} | fields))

    async def batch(self, text: str = "", op: OpName = "forward_backward") -> str:
        self.seq += 1
        return await self._submit(op, f"{text or 'batch'} {self.seq}".encode(), self.seq)

    async def command(self, op: OpName, **fields: Any) -> str:
        self.seq += 1
        return await self._submit(op, json(model_id=self.model, seq_id=self.seq, **fields), self.seq)

    async def raw(self, op: OpName, body: bytes, **more: Any) -> str:
        self.seq += 1
        return await self._submit(op, body, self.seq, **more)

    async def keyed(self, op: OpName, body: bytes, key: str) -> str:
        return await self._submit(op, body, None, key=key)

    async def step(self, **adam: float) -> str:
        return await self.command("optim_step", **({"adam_params": adam} if adam else {}))

    async def unload(self) -> str:
        return await self.keyed("unload_model", json(model_id=self.model), keys.UNLOAD)

    async def _submit(self, op: OpName, body: bytes, seq: int | None, **more: Any) -> str:
        ask = messages.SubmitTraining(
            self.tenant, op=op, session_id=self.session, model_id=self.model, seq_id=seq, body=body, **more
        )
        promise: messages.Promise = await self.cluster.ask(ask)
        return promise.request_id

    async def end(self, job: str) -> str:
        outcome: messages.Outcome = await self.cluster.ask(messages.AwaitOutcome(self.tenant, job))
        return outcome.state

    async def sample(self, sampler: str, number: int, *, seed: int | None = None, **fields: Any) -> str:
        params = {"max_tokens": 4} | ({} if seed is None else {"seed": seed})
        prompt = {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]}
        body = json(**({"prompt": prompt, "sampling_params": params, "num_samples": 2} | fields))
        key = fields.get("key")
        ask = messages.SubmitSample(
            self.tenant, sampler, None if key else number, body, num_samples=2, seed=seed, key=key
        )
        promise: messages.Promise = await self.cluster.ask(ask)
        return promise.request_id

    async def sampler(self, number: int, **source: str) -> str:
        ask = messages.CreateSampler(self.tenant, self.session, number, **source)
        made: messages.Created = await self.cluster.ask(ask)
        return made.id


async def by_trainer(folder: Path) -> None:
    """A worker whose trainer samples, too."""
    async with Cluster.running(folder, 1, snapshot_seconds=0.05, max_attempts=100) as cluster:
        session = await _session(cluster)
        one, two = Client(cluster, ALICE, session, 0), Client(cluster, ALICE, session, 1)
        await one.create(lora_config={"rank": 4, "seed": 7}, user_metadata={"run": "one"})
        await two.create(lora_config={"rank": 8, "alpha": 16.0, "train_mlp": False})
        await _refused_models(cluster, session)
        for text in ("", "", "poison"):
            await one.batch(text)
        for adam in (
            {},
            {"learning_rate": 0.01, "weight_decay": 0.1},
            {"learning_rate": -1.0},
            {"eps": 0.0},
        ):
            await one.step(**adam)
        await one.command("optim_step", optimizer_params={"type": "muon"})
        await one.batch(op="forward")
        await one.raw("optim_step", b"not json")
        await one.raw("forward_backward", b"", invalid="the body is not a valid ForwardBackwardRequest")
        await one.raw("optim_step", b" " * (MAX_COMMAND_BODY + 1))
        await two.batch()
        await two.step()
        await one.end(await one.batch())
        await _saves(one, two)
        await _loads(one, two)
        await _samples(one)
        await _crashes(cluster, one, two)
        await _gap(two)
        await _checkpoints(cluster, one)
        await _keys(cluster, session)
        await two.end(await two.unload())
        two.seq += 1
        await two.end(await two.batch())
        await two.unload()
        stranger = Client(cluster, BOB, await cluster.session(BOB), 0)
        await stranger.end(
            await stranger.make("load_weights", path=_address(one, "public"), optimizer=True)
        )
        await stranger.end(await stranger.step())
        finished = messages.FinishSession(BOB, stranger.session, "success")
        await cluster.ask(finished)


async def _session(cluster: Cluster) -> str:
    ask = messages.CreateSession(
        ALICE, ["a tag"], {"who": "alice"}, "0.38.0", "project", "name", idempotency_key="once"
    )
    made: messages.Created = await cluster.ask(ask)
    assert await cluster.ask(ask) == made
    await cluster.ask(messages.MoveSession(ALICE, made.id, "another project"))
    await cluster.ask(messages.ReportClientFailure(ALICE, "ValueError", made.id))
    return made.id


async def _refused_models(cluster: Cluster, session: str) -> None:
    wrong: list[dict[str, Any]] = [
        {"base_model": "another/model"},
        {"lora_config": {"rank": 65}},
        {"lora_config": {"rank": 4, "alpha": 0.0}},
        {"lora_config": {"rank": 4, "train_attn": False, "train_mlp": False, "train_unembed": False}},
        {"optimizer_config": {"type": "muon"}},
        {"user_metadata": {"much": "x" * MAX_METADATA_BYTES}},
    ]
    for number, fields in enumerate(wrong, 50):
        client = Client(cluster, ALICE, session, number)
        job = await client.create(**({"lora_config": {"rank": 4}} | fields))
        await client.batch()  # its model was never made
        assert await client.end(job) == "failed", fields


async def _saves(one: Client, two: Client) -> None:
    await one.command("save_weights", path="a", user_metadata={"is": "good"})
    await one.command("save_weights")
    await one.command("save_weights", path="a")
    await one.command("save_weights", path="a", overwrite=True)
    await one.command("save_weights", path="not/a/name")
    await one.command("save_weights", path="soon", ttl_seconds=60)
    await one.command("save_weights", path="never", ttl_seconds=0)
    await one.command("save_weights", path="public")
    await one.command("save_weights_for_sampler", path="best")
    await one.command("save_weights_for_sampler", sampling_session_seq_id=10)
    await one.command("save_weights_for_sampler", sampling_session_seq_id=10)
    await one.command("save_weights_for_sampler")
    await one.command("save_weights_external", path="out")
    await one.command("save_weights_external", age_encryption_recipients=["age1"])
    await two.command("save_weights_for_sampler", sampling_session_seq_id=10)
    await two.end(await two.command("save_weights", path="other"))
    await one.end(await one.command("save_weights_for_sampler", path="best", overwrite=True))


async def _loads(one: Client, two: Client) -> None:
    await one.command("load_weights", path=_address(one, "a"), optimizer=True)
    await one.command("load_weights", path=_address(one, "nowhere"))
    await one.command("load_weights", path=_address(one, "best", "sampler_weights"))
    await one.command("load_weights", path=_address(two, "other"))
    await one.command("load_weights", path="elsewhere")
    fork = Client(one.cluster, ALICE, one.session, 2)
    await fork.make("load_weights", path=_address(one, "a"), user_metadata={"of": "a"})
    await fork.batch()
    await fork.end(await fork.step())


async def _samples(one: Client) -> None:
    base = await one.sampler(20, base_model="sim/model")
    best = await one.sampler(21, model_path=_address(one, "best", "sampler_weights"))
    assert await one.sampler(21, model_path=_address(one, "best", "sampler_weights")) == best
    for model_path in (_address(one, "a"), _address(one, "nowhere", "sampler_weights")):
        try:
            await one.sampler(22, model_path=model_path)
        except UserError:
            continue
        raise AssertionError(f"there is no sampler of {model_path}")
    jobs = [await one.sample(sampler, 0, seed=3) for sampler in (base, best)]
    jobs.append(await one.sample(best, 1))
    jobs.append(await one.sample(ids.sampler_id(one.session, 10), 0))
    jobs.append(await one.sample(base, 0, key="a key"))
    jobs.append(await one.sample(base, 2, topk_sample_logprobs=10_000))
    jobs.append(await one.sample(base, 3, prompt={"chunks": [{"type": "image"}]}))
    jobs.append(await one.sample(base, 4, record_stability_info=True))
    for job in jobs:
        await one.end(job)
    one.cluster.trainer.kill()  # so that they wait
    waiting = [await one.sample(base, number) for number in range(5, 7 + SAMPLE_SLOTS)]
    for job in waiting[-3:]:
        await one.cluster.ask(messages.CancelJob(ALICE, job))
    await one.cluster.start_trainer()
    assert {await one.end(job) for job in waiting} == {"done", "cancelled"}


async def _crashes(cluster: Cluster, one: Client, two: Client) -> None:
    for crash in ("worker", "trainer", "both", "worker", "trainer"):
        jobs = []
        for client in (one, two):
            jobs += [await client.batch(), await client.batch(), await client.step()]
        await trio.sleep(0.02)
        if crash != "trainer":
            cluster.crash_worker()
        if crash != "worker":
            cluster.trainer.kill()
        await trio.sleep(1.0)
        await cluster.start_trainer()
        await cluster.start_worker()
        for client, job in zip((one,) * 3 + (two,) * 3, jobs, strict=True):
            await client.end(job)


async def _gap(client: Client) -> None:
    late = client.seq + 1
    client.seq += 3
    await client.end(await client.batch())
    late_job = ids.job_id(client.model, late)
    client.seq, now = late - 1, client.seq
    await client.batch("late")
    assert await client.end(late_job) == "failed"
    client.seq = now


async def _checkpoints(cluster: Cluster, one: Client) -> None:
    for change in (
        {"public": True},
        {"set_ttl": True, "ttl_seconds": 10**6},
        {"set_ttl": True, "ttl_seconds": None},
    ):
        await cluster.ask(messages.ChangeCheckpoint(ALICE, _address(one, "public"), **change))
    await cluster.ask(messages.DeleteCheckpoint(ALICE, _address(one, "a")))
    await one.end(await one.command("save_weights", path="a"))
    await trio.sleep(SEQ_GAP_SECONDS)  # "soon" expires


async def _keys(cluster: Cluster, session: str) -> None:
    """A client that counts nothing."""
    client = Client(cluster, ALICE, session, 3)
    await client.create(lora_config={"rank": 4})
    await client.keyed("forward_backward", b"batch", "first")
    await client.keyed("forward_backward", b"batch", "first")
    await client.keyed("optim_step", json(model_id=client.model), "second")
    client.seq = 2
    await client.end(await client.batch())
    await client.end(await client.keyed("forward", b"batch", "third"))


async def by_vllm(folder: Path) -> None:
    """A worker with servers that sample."""
    vllm = [VllmDouble() for _ in range(2)]
    async with Cluster.running(folder, 2, vllm=vllm, snapshot_seconds=30.0, lora_alpha=64.0) as cluster:
        await up(cluster, 2)
        client = Client(cluster, ALICE, await cluster.session(ALICE), 0)
        await client.create(lora_config={"rank": 4})
        await client.batch()
        await client.step()
        await client.command("save_weights_for_sampler", sampling_session_seq_id=1)
        await client.command("save_weights_for_sampler", path="named")
        await client.end(await client.command("save_weights", path="state"))
        fork = Client(cluster, ALICE, client.session, 1)
        await fork.end(await fork.make("load_weights", path=_address(client, "state"), optimizer=True))
        ephemeral = ids.sampler_id(client.session, 1)
        named = await client.sampler(2, model_path=_address(client, "named", "sampler_weights"))
        jobs = [await client.sample(sampler, n, seed=n) for sampler in (ephemeral, named) for n in range(3)]
        jobs.append(await client.sample(named, 7, sampling_params={"max_tokens": 4, "top_p": 7.0}))
        jobs.append(await client.sample(named, 8, record_stability_info=True))
        vllm[0].kill()
        jobs += [await client.sample(named, n) for n in range(10, 14)]
        await trio.sleep(LONG)
        vllm[0].start()
        await client.step()
        for job in jobs:
            await client.end(job)
        await up(cluster, 2)
        await client.end(await client.unload())
        await client.end(await client.sample(named, 20))
        await trio.sleep(LONG)
        await cluster.ask(messages.FinishSession(ALICE, client.session, "errored", "why"))


def _address(client: Client, name: str, kind: ids.CheckpointKind = "weights") -> str:
    return str(ids.Address(client.model, kind, name))


PARTS: dict[str, Callable[[Path], Awaitable[None]]] = {"trainer": by_trainer, "vllm": by_vllm}


def perform(part: str, folder: Path) -> None:
    """Writes the journal; the same each time."""
    # Trio draws the order of ready tasks from this; there is no public way to seed it.
    trio._core._run._r.seed(0)
    with trio_determinism():
        trio.run(PARTS[part], folder, clock=MockClock(autojump_threshold=0))


def sent_of(home: Home) -> dict[str, list[Any]]:
    """What today's worker sends to servers for each job of a journal, in its order."""
    found: dict[str, list[Any]] = {}

    def take(job_id: str, request: bytes) -> None:
        wanted = msgspec.json.decode(request)
        asked = found.setdefault(job_id, [])
        if wanted not in asked:
            asked.append(wanted)

    with open_recording(home) as recording:
        replay(recording, look(recording), take)
    return found


def write(part: str, target: Path) -> None:
    """What is kept of a home: its journal and its bodies, compressed, and what was sent."""
    with tempfile.TemporaryDirectory() as scratch:
        home = Home(Path(scratch) / "home")
        perform(part, home.root)
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for path in (home.journal, home.bodies):
            copy = Path(scratch) / path.name
            with closing(sqlite3.connect(path)) as database:
                database.execute("VACUUM INTO ?", (str(copy),))
            (target / f"{path.name}.zst").write_bytes(zstandard.compress(copy.read_bytes(), 19))
        sent = msgspec.json.encode(sent_of(home), order="sorted")
        (target / SENT).write_bytes(zstandard.compress(sent, 19))


def read(source: Path, home: Home) -> dict[str, list[Any]]:
    """Makes a home of what was kept, with the tables of today, whatever version they are of. Returns what
    was sent."""
    home.make()
    for path in (home.journal, home.bodies):
        path.write_bytes(zstandard.decompress((source / f"{path.name}.zst").read_bytes()))
    prepare(home)
    sent: dict[str, list[Any]] = msgspec.json.decode(zstandard.decompress((source / SENT).read_bytes()))
    return sent


def main() -> int:
    quiet()
    for part in PARTS:
        target = GOLDEN / tink.__version__ / part
        write(part, target)
        for path in sorted(target.iterdir()):
            print(f"{path.relative_to(GOLDEN.parent.parent)}: {path.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
