"""The REST API on a simulated worker: plain HTTP, from its routes to the training server."""

from __future__ import annotations

import sqlite3
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import trio
from trio.testing import MockClock

from tests.simulation.cluster import TENANT, Cluster
from tests.simulation.scenario import slow
from tests.simulation.users import servers, up
from tests.vllm.double import BASE
from tink.actors.megatron import MegatronActor
from tink.api.app import create_app
from tink.api.auth import Auth
from tink.domain import messages, rows
from tink.domain.routing import HOW_TO_SAMPLE, HOW_TO_TRAIN, NO_SAMPLING, NO_TRAINING
from tink.errors import BackendError
from tink.settings import Settings
from tink.wire import tink_train

ADAM = {"learning_rate": 0.01}


class Client:
    """`post` gives the answer, `result` the JSON of a good one."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http

    async def post(self, path: str, key: str | None = None, /, **sent: Any) -> httpx.Response:
        headers = {} if key is None else {"Idempotency-Key": key}
        return await self.http.post(path, json=sent, headers=headers, timeout=None)

    async def result(self, path: str, key: str | None = None, /, **sent: Any) -> Any:
        answer = await self.post(path, key, **sent)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def retrieve(self, request_id: str) -> httpx.Response:
        while True:
            answer = await self.post("/retrieve_future", request_id=request_id)
            if answer.status_code != 202:
                return answer

    async def base_model(self) -> str | None:
        """None: there is none."""
        answer = (await self.http.get("/get_server_capabilities")).json()
        return next((model["model_name"] for model in answer["supported_models"]), None)

    async def adapter(self, key: str | None = None) -> str:
        made = await self.result("/add_lora", key, base_model="sim/model", rank=4)
        return str(made["model_id"])

    async def train(self, model: str, value: int) -> list[str]:
        """The requests of a step."""
        datum = {"model_input": [value], "loss_fn_inputs": {"target_tokens": [1]}}
        batch = await self.result("/fwdbwd_async", model_id=model, data=[datum])
        step = await self.result("/optim_async", model_id=model, adam_params=ADAM)
        return [batch["request_id"], step["request_id"]]


@asynccontextmanager
async def connected(cluster: Cluster) -> AsyncIterator[Client]:
    app = create_app(
        cluster.router_ask, auth=Auth(), artifacts=Path("/nowhere"), secret=b"s", world=cluster.world
    )
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://tink") as http:
        yield Client(http)


def _query(cluster: Cluster, query: str) -> list[Any]:
    with closing(sqlite3.connect(cluster.home.journal)) as journal:
        return list(journal.execute(query))


# -- routing ----------------------------------------------------------------------------------------

# USE_MEGATRON, USE_VLLM, USE_HF -> what samples, what trains
CELLS = {
    (True, True, "auto"): ("http://vllm-0:8000", "trainer"),
    (True, False, "auto"): ("trainer", "trainer"),
    (False, True, "auto"): ("http://vllm-0:8000", None),
    (False, True, "true"): ("http://vllm-0:8000", "trainer"),
    (False, True, "false"): ("http://vllm-0:8000", None),
    (False, False, "auto"): ("trainer", "trainer"),
    (False, False, "true"): ("trainer", "trainer"),
    (False, False, "false"): (None, None),
}
DATUM = {"model_input": [1], "loss_fn_inputs": {"target_tokens": [1]}}
CHAT = [{"role": "assistant", "content": "text"}]
# Every operation that the table has under training.
TRAINING: list[tuple[str, dict[str, Any]]] = [
    ("add_lora", {"base_model": "sim/model", "rank": 4}),
    ("fwdbwd", {"data": [DATUM]}),
    ("fwdbwd", {"data": [CHAT]}),
    ("forward", {"data": [DATUM]}),
    ("optim", {"adam_params": ADAM}),
    ("save_weights", {"path": "a"}),
    ("load_weights", {"path": "tinker://x/weights/a"}),
    ("save_weights_for_sampler", {"path": "a"}),
    ("remove_lora", {}),
]


@pytest.mark.parametrize("cell", CELLS, ids=str)
async def test_every_cell_of_the_table_is_served_as_it_says(
    autojump_clock: MockClock, tmp_path: Path, cell: tuple[bool, bool, Any]
) -> None:
    samples, trains = CELLS[cell]
    megatron, vllm, hf = cell
    settings = {"use_megatron": megatron, "use_vllm": vllm, "use_hf": hf}
    doubles = servers(1) if vllm else ()
    # There is an adapter, whatever this mode can do with it.
    async with Cluster.running(tmp_path) as cluster, connected(cluster) as client:
        model = await client.adapter()
        path = (await client.result("/save_weights_for_sampler", model_id=model, path="a"))["path"]
        await client.result("/optim", model_id=model)
        last = _query(cluster, "SELECT max(accepted_seq) FROM jobs")[0][0]
    async with Cluster.running(tmp_path, vllm=doubles, **settings) as cluster, connected(cluster) as client:
        if vllm:
            await up(cluster, 1)
        base = await client.base_model() or "any"
        asked: list[dict[str, Any]] = [{"base_model": base, "prompt": [1]}]
        if samples is None:
            asked += [{"base_model": base, "prompts": ["text"]}, {"base_model": base, "messages": CHAT}]
            asked += [{"model_id": model, "prompt": [1]}, {"model_path": path, "prompt": [1]}]
        for prefix in ("", "/api/v1"):
            for name, sent in TRAINING if trains is None else ():
                for form in (name, f"{name}_async"):
                    named = {} if name == "add_lora" else {"model_id": model}
                    answer = await client.post(f"{prefix}/{form}", **named, **sent)
                    assert answer.status_code == 400, (form, answer.text)
                    assert answer.json() == {"detail": NO_TRAINING, "remedy": HOW_TO_TRAIN}, form
            if trains is not None:
                for request in await client.train(model, 1):
                    assert (await client.retrieve(request)).status_code == 200
                found = await client.result(f"{prefix}/sample", model_id=model, prompt=[1])
                assert found["sequences"][0]["tokens"]
            for form in ("sample", "sample_async", "asample"):
                for sent in asked:
                    answer = await client.post(f"{prefix}/{form}", **sent)
                    if samples is None:
                        assert answer.status_code == 400, answer.text
                        assert answer.json() == {"detail": NO_SAMPLING, "remedy": HOW_TO_SAMPLE}
                    else:
                        assert answer.status_code == 200, answer.text
                        if form != "sample":
                            assert (await client.retrieve(answer.json()["request_id"])).status_code == 200
        query = f"SELECT DISTINCT op = 'sample', backend FROM jobs WHERE accepted_seq > {last}"
        backends = dict(_query(cluster, query))
        assert backends == {kind: name for kind, name in ((0, trains), (1, samples)) if name}
        cluster.check_journal()


@pytest.mark.parametrize("ever", [False, True], ids=["never there", "gone"])
async def test_without_a_vllm_server_a_sample_says_which_and_what_to_do(
    autojump_clock: MockClock, tmp_path: Path, ever: bool
) -> None:
    (server,) = vllm = servers(1)
    settings: dict[str, Any] = {"use_hf": "auto", "vllm_wait_seconds": 20.0}
    if not ever:
        server.kill()
    async with Cluster.running(tmp_path, vllm=vllm, **settings) as cluster, connected(cluster) as client:
        sent = {"base_model": BASE, "prompt": [1]}
        if ever:
            done = (await client.result("/asample", **sent))["request_id"]
            result = (await client.retrieve(done)).json()
            server.kill()
            await up(cluster, 0)
        answers = [await client.post("/sample", **sent)]
        promise = await client.post("/asample", **sent)
        if ever:
            answers.append(await client.retrieve(promise.json()["request_id"]))
            # Nobody has to be there to tell of what was sampled.
            assert (await client.retrieve(done)).json() == result
        else:
            answers.append(promise)
        for answer in answers:
            assert answer.status_code == 502
            detail = answer.json()["detail"]
            assert detail.startswith("vLLM server can't be reached")
            for part in ("http://vllm-0:8000", "start it (tink vllm)", "VLLM_BASE_URL"):
                assert part in detail
        cluster.check_journal()


async def test_where_vllm_has_its_model_from_is_where_its_tokenizer_is_looked_for(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with Cluster.running(tmp_path, vllm=servers(1), use_hf="auto") as cluster:
        assert await cluster.router_ask(messages.GetTokenizer(TENANT)) is None, "nobody has said"
        assert await cluster.router_ask(messages.GetTokenizer(TENANT, "sampling")) == "/model"
        assert await cluster.router_ask(messages.GetTokenizer(TENANT)) == "/model"


# -- one training job at a time ---------------------------------------------------------------------


@pytest.mark.parametrize(("users", "steps"), [(1, 30), (12, 4)], ids=["one model", "many"])
@pytest.mark.parametrize("engine", ["megatron", "hf"])
async def test_however_hard_it_is_pressed_a_training_server_runs_one_job_at_a_time(
    autojump_clock: MockClock,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
    users: int,
    steps: int,
) -> None:
    """On Megatron one in all; on the HuggingFace engine MAX_WORKERS, and never two of one model. As many
    again are there before their turn."""
    settings: dict[str, Any] = {"use_megatron": engine == "megatron", "max_workers": 3}
    running: set[int] = set()

    def begins(arguments: str) -> bool:
        if "ForwardBackward(" not in arguments:
            return False
        now = cluster.trainer.running
        assert len(now) == len(set(now))
        running.add(len(now))
        return True

    slow(monkeypatch, 1.0, begins)
    async with Cluster.running(tmp_path, **settings) as cluster, connected(cluster) as client:
        models = [await client.adapter() for _ in range(users)]
        out: Counter[str] = Counter()
        most, most_of_one = 0, 0
        handle = cluster.trainer.handle

        async def watched(request: httpx.Request) -> httpx.Response | None:
            nonlocal most, most_of_one
            if request.method != "POST" or not request.url.path.endswith("/ops"):
                return await handle(request)
            model = msgspec.msgpack.decode(await request.aread(), type=tink_train.OpRequest).model_id
            out[model] += 1
            most, most_of_one = max(most, out.total()), max(most_of_one, out[model])
            try:
                return await handle(request)
            finally:
                out[model] -= 1

        cluster.trainer.handle = watched  # type: ignore[method-assign]
        promised: defaultdict[str, list[str]] = defaultdict(list)

        async def press(model: str, value: int) -> None:
            promised[model] += await client.train(model, value)

        async with trio.open_nursery() as nursery:
            for model in models:
                for value in range(steps):
                    nursery.start_soon(press, model, value)
        for model in models:
            answers = [await client.retrieve(request) for request in promised[model]]
            assert all(answer.status_code == 200 for answer in answers), "no job failed"
            assert len(answers) == 2 * steps
        slots = 1 if engine == "megatron" or users == 1 else 3
        assert max(running) == slots
        assert most == 2 * slots
        assert most_of_one == 2 or users > slots
        assert {job for job, *_ in _query(cluster, "SELECT attempts FROM jobs")} == {1}
        cluster.check_journal()


# -- an adapter's life ------------------------------------------------------------------------------


async def test_however_many_adapters_a_tenant_has_they_are_in_one_session_that_stays(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with Cluster.running(tmp_path) as cluster, connected(cluster) as client:
        first = await client.adapter("a")
        assert await client.adapter("a") == first
        models = {first, *[await client.adapter() for _ in range(4)]}
        assert len(models) == 5
        await client.result("/sample", base_model="sim/model", prompt=[1])
        other = await client.post("/add_lora", "a", base_model="sim/model", rank=8)
        assert (other.status_code, "another request" in other.text) == (400, True)
        ((session,),) = _query(cluster, "SELECT session_id FROM sessions")
        finish = await client.post(f"/api/v1/sessions/{session}/finish", reason={"type": "success"})
        assert (finish.status_code, "models of the REST API" in finish.text) == (400, True)
        cluster.crash_worker()
        await cluster.start_worker()
        assert await client.adapter("a") == first
        assert len(_query(cluster, "SELECT session_id FROM sessions")) == 1
        cluster.check_journal()


async def test_a_removal_that_failed_is_tried_again(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Cluster.running(tmp_path) as cluster, connected(cluster) as client:
        model = await client.adapter()
        send = MegatronActor._send

        async def fails(self: MegatronActor, job: rows.Job, *more: Any) -> Any:
            if job.op == "unload_model":
                raise BackendError("the disk is full")
            return await send(self, job, *more)

        with monkeypatch.context() as patch:
            patch.setattr(MegatronActor, "_send", fails)
            for _ in range(2):
                answer = await client.post("/remove_lora", model_id=model)
                assert (answer.status_code, answer.json()["detail"]) == (502, "the disk is full")
        assert (await client.result("/optim", model_id=model))["model_id"] == model, "nothing was removed"
        first = await client.result("/remove_lora_async", model_id=model)
        assert await client.result("/remove_lora_async", model_id=model) == first, "it happens once"
        assert (await client.retrieve(first["request_id"])).status_code == 200
        assert await client.result("/remove_lora_async", model_id=model) == first
        cluster.crash_worker()
        await cluster.start_worker()
        assert await client.result("/remove_lora_async", model_id=model) == first
        ends = "SELECT state FROM jobs WHERE op = 'unload_model' ORDER BY seq_id"
        assert [state for (state,) in _query(cluster, ends)] == ["failed", "failed", "done"]
        cluster.check_journal()


async def test_a_sample_that_comes_again_is_the_first_one_whatever_has_become_of_its_adapter(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with Cluster.running(tmp_path) as cluster, connected(cluster) as client:
        model = await client.adapter()
        sent = {"model_id": model, "prompts": [[1], [2]]}
        first = await client.result("/asample", "a", **sent)
        result = (await client.retrieve(first["request_id"])).json()
        for request in await client.train(model, 1):
            await client.retrieve(request)
        assert await client.result("/asample", "a", **sent) == first
        assert (await client.result("/sample", **sent)) != result, "of the newest weights"
        await client.result("/remove_lora", model_id=model)
        assert await client.result("/asample", "a", **sent) == first
        assert await client.result("/sample", "a", **sent) == result
        saves = "SELECT count(*) FROM jobs WHERE op = 'save_weights_for_sampler'"
        assert _query(cluster, saves) == [(2,)], "none for a repeat"
        cluster.check_journal()


def test_the_cells_are_those_of_the_settings() -> None:
    names = {"vllm": "http://vllm-0:8000", "megatron": "trainer", "hf": "trainer", None: None}
    for (megatron, vllm, hf), expected in CELLS.items():
        routes = Settings(use_megatron=megatron, use_vllm=vllm, use_hf=hf).routes
        assert (names[routes.sampling], names[routes.training]) == expected
