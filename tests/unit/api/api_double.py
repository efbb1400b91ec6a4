"""A double of the worker, and one valid request per route.

`Worker` is what `ask` is in production: it answers each message with something of the right type that
is made of the message itself, and writes down what it was asked. It has no queue, no journal and no
backend; `script` replaces an answer, or raises it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import msgspec
import trio

from tink.domain import ids, messages, rows
from tink.errors import NotFound
from tink.wire.tinker_pb2 import ForwardBackwardRequest
from tink.world import World

SESSION = "5e55" * 8
RUN = f"{SESSION}:train:0"
SAMPLER = f"{SESSION}:sample:0"
BASE = "tink/tiny"
WHEN = 1_700_000_000.25


class StillWorld(World):
    """A world whose wall clock stands still, at WHEN."""

    def __init__(self) -> None:
        self.time = WHEN

    def now(self) -> float:
        return self.time

    async def run_sync(self, fn: Callable[..., Any], *args: Any, limiter: object = None) -> Any:
        await trio.lowlevel.checkpoint()
        return fn(*args)


class Worker:
    def __init__(self) -> None:
        self.asked: list[messages.Question] = []
        self.scripted: dict[type, Any] = {}
        self.outcomes: dict[str, messages.Outcome] = {}
        self._ended: defaultdict[str, trio.Event] = defaultdict(trio.Event)
        # How many questions are waiting for an outcome.
        self.waiting = 0

    def script(self, kind: type, answer: Any) -> None:
        """Answer `kind` with `answer`, or by calling it, or by raising it."""
        self.scripted[kind] = answer

    @property
    def last(self) -> Any:
        return self.asked[-1]

    async def ask(self, question: messages.Question) -> Any:
        self.asked.append(question)
        await trio.lowlevel.checkpoint()
        answer = self.scripted.get(type(question), _ordinary)
        if isinstance(answer, Exception):
            raise answer
        if isinstance(question, messages.AwaitOutcome) and answer is _ordinary:
            return await self._outcome(question.job_id)
        return answer(question) if callable(answer) else answer

    async def end(self, job_id: str, outcome: messages.Outcome) -> None:
        await trio.lowlevel.checkpoint()
        self.outcomes[job_id] = outcome
        self._ended[job_id].set()

    async def _outcome(self, job_id: str) -> messages.Outcome:
        self.waiting += 1
        try:
            if job_id not in self.outcomes:
                await self._ended[job_id].wait()
            return self.outcomes[job_id]
        finally:
            self.waiting -= 1


def _ordinary(q: messages.Question) -> Any:
    match q:
        case messages.CreateSession():
            return messages.Created(SESSION)
        case messages.GetSession():
            return messages.SessionView(session(q.session_id), [RUN], [SAMPLER])
        case messages.ListSessions():
            return [session()]
        case messages.SubmitTraining():
            seq = 9 if q.seq_id is None else q.seq_id
            return messages.Promise(ids.job_id(q.model_id, seq), model_id=q.model_id)
        case messages.SubmitSample():
            job = ids.job_id(q.sampler_id, 9 if q.seq_id is None else q.seq_id)
            return messages.Promise(job, sample_sequence_ids=ids.sequence_ids(job, q.num_samples))
        case messages.GetModel():
            return model(q.model_id)
        case messages.ListModels():
            return [model()]
        case messages.GetWeights():
            return training_job(q.model_id)
        case messages.GetSample() | messages.GetTokenizer():
            return None
        case messages.CreateSampler():
            return messages.Created(ids.sampler_id(q.session_id, q.sampling_seq_id))
        case messages.GetSampler():
            return sampler(q.sampler_id)
        case messages.ListCheckpoints():
            return [checkpoint(), checkpoint("sampler_weights")]
        case messages.ForkCheckpoint():
            return checkpoint()
        case messages.GetCheckpoint():
            address = ids.Address.parse(q.address)
            saved = checkpoint(address.kind, address.name)
            return messages.CheckpointView(saved, model().row, {"adapter_config.json": 3, "a b/c.bin": 5})
        case messages.GetCapabilities():
            return messages.Capabilities([messages.ServedModel(BASE, 2048, True, True)])
        case messages.GetHealth():
            return messages.Health("hf", {"trainer": "ready"})
        case messages.GetMetrics():
            return b"tink_diverged_total 0.0\n"
    return None


def session(session_id: str = SESSION, **changes: Any) -> rows.Session:
    row = rows.Session(
        session_id=session_id,
        tenant="default",
        tags=["t"],
        user_metadata={"a": "b", "n": 1},
        sdk_version="0.38.0",
        project_id=None,
        display_name="My run",
        idempotency_key=None,
        created_at=WHEN,
    )
    return msgspec.structs.replace(row, **changes)


def model(model_id: str = RUN) -> messages.ModelView:
    row = rows.Model(
        model_id=model_id,
        tenant="default",
        session_id=SESSION,
        model_seq_id=0,
        state="live",
        base_model=BASE,
        rank=8,
        train_attn=True,
        train_mlp=True,
        train_unembed=False,
        user_metadata={"renderer_name": "qwen3", "n": 1, "nested": {"x": [1]}},
        created_at=WHEN,
        last_request_at=WHEN,
    )
    return messages.ModelView(row, "qwen3", "/home/tiny", checkpoint(), None)


def training_job(model_id: str = RUN, **changes: Any) -> rows.Job:
    row = rows.Job(
        job_id=ids.job_id(model_id, 4),
        tenant="default",
        op="optim_step",
        state="done",
        session_id=SESSION,
        model_id=model_id,
        sampler_id=None,
        seq_id=4,
        model_seq_id=None,
        accepted_seq=1,
        submitted_at=WHEN,
        body_sha256=None,
        body_bytes=0,
        codec="identity",
        seed=None,
        num_samples=None,
    )
    return msgspec.structs.replace(row, **changes)


def sampler(sampler_id: str = SAMPLER) -> rows.Sampler:
    return rows.Sampler(
        sampler_id=sampler_id,
        tenant="default",
        session_id=SESSION,
        sampling_seq_id=0,
        base_model=BASE,
        model_path=f"tinker://{RUN}/sampler_weights/final",
        adapter_id=f"{RUN}@1",
        created_at=WHEN,
    )


def checkpoint(kind: str = "weights", name: str = "final") -> rows.Checkpoint:
    return rows.Checkpoint(
        checkpoint_id=f"{RUN}/{kind}/{name}",
        tenant="default",
        model_id=RUN,
        kind=kind,
        name=name,
        directory=f"{SESSION}/0/00000003-{kind}",
        size_bytes=8,
        adapter_id=None,
        user_metadata={"step": "1"},
        created_at=WHEN,
        expires_at=WHEN + 3600,
    )


def protobuf(model_id: str = RUN, seq_id: int = 1, **fields: Any) -> bytes:
    message = ForwardBackwardRequest(model_id=model_id, seq_id=seq_id, loss_fn="cross_entropy", **fields)
    datum = message.data.add()
    datum.model_input.add().encoded_text.tokens = b"\1\0\0\0" * 64
    return message.SerializeToString()


def lease(path: str) -> str:
    """`path` of a route, with ids in the place of its parameters."""
    kind = "external_weights" if "urls" in path else "weights"
    parameters = {
        "session_id": SESSION,
        "run_id": RUN,
        "sampler_id": SAMPLER,
        "kind": kind,
        "name": "final",
    }
    return path.format_map(parameters)


_PROMPT = {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]}

# One valid request for each route below /api/v1 whose body matters: (method, path) -> JSON.
BODIES: dict[tuple[str, str], Any] = {
    ("POST", "/client/config"): {"sdk_version": "0.38.0"},
    ("POST", "/client/dynamic_config"): {"sdk_version": "0.38.0"},
    ("POST", "/telemetry"): {
        "events": [
            {"event": "SESSION_START"},
            {"event": "UNHANDLED_EXCEPTION", "error_type": "ValueError", "error_message": "secret"},
        ],
        "platform": "Linux",
        "sdk_version": "0.38.0",
        "session_id": SESSION,
        "process_uuid": "u",
    },
    ("POST", "/create_session"): {"tags": ["t"], "user_metadata": {"a": 1}, "sdk_version": "0.38.0"},
    ("POST", "/session_heartbeat"): {"session_id": SESSION},
    ("POST", "/sessions/search"): {"owner": {"type": "own"}, "user_metadata": {"a": "b"}},
    ("POST", "/sessions/{session_id}/finish"): {"reason": {"type": "success"}, "detail": None},
    ("PUT", "/sessions/{session_id}/project"): {"project_id": "p1"},
    ("POST", "/create_model"): {
        "session_id": SESSION,
        "model_seq_id": 0,
        "base_model": BASE,
        "lora_config": {"rank": 8},
    },
    ("POST", "/optim_step"): {"model_id": RUN, "seq_id": 2, "adam_params": {"learning_rate": 0.1}},
    ("POST", "/save_weights"): {"model_id": RUN, "path": "final", "seq_id": 3},
    ("POST", "/save_weights_for_sampler"): {"model_id": RUN, "sampling_session_seq_id": 0, "seq_id": 4},
    ("POST", "/save_weights_external"): {"model_id": RUN, "path": "x", "seq_id": 5},
    ("POST", "/load_weights"): {
        "session_id": SESSION,
        "model_seq_id": 1,
        "path": f"tinker://{RUN}/weights/final",
        "optimizer": False,
    },
    ("POST", "/unload_model"): {"model_id": RUN},
    ("POST", "/asample"): {
        "sampling_session_id": SAMPLER,
        "seq_id": 0,
        "num_samples": 2,
        "prompt": _PROMPT,
        "sampling_params": {"max_tokens": 4, "seed": 7},
    },
    ("POST", "/retrieve_future"): {"request_id": f"{RUN}:1", "allow_metadata_only": True},
    ("POST", "/cancel_future"): {"request_id": f"{SAMPLER}:0"},
    ("POST", "/create_sampling_session"): {
        "session_id": SESSION,
        "sampling_session_seq_id": 1,
        "base_model": BASE,
        "model_path": f"tinker://{RUN}/sampler_weights/final",
    },
    ("POST", "/get_info"): {"model_id": RUN},
    ("POST", "/weights_info"): {"tinker_path": f"tinker://{RUN}/weights/final"},
    ("POST", "/training_runs/{run_id}/checkpoints/weights/{name}/fork"): {
        "fork_id": "a" * 32,
        "op_no": 3,
        "step": 1,
    },
    ("PUT", "/training_runs/{run_id}/checkpoints/{kind}/{name}/ttl"): {"ttl_seconds": 3600},
}


_DATUM = {
    "model_input": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]},
    "loss_fn_inputs": {
        "target_tokens": {"data": [2, 3], "dtype": "int64", "shape": [2]},
        "weights": [0, 0.5],
    },
}
_BATCH = {
    "model_id": RUN,
    "data": [_DATUM],
    "loss_fn": "ppo",
    "loss_fn_config": {"clip_low_threshold": 0.9},
}
_CHAT = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello!"}]
_SAMPLES = [
    {"model_id": RUN, "prompt": [1, 2], "sampling_params": {"max_tokens": 4}, "num_samples": 2},
    {"model_path": f"tinker://{RUN}/sampler_weights/final", "prompts": [_PROMPT, [1]]},
    {"base_model": BASE, "messages": _CHAT[:1]},
    {"base_model": BASE, "prompt": "Hello"},
]
_SAVE = {"model_id": RUN, "path": "final", "ttl_seconds": 60, "user_metadata": {"a": "b"}}

# Valid requests of the REST API's operations.
REST: dict[str, list[dict[str, Any]]] = {
    "add_lora": [{"base_model": BASE, "rank": 4, "alpha": 8.0, "user_metadata": {"a": [1]}}],
    "remove_lora": [{"model_id": RUN}],
    "forward": [_BATCH],
    "fwd": [_BATCH],
    "fwdbwd": [_BATCH, {"model_id": RUN, "data": [_CHAT]}],
    "optim": [{"model_id": RUN, "adam_params": {"learning_rate": 0.1}}],
    "optim_step": [{"model_id": RUN}],
    "load_weights": [{"model_id": RUN, "path": f"tinker://{RUN}/weights/final", "optimizer": True}],
    "save_weights": [_SAVE],
    "save_weights_for_sampler": [_SAVE, {"model_id": RUN}],
    "sample": _SAMPLES,
}


def missing(question: messages.Question) -> Any:
    raise NotFound("there is none")
