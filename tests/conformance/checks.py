"""One function per promise of `tink-train/1`, named after it. Each raises Wrong or NotRun, or returns."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from itertools import pairwise

import msgspec
import trio

from tests.conformance.suite import STEP, Model, NotRun, Server, Wrong, expect
from tink.wire import tinker_pb2 as pb
from tink.wire.tink_train import (
    PROTOCOL,
    CreateModel,
    ExportAdapter,
    File,
    Forward,
    ForwardBackward,
    Health,
    LoadState,
    OpReply,
    OpRequest,
    RemoveModel,
    SampleReply,
    SaveState,
    Skip,
    State,
)

Check = Callable[[Server], Awaitable[None]]
CHECKS: list[Check] = []

HEALTH_SECONDS = 1.0


def check(function: Check) -> Check:
    CHECKS.append(function)
    return function


# -- what the server says of itself -----------------------------------------------------------------


@check
async def health_and_info_say_what_the_server_is(server: Server) -> None:
    health, info, state = await server.health(), server.info, await server.state()
    expect("protocol of health", PROTOCOL, health.protocol)
    expect("protocol of info", PROTOCOL, info.protocol)
    expect("state of health", "ready", health.state)
    expect("incarnation of info", health.incarnation, info.incarnation)
    expect("incarnation of state", health.incarnation, state.incarnation)
    for name in ("engine", "base_model", "base_digest", "arch"):
        if not getattr(info, name):
            raise Wrong(f"info.{name} is empty")
    for name in ("parameters", "vocab_size", "max_context", "max_rank"):
        if getattr(info, name) < 1:
            raise Wrong(f"info.{name}: expected 1 or more, got {getattr(info, name)}")
    if "cross_entropy" not in info.losses:
        raise Wrong(f"info.losses: expected cross_entropy among them, got {info.losses}")


@check
async def a_token_guards_everything_but_health(server: Server) -> None:
    if not server.token:
        raise NotRun("needs --token")
    for token in ("", "not the token"):
        answer = await server.call("GET", "/v1/state", State, token=token)
        expect("state without the token", (401, "unauthorized"), answer.short)
        answer = await server.call("POST", "/v1/ops", OpReply, b"", token=token)
        expect("an op without the token", (401, "unauthorized"), answer.short)
        answer = await server.call("GET", "/v1/health", Health, token=token)
        expect("health without the token", 200, answer.status)


@check
async def health_is_answered_within_a_second_while_an_op_runs(server: Server) -> None:
    body, model = await server.heavy(), server.model()
    await model.do(server.create())
    for _ in range(3):
        await model.send(ForwardBackward(body))
    slowest, calls, seen = 0.0, 0, False
    while (await model.poll(model.last)).status == 202:
        began = trio.current_time()
        health = await server.health()
        slowest = max(slowest, trio.current_time() - began)
        expect("state of health while an op runs", "ready", health.state)
        seen |= any(one.model_id == model.model_id for one in health.running)
        calls += 1
        await trio.sleep(0.01)
    if not calls:
        raise NotRun("the ops ended too fast to be seen running")
    if slowest > HEALTH_SECONDS:
        raise Wrong(f"health: expected an answer within {HEALTH_SECONDS:g} s, got it after {slowest:.2f} s")
    if calls >= 5 and not seen:
        raise Wrong(f"health.running: expected the op in one of {calls} answers, got it in none")
    await model.remove()


# -- operations -------------------------------------------------------------------------------------


@check
async def every_op_kind_runs(server: Server) -> None:
    model, create = server.model(), server.create()
    info = (await model.do(create)).model
    if info is None:
        raise Wrong("create_model: expected `model` in its result, got none")
    made = (info.rank, info.alpha, info.seed, info.train_attn, info.train_mlp, info.train_unembed)
    asked = (
        create.rank,
        create.alpha,
        create.seed,
        create.train_attn,
        create.train_mlp,
        create.train_unembed,
    )
    expect("the model that create_model says it made", asked, made)
    lengths = [min(length, server.info.max_context) for length in (5, 40, 17)]
    before = await model.look()
    for op in (Forward(server.body(1)), ForwardBackward(server.body(1))):
        result = await model.do(op)
        expect(f"tokens of {type(op).__name__}", sum(lengths), result.tokens)
        if result.loss is None:
            raise Wrong(f"{type(op).__name__}: expected a loss, got none")
        expect(f"logprobs per datum of {type(op).__name__}", lengths, _logprob_counts(result.body))
    await model.do(STEP)
    server.differ("log-probabilities before and after a step", before, await model.look())
    path = server.path("state")
    _check_files("save_state", (await model.do(SaveState(path))).files)
    await model.do(LoadState(path, optimizer=True))
    await model.do(ExportAdapter(server.path("adapter")))
    await model.do(Skip())
    await model.do(RemoveModel())


def _logprob_counts(body: bytes) -> list[int]:
    counts = []
    for record in pb.ForwardBackwardOutput.FromString(body).loss_fn_outputs:
        field = record.fields["logprobs"]
        ends = [
            int.from_bytes(field.offsets[at : at + 8], "little") for at in range(0, len(field.offsets), 8)
        ]
        counts += [(stop - start) // 4 for start, stop in pairwise(ends)]
    return counts


def _check_files(what: str, files: list[File]) -> None:
    if not files:
        raise Wrong(f"{what}: expected the files that it published, got none")
    for file in files:
        if not file.name or file.size < 1 or len(file.sha256) != 64:
            raise Wrong(f"{what}: expected name, size and sha256 of each file, got {file}")


@check
async def a_field_left_out_has_its_default_and_an_unknown_one_is_ignored(server: Server) -> None:
    model = server.model()
    request = {
        "incarnation": server.incarnation,
        "lease": server.lease,
        "model_id": model.model_id,
        "op_no": 1,
        "job_id": "j",
        "op": {"type": "create_model", "rank": 4, "alpha": 8, "seed": 1, "of_a_newer_worker": [1]},
        "of_a_newer_worker": {"a": None},
    }
    if "unembed" not in server.info.capabilities:
        request["op"]["train_unembed"] = False
    answer = await server.call("POST", "/v1/ops", OpReply, msgspec.msgpack.encode(request), 20)
    if answer.status not in (200, 202):
        raise Wrong(f"expected it to run, got {answer.status} {answer.message}")
    expect("state", "done", (await model.end(1)).state)
    model.last = 1
    await model.remove()


@check
async def forward_touches_no_gradient(server: Server) -> None:
    model, twin = server.model(), server.model()
    for one in (model, twin):
        await one.do(server.create())
        await one.do(ForwardBackward(server.body(1)))
        for seed in (2, 3):
            body = server.body(seed, (60, 60, 60))
            await one.do(Forward(body) if one is model else Skip())
    server.same("what follows a forward, and a skip", await twin.probe(), await model.probe())
    await model.remove()
    await twin.remove()


@check
async def a_step_uses_the_gradient_up(server: Server) -> None:
    """All of it that has been accumulated, and then it is zero."""
    model = server.model()
    await model.do(server.create())
    await model.do(ForwardBackward(server.body(1)))
    await model.do(STEP)
    path = server.path("state")
    await model.do(SaveState(path))
    fresh = server.model()
    await fresh.do(CreateModel(4, 8.0, 7, source=path, optimizer=True))
    server.same(
        "what follows a step, and a load of the same state", await fresh.probe(), await model.probe()
    )
    await model.remove()
    await fresh.remove()


@check
async def a_failed_op_is_answered_200_consumes_its_number_and_changes_nothing(server: Server) -> None:
    model, twin = server.model(), server.model()
    for one in (model, twin):
        await one.do(server.create())
        await one.do(ForwardBackward(server.body(1)))
    over = server.body(2)
    bad = pb.ForwardBackwardRequest.FromString(over)
    bad.data[-1].loss_fn_inputs["target_tokens"].dense = b"\xff" * 7
    for op in (
        ForwardBackward(b"\xff\xff not a message"),
        Forward(b"\xff\xff not a message"),
        ForwardBackward(bad.SerializeToString()),
        LoadState(server.path("that-is-not-there"), optimizer=True),
        server.create(),
    ):
        failed = await model.fails(op)
        again = await model.send(op, op_no=model.last)
        expect("a failed op sent again", (200, "failed"), again.short)
        expect("`replayed` of a failed op sent again", True, again.message.replayed)
        expect("its failure", failed.failure, again.message.failure)
    await twin.skip(5)
    server.same("what follows failed ops, and skips", await twin.probe(), await model.probe())
    await model.remove()
    await twin.remove()


@check
async def a_failed_create_consumes_its_number(server: Server) -> None:
    model = server.model()
    await model.fails(server.create(rank=server.info.max_rank + 1))
    answer = await model.send(STEP, op_no=2)
    expect("an op for a model whose creation failed", (404, "no_model"), answer.short)
    await model.do(server.create())
    await model.remove()


@check
async def removed_numbers_stay_consumed(server: Server) -> None:
    model, twin = server.model(), server.model()
    for one in (model, twin):
        await one.do(server.create())
    expected = await twin.train()
    await model.train()
    await model.do(RemoveModel())
    removed = model.last
    answer = await model.send(STEP, op_no=removed + 1)
    expect("an op for a removed model", (404, "no_model"), answer.short)
    answer = await model.send(RemoveModel(), op_no=removed)
    expect("the removal sent again", (200, "done"), answer.short)
    await model.do(server.create())
    server.same("a model made again under its name, and a new one", expected, await model.train())
    await model.remove()
    await twin.remove()


# -- exactly once: the table ------------------------------------------------------------------------


@check
async def another_incarnation_is_refused_412(server: Server) -> None:
    model = server.model()
    await model.do(server.create())
    answers = {
        "a new op": await model.send(STEP, op_no=2, incarnation="before"),
        "a known op": await model.send(server.create(), op_no=1, incarnation="before"),
        "a snapshot": await server.snapshot(model, server.path("s"), incarnation="before"),
        "a restore": await server.restore(model, server.path("s"), incarnation="before"),
    }
    for what, answer in answers.items():
        expect(f"{what} of another incarnation", (412, "stale_incarnation"), answer.short)
        expect("the incarnation that the refusal names", server.incarnation, answer.message.incarnation)
    await model.do(STEP)
    await model.remove()


@check
async def a_known_op_returns_its_stored_result_bit_for_bit(server: Server) -> None:
    model, twin = server.model(), server.model()
    for one in (model, twin):
        await one.do(server.create())
    for op in (ForwardBackward(server.body(1)), STEP, Forward(server.body(2)), SaveState(server.path("s"))):
        first = await model.do(op)
        for _ in range(2):
            again = await model.send(op, op_no=model.last)
            expect(f"{type(op).__name__} sent again", (200, "done"), again.short)
            expect(f"`replayed` of a {type(op).__name__} sent again", True, again.message.replayed)
            expect(f"the result of a {type(op).__name__} sent again", first, again.message.result)
        older = await model.send(server.create(), op_no=1)
        expect("`replayed` of an older op sent again", True, getattr(older.message, "replayed", None))
    for op in (ForwardBackward(server.body(1)), STEP, Forward(server.body(2)), Skip()):
        await twin.do(op)
    server.same("ops sent three times, and once", await twin.probe(), await model.probe())
    await model.remove()
    await twin.remove()


@check
async def a_number_known_under_another_job_is_refused_422(server: Server) -> None:
    model = server.model()
    await model.do(server.create())
    answer = await model.send(server.create(), op_no=1, job_id="another")
    expect("an ended op under another job", (422, "op_reused"), answer.short)
    await model.send(ForwardBackward(await server.heavy()))
    answer = await model.send(STEP, op_no=2, job_id="another")
    expect("an open op under another job", (422, "op_reused"), answer.short)
    expect("the op itself", "done", (await model.end(2)).state)
    await model.remove()


@check
async def a_gap_is_refused_409_with_applied(server: Server) -> None:
    model = server.model()
    await model.do(server.create())
    answer = await model.send(STEP, op_no=3)
    expect("an op one too far ahead", (409, "gap"), answer.short)
    expect("`applied` of the refusal", 1, answer.message.applied)
    answer = await model.poll(3)
    expect("the refused op when polled", (404, "no_op"), answer.short)
    await model.do(STEP)
    await model.remove()


@check
async def a_removal_leaves_out_what_was_not_applied(server: Server) -> None:
    model = server.model()
    await model.do(server.create())
    await model.send(RemoveModel(), op_no=4)
    expect("a removal across a gap", "done", (await model.end(4)).state)
    answer = await model.send(STEP, op_no=5)
    expect("an op behind it", (404, "no_model"), answer.short)
    answer = await model.send(RemoveModel(), op_no=4)
    expect("the removal sent again", (200, "done"), answer.short)


@check
async def an_acknowledged_result_is_gone_410(server: Server) -> None:
    model = server.model()
    await model.do(server.create())
    await model.do(Skip())
    await model.do(Skip(), acked=1)
    answer = await model.send(server.create(), op_no=1)
    expect("an acknowledged op sent again", (410, "result_gone"), answer.short)
    answer = await model.poll(1)
    expect("an acknowledged op when polled", (410, "result_gone"), answer.short)
    answer = await model.send(Skip(), op_no=2)
    expect("an op that was not acknowledged", (200, "done"), answer.short)
    await model.remove()


@check
async def an_op_for_a_missing_model_is_refused_404_but_create_and_skip(server: Server) -> None:
    model = server.model()
    for op in (STEP, Forward(server.body(1)), SaveState(server.path("s")), RemoveModel()):
        answer = await model.send(op, op_no=1)
        expect(f"{type(op).__name__} for a missing model", (404, "no_model"), answer.short)
    await model.do(Skip())
    answer = await model.send(STEP, op_no=2)
    expect("an op after a skip, which makes no model", (404, "no_model"), answer.short)
    await model.do(server.create())
    await model.do(STEP)
    await model.remove()


# -- order, waiting, cancelling ---------------------------------------------------------------------


@check
async def ops_sent_ahead_run_in_order(server: Server) -> None:
    model, twin = server.model(), server.model()
    await model.send(server.create())
    await twin.do(server.create())
    ops = [ForwardBackward(server.body(1)), STEP, Forward(server.body(3)), ForwardBackward(server.body(2))]
    ops += [STEP, Forward(server.body(3))]
    for op in ops:
        await model.send(op)
    expected = [await twin.do(op) for op in ops]
    found = [await model.end(number) for number in range(2, model.last + 1)]
    expect("how they ended", ["done"] * len(ops), [reply.state for reply in found])
    server.same("ops sent ahead, and one by one", expected, [reply.result for reply in found])
    await model.remove()
    await twin.remove()


@check
async def a_long_op_is_202_and_a_poll_gives_its_result(server: Server) -> None:
    body, model = await server.heavy(), server.model()
    await model.do(server.create())
    began = trio.current_time()
    answer = await model.send(ForwardBackward(body), wait=0)
    if answer.status == 200 and trio.current_time() - began < server.busy_seconds / 2:
        raise NotRun("the op ended too fast to be seen running")
    expect("status of an op that is not waited for", 202, answer.status)
    if answer.message.state not in ("queued", "running"):
        raise Wrong(f"state of a 202: expected queued or running, got {answer.message.state}")
    polled = await model.end(2)
    again = await model.send(ForwardBackward(body), op_no=2)
    expect("the result as polled and as replayed", polled.result, again.message.result)
    await model.remove()


@check
async def a_wait_is_held_no_longer_than_asked_and_capped(server: Server) -> None:
    body, model = await server.heavy(), server.model()
    await model.do(server.create())
    for _ in range(3):
        await model.send(ForwardBackward(body))
    began = trio.current_time()
    answer = await model.poll(model.last, wait=0.1)
    took = trio.current_time() - began
    if answer.status == 202 and took > 5:
        raise Wrong(f"a poll of 0.1 s: expected an answer after as long, got 202 after {took:.2f} s")
    answer = await server.call("GET", f"/v1/ops/{model.model_id}/{model.last}?wait=1e9", OpReply)
    if answer.status not in (200, 202):
        raise Wrong(f"a poll of 1e9 s: expected 200 or 202, got {answer.short}")
    await model.end(model.last)
    # Its deadline here is GRACE_SECONDS: a server that would hold it longer is found by a longer op only.
    answer = await model.send(Skip(), op_no=model.last + 1, wait=0)
    model.last += 1
    again = OpRequest(
        server.incarnation,
        server.lease,
        model.model_id,
        model.last,
        f"{model.model_id}-{model.last}",
        Skip(),
        wait=1e9,
    )
    answer = await server.call("POST", "/v1/ops", OpReply, again)
    expect("an op with a wait of 1e9 s", (200, "done"), answer.short)
    await model.remove()


@check
async def a_lost_connection_cancels_nothing(server: Server) -> None:
    body, model, twin = await server.heavy(), server.model(), server.model()
    for one in (model, twin):
        await one.do(server.create())
    await model.send(ForwardBackward(body))
    answered = True

    async def call() -> None:
        nonlocal answered
        await model.send(ForwardBackward(server.body(1)), wait=20)
        answered = True

    for _ in range(3):
        answered, number = False, model.last + 1
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            while (await model.poll(number)).status == 404:  # noqa: ASYNC110, the server has no event
                await trio.sleep(0.005)
            # The server has it: now the socket is closed on it.
            lost = not answered
            nursery.cancel_scope.cancel()
        if lost:
            break
        await model.send(ForwardBackward(body))
    reply = await model.end(model.last)
    expect("an op whose caller went away", "done", reply.state)
    if not lost:
        raise NotRun("the ops ended too fast for a connection to be lost meanwhile")
    # Both joined and ended: sent again, it is the stored result.
    again = await model.send(ForwardBackward(server.body(1)), op_no=model.last)
    expect("the result as polled and as replayed", reply.result, again.message.result)
    for number in range(2, model.last + 1):
        await twin.do(ForwardBackward(server.body(1) if number % 2 else body))
    server.same("what follows a lost connection, and none", await twin.probe(), await model.probe())
    await model.remove()
    await twin.remove()


@check
async def an_op_that_runs_is_joined_by_a_repeat(server: Server) -> None:
    body, model, twin = await server.heavy(), server.model(), server.model()
    for one in (model, twin):
        await one.do(server.create())
    answers = [await model.send(ForwardBackward(body))]
    answers += [await model.send(ForwardBackward(body), op_no=2) for _ in range(2)]
    for answer in answers:
        if answer.status not in (200, 202):
            raise Wrong(f"an open op sent again: expected 200 or 202, got {answer.short}")
    expect("how it ended", "done", (await model.end(2)).state)
    expect("applied", 2, (await model.poll(2)).message.applied)
    await twin.do(ForwardBackward(body))
    server.same("what follows an op sent three times, and once", await twin.probe(), await model.probe())
    await model.remove()
    await twin.remove()


@check
async def a_queued_op_that_is_cancelled_fails_in_its_turn(server: Server) -> None:
    body, model, twin = await server.heavy(), server.model(), server.model()
    for one in (model, twin):
        await one.do(server.create())
        await one.send(ForwardBackward(body))
        await one.send(ForwardBackward(body))
    await model.send(ForwardBackward(server.body(1)))
    cancelled = model.last
    await model.send(ForwardBackward(server.body(2)))
    path = f"/v1/ops/{model.model_id}/{cancelled}/cancel"
    answer = await server.call("POST", path, OpReply)
    if answer.status == 202 or answer.short == (200, "done"):
        await model.end(model.last)
        raise NotRun("the op was running or done already when the cancel came")
    expect("a queued op when cancelled", (200, "failed"), answer.short)
    reply = await model.end(cancelled)
    while reply.applied < cancelled:
        await trio.sleep(0.01)
        reply = await model.end(cancelled)
    expect("a cancelled op, its turn over", "failed", reply.state)
    if reply.failure is None:
        raise Wrong("a cancelled op: expected a failure, got none")
    expect("the op behind it", "done", (await model.end(model.last)).state)
    again = await model.send(ForwardBackward(server.body(1)), op_no=cancelled)
    expect("a cancelled op sent again", (200, "failed"), again.short)
    await twin.end(twin.last)
    await twin.skip()
    await twin.do(ForwardBackward(server.body(2)))
    server.same("what follows a cancelled op, and a skip", await twin.probe(), await model.probe())
    await model.remove()
    await twin.remove()


@check
async def cancelling_what_has_ended_changes_nothing(server: Server) -> None:
    model = server.model()
    await model.do(server.create())
    result = await model.look()
    answer = await server.call("POST", f"/v1/ops/{model.model_id}/2/cancel", OpReply)
    expect("cancelling an ended op", (200, "done"), answer.short)
    expect("its result", result, answer.message.result)
    answer = await server.call("POST", f"/v1/ops/{model.model_id}/9/cancel", OpReply)
    expect("cancelling an op that was never sent", (404, "no_op"), answer.short)
    await model.remove()


@check
async def two_models_side_by_side_equal_each_alone(server: Server) -> None:
    seeds = (100, 200)
    alone = []
    for seed in seeds:
        model = server.model()
        await model.do(server.create(seed=seed))
        alone.append(await model.train(seed))
        await model.remove()
    found: dict[int, list] = {}

    async def train(model: Model, seed: int) -> None:
        await model.do(server.create(seed=seed))
        found[seed] = await model.train(seed)
        await model.remove()

    async with trio.open_nursery() as nursery:
        for seed in seeds:
            nursery.start_soon(train, server.model(), seed)
    for seed, expected in zip(seeds, alone, strict=True):
        server.same("a model beside another, and alone", expected, found[seed])


@check
async def a_redo_with_the_same_seed_is_equal(server: Server) -> None:
    results = []
    for seed in (7, 7, 8):
        model = server.model()
        await model.do(server.create(seed=seed))
        results.append(await model.train())
        await model.remove()
    server.same("a run and its redo", results[0], results[1])
    server.differ("runs of another seed", results[0][-1], results[2][-1])


# -- states and adapters ----------------------------------------------------------------------------


@check
async def save_state_changes_nothing(server: Server) -> None:
    model, twin = server.model(), server.model()
    for one in (model, twin):
        await one.do(server.create())
        await one.do(ForwardBackward(server.body(1)))
        await one.do(STEP)
        await one.do(ForwardBackward(server.body(2)))
    await model.do(SaveState(server.path("state")))
    await model.do(ExportAdapter(server.path("adapter")))
    await twin.skip(2)
    server.same("what follows a save, and a skip", await twin.probe(), await model.probe())
    await model.remove()
    await twin.remove()


@check
async def a_loaded_state_goes_on_with_its_optimizer_or_without(server: Server) -> None:
    model, path = server.model(), server.path("state")
    await model.do(server.create())
    await model.do(ForwardBackward(server.body(1)))
    await model.do(STEP)
    await model.do(SaveState(path))
    expected = await model.train()
    await model.do(ForwardBackward(server.body(3)))  # a load makes this zero
    await model.do(LoadState(path, optimizer=True))
    server.same("what follows a save, and a load with optimizer", expected, await model.train())
    await model.do(ForwardBackward(server.body(3)))
    await model.do(LoadState(path, optimizer=False))
    anew = await model.train()
    server.differ("a load with optimizer, and one without", expected[-1], anew[-1])
    for optimizer, wanted in ((True, expected), (False, anew)):
        made = server.model()
        # Its rank, alpha and targets are those of the saved one.
        info = (await made.do(CreateModel(1, 1.0, 1, source=path, optimizer=optimizer))).model
        expect("rank of a model made from a state", 4, info.rank if info else None)
        what = f"what follows a load, and a create from the same state, optimizer {optimizer}"
        server.same(what, wanted, await made.train())
        await made.remove()
    await model.remove()


@check
async def a_published_directory_is_never_written_again(server: Server) -> None:
    model, path = server.model(), server.path("state")
    await model.do(server.create())
    await model.do(SaveState(path))
    expected = await model.look()
    await model.do(ForwardBackward(server.body(1)))
    await model.do(STEP)
    await model.fails(SaveState(path))
    await model.fails(ExportAdapter(path))
    await model.do(LoadState(path, optimizer=True))
    server.same("the state as saved, and as loaded", [expected], [await model.look()])
    await model.remove()


@check
async def a_path_out_of_the_artifact_folder_is_refused(server: Server) -> None:
    model = server.model()
    await model.do(server.create())
    for path in ("../outside", "/tmp/outside", "a/../../outside"):
        await model.fails(SaveState(path))
        await model.fails(LoadState(path, optimizer=True))
    await model.remove()


@check
async def export_adapter_publishes_peft_files(server: Server) -> None:
    model = server.model()
    await model.do(server.create())
    files = (await model.do(ExportAdapter(server.path("adapter")))).files
    _check_files("export_adapter", files)
    missing = {"adapter_config.json", "adapter_model.safetensors"} - {file.name for file in files}
    if missing:
        raise Wrong(f"export_adapter: expected {sorted(missing)} too, got {[file.name for file in files]}")
    await model.remove()


@check
async def create_model_with_export_publishes_what_export_adapter_does(server: Server) -> None:
    """For sampling servers, which are given a new model's adapter before anybody may ask for it."""
    model, path = server.model(), server.path("first")
    files = (await model.do(server.create(export=path))).files
    _check_files("create_model with export", files)
    later = (await model.do(ExportAdapter(server.path("adapter")))).files
    expect("files of the first adapter", {file.name for file in later}, {file.name for file in files})
    await model.remove()


# -- snapshots --------------------------------------------------------------------------------------


@check
async def a_snapshot_changes_nothing_and_can_be_sent_again(server: Server) -> None:
    model, twin = server.model(), server.model()
    for one in (model, twin):
        await one.do(server.create())
        await one.do(ForwardBackward(server.body(1)))
        await one.do(STEP)
        await one.do(ForwardBackward(server.body(2)))
    path = server.path("snapshot")
    answers = [await server.snapshot(model, path) for _ in range(2)]
    for answer in answers:
        expect("status of a snapshot", 200, answer.status)
        expect("applied of a snapshot", 4, answer.message.applied)
        _check_files("a snapshot", answer.message.files)
    expect("the files of a snapshot sent again", answers[0].message.files, answers[1].message.files)
    server.same("what follows a snapshot, and none", await twin.probe(), await model.probe())
    answer = await server.snapshot(server.model(), server.path("snapshot"))
    expect("a snapshot of a missing model", (404, "no_model"), answer.short)
    await model.remove()
    await twin.remove()


@check
async def a_restore_onto_a_model_that_is_not_behind_is_refused_409(server: Server) -> None:
    model, path = server.model(), server.path("snapshot")
    await model.do(server.create())
    answer = await server.snapshot(model, path)
    expect("status of a snapshot", 200, answer.status)
    for _ in range(2):
        answer = await server.restore(model, path)
        expect("a restore onto a model that is not behind", (409, "not_behind"), answer.short)
        await model.do(STEP)
    answer = await server.restore(server.model(), server.path("not-there"))
    expect("the word for a restore of no snapshot", "failed", answer.short[1])
    await model.remove()


@check
async def a_restarted_server_is_another_incarnation_and_redoes_all_equally(server: Server) -> None:
    if server.restart is None:
        raise NotRun("needs --restart")
    model = server.model()
    await model.do(server.create())
    expected = await model.train()
    before = await server.restarted()
    answer = await model.send(STEP, incarnation=before)
    expect("an op of the life before", (412, "stale_incarnation"), answer.short)
    expect("the incarnation that the refusal names", server.incarnation, answer.message.incarnation)
    redone = Model(server, model.model_id)
    await redone.do(server.create())
    server.same("a run, and its redo in another life", expected, await redone.train())
    await redone.remove()


@check
async def a_model_goes_on_from_its_snapshot_in_another_life(server: Server) -> None:
    """Onto an absent model, and onto one that has applied less; gradients accumulated since the last
    step and results not yet acknowledged are there again."""
    if server.restart is None:
        raise NotRun("needs --restart")
    path, models = server.path("snapshot"), [server.model(), server.model()]
    first, other = models
    for model in models:
        await model.do(server.create())
        await model.do(ForwardBackward(server.body(1)))
        await model.do(STEP)
        kept = await model.do(ForwardBackward(server.body(2)), acked=2)
        answer = await server.snapshot(model, f"{path}-{model.model_id}")
        expect("status of a snapshot", 200, answer.status)
    expected = await first.probe()
    await server.restarted()
    answer = await first.send(STEP, op_no=1)
    expect("an op of a model that is not restored yet", (404, "no_model"), answer.short)
    other.last = 0
    await other.do(server.create())
    for model in models:
        answer = await server.restore(model, f"{path}-{model.model_id}")
        expect("status of a restore", 200, answer.status)
        expect("applied of a restore", 4, answer.message.applied)
        model.last = 4
        answer = await model.send(ForwardBackward(server.body(2)), op_no=4)
        expect("an op from before the snapshot, sent again", (200, "done"), answer.short)
        if model is other:
            expect("the result that the snapshot kept", kept, answer.message.result)
        answer = await model.send(ForwardBackward(server.body(1)), op_no=2)
        expect("an op acknowledged before the snapshot", (410, "result_gone"), answer.short)
        server.same("what follows a snapshot, and its restore", expected, await model.probe())
        answer = await server.restore(model, f"{path}-{model.model_id}")
        expect("a restore onto a model that is not behind", (409, "not_behind"), answer.short)
        await model.remove()


# -- samples ----------------------------------------------------------------------------------------


def _sequences(body: bytes) -> list[bytes]:
    return [sequence.tokens for sequence in pb.SampleResponse.FromString(body).sequences]


async def _sampled(server: Server, name: str, **fields: object) -> SampleReply:
    if "sample" not in server.info.capabilities:
        raise NotRun("info.capabilities has no `sample`")
    answer = await server.sample(name, **fields)
    if answer.short != (200, "done"):
        raise Wrong(f"a sample: expected it done, got {answer.status} {answer.message}")
    return answer.message


@check
async def the_same_sample_request_gives_the_same_bytes(server: Server) -> None:
    bodies = [(await _sampled(server, f"same-{each}", num_samples=2)).body for each in range(2)]
    expect("the body of a sample sent twice", bodies[0], bodies[1])
    once = await _sampled(server, "same-0", num_samples=2)
    expect("the body of a sample sent again under its id", bodies[0], once.body)
    other = await _sampled(server, "same-seed", num_samples=2, seed=6)
    if _sequences(other.body) == _sequences(bodies[0]):
        raise Wrong("a sample of another seed: expected other tokens, got the same ones")


@check
async def samples_of_one_request_are_distinct(server: Server) -> None:
    reply = await _sampled(server, "many", num_samples=8)
    sequences = _sequences(reply.body)
    expect("number of sequences", 8, len(sequences))
    if len(set(sequences)) == 1:
        raise Wrong("8 samples of one request: expected distinct ones, got one and the same 8 times")
    most = max(len(tokens) // 4 for tokens in sequences)
    if most > 16:
        raise Wrong(f"max_tokens 16: expected no more tokens, got {most}")


@check
async def a_sample_is_drawn_from_its_adapter(server: Server) -> None:
    base = await _sampled(server, "base", temperature=0.0)
    model, before, after = server.model(), server.path("adapter"), server.path("adapter")
    await model.do(server.create())
    await model.do(ExportAdapter(before))
    await model.train(steps=4)
    await model.do(ExportAdapter(after))
    zero = await _sampled(server, "zero", temperature=0.0, adapter=before)
    expect("tokens under an adapter with B = 0", _sequences(base.body), _sequences(zero.body))
    fields = {"prompt_logprobs": True, "temperature": 0.0}
    plain = await _sampled(server, "plain", **fields)
    trained = await _sampled(server, "trained", adapter=after, **fields)
    if trained.body == plain.body:
        raise Wrong("prompt log-probabilities under a trained adapter: expected other ones, got the base's")
    await model.remove()


@check
async def an_unknown_adapter_is_refused(server: Server) -> None:
    if "sample" not in server.info.capabilities:
        raise NotRun("info.capabilities has no `sample`")
    answer = await server.sample("unknown", adapter=server.path("adapter"))
    if answer.short != (200, "failed") and not 400 <= answer.status < 500:
        raise Wrong(f"a sample from an unknown adapter: expected it refused, got {answer.short}")
    await _sampled(server, "known")


@check
async def an_unknown_sample_is_refused_404(server: Server) -> None:
    if "sample" not in server.info.capabilities:
        raise NotRun("info.capabilities has no `sample`")
    answer = await server.call("GET", f"/v1/samples/{server.run}-never", SampleReply)
    expect("a sample that was never sent", (404, "no_sample"), answer.short)


# -- garbage, and the end ---------------------------------------------------------------------------


@check
async def a_malformed_body_is_refused_400_and_the_server_lives(server: Server) -> None:
    model = server.model()
    await model.do(server.create())
    unknown = {"incarnation": server.incarnation, "lease": server.lease, "model_id": model.model_id}
    unknown |= {"op_no": 2, "job_id": "j", "op": {"type": "no_such_op"}}
    paths = ["/v1/ops", "/v1/snapshots", "/v1/restores"]
    if "sample" in server.info.capabilities:
        paths.append("/v1/samples")
    for path in paths:
        for body in (b"", b"\xc1", b"{}", b"\x80", b"\x90", b"\x81", msgspec.msgpack.encode(unknown)[:-3]):
            answer = await server.call("POST", path, OpReply, body)
            expect(f"{path} with the body {body[:20]!r}", (400, "malformed"), answer.short)
    answer = await server.call("POST", "/v1/ops", OpReply, msgspec.msgpack.encode(unknown))
    expect("an op of an unknown type", (400, "malformed"), answer.short)
    expect("state of health", "ready", (await server.health()).state)
    expect("incarnation", server.incarnation, (await server.health()).incarnation)
    await model.do(STEP)
    await model.remove()


@check
async def an_older_lease_is_fenced_409(server: Server) -> None:
    """The last check: a worker with the lease that this suite began with is fenced from here on."""
    model, old = server.model(), server.lease
    await model.do(server.create())
    server.lease = old + 1
    await model.do(Skip())
    answers = {
        "a new op": await model.send(STEP, op_no=3, lease=old),
        "a known op": await model.send(Skip(), op_no=2, lease=old),
        "a snapshot": await server.snapshot(model, server.path("s"), lease=old),
        "a restore": await server.restore(server.model(), server.path("s"), lease=old),
    }
    for what, answer in answers.items():
        expect(f"{what} of an older lease", (409, "fenced"), answer.short)
    expect("lease of state", old + 1, (await server.state()).lease)
    await model.do(STEP)
    await model.remove()
