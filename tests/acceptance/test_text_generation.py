"""A plain Megatron-LM text generation server in the place of `tink trainer`: the SDK samples from its base
model, training fails in one clear line, and all of it is journaled. The server is megatron-core's own, and
`tink trainer` behind a proxy that hides the rest of it."""

from __future__ import annotations

import http.client
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import httpx
import numpy as np
import pytest
import tinker
from tinker import types
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.live import START_SECONDS, LiveServer, LiveTrainer
from tools.ports import free_port

pytestmark = pytest.mark.slow

PLAIN = "a plain Megatron-LM text generation server, which only samples"
NAME = "tiny/plain"


class TextServer(Protocol):
    url: str

    def start(self) -> None: ...

    def kill(self) -> None: ...


class MegatronLM:
    """megatron-core's, on a port that stays the same over restarts."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.log = model, folder / "megatron-lm.log"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "tests.megatron_lm.server", str(self.model), str(self.port)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                assert httpx.get(self.url).status_code == 404
                return
            except httpx.TransportError:
                assert time.monotonic() < deadline, self.log.read_text(errors="replace")
                time.sleep(0.1)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


class HiddenTrainer:
    """`tink trainer`, of which only PUT /api is to be seen."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.trainer = trainer = LiveTrainer(folder / "trainer", "--model", model, "--engine", "megatron")

        class Proxy(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                try:
                    call = http.client.HTTPConnection("127.0.0.1", trainer.port, timeout=60)
                    call.request("PUT", self.path, body, {"content-type": "application/json"})
                    answer = call.getresponse()
                    self._answer(answer.status, answer.read())
                except OSError:
                    self._answer(502, b"Bad Gateway")

            def do_GET(self) -> None:
                self._answer(404, b"Not Found")

            def _answer(self, status: int, content: bytes) -> None:
                self.send_response(status)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self.proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
        self.url = f"http://127.0.0.1:{self.proxy.server_port}"
        threading.Thread(target=self.proxy.serve_forever, daemon=True).start()

    def start(self) -> None:
        self.trainer.start()
        self.trainer.wait_until_ready()

    def kill(self) -> None:
        self.trainer.kill()

    def close(self) -> None:
        self.kill()
        self.proxy.shutdown()
        self.proxy.server_close()


@pytest.fixture(scope="module", params=["megatron-lm", "tink trainer"])
def server(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TextServer]:
    folder = tmp_path_factory.mktemp("plain")
    if find_spec("megatron") is None:
        pytest.skip("megatron-core is not installed")
    if request.param == "tink trainer":
        hidden = HiddenTrainer(tiny_model, folder)
        yield hidden
        hidden.close()
        return
    if find_spec("flask_restful") is None:
        pytest.skip("flask-restful is not installed: there is no real text generation server")
    real = MegatronLM(tiny_model, folder)
    yield real
    real.kill()


@pytest.fixture(scope="module")
def worker(
    server: TextServer, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    """Started first: its server is not there yet."""
    tink = LiveServer(
        tmp_path_factory.mktemp("worker") / "home",
        USE_MEGATRON="true",
        MEGATRON_SERVER_URL=server.url,
        TINK_HF_MODEL=str(tiny_model),
        TINK_HF_MODEL_NAME=NAME,
    )
    try:
        tink.start(wait=False)
        tink.wait_until_listening()
        assert trainer_state(tink).startswith("awaited")
        server.start()
        tink.wait_until_ready()
        yield tink
    finally:
        tink.close()


def trainer_state(tink: LiveServer) -> str:
    return str(httpx.get(f"{tink.url}/healthz").json()["servers"]["trainer"])


@pytest.fixture(scope="module")
def service(worker: LiveServer) -> tinker.ServiceClient:
    return tinker.ServiceClient(base_url=worker.url, api_key="tml-local")


@pytest.fixture(scope="module")
def sampler(service: tinker.ServiceClient) -> tinker.SamplingClient:
    return service.create_sampling_client(base_model=NAME).result()


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def draw(sampler: tinker.SamplingClient, tokens: list[int], count: int = 1, **params: Any) -> Any:
    prompt = types.ModelInput.from_ints(tokens)
    return sampler.sample(
        prompt, num_samples=count, sampling_params=types.SamplingParams(**params)
    ).result()


def test_its_model_is_sampled_token_for_token(
    sampler: tinker.SamplingClient, tokenizer: Any, tiny_model: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    prompt = tokenizer.encode("<|im_start|>user\nReturn the")
    found = draw(sampler, prompt, 3, max_tokens=8, temperature=0.7).sequences
    # They cannot be seeded there, and one may come to its end.
    assert all(len(one.tokens) == 8 or one.stop_reason == "stop" for one in found)
    assert len({tuple(one.tokens) for one in found}) > 1
    for one in found:
        ids = model.dummy_inputs["input_ids"].new_tensor([[*prompt, *one.tokens]])
        scores = model(ids).logits[0].log_softmax(-1).detach().numpy()
        own = [scores[len(prompt) - 1 + place, token] for place, token in enumerate(one.tokens)]
        np.testing.assert_allclose(one.logprobs, own, atol=1e-4)
    (greedy,) = draw(sampler, prompt, max_tokens=8, temperature=0.0).sequences
    generated = model.generate(ids[:, : len(prompt)], max_new_tokens=8, do_sample=False)
    assert list(greedy.tokens) == generated[0, len(prompt) :].tolist()
    # So many as do not fit one call.
    assert len(draw(sampler, prompt, 130, max_tokens=1).sequences) == 130


def test_a_prompt_is_scored_and_a_stop_is_heeded(sampler: tinker.SamplingClient, tokenizer: Any) -> None:
    prompt = tokenizer.encode("Return the first of them.")
    scores = sampler.compute_logprobs(types.ModelInput.from_ints(prompt)).result()
    assert scores[0] is None
    assert len(scores) == len(prompt)
    assert all(score < 0 for score in scores[1:])
    (free,) = draw(sampler, prompt, max_tokens=12, temperature=0.0).sequences
    stop = free.tokens[5]
    (cut,) = draw(sampler, prompt, max_tokens=12, temperature=0.0, stop=[stop]).sequences
    assert list(cut.tokens) == list(free.tokens[: free.tokens.index(stop) + 1])
    assert (free.stop_reason, cut.stop_reason) == ("length", "stop")


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"seed": 3}, "seed: "),
        ({"stop": []}, "stop: an empty list"),
        ({"top_k": 5, "top_p": 0.5}, "top_k and"),
    ],
)
def test_what_it_cannot_do_is_said(
    sampler: tinker.SamplingClient, params: dict[str, Any], says: str
) -> None:
    with pytest.raises(tinker.TinkerError, match=says):
        draw(sampler, [5, 6], max_tokens=2, **params)


def test_a_prompt_that_is_of_no_text_is_refused(sampler: tinker.SamplingClient, tokenizer: Any) -> None:
    with pytest.raises(tinker.TinkerError, match="are not those of any text"):
        draw(sampler, tokenizer.encode("世")[:-1], max_tokens=2)


def test_it_is_said_what_it_is_and_what_it_cannot(
    worker: LiveServer, service: tinker.ServiceClient, server: TextServer
) -> None:
    with pytest.raises(tinker.TinkerError) as error:
        service.create_lora_training_client(base_model=NAME, rank=4).result()
    (line,) = [line for line in str(error.value).splitlines() if "Megatron" in line]
    assert f"the server at {server.url} is {PLAIN}" in line
    assert "training needs `tink trainer --engine megatron` in its place" in line
    answer = httpx.get(
        f"{worker.url}/api/v1/get_server_capabilities", headers={"X-API-Key": "tml-local"}
    ).json()
    (model,) = answer["supported_models"]
    assert (model["model_name"], model["trainable"], model["sampleable"]) == (NAME, False, True)
    assert trainer_state(worker) == f"ready: {PLAIN}"
    status = subprocess.run(
        [sys.executable, "-m", "tink.cli.main", "status", "--home", worker.home],
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"ready: {PLAIN}" in status.stdout


def test_its_samples_are_journaled_as_any_others(
    worker: LiveServer, sampler: tinker.SamplingClient
) -> None:
    def samples() -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(worker.home / "journal.sqlite")) as journal:
            columns = "state, backend, attempts, tokens_in, tokens_out, result_sha256 IS NOT NULL"
            return journal.execute(f"SELECT {columns} FROM jobs WHERE op = 'sample'").fetchall()

    before = len(samples())
    draw(sampler, [87, 549], 2, max_tokens=3)
    assert samples()[before:] == [("done", "trainer", 1, 2, 6, 1)]


def test_a_sample_waits_for_it_to_come_back(
    worker: LiveServer, sampler: tinker.SamplingClient, server: TextServer
) -> None:
    server.kill()
    prompt, params = types.ModelInput.from_ints([87, 549]), types.SamplingParams(max_tokens=3)
    waiting = sampler.sample(prompt, num_samples=1, sampling_params=params)
    worker.wait_for_output("trainer lost")
    server.start()
    assert len(waiting.result(timeout=START_SECONDS).sequences[0].tokens) == 3


def test_without_a_word_of_its_model_the_start_ends_with_what_to_set(
    server: TextServer, worker: LiveServer, tmp_path: Path
) -> None:
    lost = LiveServer(tmp_path / "home", USE_MEGATRON="true", MEGATRON_SERVER_URL=server.url)
    lost.start(wait=False)
    try:
        assert lost.wait_for_exit() == 2
        assert "set TINK_HF_MODEL to its model" in lost.output()
    finally:
        lost.close()
