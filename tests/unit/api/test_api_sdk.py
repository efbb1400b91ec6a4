"""The installed SDK against this HTTP side, over a real socket, with a double behind it: what the SDK
makes of each answer is what counts."""

from __future__ import annotations

import json
import os
import struct
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from api_double import BASE, SESSION, Worker

from tests.hosted import hosted
from tink.api.app import create_app
from tink.api.auth import Auth
from tink.domain import ids, messages
from tink.wire import tinker_pb2 as wire
from tink.world import World

KEY = "tml-alice"


class FinishingWorker(Worker):
    """The double, and every job ends at once, with a result of its kind."""

    def __init__(self) -> None:
        super().__init__()
        self.submitted: dict[str, Any] = {}
        self.script(messages.AwaitOutcome, lambda question: self._result(question.job_id))

    async def ask(self, question: messages.Question) -> Any:
        answer = await super().ask(question)
        if isinstance(question, messages.SubmitTraining | messages.SubmitSample):
            self.submitted[answer.request_id] = question
        return answer

    def _result(self, job_id: str) -> messages.Outcome:
        job = self.submitted[job_id]
        if isinstance(job, messages.SubmitSample):
            return messages.Outcome("sample", "done", body=_samples(job.num_samples))
        if job.invalid:
            return messages.Outcome(job.op, "failed", category="user", error=job.invalid)
        if job.op in ("forward", "forward_backward"):
            return messages.Outcome(job.op, "done", body=_logprobs())
        if job.op == "optim_step":
            return messages.Outcome(job.op, "done", result={"metrics": {"grad_norm": 0.5}})
        sent = json.loads(job.body)
        result = {"model_id": job.model_id, "path": sent.get("path")}
        if job.op == "save_weights":
            result = {"path": f"tinker://{job.model_id}/weights/{sent['path']}"}
        elif job.op == "save_weights_for_sampler" and "path" in sent:
            result = {"path": f"tinker://{job.model_id}/sampler_weights/{sent['path']}"}
        elif job.op == "save_weights_for_sampler":
            sampler = ids.sampler_id(SESSION, sent["sampling_session_seq_id"])
            result = {"path": None, "sampling_session_id": sampler}
        return messages.Outcome(job.op, "done", result=result)


def _samples(count: int) -> bytes:
    response = wire.SampleResponse()
    for i in range(count):
        response.sequences.add(
            stop_reason=wire.STOP_REASON_LENGTH,
            tokens=struct.pack("<2i", 7, i),
            logprobs=struct.pack("<2f", -0.5, -0.25),
        )
    return response.SerializeToString()


def _logprobs() -> bytes:
    output = wire.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord")
    record = output.loss_fn_outputs.add(num_datums=1)
    record.fields["logprobs"].CopyFrom(
        wire.BatchedTensor(
            data=struct.pack("<3f", -1, -2, -3), offsets=struct.pack("<2q", 0, 12), dtype=wire.DTYPE_FLOAT32
        )
    )
    output.metrics["loss:sum"] = 5.0
    return output.SerializeToString()


@pytest.fixture
def server(tmp_path):
    """(url, worker) of a real HTTP server."""
    worker = FinishingWorker()
    auth = Auth({KEY: "alice"})

    async def make(nursery):
        await trio.lowlevel.checkpoint()
        return create_app(worker.ask, auth=auth, artifacts=tmp_path, secret=b"s", world=World())

    with hosted(make) as host:
        yield host.url, worker


@pytest.mark.slow
async def test_the_sdk_understands_every_answer_of_its_main_flow(server):
    url, worker = server
    script = Path(__file__).with_name("sdk_flow.py")
    environment = {
        **os.environ,
        "TINKER_BASE_URL": url,
        "TINKER_API_KEY": KEY,
        "TINKER_TELEMETRY": "0",
        "HF_HUB_OFFLINE": "1",
    }
    run = partial(trio.run_process, capture_stdout=True, capture_stderr=True, check=False, env=environment)
    with trio.fail_after(120):
        done = await run([sys.executable, str(script)])
    assert done.returncode == 0, done.stderr.decode()
    run_id = f"{SESSION}:train:0"
    samples = [[7, 0], [7, 1]]
    seen = json.loads(done.stdout)
    refusal = seen.pop("refused")
    assert seen == {
        "info": [run_id, BASE, 8],
        "forward": {"loss:sum": 5.0},
        "logprobs": [-1.0, -2.0, -3.0],
        "metrics": {"loss:sum": 5.0},
        "step": {"grad_norm": 0.5},
        "saved": f"tinker://{run_id}/weights/final",
        "loaded": f"tinker://{run_id}/weights/final",
        "again": f"{SESSION}:train:1",
        "ephemeral": samples,
        "ephemeral base": BASE,
        "named": samples,
        "named base": BASE,
        "base": samples,
        "base base": BASE,
        "after": {"grad_norm": 0.5},
        "runs": [run_id],
    }
    assert refusal[0] == "user"
    assert "not a valid OptimStep" in refusal[1]
    assert {question.tenant for question in worker.asked} == {"alice"}
    numbers = [job.seq_id for job in worker.submitted.values() if getattr(job, "model_id", "") == run_id]
    assert sorted(numbers) == list(range(len(numbers)))
