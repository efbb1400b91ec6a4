"""Each route of the Tinker API: the question it asks, and how the answer reads on the wire."""

from __future__ import annotations

import msgspec
import pytest
from api_double import BASE, BODIES, RUN, SAMPLER, SESSION, lease, protobuf, session

from tink.domain import messages
from tink.errors import SessionFinished

TENANT = "default"


@pytest.fixture
def send(client):
    async def send(method, path, **changes):
        kwargs = {}
        if (method, path) in BODIES:
            kwargs["json"] = {**BODIES[method, path], **changes}
        return await client.request(method, "/api/v1" + lease(path), **kwargs)

    return send


# -- client -----------------------------------------------------------------------------------------


async def test_the_client_is_configured_to_what_the_server_can_honour(send):
    config = (await send("POST", "/client/config")).json()
    assert config["parallel_fwdbwd_chunks"] is True
    off = {"pjwt_auth_enabled", "sample_use_retrieve_futures", "sample_join_sampling_session"}
    assert not any(config[flag] for flag in off | {"custom_loss_server_side"})


async def test_samples_can_be_cancelled_so_the_client_is_told(send):
    assert (await send("POST", "/client/dynamic_config")).json()["sample_cancel_enabled"] is True


async def test_capabilities_name_the_models(send):
    answer = await send("GET", "/get_server_capabilities")
    assert answer.json() == {
        "supported_models": [
            {"model_name": BASE, "max_context_length": 2048, "trainable": True, "sampleable": True}
        ]
    }


async def test_of_telemetry_only_the_type_of_a_failure_is_kept(send, worker):
    answer = await send("POST", "/telemetry")
    assert answer.json() == {"status": "accepted"}
    assert worker.asked == [messages.ReportClientFailure(TENANT, "ValueError", SESSION)]


async def test_a_client_cannot_fill_the_journal_with_its_failures(send, worker):
    await send("POST", "/telemetry", events=[{"event": "UNHANDLED_EXCEPTION"}] * 1000)
    assert len(worker.asked) <= 8


async def test_telemetry_before_there_is_a_session_has_none(send, worker):
    await send("POST", "/telemetry", session_id="sessionless-1")
    assert worker.last.session_id is None


# -- sessions ---------------------------------------------------------------------------------------


async def test_create_session(client, worker):
    answer = await client.post(
        "/api/v1/create_session",
        json={"tags": ["x"], "user_metadata": {"k": [1]}, "sdk_version": "1", "project_id": "p", "new": 1},
        headers={"X-Idempotency-Key": "stainless-1"},
    )
    assert answer.json() == {"type": "create_session", "session_id": SESSION}
    assert worker.asked == [
        messages.CreateSession(TENANT, ["x"], {"k": [1]}, "1", "p", None, "stainless-1"),
    ]


async def test_heartbeat(send, worker):
    assert (await send("POST", "/session_heartbeat")).status_code == 200
    assert worker.asked == [messages.Heartbeat(TENANT, SESSION)]


async def test_the_heartbeat_of_a_finished_session_is_told_to_stop(send, worker):
    worker.script(messages.Heartbeat, SessionFinished("it is finished"))
    answer = await send("POST", "/session_heartbeat")
    assert (answer.status_code, answer.json()) == (410, {"detail": "it is finished"})


async def test_finish(send, worker):
    answer = await send("POST", "/sessions/{session_id}/finish")
    assert (answer.status_code, answer.content) == (204, b"")
    assert worker.asked == [messages.FinishSession(TENANT, SESSION, "success", None)]


async def test_a_session_can_change_its_project(send, worker):
    assert (await send("PUT", "/sessions/{session_id}/project")).status_code == 204
    assert worker.asked == [messages.MoveSession(TENANT, SESSION, "p1")]


async def test_session_metadata_is_all_strings(send):
    answer = await send("GET", "/sessions/{session_id}")
    assert answer.json() == {
        "training_run_ids": [RUN],
        "sampler_ids": [SAMPLER],
        "user_metadata": {"a": "b", "n": "1"},
        "display_name": "My run",
    }


async def test_sessions_are_listed_by_pages(client, worker):
    worker.script(messages.ListSessions, [session(f"{i:032x}") for i in range(5)])
    answer = await client.get("/api/v1/sessions?limit=2&offset=3&access_scope=accessible")
    assert answer.json() == {"sessions": [f"{i:032x}" for i in (3, 4)]}


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ({}, "cba"),
        ({"session_id": f"{1:032x}"}, "b"),
        ({"display_name": "RUN one"}, "b"),
        ({"display_name": "one", "session_id": f"{2:032x}"}, "cb"),
        ({"project_ids": ["p2"]}, "c"),
        ({"user_metadata": {"n": "0"}}, "a"),
        ({"user_metadata": {"n": "0", "m": "0"}}, ""),
        ({"owner": {"type": "user", "owner_urns": ["someone"]}}, ""),
        ({"owner": {"type": "user", "owner_urns": ["default"]}}, "cba"),
        ({"statuses": [{"type": "active"}]}, "ca"),
        ({"statuses": [{"type": "client_finished"}]}, "b"),
        ({"statuses": [{"type": "client_finished", "reasons": ["success"]}]}, ""),
        ({"statuses": [{"type": "failed"}]}, ""),
    ],
)
async def test_session_search(client, worker, wanted, found):
    every = [
        session(
            f"{i:032x}",
            created_at=1000.0 + i,
            project_id=f"p{i}",
            display_name=f"my run {word}",
            user_metadata={"n": i},
        )
        for i, word in enumerate(["zero", "one", "two"])
    ]
    every[1] = msgspec.structs.replace(every[1], state="finished", finish_reason="errored")
    worker.script(messages.ListSessions, every)
    answer = await client.post("/api/v1/sessions/search", json=wanted)
    assert [one["project_id"] for one in answer.json()["sessions"]] == [f"p{'abc'.index(c)}" for c in found]


async def test_session_search_goes_on_from_its_cursor(client, worker):
    worker.script(
        messages.ListSessions, [session(f"{i:032x}", created_at=1000.5 + i // 2) for i in range(5)]
    )
    seen, cursor = [], None
    for _ in range(3):
        answer = (await client.post("/api/v1/sessions/search", json={"limit": 2, "cursor": cursor})).json()
        seen += [int(one["session_id"], 16) for one in answer["sessions"]]
        cursor = answer["next_cursor"]
    assert (seen, cursor) == ([4, 3, 2, 1, 0], None)


async def test_session_search_counts_checkpoints(send):
    [found] = (await send("POST", "/sessions/search")).json()["sessions"]
    assert found["checkpoints_count"] == 2
    assert found["created_at"] == "2023-11-14T22:13:20.250000Z"


# -- jobs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "op", "seq_id"),
    [
        ("/optim_step", "optim_step", 2),
        ("/save_weights", "save_weights", 3),
        ("/save_weights_for_sampler", "save_weights_for_sampler", 4),
        ("/save_weights_external", "save_weights_external", 5),
    ],
)
async def test_a_command_is_passed_on_as_it_came(send, worker, path, op, seq_id):
    answer = await send("POST", path, field_of_the_future=[1])
    assert answer.json() == {"request_id": f"{RUN}:{seq_id}", "model_id": RUN}
    sent = msgspec.json.encode({**BODIES["POST", path], "field_of_the_future": [1]})
    [asked] = worker.asked
    assert asked == messages.SubmitTraining(TENANT, op, SESSION, RUN, seq_id, asked.body)
    assert msgspec.json.decode(asked.body) == msgspec.json.decode(sent)


async def test_create_model_is_number_zero_of_the_model_it_makes(send, worker):
    answer = await send("POST", "/create_model", model_seq_id=7)
    made = f"{SESSION}:train:7"
    assert answer.json() == {"request_id": f"{made}:0", "model_id": made}
    assert worker.last == messages.SubmitTraining(
        TENANT, "create_model", SESSION, made, 0, worker.last.body, model_seq_id=7
    )


async def test_load_weights_makes_a_model_or_changes_one(client, send, worker):
    await send("POST", "/load_weights")
    assert (worker.last.model_id, worker.last.seq_id) == (f"{SESSION}:train:1", 0)
    assert worker.last.model_seq_id == 1
    legacy = {"model_id": RUN, "seq_id": 9, "path": f"tinker://{RUN}/weights/final", "optimizer": True}
    await client.post("/api/v1/load_weights", json=legacy)
    assert (worker.last.model_id, worker.last.seq_id, worker.last.model_seq_id) == (RUN, 9, None)


@pytest.mark.parametrize("forward_only", [False, True])
async def test_forward_backward_passes_the_protobuf_through(client, worker, forward_only):
    sent = protobuf(seq_id=6, forward_only=forward_only)
    answer = await client.post(
        "/api/v1/forward_backward", content=sent, headers={"Content-Type": "application/x-protobuf"}
    )
    assert answer.json() == {"request_id": f"{RUN}:6", "model_id": RUN}
    op = "forward" if forward_only else "forward_backward"
    assert worker.asked == [messages.SubmitTraining(TENANT, op, SESSION, RUN, 6, sent)]


async def test_asample_names_one_sequence_per_sample(send, worker):
    answer = await send("POST", "/asample", seq_id=638701597000000000)
    job = f"{SAMPLER}:638701597000000000"
    assert answer.json() == {"request_id": job, "sample_sequence_ids": [f"{job}:0", f"{job}:1"]}
    asked = worker.last
    assert asked == messages.SubmitSample(TENANT, SAMPLER, 638701597000000000, asked.body, 2, 7)


# -- samplers, runs, checkpoints --------------------------------------------------------------------


async def test_a_sampler_may_have_both_a_base_model_and_a_path(send, worker):
    answer = await send("POST", "/create_sampling_session")
    assert answer.json()["sampling_session_id"] == f"{SESSION}:sample:1"
    path = f"tinker://{RUN}/sampler_weights/final"
    assert worker.asked == [messages.CreateSampler(TENANT, SESSION, 1, BASE, path)]


async def test_get_sampler(send):
    answer = await send("GET", "/samplers/{sampler_id}")
    path = f"tinker://{RUN}/sampler_weights/final"
    assert answer.json() == {"sampler_id": SAMPLER, "base_model": BASE, "model_path": path}


async def test_get_info_has_the_model_name_where_the_client_looks_for_it(send):
    info = (await send("POST", "/get_info")).json()
    assert info["model_data"] == {"arch": "qwen3", "model_name": BASE, "tokenizer_id": "/home/tiny"}
    assert (info["model_id"], info["is_lora"], info["lora_rank"]) == (RUN, True, 8)


CHECKPOINT = {
    "checkpoint_id": "weights/final",
    "checkpoint_type": "training",
    "time": "2023-11-14T22:13:20.250000Z",
    "tinker_path": f"tinker://{RUN}/weights/final",
    "size_bytes": 8,
    "public": False,
    "user_metadata": {"step": "1"},
    "expires_at": "2023-11-14T23:13:20.250000Z",
}


async def test_training_run(send):
    assert (await send("GET", "/training_runs/{run_id}")).json() == {
        "training_run_id": RUN,
        "base_model": BASE,
        "model_owner": "default",
        "is_lora": True,
        "lora_rank": 8,
        "corrupted": False,
        "last_request_time": "2023-11-14T22:13:20.250000Z",
        "last_checkpoint": CHECKPOINT,
        "last_sampler_checkpoint": None,
        "user_metadata": {"renderer_name": "qwen3", "n": "1", "nested": '{"x":[1]}'},
    }


async def test_training_runs_are_listed_by_pages_of_a_project(client, worker):
    answer = (await client.get("/api/v1/training_runs?limit=5&offset=1&project_id=p")).json()
    assert answer == {"training_runs": [], "cursor": {"offset": 1, "limit": 5, "total_count": 1}}
    assert worker.asked == [messages.ListModels(TENANT, "p")]


async def test_checkpoints_of_a_run_and_of_the_tenant(send, worker):
    of_run = (await send("GET", "/training_runs/{run_id}/checkpoints")).json()
    assert worker.last == messages.ListCheckpoints(TENANT, RUN)
    mine = (await send("GET", "/checkpoints")).json()
    assert worker.last == messages.ListCheckpoints(TENANT, None)
    assert of_run["checkpoints"] == mine["checkpoints"]
    assert of_run["checkpoints"][0] == CHECKPOINT
    assert mine["cursor"] == {"offset": 0, "limit": 100, "total_count": 2}


_ONE = "/training_runs/{run_id}/checkpoints/{kind}/{name}"
_ADDRESS = f"tinker://{RUN}/weights/final"


@pytest.mark.parametrize(
    ("method", "path", "question"),
    [
        ("DELETE", _ONE, messages.DeleteCheckpoint(TENANT, _ADDRESS)),
        ("POST", f"{_ONE}/publish", messages.ChangeCheckpoint(TENANT, _ADDRESS, public=True)),
        ("DELETE", f"{_ONE}/publish", messages.ChangeCheckpoint(TENANT, _ADDRESS, public=False)),
        (
            "PUT",
            f"{_ONE}/ttl",
            messages.ChangeCheckpoint(TENANT, _ADDRESS, set_ttl=True, ttl_seconds=3600),
        ),
    ],
)
async def test_changes_of_a_checkpoint_say_nothing_back(send, worker, method, path, question):
    assert (await send(method, path)).status_code == 204
    assert worker.asked == [question]


async def test_a_ttl_is_removed_by_null_but_not_by_its_absence(client, send, worker):
    assert (await send("PUT", f"{_ONE}/ttl", ttl_seconds=None)).status_code == 204
    assert worker.last == messages.ChangeCheckpoint(TENANT, _ADDRESS, set_ttl=True, ttl_seconds=None)
    for body in ({}, {"ttl_seconds": 0}, {"ttl_seconds": -1}, {"ttl_seconds": 1.5}):
        answer = await client.put("/api/v1" + lease(f"{_ONE}/ttl"), json=body)
        assert answer.status_code == 400


async def test_weights_info(send):
    answer = (await send("POST", "/weights_info")).json()
    assert answer == {
        "base_model": BASE,
        "is_lora": True,
        "lora_rank": 8,
        "train_unembed": False,
        "train_mlp": True,
        "train_attn": True,
        "optimizer_config": {"type": "adamw"},
    }


# -- front ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/healthz", "/api/v1/healthz"])
async def test_health_is_that_of_the_worker(client, worker, path):
    answer = (await client.get(path)).json()
    assert (answer["status"], answer["mode"]) == ("ok", "hf")
    assert [type(question) for question in worker.asked] == [messages.GetHealth]


async def test_prometheus_reads_the_metrics_without_a_key(client, worker):
    answer = await client.get("/metrics")
    assert (answer.status_code, answer.text) == (200, "tink_diverged_total 0.0\n")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert [type(question) for question in worker.asked] == [messages.GetMetrics]


async def test_the_front_page_says_what_this_is(client):
    assert (await client.get("/")).json()["name"] == "Tink"
    head = await client.head("/")
    assert head.status_code == 200
