"""A fork: what a replay left in the scratch folder becomes a saved state, once or not at all."""

from __future__ import annotations

import os
import shutil
import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock

from tests.simulation.cluster import TENANT, Cluster
from tests.simulation.scenario import json
from tests.simulation.users import User
from tink import manifest
from tink.domain import ids, messages, rows
from tink.errors import BackendError, NotFound, TinkError, UserError
from tink.limits import EXPIRY_SECONDS, FORK_LEFT_SECONDS

FORK = "a" * 32
OTHER = "b" * 32


def staged(cluster: Cluster, fork_id: str = FORK) -> Path:
    """What a replay would have left: a published state, copied."""
    path = cluster.settings.artifact_root / ids.SCRATCH / ids.fork(fork_id)
    path.mkdir(parents=True)
    (path / "weights.safetensors").write_bytes(b"weights")
    manifest.write(path, "a:replay", {})
    return path


async def trained(cluster: Cluster) -> User:
    """By one step: operation 3."""
    user = await User.begin(cluster)
    await user.train()
    return user


def fork(user: User, name: str = "mended", fork_id: str = FORK, **fields: Any) -> messages.ForkCheckpoint:
    asked = messages.ForkCheckpoint(
        TENANT, model_id=user.model, name=name, fork_id=fork_id, op_no=3, step=1, edits=["without a"]
    )
    return msgspec.structs.replace(asked, **fields)


async def test_a_fork_is_a_saved_state_of_the_model(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with Cluster.running(tmp_path) as cluster:
        user = await trained(cluster)
        path = staged(cluster)
        made: rows.Checkpoint = await cluster.ask(fork(user))
        assert (made.kind, made.name, made.step, made.user_metadata) == (
            "weights",
            "mended",
            1,
            {"fork": "without a"},
        )
        assert not path.exists()
        assert manifest.check(cluster.settings.artifact_root / made.directory).origin == "a:replay"
        assert await cluster.ask(messages.ListCheckpoints(TENANT, model_id=user.model)) == [made]
        assert await cluster.ask(fork(user)) == made, "a repeat is the same fork"
        cluster.crash_worker()
        await cluster.start_worker()
        assert await cluster.ask(fork(user)) == made
        cluster.check_journal()


async def test_a_model_is_made_of_a_fork(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Of a copy of a state that the trainer saved, so that it can be loaded."""
    async with Cluster.running(tmp_path) as cluster:
        user = await trained(cluster)
        body = json(model_id=user.model, seq_id=3, path="saved")
        promise = await cluster.submit(user.model, 3, "save_weights", body)
        assert (await cluster.outcome(promise.request_id)).state == "done"
        [saved] = await cluster.ask(messages.ListCheckpoints(TENANT, model_id=user.model))
        root = cluster.settings.artifact_root
        shutil.copytree(root / saved.directory, root / ids.SCRATCH / ids.fork(FORK))
        await cluster.ask(fork(user))
        path = f"tinker://{user.model}/weights/mended"
        model = ids.model_id(user.session, 1)
        body = json(model_id=model, path=path, optimizer=True)
        promise = await cluster.ask(
            messages.SubmitTraining(
                TENANT,
                op="load_weights",
                session_id=user.session,
                model_id=model,
                seq_id=0,
                model_seq_id=1,
                body=body,
            )
        )
        outcome = await cluster.outcome(promise.request_id)
        assert outcome.state == "done", outcome.error


async def test_an_id_is_one_fork_for_ever(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with Cluster.running(tmp_path) as cluster:
        user = await trained(cluster)
        staged(cluster)
        await cluster.ask(fork(user))
        with pytest.raises(UserError, match="published already, as"):
            await cluster.ask(fork(user, "other"))
        await cluster.ask(messages.DeleteCheckpoint(TENANT, f"tinker://{user.model}/weights/mended"))
        with pytest.raises(UserError, match="published already, as"):
            await cluster.ask(fork(user))
        cluster.check_journal()


REFUSED: dict[str, tuple[dict[str, Any], type[TinkError], str]] = {
    "a name that is taken": ({"name": "taken", "fork_id": OTHER}, UserError, "exists already"),
    "a name that cannot be": ({"name": "../up"}, UserError, "cannot be used"),
    "an id that is none": ({"fork_id": "../up"}, UserError, "32 hex digits"),
    "files that are not there": ({"fork_id": "c" * 32}, NotFound, "is that the artifact folder"),
    "a step that is to come": ({"step": 9}, UserError, "has not come to"),
    "an operation that is to come": ({"op_no": 99}, UserError, "has not come to"),
    "somebody else's model": ({"tenant": "else"}, NotFound, "there is no model"),
}


@pytest.mark.parametrize("what", REFUSED)
async def test_what_cannot_be_forked_changes_nothing(
    what: str, tmp_path: Path, autojump_clock: MockClock
) -> None:
    fields, kind, reason = REFUSED[what]
    async with Cluster.running(tmp_path) as cluster:
        user = await trained(cluster)
        staged(cluster)
        taken = await cluster.ask(fork(user, "taken"))
        path = staged(cluster, OTHER)
        with pytest.raises(kind, match=reason):
            await cluster.ask(fork(user, **fields))
        assert path.is_dir()
        assert await cluster.ask(messages.ListCheckpoints(TENANT, model_id=user.model)) == [taken]


async def test_files_that_are_not_what_was_written_are_refused(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with Cluster.running(tmp_path) as cluster:
        user = await trained(cluster)
        (staged(cluster) / "weights.safetensors").write_bytes(b"other")
        with pytest.raises(BackendError, match=r"weights\.safetensors is damaged"):
            await cluster.ask(fork(user))
        assert await cluster.ask(messages.ListCheckpoints(TENANT, model_id=user.model)) == []


async def test_a_crash_between_the_files_and_the_journal_leaves_a_fork_or_none(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with Cluster.running(tmp_path) as cluster:
        user = await trained(cluster)
        path = staged(cluster)
        made: list[rows.Checkpoint] = []

        async def ask() -> None:
            with suppress(NotFound):  # retention was there before the repeat
                while not made:
                    try:
                        made.append(await cluster.ask(fork(user)))
                    except BackendError:  # it is there just now: try again
                        await trio.sleep(1.0)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            while path.exists():  # noqa: ASYNC110  what another process would see
                await trio.sleep(0.0001)
            cluster.crash_worker()
            assert forked(cluster) == 0
            await cluster.start_worker()
        if not made:
            assert forked(cluster) == 0
            await trio.sleep(1)  # it is gone
            staged(cluster)
            made.append(await cluster.ask(fork(user)))
        assert forked(cluster) == 1
        assert await cluster.ask(messages.ListCheckpoints(TENANT, model_id=user.model)) == made
        cluster.check_journal()


def forked(cluster: Cluster) -> int:
    with closing(sqlite3.connect(cluster.home.journal)) as journal:
        [count] = journal.execute("SELECT count(*) FROM events WHERE kind = 'checkpoint_forked'").fetchone()
    return int(count)


async def test_what_a_killed_fork_has_left_goes_in_time(tmp_path: Path, autojump_clock: MockClock) -> None:
    """The files that nobody came for, and those that were never journaled; not those of one that is being
    made."""
    async with Cluster.running(tmp_path) as cluster:
        user = await trained(cluster)
        now = cluster.world.now()
        old, new = staged(cluster), staged(cluster, OTHER)
        os.utime(old, (0, now - FORK_LEFT_SECONDS - 1))
        os.utime(new, (0, now))
        lost = cluster.settings.artifact_root / ids.directory(user.model, 3, ids.fork("c" * 32))
        shutil.copytree(new, lost)
        cluster.crash_worker()
        await cluster.start_worker()
        await trio.sleep(EXPIRY_SECONDS)
        assert (old.exists(), lost.exists(), new.exists()) == (False, False, True)
