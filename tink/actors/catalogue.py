"""Sessions, models, samplers and checkpoints: what is there, whose it is, and the small changes to it.
Part of the Router; an id of another tenant does not exist here. What is deleted here leaves the disk by
retention."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, TypeVar

import msgspec

from tink.actors.artifacts import ArtifactFolder
from tink.actors.backends import Backends
from tink.actors.books import JobBooks
from tink.domain import ids, keys, messages, plans, rows
from tink.domain.events import (
    CheckpointChanged,
    CheckpointDeleted,
    CheckpointForked,
    ClientFailed,
    SamplerCreated,
    SessionCreated,
    SessionFinished,
    SessionMoved,
    Subject,
)
from tink.domain.ledger import Ledger
from tink.domain.projection import Key
from tink.domain.routing import Routes
from tink.errors import NotFound, UserError
from tink.errors import SessionFinished as SessionIsFinished
from tink.journal import queries
from tink.limits import MAX_METADATA_BYTES
from tink.metrics import Metrics
from tink.world import World

R = TypeVar("R", rows.Session, rows.Model, rows.Sampler, rows.Checkpoint)


class Catalogue:
    def __init__(
        self,
        journal: JobBooks,
        backends: Backends,
        routes: Routes,
        folder: ArtifactFolder,
        metrics: Metrics,
        world: World,
    ) -> None:
        self._journal, self._backends, self.routes = journal, backends, routes
        self._metrics = metrics
        self._folder, self._world = folder, world

    async def answer(self, ask: messages.Question) -> Any:
        match ask:
            case messages.CreateSession():
                return await self._create_session(ask)
            case messages.Heartbeat():
                if self.session(ask.tenant, ask.session_id).state == "finished":
                    raise SessionIsFinished(f"the session {ask.session_id} was finished by its client")
                return None
            case messages.FinishSession():
                return await self._finish_session(ask)
            case messages.MoveSession():
                session = self.session(ask.tenant, ask.session_id)
                subject = Subject(tenant=ask.tenant, session_id=session.session_id)
                return await self._journal.append((subject, SessionMoved(project_id=ask.project_id)))
            case messages.GetSession():
                return await self._session_view(ask)
            case messages.ListSessions():
                return await self._journal.read(partial(queries.sessions, tenant=ask.tenant))
            case messages.ReportClientFailure():
                if ask.session_id is not None:
                    self.session(ask.tenant, ask.session_id)
                subject = Subject(tenant=ask.tenant, session_id=ask.session_id)
                failed = ClientFailed(exception_type=ask.exception_type[:200])
                return await self._journal.append((subject, failed))
            case messages.GetModel():
                model = self._live_model(ask.tenant, ask.model_id)
                return (await self._model_views(ask.tenant, [model]))[0]
            case messages.ListModels():
                return await self._model_views(ask.tenant, self._live_models(ask))
            case messages.GetWeights():
                return await self._weights(ask)
            case messages.GetSample():
                return await self._journal.sample_of_key(ask.tenant, ask.key)
            case messages.CreateSampler():
                return await self._create_sampler(ask)
            case messages.GetSampler():
                return self.sampler(ask.tenant, ask.sampler_id)
            case messages.ListCheckpoints():
                return self._list_checkpoints(ask)
            case messages.GetCheckpoint():
                return await self._checkpoint_view(ask)
            case messages.ForkCheckpoint():
                return await self._fork_checkpoint(ask)
            case messages.ChangeCheckpoint():
                return await self._change_checkpoint(ask)
            case messages.DeleteCheckpoint():
                return await self._delete_checkpoint(ask)
            case messages.GetHealth():
                return messages.Health(mode=self.routes.mode, servers=self._backends.health())
            case messages.GetMetrics():
                return self._metrics.exposition()
            case messages.GetCapabilities():
                return await self._capabilities()
            case messages.GetTokenizer():
                return await self._tokenizer(ask)
        raise TypeError(f"not a question for the catalogue: {ask}")

    # -- sessions -----------------------------------------------------------------------------------

    def session(self, tenant: str, session_id: str) -> rows.Session:
        return _owned(self._ledger.sessions, tenant, session_id, "session")

    async def _create_session(self, ask: messages.CreateSession) -> messages.Created:
        async with self._journal.naming:
            if (known := await self._session_of_key(ask)) is not None:
                return messages.Created(known.session_id)
            session_id = self._world.new_id()
            created = SessionCreated(
                tags=ask.tags,
                user_metadata=ask.user_metadata,
                sdk_version=ask.sdk_version,
                project_id=ask.project_id,
                display_name=ask.display_name,
                idempotency_key=ask.idempotency_key,
            )
            await self._journal.append((Subject(tenant=ask.tenant, session_id=session_id), created))
            return messages.Created(session_id)

    async def _session_of_key(self, ask: messages.CreateSession) -> rows.Session | None:
        """In memory, or forgotten."""
        tenant, key = ask.tenant, ask.idempotency_key
        if key is None:
            return None
        known = self._ledger.session_of(tenant, key)
        if known is not None:
            return known
        return await self._journal.session_of_key(tenant, key)

    async def _finish_session(self, ask: messages.FinishSession) -> None:
        async with self._journal.naming:
            session = self.session(ask.tenant, ask.session_id)
            if session.idempotency_key == keys.REST_SESSION:
                raise UserError(
                    "this session has the models of the REST API, and stays: remove_lora ends one"
                )
            if session.state == "open":
                subject = Subject(tenant=ask.tenant, session_id=ask.session_id)
                finished = SessionFinished(reason=ask.reason, detail=ask.detail)
                await self._journal.append((subject, finished))

    async def _session_view(self, ask: messages.GetSession) -> messages.SessionView:
        session = self.session(ask.tenant, ask.session_id)
        models = [m for m in _mine(self._ledger.models, ask.tenant) if m.state == "live"]
        samplers = partial(queries.samplers_in, session_id=session.session_id)
        return messages.SessionView(
            row=session,
            model_ids=[m.model_id for m in models if m.session_id == session.session_id],
            sampler_ids=await self._journal.read(samplers),
        )

    # -- models and samplers ------------------------------------------------------------------------

    def model(self, tenant: str, model_id: str) -> rows.Model:
        return _owned(self._ledger.models, tenant, model_id, "model")

    def sampler(self, tenant: str, sampler_id: str) -> rows.Sampler:
        return _owned(self._ledger.samplers, tenant, sampler_id, "sampler")

    def _live_model(self, tenant: str, model_id: str) -> rows.Model:
        model = self.model(tenant, model_id)
        if model.state != "live":
            raise NotFound(f"there is no model {model_id}")
        return model

    async def _model_views(self, tenant: str, models: list[rows.Model]) -> list[messages.ModelView]:
        if not models:
            return []
        base = await self._backends.base()
        newest: dict[tuple[str, str], rows.Checkpoint] = {}
        for checkpoint in _newest_first(self._live_checkpoints(tenant)):
            newest.setdefault((checkpoint.model_id, checkpoint.kind), checkpoint)
        return [
            messages.ModelView(
                row=model,
                arch=base.arch,
                tokenizer=base.path,
                last_checkpoint=newest.get((model.model_id, "weights")),
                last_sampler_checkpoint=newest.get((model.model_id, "sampler_weights")),
            )
            for model in models
        ]

    def _live_models(self, ask: messages.ListModels) -> list[rows.Model]:
        models = [m for m in _mine(self._ledger.models, ask.tenant) if m.state == "live"]
        if ask.project_id is not None:
            models = [
                m for m in models if self.session(ask.tenant, m.session_id).project_id == ask.project_id
            ]
        return _newest_first(models)

    async def _weights(self, ask: messages.GetWeights) -> rows.Job:
        self.routes.check_sampling()
        self.model(ask.tenant, ask.model_id)
        found = await self._journal.read(partial(queries.weights, model_id=ask.model_id))
        assert found is not None, "a model is there when the job that makes it is"
        return found

    async def _create_sampler(self, ask: messages.CreateSampler) -> messages.Created:
        self.routes.check_sampling()
        self.session(ask.tenant, ask.session_id)
        sampler_id = ids.sampler_id(ask.session_id, ask.sampling_seq_id)
        samplers = self._ledger.samplers
        if (sampler_id,) in samplers:
            return messages.Created(sampler_id)
        base = await self._backends.base()
        async with self._journal.naming, self._journal.recalled([("samplers", sampler_id)]):
            if (sampler_id,) in samplers:
                return messages.Created(sampler_id)
            adapter_id = None
            if ask.model_path is not None:
                address = ids.Address.parse(ask.model_path)
                checkpoint = plans.find_checkpoint(self._journal.ledger, address, ask.tenant)
                if checkpoint.adapter_id is None:
                    raise UserError(
                        f"{address} holds a training state, not sampler weights: pass the path that "
                        "save_weights_for_sampler gave"
                    )
                adapter_id = checkpoint.adapter_id
            elif ask.base_model is not None:
                plans.check_base_model(ask.base_model, base.name, base.path)
            else:
                raise UserError("a sampler needs base_model or model_path")
            created = SamplerCreated(
                sampler_id=sampler_id,
                sampling_seq_id=ask.sampling_seq_id,
                base_model=base.name,
                model_path=ask.model_path,
            )
            subject = Subject(tenant=ask.tenant, session_id=ask.session_id, adapter_id=adapter_id)
            await self._journal.append((subject, created))
            return messages.Created(sampler_id)

    async def _capabilities(self) -> messages.Capabilities:
        if self.routes == (None, None):
            return messages.Capabilities(models=[])
        base = await self._backends.base()
        model = messages.ServedModel(
            name=base.name,
            max_context=base.max_context,
            trainable=self.routes.training is not None and base.trains,
            sampleable=self.routes.sampling is not None,
        )
        return messages.Capabilities(models=[model])

    async def _tokenizer(self, ask: messages.GetTokenizer) -> str | None:
        if ask.use is None:
            known = self._backends.known()
            return None if known is None else known.path
        if ask.use == "training":
            self.routes.check_training()
        else:
            self.routes.check_sampling()
        return (await self._backends.base()).path

    # -- checkpoints --------------------------------------------------------------------------------

    def _live_checkpoints(self, tenant: str) -> list[rows.Checkpoint]:
        now = self._world.now()
        return [
            checkpoint
            for checkpoint in _mine(self._ledger.checkpoints, tenant)
            if checkpoint.expires_at is None or checkpoint.expires_at > now
        ]

    def _list_checkpoints(self, ask: messages.ListCheckpoints) -> list[rows.Checkpoint]:
        found = self._live_checkpoints(ask.tenant)
        if ask.model_id is not None:
            model = self.model(ask.tenant, ask.model_id)
            if model.state not in ("live", "removed"):  # what was saved outlives its model
                raise NotFound(f"there is no model {ask.model_id}")
            found = [checkpoint for checkpoint in found if checkpoint.model_id == ask.model_id]
        return _newest_first(found)

    def _own_checkpoint(self, tenant: str, text: str) -> rows.Checkpoint:
        address = ids.Address.parse(text)
        checkpoint = self._ledger.checkpoint_at(*address)
        if checkpoint is not None and checkpoint.tenant == tenant:
            return checkpoint
        raise NotFound(f"there is no checkpoint {address}")

    async def _checkpoint_view(self, ask: messages.GetCheckpoint) -> messages.CheckpointView:
        try:
            row = plans.find_checkpoint(self._journal.ledger, ids.Address.parse(ask.address), ask.tenant)
        except UserError as error:
            raise NotFound(str(error)) from None
        model = self._ledger.models[(row.model_id,)]
        files = await self._folder.files(row.directory)
        if files is None:
            raise NotFound(f"the files of {ask.address} are not in the artifact folder {self._folder.root}")
        return messages.CheckpointView(row=row, model=model, files=files)

    async def _fork_checkpoint(self, ask: messages.ForkCheckpoint) -> rows.Checkpoint:
        model = self.model(ask.tenant, ask.model_id)
        if not (0 < ask.op_no <= model.op_no and 0 < ask.step <= model.steps):
            raise UserError(
                f"the model {ask.model_id} has not come to operation {ask.op_no}, optimizer step {ask.step}"
            )
        address = ids.Address(ask.model_id, "weights", ids.check_name(ask.name))
        checkpoint_id = ids.fork(ask.fork_id)
        directory = ids.directory(ask.model_id, ask.op_no, checkpoint_id)
        if len(msgspec.json.encode(ask.edits)) > MAX_METADATA_BYTES:
            raise UserError(f"edits is over {MAX_METADATA_BYTES} bytes")
        with self._folder.use(directory):
            if (made := await self._fork(address, checkpoint_id)) is not None:
                return made
            size = await self._folder.adopt(checkpoint_id, directory)
            async with self._journal.naming:
                if (made := await self._fork(address, checkpoint_id)) is not None:
                    return made
                forked = CheckpointForked(
                    checkpoint_id=checkpoint_id,
                    name=ask.name,
                    directory=directory,
                    size_bytes=size,
                    op_no=ask.op_no,
                    step=ask.step,
                    edits=ask.edits,
                )
                subject = Subject(tenant=model.tenant, session_id=model.session_id, model_id=model.model_id)
                await self._journal.append((subject, forked))
        return self._ledger.checkpoints[(checkpoint_id,)]

    async def _fork(self, address: ids.Address, checkpoint_id: str) -> rows.Checkpoint | None:
        """The fork, if it is made already. UserError if its name or its id is taken by another."""
        made = await self._journal.read(partial(queries.checkpoint, checkpoint_id=checkpoint_id))
        if made is not None and (made.state != "live" or made.address != str(address)):
            raise UserError(f"{checkpoint_id} was published already, as {made.address}")
        if made is None and self._ledger.checkpoint_at(*address) is not None:
            raise UserError(f"{address} exists already: choose another name")
        return made

    async def _change_checkpoint(self, ask: messages.ChangeCheckpoint) -> None:
        plans.check_ttl(ask.ttl_seconds)
        async with self._journal.naming:
            checkpoint = self._own_checkpoint(ask.tenant, ask.address)
            expires_at = checkpoint.expires_at
            if ask.set_ttl:
                expires_at = None if ask.ttl_seconds is None else self._world.now() + ask.ttl_seconds
            changed = CheckpointChanged(
                checkpoint_id=checkpoint.checkpoint_id,
                public=checkpoint.public if ask.public is None else ask.public,
                expires_at=expires_at,
            )
            await self._journal.append((rows.about(checkpoint), changed))

    async def _delete_checkpoint(self, ask: messages.DeleteCheckpoint) -> None:
        async with self._journal.naming:
            checkpoint = self._own_checkpoint(ask.tenant, ask.address)
            deleted = CheckpointDeleted(checkpoint_id=checkpoint.checkpoint_id, reason="deleted")
            await self._journal.append((rows.about(checkpoint), deleted))

    # -- lookups ------------------------------------------------------------------------------------

    @property
    def _ledger(self) -> Ledger:
        return self._journal.ledger


def _owned(table: dict[Key, R], tenant: str, key: str, what: str) -> R:
    row = table.get((key,))
    if row is None or row.tenant != tenant:
        raise NotFound(f"there is no {what} {key[:200]}")
    return row


def _mine(table: dict[Key, R], tenant: str) -> list[R]:
    return [row for row in table.values() if row.tenant == tenant]


def _newest_first(found: Iterable[R]) -> list[R]:
    return sorted(found, key=lambda row: row.created_at, reverse=True)
