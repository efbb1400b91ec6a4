"""What a replay has come to, given to the run's worker as a saved state of the model: whoever trains on it
goes on from there. The files go into the worker's artifact folder; the worker publishes them, for nobody
else writes to the journal."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from tink import files
from tink.backends.exchange import HttpClient, NoAnswer, exchange
from tink.domain import ids
from tink.errors import UNREADABLE, StartupError, Unauthorized, UserError
from tink.limits import FORK_SECONDS
from tink.replay.training import Schedule
from tink.world import World


class Worker:
    """The run's worker. Its methods raise StartupError for one that does not answer, UserError for what it
    refuses."""

    def __init__(self, client: HttpClient, model_id: str, name: str) -> None:
        self._client, self._model_id, self._name = client, model_id, name

    @property
    def address(self) -> ids.Address:
        return ids.Address(self._model_id, "weights", ids.check_name(self._name))

    async def check(self) -> None:
        """That the model is there, and the name is free: before anything is replayed."""
        answer = await self._ask("GET", self._path)
        if any(found.get("tinker_path") == str(self.address) for found in answer["checkpoints"]):
            raise UserError(f"{self.address} exists already: choose another name")

    async def publish(self, fork_id: str, schedule: Schedule) -> None:
        """What `stage` has put there."""
        content = {
            "fork_id": fork_id,
            "op_no": schedule.last,
            "step": schedule.step,
            "edits": list(schedule.edits.said()),
        }
        await self._ask("POST", f"{self._path}/weights/{self._name}/fork", content)

    @property
    def _path(self) -> str:
        return f"/api/v1/training_runs/{self._model_id}/checkpoints"

    async def _ask(self, method: str, path: str, content: Any = None) -> Any:
        body = None if content is None else msgspec.json.encode(content)
        try:
            response = await exchange(self._client, method, path, seconds=FORK_SECONDS, content=body)
            answer = msgspec.json.decode(response.content)
        except (NoAnswer, *UNREADABLE) as error:
            raise StartupError(f"the worker at {self._client.url} does not answer: {error}") from error
        if response.status == Unauthorized.status:
            raise UserError("the worker wants an API key: set TINKER_API_KEY to one of the model's owner")
        if response.status >= 400:
            raise UserError(f"the worker refuses the fork: {answer.get('detail', answer)}")
        return answer


@asynccontextmanager
async def connect(url: str, key: str, model_id: str, name: str, world: World) -> AsyncIterator[Worker]:
    """Once it has been asked whether there can be a fork of the model with that name. `key`: an API key of
    the model's owner, if the worker wants one."""
    async with HttpClient.connect(url, world, slots=1, token=key) as client:
        worker = Worker(client, model_id, name)
        await worker.check()
        yield worker


def stage(source: Path, artifacts: Path, fork_id: str) -> None:
    """Copies a published directory to where the worker takes a fork from, and syncs it. Blocks.
    StartupError if it cannot be; then nothing is left."""
    target = artifacts / ids.SCRATCH / ids.fork(fork_id)
    try:
        shutil.copytree(source, target)
        files.sync_tree(target)
    except OSError as error:
        shutil.rmtree(target, ignore_errors=True)
        raise StartupError(f"the fork cannot be written to {target}: {error}") from error


def unstage(artifacts: Path, fork_id: str) -> None:
    """Takes away what the worker has not taken. Blocks."""
    shutil.rmtree(artifacts / ids.SCRATCH / ids.fork(fork_id), ignore_errors=True)
