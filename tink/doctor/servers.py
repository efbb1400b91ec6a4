"""The servers that the settings name: whether each answers, is what it should be, and takes adapters.

Nothing is left there: the adapter that asks for a rank has no weights, so that a server refuses it, or
forgets it again."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import trio

from tink.backends import same_model
from tink.backends.endpoint import ExternalEndpoint
from tink.backends.flavour import flavour
from tink.backends.replica import Probe, ReplicaGone, ReplicaRefused, Served
from tink.backends.vllm import VllmClient
from tink.doctor.findings import Finding, ok, warning, wrong
from tink.domain.events import TrainerStarted
from tink.domain.routing import NO_TRAINING
from tink.errors import BackendError, StartupError
from tink.settings import Settings
from tink.wire.tink_train import PROTOCOL
from tink.world import World

# In vLLM's words.
_LOWER = re.compile(r"is greater than max_lora_rank (\d+)")


class Servers:
    """One look at all of them. `trainer`: where the settings say that one is."""

    def __init__(self, settings: Settings, trainer: ExternalEndpoint, world: World) -> None:
        self._settings, self._endpoint, self._world = settings, trainer, world
        self._trained: TrainerStarted | None = None
        self._replicas: dict[str, tuple[Served, Probe | None]] = {}

    async def look(self) -> list[Finding]:
        """Takes some HEALTH_SECONDS at most for a server that does not answer; all at once."""
        found: dict[str, list[Finding]] = {}

        async def vllm(url: str) -> None:
            found[url] = await self._vllm(url)

        trainer: list[Finding] = []
        if self._settings.use_megatron:
            # First: what is trained is what vLLM must serve.
            trainer = await self._trainer()
        if self._settings.use_vllm:
            async with trio.open_nursery() as nursery:
                for url in self._settings.vllm_urls:
                    nursery.start_soon(vllm, url)
        compared = await self._compare()
        return [*trainer, *(one for url in sorted(found) for one in found[url]), *compared]

    # -- training -------------------------------------------------------------------------------------

    async def _trainer(self) -> list[Finding]:
        url = self._endpoint.url
        port = url.rpartition(":")[2]
        start = f"tink trainer --engine megatron --model MODEL --port {port}; or set MEGATRON_SERVER_URL"
        try:
            async with self._endpoint.connect(self._world, 1) as client:
                health = await client.health()
                if health.protocol != PROTOCOL:
                    detail = f"{url} speaks {health.protocol}, not {PROTOCOL}"
                    return [wrong("trainer", detail, "install the same Tink there")]
                if health.state == "broken":
                    return [wrong("trainer", f"{url} is broken: {health.detail}", start)]
                if health.state == "loading":
                    return [warning("trainer", f"{url} is still loading its model", "wait for it")]
                info = await client.info()
        except (BackendError, StartupError) as error:
            return [wrong("trainer", str(error), start)]
        self._trained = TrainerStarted.of(info)
        detail = f"{url}, {info.engine}, {info.base_model}"
        if not info.trains:
            return [warning("trainer", f"{detail}: it only samples; {NO_TRAINING}", start)]
        return [ok("trainer", f"{detail}, ranks up to {info.max_rank}")]

    # -- sampling -------------------------------------------------------------------------------------

    async def _vllm(self, url: str) -> list[Finding]:
        start = "tink vllm MODEL on that machine, or set VLLM_BASE_URL"
        token = self._settings.vllm_api_key
        try:
            if await flavour(url, self._world, token) == "trl":
                return [
                    warning("vllm", f"{url} is a trl vllm-serve before 1.11: it takes no adapters", start)
                ]
            async with VllmClient.connect(url, self._world, slots=1, token=token) as client:
                if not await client.health():
                    return [wrong("vllm", f"{url}: its engine is dead", "start it again")]
                return [await self._serving(client), await self._adapters(client)]
        except ReplicaRefused as error:  # which has the remedy
            return [wrong("vllm", str(error))]
        except ReplicaGone as error:
            return [wrong("vllm", str(error), start)]

    async def _serving(self, client: VllmClient) -> Finding:
        """Raises ReplicaRefused and ReplicaGone."""
        served = await client.served()
        await client.load()  # one that says nothing of its load is not used
        probe = await client.probe(served.base_model)
        self._replicas[client.url] = served, probe
        detail = f"{client.url}, {served.base_model}, {len(served.adapters)} adapters"
        if probe.mode == "processed":
            remedy = "start it with --logprobs-mode raw_logprobs"
            return warning("vllm", f"{detail}: its logprobs are not the model's own", remedy)
        return ok("vllm", detail)

    async def _adapters(self, client: VllmClient) -> Finding:
        """Whether it takes adapters of the rank that is set, from the artifact folder."""
        url, rank, root = client.url, self._settings.vllm_max_lora_rank, self._settings.artifact_root
        try:
            await client.check_takes_adapters()
        except ReplicaRefused as error:
            return wrong("lora", str(error), "tink vllm MODEL")
        with _adapter_without_weights(root, rank) as folder:
            if folder is None:
                return ok("lora", f"{url} takes adapters; up to which rank is seen once {root} is there")
            name, reason = f"tink/doctor-{self._world.new_id()}", ""
            try:
                await client.load_adapter(name, str(folder))
                await client.unload_adapter(name)  # one that looks at weights only when it needs them
            except ReplicaRefused as error:
                reason = str(error)
        if found := _LOWER.search(reason):
            return wrong(
                "lora",
                f"{url} takes adapters of rank {found[1]} at most, VLLM_MAX_LORA_RANK is {rank}",
                f"VLLM_MAX_LORA_RANK={rank} tink vllm MODEL; or set {found[1]} here, and train no more",
            )
        if "it finds none in" in reason:
            return wrong(
                "lora",
                f"{url} does not see {root}, where adapters are",
                "mount it there by the same path, or set TINK_ARTIFACTS to a folder that both see",
            )
        return ok("lora", f"{url} takes adapters up to rank {rank}, from {root}")

    async def _compare(self) -> list[Finding]:
        """Each server with the first one, and with what is trained."""
        found = []
        first = next(iter(self._replicas), None)
        for url, (served, probe) in self._replicas.items():
            try:
                if first is not None and url != first:
                    same_model.check_alike(served, probe, *self._replicas[first], first)
                if self._trained is not None:
                    await same_model.check_trained(self._trained, served, url, self._world)
            except ReplicaRefused as error:
                found.append(wrong("vllm", f"{url}: {error}"))
        return found


@contextmanager
def _adapter_without_weights(root: Path, rank: int) -> Iterator[Path | None]:
    """A directory that says it is an adapter of that rank; None where none can be made."""
    if not root.is_dir():
        yield None
        return
    try:
        folder = Path(tempfile.mkdtemp(dir=root, prefix=".tink-doctor-"))
    except OSError:
        yield None
        return
    try:
        config = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": rank,
            "target_modules": ["q_proj"],
            "bias": "none",
        }
        (folder / "adapter_config.json").write_bytes(msgspec.json.encode(config))
        yield folder
    finally:
        shutil.rmtree(folder)
