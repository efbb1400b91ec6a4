"""One `vllm serve`: its adapters, its load and its samples. (`trl vllm-serve` from 1.11 is one too.)"""

from __future__ import annotations

import math
import re
import struct
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import msgspec

from tink.backends import completions
from tink.backends.completions import Call
from tink.backends.exchange import HttpAnswer, HttpClient
from tink.backends.replica import (
    AdapterMissing,
    Load,
    Probe,
    ReplicaGone,
    ReplicaRefused,
    Served,
    Silent,
    Unsent,
    ask,
)
from tink.errors import UNREADABLE, UserError
from tink.limits import (
    ADAPTER_SECONDS,
    COMPLETION_SECONDS,
    HEALTH_SECONDS,
    INLINE_BYTES,
    MAX_REASON,
    MAX_STOPS,
    MAX_TOPK,
    NOT_FINITE_TRIES,
)
from tink.wire import tinker_pb2 as pb
from tink.wire.samples import Sampled
from tink.wire.tink_train import SampleRequest
from tink.world import World

# What a probe asks: a token that every vocabulary has, and for the likeliest ones after it.
PROBE, PROBE_TOP = [0], 5


class _Model(msgspec.Struct):
    id: str
    root: str | None = None
    parent: str | None = None
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


class VllmClient:
    """Calls of one server. Whatever goes wrong is a ReplicaGone, an AdapterMissing, a ReplicaRefused or
    (the request's fault) a UserError. Cancelling `complete` closes its connection, which makes the server
    give the request up; a load or unload that is cancelled may have been done: it can be repeated."""

    def __init__(self, client: HttpClient, url: str, world: World) -> None:
        self._client, self.url, self._world = client, url, world

    @classmethod
    @asynccontextmanager
    async def connect(
        cls, url: str, world: World, *, slots: int, token: str = ""
    ) -> AsyncIterator[VllmClient]:
        """`slots`: calls at once (see HttpClient). `token`: the server's `--api-key`."""
        async with HttpClient.connect(url, world, slots=slots, token=token) as client:
            yield cls(client, url, world)

    # -- the server ---------------------------------------------------------------------------------

    async def health(self) -> bool:
        """Whether its engine lives. It also does while paused, asleep or draining. Raises Silent if there
        is no answer in time."""
        try:
            return (await self._exchange("GET", "/health", HEALTH_SECONDS)).status == 200
        except Silent:
            raise
        except ReplicaGone:
            return False

    async def served(self) -> Served:
        models = self._decoded(await self._get("/v1/models"), _Models).data
        base = next((model for model in models if model.parent is None), None)
        if base is None or base.max_model_len is None:
            raise ReplicaGone(f"the vLLM server at {self.url} names no base model")
        adapters = {model.id: model.root or "" for model in models if model.parent is not None}
        return Served(base.id, base.root or "", base.max_model_len, adapters)

    async def load(self) -> Load:
        sums = _sums(await self._get("/metrics"))
        if "vllm:num_requests_running" not in sums:
            raise ReplicaRefused(
                f"the vLLM server at {self.url} has no metrics: start it without --disable-log-stats"
            )
        return Load(
            running=int(sums["vllm:num_requests_running"]),
            waiting=int(sums["vllm:num_requests_waiting"]),
            generated=int(sums["vllm:generation_tokens_total"]),
        )

    async def probe(self, model: str) -> Probe:
        """Samples one token, from which top_k leaves no choice: if the server's logprobs are of the
        distribution that it drew from, it has all the probability. ReplicaRefused if they are no
        log-probabilities at all."""
        # Not those of the prompt: they may kill a server that is busy (docs/vllm.md).
        request = SampleRequest(
            sample_id="probe",
            prompt=PROBE,
            seed=0,
            max_tokens=1,
            top_k=1,
            topk_sample_logprobs=PROBE_TOP,
        )
        try:
            sampled = await self.sample(request, model=model, max_context=len(PROBE) + 1)
        except UserError as error:
            raise ReplicaRefused(f"the vLLM server at {self.url} samples nothing: {error}") from error
        (sequence,) = pb.SampleResponse.FromString(sampled.body).sequences
        (value,) = struct.unpack("<f", sequence.logprobs)
        top = sequence.topk_sampled_logprobs
        tokens = struct.unpack(f"<{PROBE_TOP}i", top.token_ids)
        scores = struct.unpack(f"<{PROBE_TOP}f", top.logprobs)
        if value > 1e-6:
            raise ReplicaRefused(
                f"the vLLM server at {self.url} gives logits for logprobs: start it with --logprobs-mode "
                "raw_logprobs"
            )
        return Probe("processed" if value > -1e-6 else "raw", dict(zip(tokens, scores, strict=True)))

    # -- adapters -----------------------------------------------------------------------------------

    async def check_takes_adapters(self) -> None:
        """Raises ReplicaRefused, with the remedy, if the server takes none while it runs."""
        await self.unload_adapter("tink/nobody")  # which is not there

    async def load_adapter(self, name: str, path: str) -> None:
        """Returns once requests may name it. Loaded already, from the same path, is success. The path is
        the server's. Raises ReplicaRefused if it cannot, or serves something else by this name."""
        content = msgspec.json.encode({"lora_name": name, "lora_path": path, "load_inplace": False})
        answer = await self._exchange("POST", "/v1/load_lora_adapter", ADAPTER_SECONDS, content)
        if answer.status == 200:
            return
        reason = _reason(answer)
        if answer.status == 400 and "already been loaded" in reason:
            loaded = (await self.served()).adapters.get(name)
            if loaded == path:
                return
            reason = f"it has loaded another one by this name, from {loaded}"
        elif answer.status == 404 and "No adapter found" in reason:
            reason = f"it finds none in {path}: it must see the worker's artifact folder by the same path"
        elif "shutting down" in reason:
            raise Unsent(f"the vLLM server at {self.url} takes no adapter now: {reason}")
        elif answer.status == 500 and "add_lora" in reason:
            found = re.search("failed with error '(.*?)', please check", reason)
            found = found or re.search("failed: (.*)", reason)
            reason = found[1] if found else reason
        else:
            self._check_adapter_answer(answer, reason)
        raise ReplicaRefused(f"the vLLM server at {self.url} cannot load the adapter {name!r}: {reason}")

    async def unload_adapter(self, name: str) -> None:
        """Returns once no new request may name it; those under way end undisturbed. Absent is success."""
        content = msgspec.json.encode({"lora_name": name})
        answer = await self._exchange("POST", "/v1/unload_lora_adapter", ADAPTER_SECONDS, content)
        reason = _reason(answer)
        if answer.status == 200 or (answer.status == 404 and "cannot be found" in reason):
            return
        self._check_adapter_answer(answer, reason)
        raise ReplicaRefused(f"the vLLM server at {self.url} cannot unload the adapter {name!r}: {reason}")

    def _check_adapter_answer(self, answer: HttpAnswer, reason: str) -> None:
        """Returns if the answer is a refusal of this adapter."""
        if answer.status == 404 and reason == "Not Found":
            raise ReplicaRefused(
                f"the vLLM server at {self.url} takes no adapters while it runs: start it with "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora"
            )
        self._check_answered(answer, reason)

    # -- samples ------------------------------------------------------------------------------------

    async def sample(self, request: SampleRequest, *, model: str, max_context: int) -> Sampled:
        """A pure function of the request: may be repeated, here or at another server of the same models."""
        call = completions.encode(request, model=model, max_context=max_context)
        answer = await self.complete(call)
        decode = partial(completions.decode, answer, request, model=model)
        try:
            # A long one would be felt in the loop.
            return await self._world.run_sync(decode) if len(answer) > INLINE_BYTES else decode()
        except ReplicaGone as error:
            raise type(error)(f"{self.url}: {error}") from error

    async def complete(self, call: Call) -> bytes:
        """The answer of `/v1/completions`, for `completions.decode` to judge."""
        for _ in range(NOT_FINITE_TRIES):
            answer = await self._exchange("POST", "/v1/completions", COMPLETION_SECONDS, call.body)
            if answer.status == 200:
                return answer.content
            reason = _reason(answer)
            if _NOT_FINITE not in reason:
                break
        if answer.status == 404 and "does not exist" in reason:
            raise AdapterMissing(f"the vLLM server at {self.url} does not serve {call.model!r}")
        if answer.status in (400, 422):
            raise UserError(_fault(reason))
        self._check_answered(answer, reason)
        raise ReplicaRefused(f"the vLLM server at {self.url} does not complete: {answer.status} {reason}")

    # -- one exchange -------------------------------------------------------------------------------

    async def _get(self, path: str) -> bytes:
        answer = await self._exchange("GET", path, HEALTH_SECONDS)
        if answer.status != 200:
            reason = _reason(answer)
            self._check_answered(answer, reason)
            raise ReplicaRefused(
                f"what answers at {self.url} is no vLLM server: {path} gives {answer.status} {reason}"
            )
        return answer.content

    def _check_answered(self, answer: HttpAnswer, reason: str) -> None:
        """Returns if the answer is a refusal of the call itself."""
        if answer.status in (401, 403):
            raise ReplicaRefused(f"the vLLM server at {self.url} wants its API key: {reason}")
        if answer.status in (408, 429, 503):
            raise Unsent(f"the vLLM server at {self.url} takes no request now: {answer.status} {reason}")
        if answer.status not in range(400, 500):
            raise ReplicaGone(f"the vLLM server at {self.url} failed: {answer.status} {reason}")

    async def _exchange(
        self, method: str, path: str, seconds: float, content: bytes | None = None
    ) -> HttpAnswer:
        server = f"the vLLM server at {self.url}"
        return await ask(self._client, server, method, path, seconds=seconds, content=content)

    def _decoded(self, content: bytes, kind: Any) -> Any:
        try:
            return msgspec.json.decode(content, type=kind)
        except UNREADABLE as error:
            raise ReplicaGone(f"what answers at {self.url} is no vLLM server: {error}") from error


def _reason(answer: HttpAnswer) -> str:
    """What an answer that is not 200 says, in one line."""
    text = answer.content[: 16 * MAX_REASON].decode(errors="replace")
    try:
        found = msgspec.json.decode(answer.content)
    except UNREADABLE:
        found = None
    if isinstance(found, dict):
        error = found.get("error", found.get("detail", text))
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    return " ".join(text.split())[:MAX_REASON]


# NaN, in the words of vLLM's JSON encoder. A model whose training has diverged gives it, but also leaves it
# in blocks of the KV cache; who is given these next gets it too, once or twice, until they are overwritten.
_NOT_FINITE = "not JSON compliant"
_LOGPROBS = re.compile(r"(sample|prompt) logprobs of (\d+), which is greater than max allowed: (\d+)")
_STOPS = re.compile(r"'body\.stop'.*at most (\d+) items")


def _fault(reason: str) -> str:
    """What is wrong with a request; and if that is a limit of the server, what to start it with."""
    if found := _LOGPROBS.search(reason):
        return (
            f"topk_{found[1]}_logprobs is {found[2]}: this vLLM server gives {found[3]} at most; "
            f"it must be started with --max-logprobs {MAX_TOPK} to give more"
        )
    if found := _STOPS.search(reason):
        return (
            f"stop has more strings than the {found[1]} that this vLLM server takes: it must be started "
            f"with VLLM_MAX_STOP_STRINGS={MAX_STOPS} to take more"
        )
    if _NOT_FINITE in reason:
        return "the model's logits are not finite: its training has diverged"
    return f"vLLM refuses the request: {reason}"


_SAMPLE = re.compile(rb"^(vllm:\w+)(?:\{.*\})? (\S+)$", re.MULTILINE)


def _sums(metrics: bytes) -> dict[str, float]:
    """Of each series, over its labels: a server may have several engines."""
    sums: dict[str, float] = defaultdict(float)
    for name, text in _SAMPLE.findall(metrics):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if math.isfinite(value):
            sums[name.decode()] += value
    return sums
