"""What a sampling server says, in its own words, and what the client makes of it."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import httpx
import msgspec
import pytest
import trio
from hypothesis import example, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from tink.backends.flavour import flavour
from tink.backends.replica import Aborted, AdapterMissing, Load, ReplicaGone, ReplicaRefused, Silent, Unsent
from tink.backends.trl import TrlClient
from tink.backends.vllm import VllmClient
from tink.errors import TinkError, UserError
from tink.limits import ADAPTER_SECONDS, COMPLETION_SECONDS, HEALTH_SECONDS, INLINE_BYTES
from tink.wire import tinker_pb2 as pb
from tink.wire.tink_train import SampleRequest
from tink.world import World

Answer = Callable[[httpx.Request], httpx.Response]
T = TypeVar("T")

URL = "http://vllm:8000"
SAMPLE = SampleRequest(sample_id="s", prompt=[5, 6], seed=0, max_tokens=1)
NOT_FOUND = httpx.Response(404, json={"detail": "Not Found"})


class OneServer(World):
    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    def http_transport(self, origin: str, max_slots: int) -> httpx.AsyncBaseTransport:
        return httpx.MockTransport(self._answer)


@asynccontextmanager
async def talking_to(answer: Answer | httpx.Response, token: str = "") -> AsyncIterator[VllmClient]:
    if isinstance(answer, httpx.Response):
        whole = answer
        answer = lambda request: httpx.Response(whole.status_code, content=whole.content)  # noqa: E731
    async with VllmClient.connect(URL, OneServer(answer), slots=1, token=token) as client:
        yield client


def error(status: int, message: str, **fields: Any) -> httpx.Response:
    return httpx.Response(status, json={"error": {"message": message, "code": status} | fields})


def models(**adapters: str) -> httpx.Response:
    base = {"id": "base", "root": "/models/base", "parent": None, "max_model_len": 512}
    others = [
        {"id": name, "root": root, "parent": "base", "max_model_len": None}
        for name, root in adapters.items()
    ]
    return httpx.Response(200, json={"object": "list", "data": [base, *others]})


def completion(model: str = "base", **fields: Any) -> httpx.Response:
    choice = {
        "index": 0,
        "token_ids": [7],
        "logprobs": {"token_logprobs": [-0.5], "top_logprobs": [{"token_id:7": -0.5}]},
        "finish_reason": "length",
    }
    return httpx.Response(200, json={"model": model, "choices": [choice | fields]})


async def every_call(client: VllmClient) -> list[BaseException | None]:
    """What each call raises; health nothing but Silent."""
    with suppress(Silent):
        await client.health()
    found: list[BaseException | None] = []
    calls = (
        client.served,
        client.load,
        lambda: client.probe("base"),
        lambda: client.load_adapter("a", "/a"),
        lambda: client.unload_adapter("a"),
        lambda: client.sample(SAMPLE, model="base", max_context=512),
    )
    for call in calls:
        try:
            await call()
        except Exception as raised:
            found.append(raised)
        else:
            found.append(None)
    return found


# -- what it serves, and how busy it is -------------------------------------------------------------


async def test_it_tells_what_it_serves() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        return models(**{"s:train:0@1": "/artifacts/a"})

    async with talking_to(answer) as client:
        served = await client.served()
    assert served == ("base", "/models/base", 512, {"s:train:0@1": "/artifacts/a"})


METRICS = b"""# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="base"} 4.0
vllm:num_requests_running{engine="1",model_name="base"} 1.0
vllm:num_requests_waiting{engine="0",model_name="base"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="base",reason="deferred"} 2.0
vllm:generation_tokens_total{engine="0",model_name="base"} 1.2e+03
vllm:lora_requests_info{max_lora="4",running_lora_adapters="a,b"} 1.7954103374329836e+09
vllm:broken{engine="0"} NaN
"""


async def test_its_load_is_that_of_all_its_engines() -> None:
    async with talking_to(httpx.Response(200, content=METRICS)) as client:
        assert await client.load() == Load(running=5, waiting=2, generated=1200)


async def test_a_server_without_metrics_says_how_to_start_it() -> None:
    async with talking_to(httpx.Response(200, text="python_info 1.0\n")) as client:
        with pytest.raises(ReplicaRefused, match="--disable-log-stats"):
            await client.load()


@pytest.mark.parametrize(("status", "well"), [(200, True), (503, False), (500, False), (404, False)])
async def test_it_is_well_when_it_says_so(status: int, well: bool) -> None:
    async with talking_to(httpx.Response(status)) as client:
        assert await client.health() is well


async def test_a_server_that_cannot_be_reached_is_not_well() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    async with talking_to(answer) as client:
        assert await client.health() is False


@pytest.mark.parametrize(("value", "mode"), [(-2.4, "raw"), (0.0, "processed"), (-0.0, "processed")])
async def test_processed_logprobs_are_noticed(value: float, mode: str) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        assert msgspec.json.decode(request.content)["top_k"] == 1
        return probed(value)

    async with talking_to(answer) as client:
        probe = await client.probe("base")
    assert probe.mode == mode
    assert probe.scores == pytest.approx({7: value, 1: -5.0, 2: -6.0, 3: -7.0, 4: -8.0})


async def test_logits_for_logprobs_are_refused() -> None:
    async with talking_to(probed(11.5)) as client:
        with pytest.raises(ReplicaRefused, match="--logprobs-mode"):
            await client.probe("base")


def probed(value: float) -> httpx.Response:
    """The answer to a probe, whose one token has this log-probability."""
    top = {"token_id:7": value} | {f"token_id:{token}": -4.0 - token for token in range(1, 5)}
    return completion(logprobs={"token_logprobs": [value], "top_logprobs": [top]})


# -- adapters ---------------------------------------------------------------------------------------

LOADED = error(400, "The lora adapter 'a' has already been loaded. If you want to load ...")
WORKER = (
    "Call to add_lora method failed: Worker failed with error 'LoRA rank 128 is greater than max_lora_rank "
    "64.', please check the stack trace above for the root cause"
)


async def test_an_adapter_is_loaded_by_its_name_and_path_and_never_in_place() -> None:
    asked: list[Any] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append((request.url.path, msgspec.json.decode(request.content)))
        return httpx.Response(200, text="Success: LoRA adapter 'a' added successfully.")

    async with talking_to(answer) as client:
        await client.load_adapter("a", "/artifacts/a")
        await client.unload_adapter("a")
    load = {"lora_name": "a", "lora_path": "/artifacts/a", "load_inplace": False}
    assert asked == [("/v1/load_lora_adapter", load), ("/v1/unload_lora_adapter", {"lora_name": "a"})]


@pytest.mark.parametrize("path", ["/artifacts/a", "/elsewhere"])
async def test_loaded_already_is_success_if_it_is_the_same(path: str) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        return LOADED if request.method == "POST" else models(a="/artifacts/a")

    async with talking_to(answer) as client:
        if path == "/artifacts/a":
            await client.load_adapter("a", path)
        else:
            with pytest.raises(ReplicaRefused, match="from /artifacts/a"):
                await client.load_adapter("a", path)


@pytest.mark.parametrize(
    ("answered", "said"),
    [
        (
            error(404, "Loading lora a failed: No adapter found for <path>"),
            "finds none in /a: .*the same path",
        ),
        (error(500, WORKER), "'a': LoRA rank 128 is greater than max_lora_rank 64.$"),
        (error(500, "Call to add_lora method failed: rank 128 > 64"), "'a': rank 128 > 64$"),
        (error(400, "conflicts with a served base model."), "conflicts with a served base model"),
        (NOT_FOUND, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
        (httpx.Response(401, json={"error": "Unauthorized"}), "API key"),
    ],
)
async def test_a_load_that_is_refused_says_why_in_one_line(answered: httpx.Response, said: str) -> None:
    async with talking_to(answered) as client:
        with pytest.raises(ReplicaRefused, match=said) as caught:
            await client.load_adapter("a", "/a")
    assert URL in str(caught.value)
    assert "\n" not in str(caught.value)


async def test_unloading_what_is_not_there_is_success() -> None:
    async with talking_to(error(404, "The lora adapter 'a' cannot be found.")) as client:
        await client.unload_adapter("a")
    async with talking_to(NOT_FOUND) as client:
        with pytest.raises(ReplicaRefused, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
            await client.unload_adapter("a")


GONE: dict[str, httpx.Response | Exception] = {
    "a dead engine": error(500, "EngineCore encountered an issue. See stack trace (above) ..."),
    "draining": error(500, "Server shutting down"),
    "a full queue": error(503, "Too many requests"),
    "busy": httpx.Response(429),
    "a proxy's error": httpx.Response(502, text="Bad Gateway"),
    "a redirect": httpx.Response(302, headers={"Location": "http://elsewhere/"}),
    "refused": httpx.ConnectError("refused"),
    "reset": httpx.ReadError("reset"),
    "cut off": httpx.RemoteProtocolError("peer closed connection"),
    "slow": httpx.ReadTimeout("slow"),
}


@pytest.mark.parametrize("what", GONE)
async def test_a_server_that_is_gone_is_told_from_one_that_refuses(what: str) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        found = GONE[what]
        if isinstance(found, Exception):
            raise found
        return httpx.Response(found.status_code, headers=found.headers, content=found.content)

    async with talking_to(answer) as client:
        for raised in await every_call(client):
            assert type(raised) in (ReplicaGone, Silent, Unsent), repr(raised)
            assert URL in str(raised)


# -- samples ----------------------------------------------------------------------------------------


async def test_a_sample_is_one_exchange() -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(f"{request.method} {request.url.path} {msgspec.json.decode(request.content)['model']}")
        return completion("m@1")

    async with talking_to(answer) as client:
        sampled = await client.sample(SAMPLE, model="m@1", max_context=512)
    assert asked == ["POST /v1/completions m@1"]
    assert pb.SampleResponse.FromString(sampled.body).sequences[0].tokens == b"\7\0\0\0"


async def test_a_long_answer_is_read_beside_the_loop() -> None:
    class Watched(OneServer):
        threads = 0

        async def run_sync(self, fn: Callable[..., T], *args: Any, limiter: Any = None) -> T:
            self.threads += 1
            return await super().run_sync(fn, *args, limiter=limiter)

    for padding, threads in ((0, 0), (INLINE_BYTES, 1)):
        world = Watched(lambda request, padding=padding: completion(text=" " * padding))  # type: ignore[misc]
        async with VllmClient.connect(URL, world, slots=1) as client:
            await client.sample(SAMPLE, model="base", max_context=512)
        assert world.threads == threads


@pytest.mark.parametrize("said", ["does not exist. Valid aliases: base.", "does not exist."])
async def test_a_model_that_it_does_not_have_is_a_missing_adapter(said: str) -> None:
    missing = error(404, f"The model `m@1` {said}", type="NotFoundError", param="model")
    async with talking_to(missing) as client:
        with pytest.raises(AdapterMissing, match=r"m@1"):
            await client.sample(SAMPLE, model="m@1", max_context=512)


async def test_an_answer_of_the_base_model_is_never_that_of_an_adapter() -> None:
    async with talking_to(completion("base")) as client:
        with pytest.raises(ReplicaGone, match="answered by 'base'"):
            await client.sample(SAMPLE, model="m@1", max_context=512)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (
            "Token id 5000 is out of vocabulary",
            "^vLLM refuses the request: Token id 5000 is out of",
        ),
        ("Out of range float values are not JSON compliant", "^the model's logits are not finite"),
        (
            "Requested sample logprobs of 30, which is greater than max allowed: 20 (parameter=logprobs)",
            "^topk_sample_logprobs is 30: .* 20 at most; .*--max-logprobs 64",
        ),
        (
            "Requested prompt logprobs of 30, which is greater than max allowed: 20",
            "^topk_prompt_logprobs is 30: .*--max-logprobs 64",
        ),
        (
            "1 validation error:\n {'loc': 'body.stop', 'msg': 'List should have at most 4 items ...'}",
            "^stop has more strings than the 4 .*VLLM_MAX_STOP_STRINGS=64",
        ),
    ],
)
async def test_the_requests_own_fault_is_its_callers_error(message: str, said: str) -> None:
    async with talking_to(error(400, message)) as client:
        with pytest.raises(UserError, match=said):
            await client.sample(SAMPLE, model="base", max_context=512)


@pytest.mark.parametrize("times", [1, 3, 4])
async def test_logits_that_another_model_spoilt_are_not_this_ones_fault(times: int) -> None:
    """A diverged model leaves NaN in the KV cache, for whoever is given its blocks next."""
    spoilt = [error(400, "Out of range float values are not JSON compliant") for _ in range(times)]
    answers = [*spoilt, completion()]
    async with talking_to(lambda request: answers.pop(0)) as client:
        if times < 4:
            await client.sample(SAMPLE, model="base", max_context=512)
        else:
            with pytest.raises(UserError, match="not finite: its training has diverged"):
                await client.sample(SAMPLE, model="base", max_context=512)


async def test_an_aborted_sample_is_not_a_sample() -> None:
    async with talking_to(completion(finish_reason="abort")) as client:
        with pytest.raises(Aborted, match=f"{URL}.*abort"):
            await client.sample(SAMPLE, model="base", max_context=512)


# -- whatever it does -------------------------------------------------------------------------------


async def test_a_connection_that_was_closed_while_idle_is_not_a_server_that_is_gone() -> None:
    """vLLM closes one that is idle for 5 s, or that saw an error."""
    answers: list[httpx.Response | Exception] = [httpx.RemoteProtocolError("disconnected"), completion()]

    def answer(request: httpx.Request) -> httpx.Response:
        found = answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    async with talking_to(answer) as client:
        await client.sample(SAMPLE, model="base", max_context=512)
        answers = [httpx.RemoteProtocolError("disconnected"), httpx.ReadError("reset"), completion()]
        with pytest.raises(ReplicaGone):
            await client.sample(SAMPLE, model="base", max_context=512)
    assert len(answers) == 1


async def test_what_came_before_a_connection_broke_is_no_part_of_the_answer() -> None:
    whole = completion().content

    class Broken(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield whole[:40]
            raise httpx.ReadError("reset")

    answers = [httpx.Response(200, stream=Broken()), completion()]
    async with talking_to(lambda request: answers.pop(0)) as client:
        await client.sample(SAMPLE, model="base", max_context=512)


async def test_no_call_waits_for_ever(autojump_clock: MockClock) -> None:
    class SilentTransport(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            await trio.sleep_forever()
            raise AssertionError

    class SilentWorld(World):
        def http_transport(self, origin: str, max_slots: int) -> httpx.AsyncBaseTransport:
            return SilentTransport()

    async with VllmClient.connect(URL, SilentWorld(), slots=1) as client:
        began = trio.current_time()
        with pytest.raises(Silent):
            await client.health()
        assert trio.current_time() - began == pytest.approx(HEALTH_SECONDS)
        began = trio.current_time()
        assert {type(raised) for raised in await every_call(client)} == {Silent}
        most = 3 * HEALTH_SECONDS + 2 * ADAPTER_SECONDS + 2 * COMPLETION_SECONDS
        assert trio.current_time() - began == pytest.approx(most, rel=0.01)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([200, 400, 404, 422, 500]), st.binary(max_size=40))
@example(200, b'{"data": [], "model": "\xff"}')
@example(400, b'{"error": ' + b"[" * 100_000)
@example(404, b'{"error": {"message": null}}')
def test_no_bytes_make_another_error(status: int, content: bytes) -> None:
    async def main() -> None:
        async with talking_to(httpx.Response(status, content=content)) as client:
            for raised in await every_call(client):
                assert raised is None or isinstance(raised, TinkError), repr(raised)

    trio.run(main)


async def test_the_api_key_is_sent_and_proxies_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    seen: list[str | None] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers.get("Authorization"))
        return httpx.Response(200)

    for token in ("secret", ""):
        async with talking_to(answer, token=token) as client:
            assert await client.health()
    assert seen == ["Bearer secret", None]


# -- flavours ---------------------------------------------------------------------------------------


def routes(**paths: httpx.Response) -> Answer:
    return lambda request: paths.get(request.url.path.strip("/").replace("/", "_"), NOT_FOUND)


WORLD_SIZE = httpx.Response(200, json={"world_size": 1})


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (routes(v1_models=models(), get_world_size=WORLD_SIZE), "vllm"),
        (routes(v1_models=httpx.Response(401, json={"error": "Unauthorized"})), "vllm"),
        (routes(get_world_size=WORLD_SIZE), "trl"),
    ],
)
async def test_the_kind_of_server_is_recognised(answer: Answer, found: str) -> None:
    assert await flavour(URL, OneServer(answer)) == found


@pytest.mark.parametrize("other", [NOT_FOUND, httpx.Response(200, text="<html>"), httpx.Response(307)])
async def test_another_server_is_refused(other: httpx.Response) -> None:
    with pytest.raises(ReplicaRefused, match=re.escape(URL)):
        await flavour(URL, OneServer(routes(get_world_size=other)))


async def test_a_server_that_is_not_up_yet_has_no_kind() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    with pytest.raises(ReplicaGone, match=f"can't be reached at {URL}"):
        await flavour(URL, OneServer(answer))
    with pytest.raises(ReplicaGone):
        await flavour(URL, OneServer(lambda request: httpx.Response(503)))


# -- an old trl vllm-serve --------------------------------------------------------------------------


def generated(*sequences: Sequence[int], **fields: Any) -> httpx.Response:
    return httpx.Response(
        200,
        json={
            "prompt_ids": [[5, 6]],
            "completion_ids": sequences,
            "logprobs": [[[-0.5]] * len(tokens) for tokens in sequences],
            "logprob_token_ids": [[[token] for token in tokens] for tokens in sequences],
        }
        | fields,
    )


def old(**fields: Any) -> SampleRequest:
    return SampleRequest(
        **{"sample_id": "s", "prompt": [5, 6], "seed": 7, "max_tokens": 2, "num_samples": 2} | fields
    )


async def test_an_old_trl_samples_by_the_base_model() -> None:
    asked: list[Any] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append((request.url.path, msgspec.json.decode(request.content)))
        return generated([8, 9], [4])

    async with TrlClient.connect(URL, OneServer(answer)) as client:
        sampled = await client.sample(old(stop_strings=["."], temperature=0.5), max_context=512)
    path, body = asked[0]
    assert path == "/generate/"
    assert (body["prompts"], body["n"], body["temperature"], body["top_k"]) == ([[5, 6]], 2, 0.5, -1)
    assert body["generation_kwargs"]["seed"] == 7
    assert body["generation_kwargs"]["stop"] == ["."]
    assert body["generation_kwargs"]["max_tokens"] == 2
    sequences = pb.SampleResponse.FromString(sampled.body).sequences
    assert [sequence.stop_reason for sequence in sequences] == [
        pb.STOP_REASON_LENGTH,
        pb.STOP_REASON_STOP,
    ]
    assert (sampled.tokens_in, sampled.tokens_out) == (2, 3)


@pytest.mark.parametrize(
    "fields",
    [
        {"adapter": "a"},
        {"prompt_logprobs": True},
        {"topk_prompt_logprobs": 1},
        {"topk_sample_logprobs": 1},
        {"targets": [[1]]},
        {"temperature": 2.5},
        {"prompt": [1] * 512},
    ],
)
async def test_what_an_old_trl_cannot_do_is_the_callers_error(fields: dict[str, Any]) -> None:
    async with TrlClient.connect(URL, OneServer(lambda request: generated([8, 9]))) as client:
        with pytest.raises(UserError):
            await client.sample(old(**fields), max_context=512)


@pytest.mark.parametrize(
    ("answered", "raised"),
    [
        (httpx.Response(500, text="Internal Server Error"), ReplicaGone),
        (generated([8, 9]), ReplicaGone),
        (generated([8, 9], [8]), None),
        (generated([8, 9], []), ReplicaRefused),
        (generated([8, 9], [1, 2], logprobs=None), ReplicaRefused),
        (generated([8, 9], [1, 2], logprobs=[[[]], [[]]]), ReplicaRefused),
        (generated([8, 9], [1, 2], logprobs=[[[-1e39]] * 2] * 2), ReplicaRefused),
        (generated([8, 9], [1, 2], logprob_token_ids=[[[8], [9]], [[2], [1]]]), ReplicaRefused),
        (httpx.Response(200, text="<html>"), ReplicaRefused),
    ],
)
async def test_a_wrong_answer_of_an_old_trl_is_no_sample(
    answered: httpx.Response, raised: type[TinkError] | None
) -> None:
    answer = OneServer(lambda request: httpx.Response(answered.status_code, content=answered.content))
    async with TrlClient.connect(URL, answer) as client:
        if raised is None:
            await client.sample(old(), max_context=512)
        else:
            with pytest.raises(raised):
                await client.sample(old(), max_context=512)


async def test_what_an_old_trl_may_generate_is_bounded_by_the_context() -> None:
    asked: list[Any] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(msgspec.json.decode(request.content)["generation_kwargs"]["max_tokens"])
        return generated([8, 9], [4])

    async with TrlClient.connect(URL, OneServer(answer)) as client:
        free = await client.sample(old(max_tokens=None), max_context=4)
        stopped = await client.sample(old(max_tokens=None, stop_tokens=[9]), max_context=4)
    assert asked == [2, 2]
    length, stop = pb.STOP_REASON_LENGTH, pb.STOP_REASON_STOP
    for sampled, reasons in ((free, [length, stop]), (stopped, [stop, stop])):
        sequences = pb.SampleResponse.FromString(sampled.body).sequences
        assert [sequence.stop_reason for sequence in sequences] == reasons


async def test_an_old_trl_that_works_for_us_is_well_though_it_does_not_answer() -> None:
    asked: list[str] = []

    class OneAtATime(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            asked.append(request.url.path)
            await trio.sleep_forever()
            raise AssertionError

    class Busy(World):
        def http_transport(self, origin: str, max_slots: int) -> httpx.AsyncBaseTransport:
            return OneAtATime()

    async with TrlClient.connect(URL, Busy()) as client, trio.open_nursery() as nursery:

        async def sample() -> None:
            async with client.turn:
                await client.sample(old(), max_context=512)

        nursery.start_soon(sample)
        nursery.start_soon(sample)
        await trio.testing.wait_all_tasks_blocked()
        assert await client.health()
        assert asked == ["/generate/"]
        nursery.cancel_scope.cancel()
