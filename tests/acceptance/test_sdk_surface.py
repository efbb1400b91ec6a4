"""Every public method of the installed SDK against a real `tink serve`.

The methods are found by introspection: one that a new SDK adds fails the test until it is exercised here,
or is listed as unsupported with the reason.
"""

from __future__ import annotations

import asyncio
import inspect
import urllib.request
from collections.abc import Callable
from datetime import date
from types import SimpleNamespace
from typing import Any

import pytest
import tinker
from tinker import types
from tinker.lib.queue_state_logger import QueueState

from tests.live import LiveServer

pytestmark = [
    pytest.mark.slow,
    # The SDK's own: half of its surface is deprecated in favour of the other half.
    pytest.mark.filterwarnings("ignore"),
]

CLASSES = (tinker.ServiceClient, tinker.TrainingClient, tinker.SamplingClient, tinker.RestClient)
KEY = "tml-local"
HOUR = 3600

# All of them MAY be missing by the wire's own account (reference: tinker-wire 1.2).
UNSUPPORTED = {
    "ServiceClient.copy_weights": "E38: publish the checkpoint and load it by its address",
    "RestClient.copy_weights": "E38",
    "RestClient.copy_weights_async": "E38",
    "RestClient.export_session_trace": "E36: the journal has it all",
    "RestClient.export_session_trace_async": "E36",
    "RestClient.get_audit_log": "E41: the journal is plain SQL",
    "RestClient.get_audit_log_async": "E41",
    "RestClient.get_billing_usage": "E41: nothing is billed",
    "RestClient.get_billing_usage_async": "E41",
    "RestClient.get_current_checkpoint_storage_usage": "E41",
    "RestClient.get_current_checkpoint_storage_usage_async": "E41",
    "RestClient.whoami": "E3: reads the claims of a token, and keys are not exchanged for tokens",
}

Exercise = Callable[[SimpleNamespace], Any]
EXERCISES: dict[str, Exercise] = {}


def exercise(*names: str) -> Callable[[Exercise], Exercise]:
    """`do` uses the methods called `names`."""

    def register(do: Exercise) -> Exercise:
        for name in names:
            assert name not in EXERCISES
            EXERCISES[name] = do
        return do

    return register


def surface() -> set[str]:
    return {
        f"{cls.__name__}.{name}"
        for cls in CLASSES
        for name, _ in inspect.getmembers(cls)
        if not name.startswith("_")
    }


@pytest.fixture(scope="module")
def sdk(live_server: LiveServer) -> Any:
    """A client of each class, of a run with one step, one checkpoint of each kind and one sampler."""
    patch = pytest.MonkeyPatch()
    patch.setenv("TINKER_API_KEY", KEY)
    patch.setenv("TINKER_BASE_URL", live_server.url)
    service = tinker.ServiceClient(user_metadata={"made": "by a test"})
    rest = tinker.RestClient()
    [model] = rest.get_server_capabilities().result().supported_models
    training = service.create_lora_training_client(
        model.model_name, rank=4, seed=1, user_metadata={"renderer_name": "none"}
    ).result()
    data = [datum([1, 2, 3, 4, 5])]
    training.forward_backward(data, "cross_entropy").result()
    training.optim_step(types.AdamParams(learning_rate=1e-3)).result()
    state = training.save_state("base").result().path
    weights = training.save_weights_for_sampler("base").result().path
    external = training.save_weights_external("base").result().path
    yield SimpleNamespace(
        base=model.model_name,
        service=service,
        rest=rest,
        training=training,
        data=data,
        state=state,
        weights=weights,
        external=external,
        sampler=service.create_sampling_client(model_path=weights).result(),
        run=training.get_info().model_id,
        session=training.get_info().model_id.partition(":")[0],
        prompt=types.ModelInput.from_ints([1, 2, 3]),
        params=types.SamplingParams(max_tokens=3, seed=5),
    )
    service.close("success").result()
    patch.undo()


def datum(tokens: list[int]) -> types.Datum:
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)},
    )


_numbers = iter(range(10**6))


def fresh(prefix: str) -> str:
    return f"{prefix}-{next(_numbers)}"


def test_every_public_method_is_exercised_or_listed() -> None:
    assert surface() == EXERCISES.keys() | UNSUPPORTED.keys()
    assert not EXERCISES.keys() & UNSUPPORTED.keys()
    for name in sorted(UNSUPPORTED):
        print(f"unsupported: {name} ({UNSUPPORTED[name]})")


# -- ServiceClient ----------------------------------------------------------------------------------


@exercise("ServiceClient.holder", "ServiceClient.get_console_url", "ServiceClient.get_telemetry")
def service_itself(sdk):
    assert sdk.service.holder is not None
    assert sdk.session in sdk.service.get_console_url()
    sdk.service.get_telemetry()


@exercise("ServiceClient.close")
def close(sdk):
    service = tinker.ServiceClient()
    service.create_sampling_client(base_model=sdk.base).result()
    service.close("errored", "a detail").result()


@exercise("ServiceClient.get_server_capabilities", "ServiceClient.get_server_capabilities_async")
def capabilities(sdk):
    [one] = sdk.service.get_server_capabilities().supported_models
    [other] = asyncio.run(sdk.service.get_server_capabilities_async()).supported_models
    assert one == other
    assert one.trainable
    assert one.sampleable
    assert one.max_context_length > 16


@exercise("ServiceClient.create_rest_client")
def rest_client(sdk):
    assert sdk.service.create_rest_client().get_session(sdk.session).result().training_run_ids


@exercise("ServiceClient.create_lora_training_client", "ServiceClient.create_lora_training_client_async")
def create(sdk):
    one = sdk.service.create_lora_training_client(sdk.base, rank=8, train_unembed=False).result()
    assert (one.get_info().lora_rank, one.get_info().is_lora) == (8, True)
    other = asyncio.run(sdk.service.create_lora_training_client_async(sdk.base, rank=2, seed=3))
    assert other.get_info().lora_rank == 2


@exercise(
    "ServiceClient.create_training_client_from_state",
    "ServiceClient.create_training_client_from_state_async",
    "ServiceClient.create_training_client_from_state_with_optimizer",
    "ServiceClient.create_training_client_from_state_with_optimizer_async",
)
def from_state(sdk):
    service, state = sdk.service, sdk.state
    made = [
        service.create_training_client_from_state(state, user_metadata={"renderer_name": "x"}).result(),
        asyncio.run(service.create_training_client_from_state_async(state)),
        service.create_training_client_from_state_with_optimizer(state).result(),
        asyncio.run(service.create_training_client_from_state_with_optimizer_async(state)),
    ]
    results = [client.forward(sdk.data, "cross_entropy").result().metrics["loss:sum"] for client in made]
    assert len(set(results)) == 1
    assert {client.get_info().lora_rank for client in made} == {4}
    run = sdk.rest.get_training_run(made[0].get_info().model_id).result()
    assert run.user_metadata == {"renderer_name": "x"}


@exercise("ServiceClient.create_sampling_client", "ServiceClient.create_sampling_client_async")
def sampling_clients(sdk):
    made = [
        sdk.service.create_sampling_client(model_path=sdk.weights).result(),
        sdk.service.create_sampling_client(base_model=sdk.base).result(),
        sdk.service.create_sampling_client(model_path=sdk.weights, base_model=sdk.base).result(),
        asyncio.run(sdk.service.create_sampling_client_async(model_path=sdk.weights)),
    ]
    values = [client.compute_logprobs(sdk.prompt).result() for client in made]
    assert values[0] == values[2] == values[3] != values[1]


def squared(logprobs, weights):
    loss = (logprobs * logprobs * weights).sum()
    return loss, {"custom/squared:sum": loss}


@exercise("ServiceClient.create_custom_loss")
def custom_loss_handle(sdk):
    handle = sdk.service.create_custom_loss(squared, input_ranks={"logprobs": 1, "weights": 1}).result()
    result = sdk.training.forward_backward_custom(sdk.data, handle).result()
    assert result.metrics["custom/squared:sum"] > 0


# -- TrainingClient ---------------------------------------------------------------------------------


@exercise("TrainingClient.get_console_url", "TrainingClient.get_telemetry", "TrainingClient.get_tokenizer")
def training_itself(sdk):
    assert sdk.run in sdk.training.get_console_url()
    sdk.training.get_telemetry()
    tokenizer = sdk.training.get_tokenizer()
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"


@exercise("TrainingClient.get_info", "TrainingClient.get_info_async")
def info(sdk):
    one, other = sdk.training.get_info(), asyncio.run(sdk.training.get_info_async())
    assert one == other
    assert (one.model_data.model_name, one.lora_rank) == (sdk.base, 4)


@exercise(
    "TrainingClient.forward",
    "TrainingClient.forward_async",
    "TrainingClient.forward_backward",
    "TrainingClient.forward_backward_async",
    "TrainingClient.optim_step",
    "TrainingClient.optim_step_async",
)
def step(sdk):
    async def with_async():
        forward = await sdk.training.forward_async(sdk.data, "cross_entropy")
        backward = await sdk.training.forward_backward_async(sdk.data, "cross_entropy")
        stepped = await sdk.training.optim_step_async(types.AdamParams(learning_rate=1e-3))
        return [await forward, await backward, await stepped]

    forward = sdk.training.forward(sdk.data, "cross_entropy").result()
    backward = sdk.training.forward_backward(sdk.data, "cross_entropy").result()
    assert forward.metrics["loss:sum"] == backward.metrics["loss:sum"]
    sdk.training.optim_step(types.AdamParams(learning_rate=1e-3)).result()
    later = asyncio.run(with_async())
    assert later[1].metrics["loss:sum"] < backward.metrics["loss:sum"]
    [output] = later[1].loss_fn_outputs
    assert len(output["logprobs"].data) == 4


@exercise("TrainingClient.forward_backward_custom", "TrainingClient.forward_backward_custom_async")
def custom(sdk):
    def loss(data, logprobs):
        total = sum(-one.sum() for one in logprobs)
        return total, {"mine": float(total)}

    training = sdk.service.create_lora_training_client(sdk.base, rank=4, seed=1).result()
    expected = training.forward(sdk.data, "cross_entropy").result().metrics["loss:sum"]
    one = training.forward_backward_custom(sdk.data, loss).result()

    async def with_async():
        return await (await training.forward_backward_custom_async(sdk.data, loss))

    other = asyncio.run(with_async())
    assert one.metrics["mine"] == pytest.approx(expected, rel=1e-5)
    assert other.metrics["mine"] == one.metrics["mine"]


@exercise(
    "TrainingClient.save_state",
    "TrainingClient.save_state_async",
    "TrainingClient.load_state",
    "TrainingClient.load_state_async",
    "TrainingClient.load_state_with_optimizer",
    "TrainingClient.load_state_with_optimizer_async",
)
def states(sdk):
    training = sdk.service.create_lora_training_client(sdk.base, rank=4, seed=1).result()

    def loss():
        return training.forward(sdk.data, "cross_entropy").result().metrics["loss:sum"]

    def train():
        training.forward_backward(sdk.data, "cross_entropy").result()
        training.optim_step(types.AdamParams(learning_rate=1e-2)).result()

    async def with_async(path):
        saved = await (await training.save_state_async("two"))
        await (await training.load_state_async(path))
        await (await training.load_state_with_optimizer_async(path))
        return saved.path

    train()
    before = loss()
    path = training.save_state("one", ttl_seconds=HOUR, user_metadata={"a": "b"}).result().path
    assert path == f"tinker://{training.get_info().model_id}/weights/one"
    train()
    after = loss()
    assert after != before
    training.load_state(path).result()
    assert loss() == before
    training.load_state_with_optimizer(path).result()
    train()
    # Weights and moments are back, so the same step gives the same bits.
    assert loss() == after
    assert asyncio.run(with_async(path)).endswith("/weights/two")
    assert loss() == before
    assert training.save_state("one", overwrite=True).result().path == path


@exercise("TrainingClient.save_weights_for_sampler", "TrainingClient.save_weights_for_sampler_async")
def sampler_weights(sdk):
    async def with_async():
        return await (await sdk.training.save_weights_for_sampler_async(fresh("a"), ttl_seconds=HOUR))

    name = fresh("s")
    path = sdk.training.save_weights_for_sampler(name, user_metadata={"a": "b"}).result().path
    assert path == f"tinker://{sdk.run}/sampler_weights/{name}"
    assert "/sampler_weights/a-" in asyncio.run(with_async()).path


@exercise("TrainingClient.save_weights_external", "TrainingClient.save_weights_external_async")
def external_weights(sdk):
    async def with_async():
        return await (await sdk.training.save_weights_external_async(fresh("a")))

    saved = sdk.training.save_weights_external(fresh("x"), ttl_seconds=HOUR).result()
    assert "/external_weights/x-" in saved.path
    assert "/external_weights/a-" in asyncio.run(with_async()).path


@exercise(
    "TrainingClient.save_weights_and_get_sampling_client",
    "TrainingClient.save_weights_and_get_sampling_client_async",
    "TrainingClient.create_sampling_client",
    "TrainingClient.create_sampling_client_async",
)
def training_samplers(sdk):
    training = sdk.training
    made = [
        training.save_weights_and_get_sampling_client().result(),
        training.save_weights_and_get_sampling_client(kind="inflight").result(),
        asyncio.run(training.save_weights_and_get_sampling_client_async()),
        training.create_sampling_client(
            training.save_weights_for_sampler(fresh("n")).result().path
        ).result(),
        asyncio.run(training.create_sampling_client_async(sdk.weights)),
    ]
    values = [client.compute_logprobs(sdk.prompt).result() for client in made]
    assert values[0] == values[1] == values[2] == values[3]
    assert values[4] == sdk.sampler.compute_logprobs(sdk.prompt).result()


# -- SamplingClient ---------------------------------------------------------------------------------


@exercise(
    "SamplingClient.get_base_model",
    "SamplingClient.get_base_model_async",
    "SamplingClient.get_telemetry",
    "SamplingClient.on_queue_state_change",
)
def sampler_itself(sdk):
    assert sdk.sampler.get_base_model() == sdk.base
    assert asyncio.run(sdk.sampler.get_base_model_async()) == sdk.base
    sdk.sampler.get_telemetry()
    sdk.sampler.on_queue_state_change(QueueState.ACTIVE, None)


@exercise("SamplingClient.get_tokenizer")
def sampler_tokenizer(sdk):
    """The SDK asks the Hugging Face cache for the base model's name, never the server: Tink has put the
    tokenizer of the built-in model there."""
    tokenizer = sdk.sampler.get_tokenizer()
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"


@exercise("SamplingClient.create")
def sampler_create(sdk):
    made = tinker.SamplingClient.create(sdk.service.holder, base_model=sdk.base).result()
    assert made.sample(sdk.prompt, 1, sdk.params).result().sequences


@exercise("SamplingClient.get_sampler_handle", "SamplingClient.from_sampler_handle")
def sampler_handle(sdk):
    clone = tinker.SamplingClient.from_sampler_handle(sdk.sampler.get_sampler_handle(), api_key=KEY)
    one = clone.sample(sdk.prompt, 1, sdk.params).result()
    other = sdk.sampler.sample(sdk.prompt, 1, sdk.params).result()
    assert one.sequences[0].tokens == other.sequences[0].tokens


@exercise("SamplingClient.sample", "SamplingClient.sample_async")
def sample(sdk):
    one = sdk.sampler.sample(sdk.prompt, 2, sdk.params).result()
    other = asyncio.run(sdk.sampler.sample_async(sdk.prompt, 2, sdk.params))
    assert [s.tokens for s in one.sequences] == [s.tokens for s in other.sequences]
    for sequence in one.sequences:
        assert len(sequence.logprobs) == len(sequence.tokens) <= 3
        assert sequence.stop_reason in ("stop", "length")


@exercise("SamplingClient.compute_logprobs", "SamplingClient.compute_logprobs_async")
def compute_logprobs(sdk):
    one = sdk.sampler.compute_logprobs(sdk.prompt).result()
    assert one == asyncio.run(sdk.sampler.compute_logprobs_async(sdk.prompt))
    assert one[0] is None
    assert all(value < 0 for value in one[1:])


# -- RestClient -------------------------------------------------------------------------------------


def both(client: Any, method: str, *args: Any, **kwargs: Any) -> Any:
    """The answer of `method`, which its async variant gives too."""

    async def with_async():
        return await getattr(client, f"{method}_async")(*args, **kwargs)

    one = getattr(client, method)(*args, **kwargs).result()
    assert asyncio.run(with_async()) == one
    return one


def rest_pair(method: str) -> Callable[[Exercise], Exercise]:
    return exercise(f"RestClient.{method}", f"RestClient.{method}_async")


@exercise("RestClient.get_telemetry", "RestClient.get_server_capabilities")
def rest_itself(sdk):
    sdk.rest.get_telemetry()
    assert sdk.rest.get_server_capabilities().result().supported_models[0].model_name == sdk.base


@rest_pair("get_training_run")
def get_training_run(sdk):
    run = both(sdk.rest, "get_training_run", sdk.run, access_scope="accessible")
    assert (run.training_run_id, run.base_model, run.lora_rank) == (sdk.run, sdk.base, 4)
    assert run.user_metadata == {"renderer_name": "none"}
    with pytest.raises(tinker.NotFoundError):
        sdk.rest.get_training_run("nobody:train:0").result()


@rest_pair("get_training_run_by_tinker_path")
def get_run_by_path(sdk):
    assert both(sdk.rest, "get_training_run_by_tinker_path", sdk.state).training_run_id == sdk.run


@exercise("RestClient.get_weights_info_by_tinker_path")
def weights_info(sdk):
    found = sdk.rest.get_weights_info_by_tinker_path(sdk.state).result()
    assert (found.base_model, found.lora_rank, found.train_mlp) == (sdk.base, 4, True)


@rest_pair("list_training_runs")
def list_training_runs(sdk):
    listed = both(sdk.rest, "list_training_runs", limit=1000)
    assert sdk.run in [run.training_run_id for run in listed.training_runs]
    assert listed.cursor.total_count == len(listed.training_runs)
    page = sdk.rest.list_training_runs(limit=1, offset=1).result()
    assert page.training_runs == listed.training_runs[1:2]


@rest_pair("list_checkpoints")
def list_checkpoints(sdk):
    found = both(sdk.rest, "list_checkpoints", sdk.run).checkpoints
    kinds = {c.checkpoint_id: c.checkpoint_type for c in found}
    assert kinds["weights/base"] == "training"
    assert kinds["sampler_weights/base"] == "sampler"
    assert kinds["external_weights/base"] == "external"
    assert all(c.size_bytes for c in found)


@rest_pair("list_user_checkpoints")
def list_user_checkpoints(sdk):
    found = both(sdk.rest, "list_user_checkpoints", limit=1000).checkpoints
    assert {sdk.state, sdk.weights, sdk.external} <= {c.tinker_path for c in found}
    assert [c.time for c in found] == sorted((c.time for c in found), reverse=True)


def saved(sdk) -> str:
    return sdk.training.save_state(fresh("tmp")).result().path


def stored(sdk, path: str) -> Any:
    found = sdk.rest.list_user_checkpoints(limit=1000).result().checkpoints
    return next((c for c in found if c.tinker_path == path), None)


@rest_pair("delete_checkpoint")
def delete_checkpoint(sdk):
    path = saved(sdk)
    sdk.rest.delete_checkpoint(sdk.run, path.partition(f"{sdk.run}/")[2]).result()
    assert stored(sdk, path) is None
    path = saved(sdk)

    async def with_async():
        await sdk.rest.delete_checkpoint_async(sdk.run, path.partition(f"{sdk.run}/")[2])

    asyncio.run(with_async())
    assert stored(sdk, path) is None
    with pytest.raises(tinker.NotFoundError):
        sdk.rest.delete_checkpoint_from_tinker_path(path).result()


@rest_pair("delete_checkpoint_from_tinker_path")
def delete_by_path(sdk):
    path = saved(sdk)
    sdk.rest.delete_checkpoint_from_tinker_path(path).result()
    assert stored(sdk, path) is None
    path = saved(sdk)

    async def with_async():
        await sdk.rest.delete_checkpoint_from_tinker_path_async(path)

    asyncio.run(with_async())
    assert stored(sdk, path) is None


@exercise(
    "RestClient.publish_checkpoint_from_tinker_path",
    "RestClient.publish_checkpoint_from_tinker_path_async",
    "RestClient.unpublish_checkpoint_from_tinker_path",
    "RestClient.unpublish_checkpoint_from_tinker_path_async",
)
def publish(sdk):
    path = saved(sdk)
    both(sdk.rest, "publish_checkpoint_from_tinker_path", path)
    assert stored(sdk, path).public
    both(sdk.rest, "unpublish_checkpoint_from_tinker_path", path)
    assert not stored(sdk, path).public


@rest_pair("set_checkpoint_ttl_from_tinker_path")
def ttl(sdk):
    path = saved(sdk)
    both(sdk.rest, "set_checkpoint_ttl_from_tinker_path", path, HOUR)
    left = stored(sdk, path).expires_at - stored(sdk, path).time
    assert HOUR - 60 < left.total_seconds() < HOUR + 60
    both(sdk.rest, "set_checkpoint_ttl_from_tinker_path", path, None)
    assert stored(sdk, path).expires_at is None


@rest_pair("get_external_weights_urls")
def external_urls(sdk):
    async def with_async():
        return await sdk.rest.get_external_weights_urls_async(sdk.external)

    for found in (sdk.rest.get_external_weights_urls(sdk.external).result(), asyncio.run(with_async())):
        assert {"adapter_config.json", "adapter_model.safetensors"} <= found.urls.keys()
        for url in found.urls.values():
            with urllib.request.urlopen(url) as answer:
                assert len(answer.read()) == int(answer.headers["Content-Length"]) > 0


@rest_pair("get_sampler")
def get_sampler(sdk):
    [sampler_id] = [
        one
        for one in sdk.rest.get_session(sdk.session).result().sampler_ids
        if one == sdk.sampler._sampling_session_id
    ]
    found = both(sdk.rest, "get_sampler", sampler_id)
    assert (found.base_model, found.model_path) == (sdk.base, sdk.weights)


@rest_pair("get_session")
def get_session(sdk):
    found = both(sdk.rest, "get_session", sdk.session)
    assert sdk.run in found.training_run_ids
    assert found.user_metadata == {"made": "by a test"}


@rest_pair("list_sessions")
def list_sessions(sdk):
    assert sdk.session in both(sdk.rest, "list_sessions", limit=1000).sessions


@exercise("RestClient.search_sessions")
def search_sessions(sdk):
    wanted = types.SessionSearchRequest(user_metadata={"made": "by a test"}, limit=1)
    found = sdk.rest.search_sessions(wanted).result()
    assert [one.session_id for one in found.sessions] == [sdk.session]
    assert found.sessions[0].checkpoints_count >= 3
    assert found.next_cursor is None


@rest_pair("assign_session_project")
def assign_project(sdk):
    both(sdk.rest, "assign_session_project", sdk.session, "project-1")
    listed = sdk.rest.list_training_runs(limit=1000, project_id="project-1").result().training_runs
    assert sdk.run in [run.training_run_id for run in listed]
    assert sdk.rest.list_training_runs(project_id="project-2").result().training_runs == []


# -- the tests --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted({do.__name__ for do in EXERCISES.values()}))
def test_method(sdk: SimpleNamespace, name: str) -> None:
    globals()[name](sdk)


def _copy_in_a_project(sdk: SimpleNamespace) -> Any:
    """The service copies to the project that it is in, so there must be one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINKER_PROJECT_ID", "p")
        return sdk.service.copy_weights(sdk.state)


def _unsupported_calls(sdk: SimpleNamespace) -> dict[str, Callable[[], Any]]:
    rest = sdk.rest
    return {
        "ServiceClient.copy_weights": lambda: _copy_in_a_project(sdk),
        "RestClient.copy_weights": lambda: rest.copy_weights(sdk.state, "p"),
        "RestClient.copy_weights_async": lambda: rest.copy_weights_async(sdk.state, "p"),
        "RestClient.export_session_trace": lambda: rest.export_session_trace(sdk.session),
        "RestClient.export_session_trace_async": lambda: rest.export_session_trace_async(sdk.session),
        "RestClient.get_audit_log": lambda: rest.get_audit_log(day=date(2026, 1, 1)),
        "RestClient.get_audit_log_async": lambda: rest.get_audit_log_async(day=date(2026, 1, 1)),
        "RestClient.get_billing_usage": lambda: rest.get_billing_usage("2026-01-01", "2026-01-02"),
        "RestClient.get_billing_usage_async": lambda: rest.get_billing_usage_async(
            "2026-01-01", "2026-01-02"
        ),
        "RestClient.get_current_checkpoint_storage_usage": rest.get_current_checkpoint_storage_usage,
        "RestClient.get_current_checkpoint_storage_usage_async": (
            rest.get_current_checkpoint_storage_usage_async
        ),
        "RestClient.whoami": rest.whoami,
    }


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_what_is_unsupported_says_so_at_once(sdk: SimpleNamespace, name: str) -> None:
    async def call() -> Any:
        return await _unsupported_calls(sdk)[name]()

    # whoami is refused by the SDK itself.
    refusal = "requires JWT auth" if name == "RestClient.whoami" else "not supported by Tink"
    with pytest.raises((tinker.NotFoundError, RuntimeError), match=refusal):
        asyncio.run(call())
