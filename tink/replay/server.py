"""A training server for a replay: one that holds nothing, and whose artifacts are its own. What the run has
saved is copied there; the home and the artifacts of the run are only read."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import trio

from tink import pretrained
from tink.actors.embedded import EmbeddedTrainer
from tink.backends.endpoint import Endpoint
from tink.backends.trainer import TrainerClient
from tink.domain.events import TrainerStarted
from tink.errors import StartupError
from tink.home import Home
from tink.limits import LOADING_SECONDS, REPLAY_ORPHAN_SECONDS
from tink.settings import Settings
from tink.wire import tink_train
from tink.world import World

ENGINE = "hf"


class Server(msgspec.Struct, frozen=True):
    """`artifacts`: its folder, as it is seen here; None if nobody has said."""

    client: TrainerClient
    info: tink_train.Info
    artifacts: Path | None


@asynccontextmanager
async def own_server(
    served: TrainerStarted, folder: Path, crash_at: str, world: World
) -> AsyncIterator[Server]:
    """A child of this process, which serves what was served, and keeps all it writes in `folder`. It is
    ended with the block, however that ends. `crash_at`: TINK_CRASH_AT. StartupError if it cannot be had."""
    if served.engine != ENGINE:
        raise StartupError(
            f"the model was trained with the engine {served.engine!r}: start such a training server, which "
            "nobody else uses, and pass --trainer URL"
        )
    home = Home(folder)
    home.make()
    trainer = EmbeddedTrainer(_settings(served, home, crash_at), home, world)
    try:
        endpoint = await trainer.find()
        async with _connected(endpoint, world, home.artifacts) as server:
            yield server
    finally:
        with trio.CancelScope(shield=True):
            await trainer.stop()


@asynccontextmanager
async def other_server(
    url: str, token: str, artifacts: Path | None, known: Iterable[str], world: World
) -> AsyncIterator[Server]:
    """One that somebody else has started, for this replay alone. `known`: the servers that the journal
    names, which are the run's own. StartupError if it is one of these, or has been used."""
    async with _connected(Endpoint(url, token), world, artifacts) as server:
        state = await server.client.state()
        if server.info.incarnation in known:
            raise StartupError(f"the trainer at {url} is the run's own: start another one for the replay")
        if state.models or state.lease:
            raise StartupError(f"the trainer at {url} has been used already: a replay needs a fresh one")
        if not server.info.trains:
            raise StartupError(f"the server at {url} is a plain {server.info.engine}, which only samples")
        yield server


def differences(served: TrainerStarted, info: tink_train.Info) -> dict[str, tuple[str, str]]:
    """What of the server is other than it was, by name: then and now. StartupError for other weights."""
    if info.base_digest != served.base_digest:
        raise StartupError(
            f"the run was on {served.base_model} ({served.base_digest[:12]}), the replay's trainer serves "
            f"{info.base_model} ({info.base_digest[:12]}): these are other weights"
        )
    then = {"base model": served.base_model, "engine": served.engine, **served.versions}
    now = {"base model": info.base_model, "engine": info.engine, **info.versions}
    names = sorted(then.keys() | now.keys())
    return {
        name: (then.get(name, "none"), now.get(name, "none"))
        for name in names
        if then.get(name) != now.get(name)
    }


def _settings(served: TrainerStarted, home: Home, crash_at: str) -> Settings:
    """Of an embedded trainer that serves the same as then."""
    path = served.base_path
    model = path if path is not None and Path(path).is_dir() else served.base_model
    built_in = model == pretrained.BUILT_IN  # it is made anew
    return Settings(
        home=home.root,
        hf_model="" if built_in else model,
        hf_model_name="" if built_in else served.base_model,
        max_workers=1,
        trainer_threads=_threads(served.versions),
        trainer_orphan_seconds=REPLAY_ORPHAN_SECONDS,
        crash_at=crash_at,
    )


def _threads(versions: Mapping[str, str]) -> int:
    said = versions.get("threads", "")
    return int(said) if said.isdecimal() else Settings.trainer_threads


@asynccontextmanager
async def _connected(endpoint: Endpoint, world: World, artifacts: Path | None) -> AsyncIterator[Server]:
    """Once it has loaded its model. StartupError if it cannot, or speaks something else."""
    async with endpoint.connect(world, 1) as client:
        while (health := await client.health()).state == "loading":  # noqa: ASYNC110  another process
            await trio.sleep(LOADING_SECONDS)
        if health.protocol != tink_train.PROTOCOL:
            raise StartupError(
                f"the trainer at {endpoint.url} speaks {health.protocol}, not {tink_train.PROTOCOL}"
            )
        if health.state == "broken":
            raise StartupError(f"the replay's trainer is broken: {health.detail}")
        yield Server(client, await client.info(), artifacts)
