"""The REST API: what each operation asks of the worker, and how what comes of it reads."""

from __future__ import annotations

import base64
import pickle
import struct
from typing import get_args

import httpx
import pytest
import trio
from api_double import BASE, BODIES, RUN, SAMPLER, SESSION, StillWorld, Worker, training_job
from trio.testing import wait_all_tasks_blocked

from tink import limits, pretrained
from tink.api import rest, tinker
from tink.api.app import create_app
from tink.api.auth import Auth
from tink.api.both import SDK_MEMBERS
from tink.api.chat import Message, Template
from tink.api.rest import answers, datums
from tink.api.rest.datums import LOSSES
from tink.api.texts import Texts
from tink.domain import ids, keys, messages, requests
from tink.errors import NotServed, Overloaded, StartupError, UserError
from tink.trainer import losses
from tink.wire import tinker_pb2 as pb

TENANT = "default"
DATUM = {
    "model_input": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]},
    "loss_fn_inputs": {
        "target_tokens": {"data": [2, 3], "dtype": "int64", "shape": [2]},
        "weights": {"data": [0, 0.5], "dtype": "float32", "shape": [2]},
    },
}
PLAIN = {"model_input": [1, 2], "loss_fn_inputs": {"target_tokens": [2, 3], "weights": [0, 0.5]}}
# name -> (a valid body, the worker's operation)
COMMANDS = {
    "optim": ({"model_id": RUN, "adam_params": {"learning_rate": 0.1}}, "optim_step"),
    "save_weights": ({"model_id": RUN, "path": "final"}, "save_weights"),
    "save_weights_for_sampler": ({"model_id": RUN, "path": "final"}, "save_weights_for_sampler"),
    "load_weights": ({"model_id": RUN, "path": f"tinker://{RUN}/weights/a"}, "load_weights"),
    "remove_lora": ({"model_id": RUN}, "unload_model"),
    "fwdbwd": ({"model_id": RUN, "data": [DATUM]}, "forward_backward"),
    "forward": ({"model_id": RUN, "data": [DATUM]}, "forward"),
}
KEY = {"Idempotency-Key": "k 1"}


@pytest.fixture
def post(client):
    async def post(path, sent, **headers):
        return await client.post(path, json=sent, headers=headers)

    return post


async def _ended(worker, outcome, seq=9, owner=RUN):
    await worker.end(f"{owner}:{seq}", outcome)


# -- operations -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("prefix", ["", "/api/v1"])
async def test_an_operation_is_a_job_without_a_number(post, worker, name, prefix):
    sent, op = COMMANDS[name]
    answer = await post(f"{prefix}/{name}_async", sent)
    assert answer.json() == {"request_id": f"{RUN}:9", "model_id": RUN}
    (asked,) = worker.asked
    assert (asked.tenant, asked.op, asked.session_id, asked.model_id) == (TENANT, op, SESSION, RUN)
    assert asked.seq_id is asked.model_seq_id is asked.invalid is None
    assert asked.key == ("unload" if op == "unload_model" else None)


@pytest.mark.parametrize("name", COMMANDS)
async def test_the_clients_key_is_the_jobs_and_no_key_of_tinks_own(post, worker, name):
    sent, op = COMMANDS[name]
    await post(f"/{name}_async", sent, **KEY)
    assert worker.last.key == ("unload" if op == "unload_model" else "client:k 1")


@pytest.mark.parametrize("key", ["", "x" * (limits.MAX_NAME + 1), "a\tb"])
async def test_a_key_that_cannot_be_one_is_refused(post, worker, key):
    answer = await post("/optim_async", {"model_id": RUN}, **{"Idempotency-Key": key})
    assert answer.status_code == 400
    assert "Idempotency-Key" in answer.json()["detail"]
    assert worker.asked == []


async def test_add_lora_makes_a_model_that_its_key_names_in_the_apis_own_session(post, worker):
    sent = {"base_model": BASE, "rank": 4, "alpha": 8.0, "train_mlp": False}
    answer = await post("/add_lora_async", sent, **KEY)
    number = ids.number("client:k 1")
    model = ids.model_id(SESSION, number)
    assert answer.json() == {"request_id": f"{model}:0", "model_id": model}
    session, submit = worker.asked
    assert (session.tenant, session.idempotency_key) == (TENANT, keys.REST_SESSION)
    assert (submit.op, submit.seq_id, submit.model_seq_id, submit.key) == (
        *("create_model", 0, number),
        "client:k 1",
    )
    create = requests.decode(submit.body, requests.CreateModel)
    assert (create.session_id, create.model_seq_id) == (SESSION, number)
    assert create.lora_config == requests.LoraConfig(4, train_mlp=False, alpha=8.0)
    models = {(await post("/add_lora_async", sent)).json()["model_id"] for _ in range(3)}
    assert len(models | {model}) == 4


async def test_the_synchronous_form_waits_for_the_result(post, worker):
    answers = []

    async def ask():
        answers.append(await post("/optim", {"model_id": RUN}))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await wait_all_tasks_blocked()
        assert answers == []
        await _ended(worker, messages.Outcome("optim_step", "done", result={"metrics": {"step": 1.0}}))
    assert answers[0].json() == {"model_id": RUN, "metrics": {"step": 1.0}}


async def test_a_batch_is_that_of_the_sdk_whichever_way_it_is_written(post, worker):
    bodies = []
    for data in ([DATUM], [PLAIN]):
        sent = {"model_id": RUN, "data": data, "loss_fn": "ppo", "loss_fn_config": {"a": 0.5, "b": "x"}}
        await post("/fwdbwd_async", sent)
        bodies.append(worker.last.body)
    assert bodies[0] == bodies[1]
    message = pb.ForwardBackwardRequest.FromString(bodies[0])
    assert (message.model_id, message.loss_fn, message.forward_only) == (RUN, "ppo", False)
    assert message.loss_fn_config_v2["a"].number == 0.5
    assert message.loss_fn_config_v2["b"].text == "x"
    (datum,) = message.data
    assert datum.model_input[0].encoded_text.tokens == struct.pack("<2i", 1, 2)
    weights = datum.loss_fn_inputs["weights"]
    assert (weights.dense, weights.dtype, [*weights.shape]) == (
        *(struct.pack("<2f", 0, 0.5), pb.DTYPE_FLOAT32),
        [2],
    )


@pytest.mark.parametrize(
    ("datum", "reason"),
    [
        ({**PLAIN, "model_input": [2**40]}, "data[1]: "),
        ({**PLAIN, "loss_fn_inputs": {"weights": [1e300]}}, "data[1]: "),
        ({"model_input": {"chunks": [{"type": "image"}]}, "loss_fn_inputs": {}}, "data[1]: chunk 0 is of"),
        ({**PLAIN, "loss_fn_inputs": {"w": {"data": [1], "dtype": "bool"}}}, "data[1]: the dtype 'bool'"),
        ({"model_input": [1]}, "$.data[1]"),
        ("text", "$.data[1]"),
    ],
)
async def test_a_datum_that_cannot_be_read_is_refused_by_its_number(post, worker, datum, reason):
    answer = await post("/fwdbwd", {"model_id": RUN, "data": [PLAIN, datum]})
    assert answer.status_code == 400
    assert reason in answer.json()["detail"]
    assert worker.asked == []


@pytest.mark.parametrize("sent", [{}, {"model_id": 1}, {"model_id": "x"}, {"model_id": "x:train:y"}])
async def test_an_operation_of_no_model_is_refused(post, worker, sent):
    for name, (valid, _) in COMMANDS.items():
        rest_of_it = {field: value for field, value in valid.items() if field != "model_id"}
        answer = await post(f"/{name}", {**rest_of_it, **sent})
        assert answer.status_code in (400, 404), (name, answer.text)
        assert answer.json()["detail"]
    assert worker.asked == []


PICKLE = base64.b64encode(pickle.dumps(len)).decode()


@pytest.mark.parametrize(
    "sent",
    [
        {"loss_fn": "my_loss"},
        {"loss_fn": {"pickle": PICKLE}},
        {"loss_fn": [PICKLE]},
        {"loss_fn": None},
        {"loss_fn_pickle": PICKLE},
        {"custom_loss": "lambda data, logprobs: logprobs.sum()"},
    ],
)
@pytest.mark.parametrize("name", ["fwdbwd", "fwdbwd_async", "forward"])
async def test_a_function_is_no_loss_and_the_answer_says_what_is(post, worker, name, sent):
    answer = await post(f"/{name}", {"model_id": RUN, "data": [DATUM], **sent})
    assert answer.status_code == 400
    for part in ("/list_loss_functions", "forward_backward_custom", "client"):
        assert part in answer.json()["detail"]
    assert worker.asked == []


async def test_what_the_worker_does_not_serve_is_said_with_what_to_do(post, worker):
    worker.script(messages.SubmitTraining, NotServed("what", "do"))
    answer = await post("/fwdbwd", {"model_id": RUN, "data": [DATUM]})
    assert (answer.status_code, answer.json()) == (400, {"detail": "what", "remedy": "do"})


async def test_whoever_is_to_come_again_is_told_so(post, worker):
    worker.script(messages.SubmitTraining, Overloaded("full"))
    answer = await post("/optim", {"model_id": RUN})
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "1")


# -- results ----------------------------------------------------------------------------------------


async def test_what_has_not_ended_is_pending(post, autojump_clock, worker):
    began = trio.current_time()
    answer = await post("/retrieve_future", {"request_id": f"{RUN}:9"})
    assert (answer.status_code, answer.json()) == (202, {"status": "pending"})
    assert trio.current_time() - began == pytest.approx(limits.REST_POLL_HOLD)
    assert worker.waiting == 0


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        (messages.Outcome("optim_step", "failed", category="user", error="because"), 400),
        (messages.Outcome("optim_step", "failed", category="server", error="because"), 502),
        (messages.Outcome("sample", "cancelled", error="because"), 400),
    ],
)
@pytest.mark.parametrize("prefix", ["", "/api/v1"])
async def test_a_failed_job_is_an_error_of_http(post, worker, outcome, status, prefix):
    await _ended(worker, outcome)
    answer = await post(f"{prefix}/retrieve_future", {"request_id": f"{RUN}:9"})
    assert (answer.status_code, answer.json()) == (status, {"detail": "because"})


async def test_a_batchs_result_is_read(post, worker):
    output = pb.ForwardBackwardOutput(metrics={"loss:sum": 1.5})
    record = output.loss_fn_outputs.add(num_datums=2)
    record.fields["logprobs"].CopyFrom(
        pb.BatchedTensor(
            data=struct.pack("<3f", -1, -2, -3),
            offsets=struct.pack("<3q", 0, 8, 12),
            dtype=pb.DTYPE_FLOAT32,
        )
    )
    await _ended(worker, messages.Outcome("forward_backward", "done", body=output.SerializeToString()))
    answer = await post("/retrieve_future", {"request_id": f"{RUN}:9"})
    assert answer.json() == {
        "loss": 1.5,
        "metrics": {"loss:sum": 1.5},
        "loss_fn_outputs": [
            {"logprobs": {"data": [-1.0, -2.0], "dtype": "float32", "shape": [2]}},
            {"logprobs": {"data": [-3.0], "dtype": "float32", "shape": [1]}},
        ],
    }


async def test_jobs_of_several_requests_are_no_request(post, worker):
    await _ended(worker, messages.Outcome("optim_step", "done", result={}), seq=8)
    await _ended(worker, messages.Outcome("forward_backward", "done", body=b"x"), seq=9)
    answer = await post("/retrieve_future", {"request_id": f"{RUN}:8,{RUN}:9"})
    assert answer.status_code == 404


# -- samples ----------------------------------------------------------------------------------------


def _sampled(*tokens):
    response = pb.SampleResponse()
    response.sequences.add(
        stop_reason=pb.STOP_REASON_LENGTH,
        tokens=struct.pack(f"<{len(tokens)}i", *tokens),
        logprobs=struct.pack(f"<{len(tokens)}f", *[-1.0] * len(tokens)),
    )
    return messages.Outcome("sample", "done", body=response.SerializeToString())


async def test_a_sample_of_a_model_is_of_its_newest_weights_saved_once(post, worker):
    saved = messages.Outcome("save_weights_for_sampler", "done", result={"sampling_session_id": SAMPLER})
    await _ended(worker, saved)
    sent = {"model_id": RUN, "prompt": [1, 2], "sampling_params": {"seed": 7}, "num_samples": 2}
    answer = await post("/api/v1/asample", sent, **KEY)
    assert answer.json() == {"request_id": f"{SAMPLER}:9", "model_id": RUN}
    _sample, _weights, save, wait, sample = worker.asked
    assert (save.op, save.key, wait.job_id) == ("save_weights_for_sampler", "weights 4", f"{RUN}:9")
    assert (sample.sampler_id, sample.seq_id, sample.num_samples, sample.seed, sample.key) == (
        *(SAMPLER, None, 2, 7),
        "client:k 1",
    )
    body = requests.decode(sample.body, requests.Sample)
    assert body.prompt.chunks == [requests.Chunk("encoded_text", [1, 2])]
    assert body.sampling_params.seed == 7


@pytest.mark.parametrize(
    "result", [{"sampling_session_id": SAMPLER}, {"path": f"tinker://{RUN}/sampler_weights/a"}]
)
async def test_weights_that_were_saved_are_not_saved_again(post, worker, result):
    worker.script(messages.GetWeights, training_job(op="save_weights_for_sampler"))
    await _ended(worker, messages.Outcome("save_weights_for_sampler", "done", result=result), seq=4)
    answer = await post("/asample", {"model_id": RUN, "prompt": [1]})
    assert answer.status_code == 200, answer.text
    assert not any(isinstance(asked, messages.SubmitTraining) for asked in worker.asked)
    made = [asked for asked in worker.asked if isinstance(asked, messages.CreateSampler)]
    assert [one.model_path for one in made] == ([result["path"]] if "path" in result else [])


async def test_a_sample_has_a_job_for_each_prompt_and_one_answer(post, worker):
    prompts = [[1], [2], {"chunks": [{"type": "encoded_text", "tokens": [3]}]}]
    numbers = iter(range(3))
    worker.script(
        messages.SubmitSample, lambda asked: messages.Promise(f"{asked.sampler_id}:{next(numbers)}")
    )
    answer = await post("/asample", {"base_model": BASE, "prompts": prompts}, **KEY)
    asked = [one for one in worker.asked if isinstance(one, messages.SubmitSample)]
    assert [one.key for one in asked] == ["client:k 1", "prompt 1 of client:k 1", "prompt 2 of client:k 1"]
    owner = asked[0].sampler_id
    request_id = answer.json()["request_id"]
    assert request_id == ",".join(f"{owner}:{number}" for number in range(3))
    for number in range(3):
        await _ended(worker, _sampled(number), number, owner)
    found = (await post("/retrieve_future", {"request_id": request_id})).json()
    expected = {"text": None, "logprobs": [-1.0], "stop_reason": "length"}
    assert found == {"sequences": [{"prompt": n, "tokens": [n], **expected} for n in range(3)]}


@pytest.mark.parametrize(
    "sent",
    [
        {"model_id": RUN},
        {"prompt": [1]},
        {"model_id": RUN, "base_model": BASE, "prompt": [1]},
        {"model_id": RUN, "prompt": [1], "prompts": [[1]]},
        {"model_id": RUN, "prompts": []},
        {"model_id": RUN, "prompts": [[1]] * (limits.MAX_PROMPTS + 1)},
        {"model_id": RUN, "prompt": [1], "num_samples": 0},
        {"model_id": RUN, "prompt": {"chunks": [{"type": "image"}]}},
        {"model_id": RUN, "prompt": "text, and no tokenizer here"},
    ],
)
async def test_a_sample_that_cannot_be_asked_is_refused(post, worker, sent):
    await _ended(
        worker,
        messages.Outcome("save_weights_for_sampler", "done", result={"sampling_session_id": SAMPLER}),
    )
    answer = await post("/sample", sent)
    assert answer.status_code == 400, answer.text
    assert not any(isinstance(asked, messages.SubmitSample) for asked in worker.asked)


async def test_text_comes_with_a_sample_where_its_tokenizer_can_be_had_and_keeps_no_result_back(
    post, worker, tiny_model
):
    await _ended(worker, _sampled(413, 266))
    sent = {"request_id": f"{RUN}:9"}
    for directory, is_text in (("/not/here", False), (str(tiny_model), True)):
        worker.script(messages.GetTokenizer, directory)
        (sequence,) = (await post("/retrieve_future", sent)).json()["sequences"]
        assert sequence["tokens"] == [413, 266]
        assert isinstance(sequence["text"], str) == is_text
    prompts = {"base_model": BASE, "prompts": ["A journal", [1]]}
    assert (await post("/asample", prompts)).status_code == 200
    bodies = [asked.body for asked in worker.asked if isinstance(asked, messages.SubmitSample)]
    tokens = [requests.decode(body, requests.Sample).prompt.chunks[0].tokens for body in bodies]
    assert len(tokens[0]) > 1
    assert tokens[1] == [1]


async def test_a_tokenizer_that_cannot_be_had_is_not_looked_for_at_every_request(
    monkeypatch, autojump_clock
):
    looked = []

    def find(model, patterns):
        looked.append(model)
        raise StartupError("the hub does not answer")

    monkeypatch.setattr(pretrained, "find", find)
    world = StillWorld()
    monkeypatch.setattr(world, "monotonic", trio.current_time)
    texts = Texts(world)
    for seconds in (0.0, 1.0, limits.TEXT_RETRY_SECONDS):
        await trio.sleep(seconds)
        with pytest.raises(UserError, match="the hub does not answer; send tokens"):
            await texts.of("some/model")
    assert looked == ["some/model"] * 2


# -- chats ------------------------------------------------------------------------------------------


class _Letters:
    """A tokenizer of letters."""

    def encode_places(self, text):
        return [ord(letter) for letter in text], [(at, at + 1) for at in range(len(text))]


TURNS = (
    "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def test_the_loss_of_a_chat_is_on_the_assistants_turns_alone():
    chat = [
        Message(*turn) for turn in (("user", "hi"), ("assistant", "yo"), ("user", "x"), ("assistant", "y"))
    ]
    taught = Template(TURNS, {}).teach(chat, _Letters())
    said = "".join(chr(token) if mine else "." for token, mine in zip(*taught, strict=True))
    assert "".join(map(chr, taught.tokens)) == "<u>hi;<a>yo;<u>x;<a>y;"
    assert said == ".........yo;........y;"


def test_a_chat_as_a_datum_has_the_next_tokens_and_weighs_those_of_the_assistant():
    chat = [Message("user", "hi"), Message("assistant", "yo")]
    side = (_Letters(), Template(TURNS, {}))
    (datum,) = pb.ForwardBackwardRequest.FromString(
        datums.encode(datums.Batch(RUN, [chat]), side, forward_only=False)
    ).data
    tokens = struct.unpack("<11i", datum.model_input[0].encoded_text.tokens)
    targets = struct.unpack("<11q", datum.loss_fn_inputs["target_tokens"].dense)
    weights = struct.unpack("<11f", datum.loss_fn_inputs["weights"].dense)
    assert "".join(map(chr, tokens)) == "<u>hi;<a>yo"
    assert "".join(map(chr, targets)) == "u>hi;<a>yo;"
    assert weights == (0,) * 8 + (1,) * 3


def test_a_chat_is_for_cross_entropy():
    batch = datums.Batch(RUN, [[Message("assistant", "yo")]], loss_fn="ppo")
    with pytest.raises(UserError, match=r"data\[0\]: chats are for the loss cross_entropy"):
        datums.encode(batch, (_Letters(), Template(TURNS, {})), forward_only=False)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('roles must take turns') }}", "roles must take turns"),
        ("{{ messages[0].__class__.__mro__ }}", "does not take these messages"),
        ("{{ messages|length }}{{ messages[0]['content'] }}", "writes earlier turns"),
    ],
)
def test_a_chat_that_cannot_be_written_is_refused(source, reason):
    chat = [Message("user", "hi"), Message("assistant", "yo"), Message("user", "and")]
    with pytest.raises(UserError, match=reason):
        Template(source, {}).teach(chat, _Letters())


def test_a_chat_in_which_the_assistant_says_nothing_teaches_nothing():
    with pytest.raises(UserError, match="needs a message of the assistant"):
        Template(TURNS, {}).teach([Message("user", "hi")], _Letters())


# -- beside the SDK ---------------------------------------------------------------------------------


SHARED = sorted(tinker.TABLE.keys() & rest.API.keys())


def test_the_paths_that_both_clients_have():
    assert [
        *("/asample", "/load_weights", "/optim_step", "/retrieve_future"),
        *("/save_weights", "/save_weights_for_sampler"),
    ] == SHARED


@pytest.mark.parametrize("path", SHARED)
def test_what_the_sdk_sends_there_is_told_apart(path):
    assert BODIES["POST", path].keys() & SDK_MEMBERS


@pytest.mark.parametrize("path", ["save_weights", "save_weights_for_sampler", "load_weights"])
async def test_each_client_of_a_shared_path_is_served_as_itself(client, worker, path):
    sent = {"model_id": RUN, "path": f"tinker://{RUN}/weights/a" if path == "load_weights" else "a"}
    await _ended(worker, messages.Outcome(path, "done", result={"path": "p", "type": "t"}))
    plain = await client.post(f"/api/v1/{path}", json=sent)
    assert plain.json() == {"model_id": RUN, "path": "p"}
    counting = await client.post(f"/api/v1/{path}", json={**sent, "seq_id": 5})
    assert counting.json() == {"request_id": f"{RUN}:5", "model_id": RUN}


async def test_so_is_each_who_samples_steps_or_asks_for_a_result(client, worker, autojump_clock):
    await _ended(worker, messages.Outcome("optim_step", "done", result={"metrics": {"step": 1.0}}))
    step = {"model_id": RUN, "adam_params": {"learning_rate": 0.1}}
    plain = await client.post("/api/v1/optim_step", json=step)
    assert plain.json() == {"model_id": RUN, "metrics": {"step": 1.0}}
    counting = await client.post("/api/v1/optim_step", json={**step, "seq_id": 5})
    assert counting.json() == {"request_id": f"{RUN}:5", "model_id": RUN}
    plain = await client.post("/api/v1/asample", json={"base_model": BASE, "prompt": [1]})
    assert plain.json()["model_id"] is None
    counting = await client.post("/api/v1/asample", json=BODIES["POST", "/asample"])
    assert counting.json()["request_id"] == f"{SAMPLER}:0"
    pending = {"request_id": f"{RUN}:4"}
    plain = await client.post("/api/v1/retrieve_future", json=pending)
    assert (plain.status_code, plain.json()) == (202, {"status": "pending"})
    counting = await client.post("/api/v1/retrieve_future", json={**pending, "allow_metadata_only": True})
    assert (counting.status_code, counting.json()["type"]) == (408, "try_again")


async def test_a_body_that_is_too_long_or_no_json_is_refused(client, worker):
    too_long = await client.post(
        "/save_weights", json={"model_id": RUN, "path": "x" * limits.MAX_JSON_BODY}
    )
    assert too_long.status_code == 413
    for path in ("/api/v1/save_weights", "/fwdbwd"):
        assert (await client.post(path, content=b"{}")).status_code == 415
        no_json = await client.post(path, content=b"[" * 100, headers={"Content-Type": "application/json"})
        assert no_json.status_code == 400
    assert worker.asked == []


def test_every_operation_whose_result_is_json_has_a_kind_of_answer():
    assert answers.KINDS.keys() == {*get_args(requests.OpName)} - requests.DATA_OPS


# -- the rest ---------------------------------------------------------------------------------------


async def test_the_losses_are_those_of_the_trainer(client):
    answer = await client.get("/list_loss_functions")
    named = {one["name"]: one["inputs"] for one in answer.json()["loss_functions"]}
    assert named == LOSSES == {name: [*loss.required] for name, loss in losses.LOSSES.items()}


async def test_what_is_here_is_told_at_the_root(client):
    found = (await client.get("/")).json()
    assert {"add_lora", "fwdbwd", "fwdbwd_async", "sample", "asample"} <= {*found["operations"]}
    assert (await client.get("/get_server_capabilities")).json()["supported_models"][0][
        "model_name"
    ] == BASE


async def test_every_route_wants_a_key_where_there_are_keys(tmp_path):
    worker = Worker()
    auth = Auth({"tml-a": "alice"})
    app = create_app(worker.ask, auth=auth, artifacts=tmp_path, secret=b"s", world=StillWorld())
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://tink") as client:
        paths = [*rest.SHORT, *(f"/api/v1{path}" for path in rest.API)]
        for path in paths:
            method = next(iter({**rest.SHORT, **{f"/api/v1{p}": h for p, h in rest.API.items()}}[path]))
            answer = await client.request(method, path, json={"model_id": RUN})
            assert answer.status_code == 401, path
        assert worker.asked == []
        sent = {"model_id": RUN}
        await client.post("/optim_async", json=sent, headers={"X-API-Key": "tml-a"})
        assert worker.last.tenant == "alice"
