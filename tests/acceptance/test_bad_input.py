"""What a client gets wrong, against a real `tink serve`: a clear error to that caller; the server, its log
and the other clients as before.

Most of it the SDK would not send, so it is sent over plain HTTP.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import tinker
import zstandard
from tinker import types

from tests.live import LiveServer
from tink import limits
from tink.wire.tinker_pb2 import DTYPE_FLOAT32, DTYPE_INT64, ForwardBackwardRequest

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

KEY = {"X-API-Key": "tml-local"}


class Client:
    """Plain HTTP, with the numbers that the SDK would count."""

    def __init__(self, url: str, base: str) -> None:
        self.http = httpx.Client(base_url=f"{url}/api/v1", headers=KEY, timeout=60)
        self.base = base
        self.session = self.post("/create_session", {"tags": [], "sdk_version": "0"})["session_id"]
        self.run = f"{self.session}:train:0"
        made = {
            "session_id": self.session,
            "model_seq_id": 0,
            "base_model": base,
            "lora_config": {"rank": 4},
        }
        assert "error" not in self.outcome(self.post("/create_model", made))
        made = {"session_id": self.session, "sampling_session_seq_id": 0, "base_model": base}
        self.sampler = self.post("/create_sampling_session", made)["sampling_session_id"]
        self.numbers = iter(range(1, 10**6))

    def post(self, path: str, sent: Any) -> Any:
        answer = self.http.post(path, json=sent)
        assert answer.is_success, answer.text
        return answer.json()

    def outcome(self, promise: Any) -> Any:
        """What became of a promise, within one poll; of protobuf, nothing is looked at."""
        answer = self.http.post(
            "/retrieve_future", json={"request_id": promise["request_id"], "allow_metadata_only": False}
        )
        assert answer.is_success, answer.text
        is_json = answer.headers["Content-Type"] == "application/json"
        return answer.json() if is_json else {}

    def train(self, body: bytes, **headers: str) -> httpx.Response:
        return self.http.post(
            "/forward_backward", content=body, headers={"Content-Type": "application/x-protobuf", **headers}
        )

    def step(self, **params: float) -> Any:
        sent = {"model_id": self.run, "seq_id": next(self.numbers), "adam_params": params}
        return self.outcome(self.post("/optim_step", sent))

    def works(self) -> None:
        assert "error" not in self.outcome(self.train(batch(self.run, next(self.numbers))).json())
        assert "error" not in self.step(learning_rate=1e-4)


@pytest.fixture(scope="module")
def server(live_server: LiveServer) -> Any:
    """The server, and a client with the SDK that nothing here may disturb."""
    patch = pytest.MonkeyPatch()
    patch.setenv("TINKER_API_KEY", "tml-local")
    patch.setenv("TINKER_BASE_URL", live_server.url)
    service = tinker.ServiceClient()
    [model] = tinker.RestClient().get_server_capabilities().result().supported_models
    training = service.create_lora_training_client(model.model_name, rank=4, seed=1).result()
    datum = types.Datum(
        model_input=types.ModelInput.from_ints([1, 2, 3]),
        loss_fn_inputs={"target_tokens": [2, 3, 4], "weights": [1.0, 1.0, 1.0]},
    )
    value = training.forward([datum], "cross_entropy").result().metrics["loss:sum"]
    yield SimpleNamespace(
        live=live_server,
        base=model.model_name,
        context=model.max_context_length,
        undisturbed=lambda: (
            training.forward([datum], "cross_entropy").result().metrics["loss:sum"] == value
        ),
    )
    service.close("success").result()
    patch.undo()


@pytest.fixture(scope="module")
def plain(server: Any) -> Any:
    client = Client(server.live.url, server.base)
    yield client
    client.http.close()


@pytest.fixture(autouse=True)
def everything_else_is_as_before(server: Any, plain: Client) -> Any:
    """Around each test: the same processes, no traceback in either log, and both clients served."""
    pids = server.live.process.pid, server.live.trainer_pid()
    before = len(server.live.output()), len(trainer_log(server.live))
    yield
    assert (server.live.process.poll(), server.live.trainer_pid()) == (None, pids[1])
    worker, trainer = server.live.output()[before[0] :], trainer_log(server.live)[before[1] :]
    assert "Traceback" not in worker, worker
    assert "Traceback" not in trainer, trainer
    assert "level=error" not in worker, worker
    assert server.undisturbed()
    plain.works()


def trainer_log(live: LiveServer) -> str:
    path = live.home / "logs" / "trainer.log"
    return path.read_text(errors="replace") if path.exists() else ""


def batch(run: str, number: int, **changes: Any) -> bytes:
    """One datum; `changes` replace the tensors of its loss, as (values, dtype, shape)."""
    loss_fn = changes.pop("loss_fn", "cross_entropy")
    tokens = changes.pop("tokens", [1, 2, 3])
    message = ForwardBackwardRequest(model_id=run, seq_id=number, loss_fn=loss_fn)
    datum = message.data.add()
    datum.model_input.add().encoded_text.tokens = struct.pack(f"<{len(tokens)}i", *tokens)
    inputs = {
        "target_tokens": ([2, 3, 4], DTYPE_INT64, [3]),
        "weights": ([1.0, 1.0, 1.0], DTYPE_FLOAT32, [3]),
        **changes,
    }
    for name, value in inputs.items():
        if value is not None:
            values, dtype, shape = value
            code = "q" if dtype == DTYPE_INT64 else "f"
            tensor = datum.loss_fn_inputs[name]
            tensor.dense = struct.pack(f"<{len(values)}{code}", *values)
            tensor.dtype = dtype
            tensor.shape.extend(shape)
    return message.SerializeToString()


def assert_refused(outcome: Any, *words: str) -> None:
    assert outcome.keys() == {"error", "category"}, outcome
    assert outcome["category"] == "user", outcome
    for word in words:
        assert word.lower() in outcome["error"].lower(), outcome


# -- training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights": ([float("nan"), 1, 1], DTYPE_FLOAT32, [3])}, ["weights"]),
        ({"weights": ([float("inf"), 1, 1], DTYPE_FLOAT32, [3])}, ["weights"]),
        ({"weights": ([1.0], DTYPE_FLOAT32, [1])}, ["weights"]),
        ({"weights": ([1.0, 1.0, 1.0], DTYPE_FLOAT32, [4])}, []),
        ({"weights": ([1.0, 1.0, 1.0], DTYPE_FLOAT32, [-1])}, []),
        ({"weights": ([1.0, 1.0, 1.0], DTYPE_FLOAT32, [2**40, 2**40])}, []),
        ({"weights": None}, ["weights"]),
        ({"target_tokens": None}, ["target_tokens"]),
        ({"target_tokens": ([2, 3], DTYPE_INT64, [2])}, ["target_tokens"]),
        ({"target_tokens": ([2, 3, 10**9], DTYPE_INT64, [3])}, ["1000000000"]),
        ({"target_tokens": ([2, 3, -5], DTYPE_INT64, [3])}, ["-5"]),
        ({"tokens": [1, 2, 10**9]}, ["1000000000"]),
        ({"tokens": [1, 2, -1]}, ["-1"]),
        ({"tokens": []}, []),
        ({"loss_fn": "no_such_loss"}, ["no_such_loss"]),
        ({"loss_fn": "stable_reinforce"}, ["stable_reinforce"]),
        ({"loss_fn": "custom"}, ["custom"]),
        ({"loss_fn": "ppo"}, []),
        ({"loss_fn": ""}, []),
    ],
)
def test_a_batch_that_makes_no_sense(plain, changes, words):
    answer = plain.train(batch(plain.run, next(plain.numbers), **changes))
    assert_refused(plain.outcome(answer.json()), *words)


def test_a_prompt_past_the_context(server, plain):
    long = [1] * (server.context + 1)
    ones = ([1.0] * len(long), DTYPE_FLOAT32, [len(long)])
    body = batch(
        plain.run,
        next(plain.numbers),
        tokens=long,
        target_tokens=(long, DTYPE_INT64, [len(long)]),
        weights=ones,
    )
    assert_refused(plain.outcome(plain.train(body).json()), str(server.context))
    answer = plain.http.post("/asample", json=sampling(plain, prompt=long))
    assert_refused(plain.outcome(answer.json()), str(server.context))


def test_a_batch_without_data(plain):
    empty = ForwardBackwardRequest(model_id=plain.run, seq_id=next(plain.numbers), loss_fn="cross_entropy")
    outcome = plain.outcome(plain.train(empty.SerializeToString()).json())
    assert_refused(outcome)


def test_protobuf_cut_off_in_the_middle(plain):
    body = batch(plain.run, next(plain.numbers))
    assert_refused(plain.outcome(plain.train(body[:-3]).json()), "ForwardBackwardRequest")


@pytest.mark.parametrize("body", [b"", b"\xff" * 100, b"{}"])
def test_protobuf_that_is_none(plain, body):
    answer = plain.train(body)
    assert answer.status_code == 400
    assert answer.json()["detail"]


@pytest.mark.parametrize(
    ("params", "word"),
    [
        ('{"learning_rate": NaN}', "valid OptimStep"),
        ('{"learning_rate": 1e999}', ""),
        ('{"learning_rate": "fast"}', "learning_rate"),
        ('{"learning_rate": -1.0}', "learning_rate"),
        ('{"beta1": 1.5}', "beta1"),
        ("[]", "adam_params"),
    ],
)
def test_an_optimizer_step_that_makes_no_sense(plain, params, word):
    sent = f'{{"model_id": "{plain.run}", "seq_id": {next(plain.numbers)}, "adam_params": {params}}}'
    answer = plain.http.post("/optim_step", content=sent, headers={"Content-Type": "application/json"})
    assert_refused(plain.outcome(answer.json()), word)


def test_an_optimizer_of_another_family(plain):
    sent = {"model_id": plain.run, "seq_id": next(plain.numbers), "optimizer_params": {"type": "dimuon"}}
    assert_refused(plain.outcome(plain.post("/optim_step", sent)), "dimuon")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"base_model": "no/such-model"}, "no/such-model"),
        ({"lora_config": {"rank": 0}}, "rank"),
        ({"lora_config": {"rank": -4}}, "rank"),
        ({"lora_config": {"rank": 10**6}}, "rank"),
        ({"lora_config": {"rank": "big"}}, "rank"),
        ({"lora_config": {"rank": 2**70}}, "rank"),
        ({"lora_config": {"rank": 4, "seed": 2**70}}, "seed"),
        ({"lora_config": {"rank": 4, "train_mlp": False, "train_attn": False, "train_unembed": False}}, ""),
        ({"user_metadata": {"x": "y" * 100_000}}, ""),
        ({"optimizer_config": {"type": "dimuon"}}, "dimuon"),
    ],
)
def test_a_model_that_cannot_be_made(plain, changes, word):
    made = {"session_id": plain.session, "model_seq_id": next(_models), "base_model": plain.base}
    promise = plain.post("/create_model", {**made, "lora_config": {"rank": 4}, **changes})
    assert_refused(plain.outcome(promise), word)


_models = iter(range(1, 10**6))

NAMES = [
    "..",
    "../../etc",
    "a/b",
    "a..b",
    "/etc/passwd",
    "",
    " ",
    "a b",
    "a\x00b",
    "é",
    "-x",
    ".hidden",
    "x" * 200,
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("path", ["/save_weights", "/save_weights_for_sampler", "/save_weights_external"])
def test_a_checkpoint_name_that_is_none(server, plain, path, name):
    before = set(os.listdir(server.live.home))
    promise = plain.post(path, {"model_id": plain.run, "seq_id": next(plain.numbers), "path": name})
    assert_refused(plain.outcome(promise))
    assert set(os.listdir(server.live.home)) == before


@pytest.mark.parametrize(
    "path",
    [
        "tinker://nobody:train:0/weights/x",
        "tinker://../../x",
        "tinker://a/weights/../..",
        "/etc/passwd",
        "file:///etc/passwd",
        "",
    ],
)
def test_weights_that_are_not_there(plain, path):
    sent = {"model_id": plain.run, "seq_id": next(plain.numbers), "path": path, "optimizer": False}
    assert_refused(plain.outcome(plain.post("/load_weights", sent)))
    sampler = {"session_id": plain.session, "sampling_session_seq_id": 50, "model_path": path}
    assert plain.http.post("/create_sampling_session", json=sampler).status_code in (400, 404)
    assert plain.http.post("/weights_info", json={"tinker_path": path}).status_code in (400, 404)


@pytest.mark.parametrize("ttl", [-1, 0, 10**18, 2**70])
def test_a_time_to_live_that_is_none(plain, ttl):
    sent = {"model_id": plain.run, "seq_id": next(plain.numbers), "path": f"ttl{ttl}", "ttl_seconds": ttl}
    assert_refused(plain.outcome(plain.post("/save_weights", sent)), "ttl")


# -- sampling ---------------------------------------------------------------------------------------


def sampling(plain: Client, prompt: Any = (1, 2, 3), **changes: Any) -> dict[str, Any]:
    return {
        "sampling_session_id": plain.sampler,
        "seq_id": next(_samples),
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": list(prompt)}]},
        "sampling_params": {"max_tokens": 2},
        "num_samples": 1,
        **changes,
    }


_samples = iter(range(10**6))


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": []},
        {"prompt": [10**9]},
        {"prompt": [-1]},
        {"sampling_params": {"max_tokens": -1}},
        {"sampling_params": {"max_tokens": 2, "temperature": -1.0}},
        {"sampling_params": {"max_tokens": 2, "top_p": 7.0}},
        {"sampling_params": {"max_tokens": 2, "top_k": -7}},
        {"sampling_params": {"max_tokens": 2, "stop": [""]}},
        {"sampling_params": {"max_tokens": 2, "stop": [-4]}},
        {"sampling_params": {"max_tokens": 2, "stop": ["x"] * 10_000}},
        {"sampling_params": {"max_tokens": 2, "seed": 2**70}},
        {"sampling_params": {"max_tokens": 2**70}},
        {"sampling_params": {"max_tokens": 2, "top_k": 2**70}},
        {"prompt": [2**70]},
        {"prompt_logprobs_last_n": 2**70},
        {"topk_sample_logprobs": -1},
        {"topk_prompt_logprobs": 10**6},
        {"prompt_alt_tokens_k": 10**6},
        {"prompt_logprobs_last_n": -2},
        {"target_prompt_logprobs": {"data": [1], "dtype": "int64", "shape": [9, 9]}},
        {"target_prompt_logprobs": {"data": [1, 10**9], "dtype": "int64", "shape": [2, 1]}},
        {"num_samples": 0},
        {"num_samples": 10**9},
        {"prompt": [1], "extra": None, "sampling_params": {"max_tokens": "many"}},
    ],
)
def test_a_sample_that_makes_no_sense(plain, changes):
    changes = dict(changes)
    answer = plain.http.post("/asample", json=sampling(plain, changes.pop("prompt", (1, 2, 3)), **changes))
    if answer.is_success:
        assert_refused(plain.outcome(answer.json()))
    else:
        assert answer.status_code == 400
        assert answer.json()["detail"]


def test_a_sampler_of_a_model_that_is_not_served(plain):
    sent = {"session_id": plain.session, "sampling_session_seq_id": 60, "base_model": "no/such-model"}
    answer = plain.http.post("/create_sampling_session", json=sent)
    assert answer.status_code in (400, 404)
    assert "no/such-model" in answer.json()["detail"]


# -- bodies -----------------------------------------------------------------------------------------


def test_a_body_over_the_limit_consumes_its_number(plain):
    head = f'{{"model_id": "{plain.run}", "seq_id": {next(plain.numbers)}, "x": "'
    answer = plain.http.post(
        "/optim_step",
        content=head + "y" * (limits.MAX_JSON_BODY + 1) + '"}',
        headers={"Content-Type": "application/json"},
    )
    assert_refused(plain.outcome(answer.json()), "over the limit")


@pytest.mark.parametrize("path", ["/create_session", "/asample", "/retrieve_future", "/telemetry"])
def test_a_body_over_the_limit_is_refused(plain, path):
    huge = {"events": [], "request_id": "x" * (limits.MAX_JSON_BODY + 1)}
    answer = plain.http.post(path, json=huge)
    assert (answer.status_code, "limit" in answer.json()["detail"]) == (413, True)


@pytest.mark.parametrize("declared", [True, False])
def test_a_zstd_bomb(plain, declared):
    """A quarter of a gigabyte out of some kilobytes, behind the ids of a job."""
    content = batch(plain.run, next(plain.numbers)) + bytes(256 << 20)
    bomb = zstandard.ZstdCompressor(write_content_size=declared).compress(content)
    answer = plain.train(bomb, **{"Content-Encoding": "zstd"})
    assert_refused(plain.outcome(answer.json()), "decompresses to more")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"a":NaN}'])
def test_json_that_is_none(plain, body):
    for path in (
        "/create_session",
        "/create_model",
        "/optim_step",
        "/asample",
        "/get_info",
        "/sessions/search",
    ):
        answer = plain.http.post(path, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400, (path, answer.text)
        assert answer.json()["detail"]


def test_ids_that_are_nobodys(plain):
    for path, sent in {
        "/get_info": {"model_id": "x:train:0"},
        "/optim_step": {"model_id": f"{plain.session}:train:77", "seq_id": 1},
        "/retrieve_future": {"request_id": "x:train:0:1", "allow_metadata_only": True},
        "/session_heartbeat": {"session_id": "x"},
    }.items():
        answer = plain.http.post(path, json=sent)
        assert (answer.status_code, list(answer.json())) == (404, ["detail"]), (path, answer.text)


def test_bytes_that_are_not_http(server):
    for sent in (b"\x00" * 100, b"GET / HTTP/1.1\r\nno colon\r\n\r\n", b"GET " + b"/" * 200_000):
        with socket.create_connection(("127.0.0.1", server.live.port), timeout=10) as stream:
            stream.sendall(sent)
            stream.shutdown(socket.SHUT_WR)
            while stream.recv(65536):
                pass


def test_clients_that_leave_in_the_middle(server, plain):
    head = "POST /api/v1/optim_step HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    for rest in ("", "Content-Length: 1000\r\n\r\n{", "Transfer-Encoding: chunked\r\n\r\n5\r\nabc"):
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", server.live.port), timeout=10) as stream:
                stream.sendall((head + rest).encode())


def test_many_bad_requests_beside_good_ones(server, plain):
    """A storm of nonsense from one client; the other's steps go on and give what they give alone."""

    def storm() -> None:
        with httpx.Client(base_url=f"{server.live.url}/api/v1", headers=KEY, timeout=60) as http:
            for i in range(100):
                http.post("/forward_backward", content=os.urandom(i), headers={"Content-Type": "x/y"})
                http.post("/optim_step", content=b"{", headers={"Content-Type": "application/json"})

    threads = [threading.Thread(target=storm) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        plain.works()
    for thread in threads:
        thread.join()


def test_what_was_refused_reads_the_same_after_all_that(plain):
    """A refusal is a durable result like any other."""
    number = next(plain.numbers)
    promise = plain.train(batch(plain.run, number, loss_fn="no_such_loss")).json()
    first = plain.outcome(promise)
    again = plain.train(batch(plain.run, number)).json()
    assert again["request_id"] == promise["request_id"]
    assert plain.outcome(again) == first
    assert json.loads(json.dumps(first))["category"] == "user"
