"""A `vllm serve` in memory, on trio's clock, for tests and for simulation.

What it says is what a real one said (recording.json, made by record.py), with names and numbers put in;
what it samples is a function of the adapter's files, the prompt and the seed (language.py). The contract
tests run against both. Beside that it does what a real one does to those who do not know it: it keeps an
adapter's first weights for ever under one name and path, reads an adapter that it has dropped from its
directory again, and dies if that is gone; it answers 200 for what it aborts; it says that it is well while
it is paused or draining; and after a restart it is empty.
"""

from __future__ import annotations

import copy
import json
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import httpx
import trio

from tests.vllm import language
from tests.vllm.server import RECORDING
from tink.backends.completions import decode, encode
from tink.wire.tink_train import SampleRequest
from tink.world import World

EXCHANGES: dict[str, dict[str, Any]] = json.loads(RECORDING.read_text())
CONTEXT: int = EXCHANGES["models"]["body"]["data"][0]["max_model_len"]
BASE = "base"


class Adapter(NamedTuple):
    name: str
    path: str


class Answered(NamedTuple):
    """A completion that was answered whole: by which name, from which files, and what was asked."""

    model: str
    path: str | None
    body: dict[str, Any]


@dataclass(eq=False)
class _Run:
    """A completion under way. `fate`: why it was cut short."""

    adapter: Adapter | None
    body: dict[str, Any]
    admitted: trio.Event = field(default_factory=trio.Event)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    began: float | None = None
    tokens: int = 0
    counted: bool = False
    fate: Literal["", "abort", "dead"] = ""

    @property
    def n(self) -> int:
        return int(self.body["n"])


class Watch(Protocol):
    """Who wants to know what the server does."""

    def computes(self, path: str | None, body: dict[str, Any]) -> None: ...

    def unloads(self, name: str, *, used: bool) -> None: ...

    def dies(self, path: str) -> None: ...


class VllmDouble:
    """`latency`: seconds of every exchange; `token_seconds`: of a token of all the samples under way, both
    times `slowness`. The rest is what vLLM's own options are."""

    def __init__(
        self,
        *,
        max_loras: int = 4,
        max_cpu_loras: int = 8,
        max_lora_rank: int = 64,
        max_num_seqs: int = 64,
        max_logprobs: int = 20,
        max_stops: int = 4,
        runtime_lora: bool = True,
        logprobs_mode: Literal["raw", "processed"] = "raw",
        latency: float = 0.002,
        token_seconds: float = 0.001,
    ) -> None:
        self.max_loras, self.max_cpu_loras, self.max_lora_rank = max_loras, max_cpu_loras, max_lora_rank
        self.max_num_seqs, self.max_logprobs, self.max_stops = max_num_seqs, max_logprobs, max_stops
        self.runtime_lora, self.logprobs_mode = runtime_lora, logprobs_mode
        self.latency, self.token_seconds, self.slowness = latency, token_seconds, 1.0
        # A reason: adapters are refused with it.
        self.refuses_loads = ""
        # Directories of adapters whose logits are not finite.
        self.diverged: set[str] = set()
        self.lives = 0
        self.watch: Watch | None = None
        self.answered: list[Answered] = []
        self._connections: set[trio.CancelScope] = set()
        self.start()

    def transport(self) -> httpx.AsyncBaseTransport:
        """For one client, which may close it."""
        return _Transport(self)

    # -- what may happen to it ----------------------------------------------------------------------

    def start(self) -> None:
        """As a new process: it has nothing of the one before."""
        self.up, self.draining, self.lives = True, False, self.lives + 1
        self.adapters: dict[str, Adapter] = {}
        self._cache: OrderedDict[Adapter, bytes] = OrderedDict()
        self._prefixes: dict[Adapter, bytes] = {}
        self._waiting: list[_Run] = []
        self._running: list[_Run] = []
        self._generated = 0
        self._paused = False
        self._answers = trio.Event()
        self._answers.set()
        self._computes = trio.Event()
        self._computes.set()
        self._frozen_at = 0.0

    def kill(self) -> None:
        """kill -9: whoever waits is cut off, and whoever comes is refused."""
        self.up = False
        for connection in self._connections:
            connection.cancel()

    def drain(self) -> None:
        """SIGTERM, with --shutdown-timeout: it ends when what runs has ended."""
        self.draining = True
        self._end_if_drained()

    def pause(self) -> None:
        """/pause: aborts what runs; what comes waits."""
        self._paused = True
        for run in [*self._running, *self._waiting]:
            self._cut(run, "abort")

    def resume(self) -> None:
        self._paused = False
        self._schedule()

    def hang(self) -> None:
        """It accepts connections, and answers nothing."""
        self._answers = trio.Event()

    def freeze(self) -> None:
        """It answers, and computes nothing."""
        self._computes, self._frozen_at = trio.Event(), trio.current_time()

    def recover(self) -> None:
        """From a hang or a freeze."""
        self._answers.set()
        self._computes.set()

    def would_answer(self, request: SampleRequest, directory: Path | None) -> bytes:
        """The SampleResponse that `request` has by the adapter in a directory, or by the base model."""
        weights = language.BASE if directory is None else language.digest(directory)
        body = json.loads(encode(request, model=BASE, max_context=CONTEXT).body)
        answer = self._completion(BASE, body, weights, self._generate(weights, body))
        return decode(answer.content, request, model=BASE).body

    # -- one exchange -------------------------------------------------------------------------------

    async def handle(self, request: httpx.Request) -> httpx.Response:
        await trio.lowlevel.checkpoint()
        if not self.up:
            raise httpx.ConnectError("connection refused", request=request)
        content = await request.aread()
        with trio.CancelScope() as connection:
            self._connections.add(connection)
            try:
                await trio.sleep(self.latency * self.slowness)
                await self._answers.wait()
                answer = await self._answer(request.method, request.url.path, content)
                await self._answers.wait()
                return answer
            finally:
                self._connections.discard(connection)
                self._end_if_drained()
        raise httpx.ReadError("connection reset", request=request)

    async def _answer(self, method: str, path: str, content: bytes) -> httpx.Response:
        match method, path:
            case "GET", "/health":
                return self._say("health: draining" if self.draining else "health")
            case "GET", "/version":
                return self._say("version")
            case "GET", "/v1/models":
                return self._models()
            case "GET", "/metrics":
                return self._metrics()
            case "POST", "/v1/completions":
                return await self._complete(json.loads(content))
            case "POST", "/v1/load_lora_adapter" if self.runtime_lora:
                return self._load(json.loads(content))
            case "POST", "/v1/unload_lora_adapter" if self.runtime_lora:
                return self._unload(json.loads(content)["lora_name"])
        return self._say("unknown path")

    def _say(self, exchange: str, **words: object) -> httpx.Response:
        """What was recorded, each of `words` in the place of the recorded one of the same spelling."""
        found = copy.deepcopy(EXCHANGES[exchange])
        body = found["body"]
        if "error" in body:
            body["error"]["message"] = _with(body["error"]["message"], words)
        elif isinstance(body, str):
            body = _with(body, words)
        return _response(found["status"], body)

    # -- adapters -----------------------------------------------------------------------------------

    def _models(self) -> httpx.Response:
        body = copy.deepcopy(EXCHANGES["models"]["body"])
        base, adapter = body["data"]
        loaded = [adapter | {"id": name, "root": path} for name, path in self.adapters.values()]
        return _response(200, body | {"data": [base, *loaded]})

    def _load(self, body: dict[str, Any]) -> httpx.Response:
        adapter = Adapter(body["lora_name"], body["lora_path"])
        if adapter.name == BASE:
            return self._say("load: base")
        if adapter.name in self.adapters:
            return self._say("load: again", a=adapter.name)
        if self.draining:
            return self._say("load: draining")
        try:
            weights = language.digest(Path(adapter.path))
            rank = json.loads((Path(adapter.path) / "adapter_config.json").read_text())["r"]
        except OSError:
            return self._say("load: missing", b=adapter.name)
        except (ValueError, LookupError):
            return self._say("load: broken")
        if rank > self.max_lora_rank:
            return self._say("load: rank", **{"128": rank, "64": self.max_lora_rank})
        refused = self.refuses_loads
        if [file.name for file in Path(adapter.path).iterdir()] == ["adapter_config.json"]:
            refused = f"Worker failed with error '{adapter.path} doesn't contain tensors', please check"
        if refused:
            message = EXCHANGES["load: rank"]["body"]["error"]["message"].partition(":")[0]
            return _error(500, f"{message}: {refused}")
        self.adapters[adapter.name] = adapter
        self._hold(adapter, weights)
        return self._say("load", a=adapter.name)

    def _unload(self, name: str) -> httpx.Response:
        """It only forgets the name: what runs goes on, and the weights stay until others need the room."""
        found = self.adapters.pop(name, None)
        if self.watch is not None and found is not None:
            runs = [*self._running, *self._waiting]
            self.watch.unloads(name, used=any(run.adapter == found for run in runs))
        return self._say("unload: again" if found is None else "unload", a=name)

    def _hold(self, adapter: Adapter, weights: bytes) -> None:
        self._cache[adapter] = weights
        self._cache.move_to_end(adapter)
        used = {run.adapter for run in self._running}
        unused = [held for held in self._cache if held not in used and held != adapter]
        while len(self._cache) > self.max_cpu_loras and unused:
            del self._cache[unused.pop(0)]

    def _weights(self, adapter: Adapter | None) -> bytes:
        """FileNotFoundError where vLLM's engine dies of it."""
        if adapter is None:
            return language.BASE
        self._hold(adapter, self._cache.get(adapter) or language.digest(Path(adapter.path)))
        # The KV of prompts is found by name and path, whatever is behind them now.
        return self._prefixes.setdefault(adapter, self._cache[adapter])

    # -- completions --------------------------------------------------------------------------------

    async def _complete(self, body: dict[str, Any]) -> httpx.Response:
        model = body.get("model") or BASE
        if model != BASE and model not in self.adapters:
            return self._say("completion: no such model", b=model)
        if (refusal := self._refusal(body)) is not None:
            return refusal
        if self.draining:
            return self._aborted("completion: draining", model, body)
        run = _Run(self.adapters.get(model), body)
        self._waiting.append(run)
        self._schedule()
        try:
            return await self._run(run, model)
        finally:
            if not run.counted:  # given up by its client: what was generated stays counted
                self._generated += self._progress(run) * run.n
            for runs in (self._waiting, self._running):
                if run in runs:
                    runs.remove(run)
            self._schedule()

    async def _run(self, run: _Run, model: str) -> httpx.Response:
        choices: list[language.Choice] = []
        weights = b""
        with run.scope:
            await run.admitted.wait()
            try:
                weights = self._weights(run.adapter)
            except FileNotFoundError:
                if self.watch is not None and run.adapter is not None:
                    self.watch.dies(run.adapter.path)
                self._die()
                return self._say("completion: files gone")
            if self.watch is not None:
                self.watch.computes(run.adapter and run.adapter.path, run.body)
            choices = self._generate(weights, run.body)
            run.tokens = max(len(choice.tokens) for choice in choices)
            run.began = trio.current_time()
            await trio.sleep(run.tokens * self.token_seconds * self.slowness)
            await self._computes.wait()
        if run.fate == "dead":
            return self._say("completion: files gone")
        if run.fate == "abort":
            if not choices:
                return self._aborted("completion: aborted", model, run.body)
            choices = [choice.cut(self._progress(run)) for choice in choices]
        else:
            self.answered.append(Answered(model, run.adapter and run.adapter.path, run.body))
        self._generated += sum(len(choice.tokens) for choice in choices)
        run.counted = True
        if run.adapter and run.adapter.path in self.diverged:
            return self._say("completion: diverged")
        return self._completion(model, run.body, weights, choices)

    def _schedule(self) -> None:
        """In the order of arrival, but past those whose adapter has no place."""
        for run in [*self._waiting]:
            places = {other.adapter for other in self._running} - {None}
            lacks_place = run.adapter not in {None, *places} and len(places) >= self.max_loras
            full = self._running and sum(other.n for other in self._running) + run.n > self.max_num_seqs
            if self._paused or full:
                break
            if not lacks_place:
                self._waiting.remove(run)
                self._running.append(run)
                run.admitted.set()

    def _cut(self, run: _Run, fate: Literal["abort", "dead"]) -> None:
        run.fate = fate
        run.scope.cancel()

    def _die(self) -> None:
        """The engine is dead, and the process ends with it."""
        self.up = False
        for run in [*self._running, *self._waiting]:
            self._cut(run, "dead")

    def _end_if_drained(self) -> None:
        if self.draining and not self._running and not self._waiting:
            self.kill()

    def _progress(self, run: _Run) -> int:
        if run.began is None:
            return 0
        step = self.token_seconds * self.slowness
        now = trio.current_time() if self._computes.is_set() else self._frozen_at
        done = int((now - run.began) / step) if step else run.tokens
        return min(max(done, 0), run.tokens)

    def _refusal(self, body: dict[str, Any]) -> httpx.Response | None:
        """In the order in which vLLM looks."""
        prompt, stops, most = body["prompt"], body.get("stop") or [], self.max_logprobs
        bad = [token for token in body["stop_token_ids"] if not 0 <= token < language.VOCABULARY]
        if len(stops) > self.max_stops:
            return self._say("completion: stops", **{"5": len(stops), "4": self.max_stops})
        if not prompt:
            return self._say("completion: no prompt")
        if len(prompt) > CONTEXT:
            return self._say("completion: long prompt", **{"257": len(prompt)})
        if (token := max(prompt)) >= language.VOCABULARY:
            return self._say("completion: vocabulary", **{"5000": token})
        if body["temperature"] > 2:
            return self._say("completion: temperature", **{"2.5": body["temperature"]})
        if body["logprobs"] > most:
            return self._say("completion: sample logprobs", **{"21": body["logprobs"], "20": most})
        if (body.get("prompt_logprobs") or 0) > most:
            return self._say("completion: prompt logprobs", **{"21": body["prompt_logprobs"], "20": most})
        if bad:
            return self._say("completion: stop token", **{"5000": bad[0]})
        return None

    def _generate(self, weights: bytes, body: dict[str, Any]) -> list[language.Choice]:
        processed = self.logprobs_mode == "processed"
        return [
            language.generate(weights, body, number, CONTEXT, processed=processed)
            for number in range(body["n"])
        ]

    def _completion(
        self, model: str, body: dict[str, Any], weights: bytes, choices: list[language.Choice]
    ) -> httpx.Response:
        """The recorded answer, with these choices."""
        answer = copy.deepcopy(EXCHANGES["completion"]["body"])
        template = answer["choices"][0]
        scores = None
        if (k := body.get("prompt_logprobs")) is not None:
            scores = [
                entries
                and {
                    str(token): {"logprob": value, "rank": rank, "decoded_token": language.text([token])}
                    for token, (value, rank) in entries.items()
                }
                for entries in language.score(weights, body["prompt"], k)
            ]
        answer["model"] = model
        answer["choices"] = [
            template
            | {
                "index": index,
                "text": choice.text,
                "logprobs": {
                    "text_offset": [0] * len(choice.tokens),
                    "token_logprobs": choice.logprobs,
                    "tokens": [f"token_id:{token}" for token in choice.tokens],
                    "top_logprobs": [
                        {f"token_id:{token}": value for token, value in top.items()} for top in choice.top
                    ],
                },
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
                "token_ids": choice.tokens,
                "prompt_logprobs": scores,
                "prompt_token_ids": body["prompt"],
            }
            for index, choice in enumerate(choices)
        ]
        asked, given = len(body["prompt"]), sum(len(choice.tokens) for choice in choices)
        counts = {"prompt_tokens": asked, "completion_tokens": given, "total_tokens": asked + given}
        answer["usage"] |= counts
        return _response(200, answer)

    def _aborted(self, exchange: str, model: str, body: dict[str, Any]) -> httpx.Response:
        answer = copy.deepcopy(EXCHANGES[exchange]["body"])
        answer["model"] = model
        template = answer["choices"][0] | {"prompt_token_ids": body["prompt"]}
        answer["choices"] = [template | {"index": index} for index in range(body["n"])]
        return _response(200, answer)

    # -- load ---------------------------------------------------------------------------------------

    def _metrics(self) -> httpx.Response:
        places = {run.adapter for run in self._running} - {None}
        deferred = [run for run in self._waiting if run.adapter and run.adapter not in places]
        values = {
            "vllm:num_requests_running{": sum(run.n for run in self._running),
            "vllm:num_requests_waiting{": sum(run.n for run in self._waiting),
            'reason="deferred"': sum(run.n for run in deferred),
            "vllm:kv_cache_usage_perc{": min(len(self._running) / self.max_num_seqs, 1.0),
            "vllm:generation_tokens_total{": self._generated
            + sum(self._progress(run) * run.n for run in self._running),
        }
        lines = []
        for line in EXCHANGES["metrics"]["body"].splitlines():
            value = next((value for part, value in values.items() if part in line), 0.0)
            lines.append(f"{line.rpartition(' ')[0]} {float(value)}\n")
        return _response(200, "".join(lines))


class Network(World):
    """A world in which these doubles are all that can be reached, by their origins."""

    def __init__(self, doubles: Mapping[str, VllmDouble]) -> None:
        self._doubles = doubles

    def http_transport(self, origin: str, max_slots: int) -> httpx.AsyncBaseTransport:
        return self._doubles[origin].transport()


class _Transport(httpx.AsyncBaseTransport):
    def __init__(self, server: VllmDouble) -> None:
        self._server = server

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return await self._server.handle(request)


def _with(text: str, words: dict[str, object]) -> str:
    """Whole words only, all at once."""
    if not words:
        return text
    pattern = "|".join(rf"(?<![\w.]){re.escape(word)}(?![\w]|\.\d)" for word in words)
    return re.sub(pattern, lambda found: str(words[found[0]]), text)


def _error(status: int, message: str) -> httpx.Response:
    kind = "InternalServerError"
    error = {"message": message, "type": kind, "param": None, "code": status}
    return _response(status, {"error": error})


def _response(status: int, body: Any) -> httpx.Response:
    if isinstance(body, str):
        return httpx.Response(status, text=body)
    return httpx.Response(status, json=body)
