"""The REST API of a real worker with its real trainer, for a client that has httpx and nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import status_code_conformance

from tests.live import LiveServer
from tink.domain.routing import HOW_TO_SAMPLE, HOW_TO_TRAIN, NO_SAMPLING, NO_TRAINING, NO_VLLM
from tools.ports import free_port

pytestmark = pytest.mark.slow

DOCUMENTATION = Path(__file__).resolve().parents[2] / "docs/rest.md"
BIN = Path(sys.executable).parent

CHAT = [
    {"role": "user", "content": "What is Tink?"},
    {"role": "assistant", "content": "A worker that forgets nothing."},
]
SAMPLING = {"max_tokens": 8, "seed": 1, "temperature": 0.7}


class Client:
    """Plain HTTP. `url` is that of a worker that may come back."""

    def __init__(self, server: LiveServer) -> None:
        self.server = server

    def post(self, route: str, key: str | None = None, /, **sent: Any) -> httpx.Response:
        headers = {} if key is None else {"Idempotency-Key": key}
        return httpx.post(f"{self.server.url}{route}", json=sent, headers=headers, timeout=120)

    def result(self, route: str, key: str | None = None, /, **sent: Any) -> Any:
        answer = self.post(route, key, **sent)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def retrieve(self, request_id: str) -> Any:
        deadline = time.monotonic() + 120
        while (answer := self.post("/retrieve_future", request_id=request_id)).status_code == 202:
            assert answer.json() == {"status": "pending"}
            assert time.monotonic() < deadline
        assert answer.status_code == 200, answer.text
        return answer.json()


@pytest.fixture
def client(own_server: LiveServer) -> Client:
    own_server.start()
    return Client(own_server)


def _run(client: Client, *, killed: bool) -> list[Any]:
    """What a client gets that makes, trains, samples and removes an adapter, step by step. `killed`: the
    worker dies between each submission and its retrieval, and before the answer is used."""

    def promised(name: str, key: str, /, **sent: Any) -> Any:
        first = client.result(f"/api/v1/{name}", key, **sent)
        if killed:
            client.server.kill()
            client.server.start()
            assert client.result(f"/api/v1/{name}", key, **sent) == first, "the first promise"
        return client.retrieve(first["request_id"])

    base = httpx.get(f"{client.server.url}/get_server_capabilities").json()["supported_models"][0]
    model = promised("add_lora_async", "add", base_model=base["model_name"], rank=4, alpha=8, seed=3)[
        "model_id"
    ]
    found = []
    for step in range(2):
        batch = promised("fwdbwd_async", f"b{step}", model_id=model, data=[CHAT], loss_fn="cross_entropy")
        found += [batch["loss"], batch["loss_fn_outputs"]]
        adam = {"learning_rate": 0.01}
        found.append(promised("optim_async", f"o{step}", model_id=model, adam_params=adam)["metrics"])
    sample = promised("asample", "s", model_id=model, messages=CHAT[:1], sampling_params=SAMPLING)
    found.append(sample["sequences"])
    saved = promised("save_weights_async", "save", model_id=model, path="final")
    assert saved["path"] == f"tinker://{model}/weights/final"
    assert promised("remove_lora_async", "remove", model_id=model) == {"model_id": model}
    return found


def test_a_whole_run_is_the_same_if_the_worker_is_killed_behind_each_submission(
    client: Client, tmp_path: Path
) -> None:
    undisturbed = _run(client, killed=False)
    other = LiveServer(tmp_path / "other")
    try:
        other.start()
        disturbed = _run(Client(other), killed=True)
    finally:
        other.close()
    assert disturbed == undisturbed
    first, second = undisturbed[0], undisturbed[3]
    assert second < first, "it has learnt"
    (sequence,) = undisturbed[6]
    assert len(sequence["tokens"]) == len(sequence["logprobs"]) <= 8
    assert isinstance(sequence["text"], str)


def test_the_short_forms_wait_and_errors_are_http_s(client: Client) -> None:
    base = httpx.get(f"{client.server.url}/get_server_capabilities").json()["supported_models"][0]
    model = client.result("/add_lora", base_model=base["model_name"], rank=4)["model_id"]
    datum = {
        "model_input": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]},
        "loss_fn_inputs": {
            "target_tokens": {"data": [2, 3, 4], "dtype": "int64", "shape": [3]},
            "weights": {"data": [0.0, 1.0, 1.0], "dtype": "float32", "shape": [3]},
        },
    }
    plain = {"model_input": [1, 2, 3], "loss_fn_inputs": {"target_tokens": [2, 3, 4], "weights": [0, 1, 1]}}
    forward = client.result("/fwd", model_id=model, data=[datum, plain])
    outputs = forward["loss_fn_outputs"]
    assert outputs[0] == outputs[1]
    assert len(outputs[0]["logprobs"]["data"]) == 3
    before = client.result("/sample", model_id=model, prompt=[1, 2, 3], sampling_params=SAMPLING)
    client.result("/fwdbwd", model_id=model, data=[datum])
    client.result("/optim_step", model_id=model, adam_params={"learning_rate": 0.3})
    after = client.result("/sample", model_id=model, prompt=[1, 2, 3], sampling_params=SAMPLING)
    assert after != before, "of the newest weights"
    assert client.result("/sample", model_id=model, prompt=[1, 2, 3], sampling_params=SAMPLING) == after
    base_model = base["model_name"]
    two = client.result("/sample", base_model=base_model, prompts=["a", "b"], sampling_params=SAMPLING)
    assert [sequence["prompt"] for sequence in two["sequences"]] == [0, 1]
    path = client.result("/save_weights_for_sampler", model_id=model, path="best")["path"]
    named = client.result("/sample", model_path=path, prompt=[1, 2, 3], sampling_params=SAMPLING)
    assert named == after
    saved = client.result("/save_weights", model_id=model, path="state")["path"]
    client.result("/load_weights", model_id=model, path=saved, optimizer=True)
    wrong = client.post("/fwdbwd", model_id=model, data=[{**datum, "loss_fn_inputs": {}}])
    assert wrong.status_code == 400
    assert "data[0]: loss_fn_inputs lacks target_tokens" in wrong.json()["detail"]
    client.result("/remove_lora", model_id=model)
    gone = client.post("/optim", model_id=model)
    assert gone.status_code == 400
    assert "was unloaded" in gone.json()["detail"]


@pytest.mark.parametrize(
    ("switches", "route", "status", "detail", "remedy"),
    [
        ({"USE_HF": "false"}, "/add_lora", 400, NO_TRAINING, HOW_TO_TRAIN),
        ({"USE_HF": "false"}, "/sample", 400, NO_SAMPLING, HOW_TO_SAMPLE),
        ({"USE_VLLM": "true"}, "/add_lora", 400, NO_TRAINING, HOW_TO_TRAIN),
        ({"USE_VLLM": "true"}, "/sample", 502, NO_VLLM, None),
    ],
)
def test_what_is_not_configured_or_not_there_is_said_with_what_to_do(
    tmp_path: Path,
    switches: dict[str, str],
    route: str,
    status: int,
    detail: str,
    remedy: str | None,
) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    server = LiveServer(tmp_path, VLLM_BASE_URL=nowhere, TINK_VLLM_WAIT_SECONDS="1", **switches)
    try:
        server.start(wait=False)
        server.wait_until_listening()
        sent = {"prompt": [1]} if route == "/sample" else {"rank": 4}
        answer = Client(server).post(route, base_model="any", **sent)
        assert answer.status_code == status
        assert answer.json()["detail"].startswith(detail)
        assert answer.json().get("remedy") == remedy
        if status == 502:
            assert nowhere in answer.json()["detail"]
            assert "start it (tink vllm), or set VLLM_BASE_URL" in answer.json()["detail"]
    finally:
        server.close()


RUN = {"bash": ["bash", "-eu"], "python": [sys.executable, "-"]}


@pytest.mark.parametrize("language", RUN)
def test_what_the_documentation_shows_works(live_server: LiveServer, tmp_path: Path, language: str) -> None:
    (block,) = re.findall(rf"```{language}\n(.*?)```", DOCUMENTATION.read_text(), re.DOTALL)
    environment = {**os.environ, "URL": live_server.url, "PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(
        RUN[language],
        input=block,
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "/weights/final" in done.stdout
    assert language == "python" or '"loss":' in done.stdout


# Drawn on a CPU: no more than these tokens.
SHORT = {"max_tokens": 4}


def _statuses(operation: schemathesis.APIOperation, url: str, known: dict[str, str]) -> set[int]:
    """Of some bodies that may be sent, every other one about what is `known`."""
    statuses = set()

    @given(case=operation.as_strategy(), aimed=st.booleans())
    @settings(max_examples=10, deadline=None, suppress_health_check=[*HealthCheck])
    def check(case: schemathesis.Case, aimed: bool) -> None:
        if isinstance(case.body, dict):
            case.body |= {name: value for name, value in known.items() if aimed and name in case.body}
            case.body |= {"sampling_params": SHORT} if "sampling_params" in case.body else {}
        answer = case.call(base_url=url, timeout=120)
        case.validate_response(answer, checks=[not_a_server_error, status_code_conformance])
        statuses.add(answer.status_code)

    check()
    return statuses


def test_nothing_that_the_description_allows_is_a_5xx(live_server: LiveServer) -> None:
    url = live_server.url
    client = Client(live_server)
    base = httpx.get(f"{url}/get_server_capabilities").json()["supported_models"][0]["model_name"]
    model = client.result("/add_lora", base_model=base, rank=4)["model_id"]
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    statuses = set()
    for found in schema.get_all_operations():
        operation = found.ok()
        # It is needed until the end.
        known = {"base_model": base} | ({} if "remove" in operation.path else {"model_id": model})
        statuses |= _statuses(operation, url, known)
    assert {200, 400, 404} <= statuses
    assert httpx.get(f"{url}/healthz").json()["status"] == "ok"
    client.result("/optim", model_id=model)
