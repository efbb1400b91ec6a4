"""From a journaled training job to the trainer's operation, and from its answer to the events that end the
job. Pure: everything comes in as arguments, and the same job gives the same plan in every life."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, assert_never

import msgspec

from tink.domain import events, ids, requests, rows
from tink.domain.events import Entry
from tink.domain.ledger import Ledger
from tink.domain.memory import RowId
from tink.errors import UserError
from tink.limits import LONGEST_TTL, MAX_METADATA_BYTES
from tink.wire import tink_train

Save = requests.SaveWeights | requests.SaveWeightsForSampler | requests.SaveWeightsExternal
Command = requests.CreateModel | requests.OptimStep | requests.LoadWeights | Save
KINDS: dict[type[Save], ids.CheckpointKind] = {
    requests.SaveWeights: "weights",
    requests.SaveWeightsForSampler: "sampler_weights",
    requests.SaveWeightsExternal: "external_weights",
}


class Plan(msgspec.Struct, frozen=True):
    """`directory`: what the operation reads or writes under the artifact folder. `export`: where it writes
    an adapter version. `request`: the command, decoded; None of data and of unload_model."""

    op: tink_train.Op
    directory: str | None = None
    export: str | None = None
    request: Command | None = None


class Context(msgspec.Struct, frozen=True):
    """What a plan depends on beside the job: the journal's state, what the trainer serves, and whether
    sampling servers have to be given a new model's adapter (`exports`)."""

    ledger: Ledger
    served: tink_train.Info
    alpha: float
    exports: bool


# -- training ---------------------------------------------------------------------------------------


def training(job: rows.Job, body: bytes, op_no: int, context: Context) -> Plan:
    """The operation of a training job whose turn has come. Raises UserError if it cannot be served."""
    model_id = _model_id(job)
    if job.op != "create_model" and job.seq_id != 0:
        model = context.ledger.models[(model_id,)]
        if model.state == "removed":
            raise UserError(
                f"the model {model_id} was unloaded: make another one, from what was saved of it"
            )
        if model.state != "live":
            raise UserError(f"the model {model_id} was never made: its creation failed")
    match job.op:
        case "forward":
            return Plan(tink_train.Forward(body))
        case "forward_backward":
            return Plan(tink_train.ForwardBackward(body))
        case "unload_model":
            return Plan(tink_train.RemoveModel())
        case "create_model":
            create = requests.decode(body, requests.CreateModel)
            plan = Plan(_create_model(model_id, create, context), request=create)
            return _exporting(plan, model_id, op_no, context)
        case "optim_step":
            optim, op = optim_step(body)
            return Plan(op, request=optim)
        case "load_weights":
            load = _load_weights(job, requests.decode(body, requests.LoadWeights), context)
            return _exporting(load, model_id, op_no, context)
    directory = ids.directory(model_id, op_no, job.op)
    match job.op:
        case "save_weights":
            state = requests.decode(body, requests.SaveWeights)
            _check_save(job, state, context.ledger)
            return Plan(tink_train.SaveState(directory), directory, request=state)
        case "save_weights_for_sampler":
            save = requests.decode(body, requests.SaveWeightsForSampler)
            _check_save(job, save, context.ledger)
            if save.path is None:
                _check_ephemeral(job, save, context.ledger)
            return Plan(tink_train.ExportAdapter(directory), directory, directory, save)
        case "save_weights_external":
            external = requests.decode(body, requests.SaveWeightsExternal)
            if external.age_encryption_recipients:
                raise UserError("encrypted exports are not supported: leave age_encryption_recipients out")
            _check_save(job, external, context.ledger)
            return Plan(tink_train.ExportAdapter(directory), directory, request=external)
    raise UserError(f"{job.op} is not a training operation")


def _exporting(plan: Plan, model_id: str, op_no: int, context: Context) -> Plan:
    """With the new model's version 0, if the plan makes a model and somebody has to be given it."""
    if not context.exports or not isinstance(plan.op, tink_train.CreateModel):
        return plan
    export = ids.first_adapter(model_id, op_no)
    return msgspec.structs.replace(plan, op=msgspec.structs.replace(plan.op, export=export), export=export)


def named(job: rows.Job, request: str | None) -> list[RowId]:
    """What a plan looks up beside its own model: rows that may have been forgotten."""
    try:
        match job.op:
            case "load_weights":
                load = requests.decode((request or "").encode(), requests.LoadWeights)
                return [("models", ids.Address.parse(load.path).model_id)]
            case "save_weights_for_sampler":
                save = requests.decode((request or "").encode(), requests.SaveWeightsForSampler)
                if save.path is None and save.sampling_session_seq_id is not None:
                    return [("samplers", ids.sampler_id(str(job.session_id), save.sampling_session_seq_id))]
    except UserError:  # which the plan says
        pass
    return []


def again(job: rows.Job, body: bytes, ledger: Ledger) -> tink_train.Op:
    """The operation of a job that has run before, for a trainer that has lost it: exactly what it was
    then, whatever has been renamed, deleted or configured since."""
    if job.state == "failed" or job.op not in requests.MUTATING:
        return tink_train.Skip()
    model = ledger.models[(_model_id(job),)]
    match job.op:
        case "forward_backward":
            return tink_train.ForwardBackward(body)
        case "optim_step":
            return optim_step(body)[1]
        case "load_weights" if job.seq_id != 0:
            request = requests.decode(body, requests.LoadWeights)
            return tink_train.LoadState(path=str(job.directory), optimizer=request.optimizer)
    source, optimizer = None, False
    if job.op == "load_weights":
        source, optimizer = job.directory, requests.decode(body, requests.LoadWeights).optimizer
    return _like(model, source, optimizer)


def _like(model: rows.Model, source: str | None, optimizer: bool) -> tink_train.CreateModel:
    """Another one of that shape, from the state at `source`."""
    assert model.rank is not None, "a model that was made has a rank"
    assert model.alpha is not None
    assert model.seed is not None
    return tink_train.CreateModel(
        rank=model.rank,
        alpha=model.alpha,
        seed=model.seed,
        train_attn=bool(model.train_attn),
        train_mlp=bool(model.train_mlp),
        train_unembed=bool(model.train_unembed),
        source=source,
        optimizer=optimizer,
    )


def difference(job: rows.Job, reply: tink_train.OpReply) -> str | None:
    """What a redo gave that the job did not give, if it did."""
    if reply.result is None:
        return f"the redo failed: {reply.failure.message if reply.failure else reply.state}"
    if job.result_sha256 and hashlib.sha256(reply.result.body).hexdigest() != job.result_sha256:
        return f"another result: loss {reply.result.loss}, journaled {job.loss_sum}"
    if job.op == "optim_step" and job.result != {"metrics": reply.result.metrics}:
        return f"other metrics: {reply.result.metrics}, journaled {job.result}"
    return None


def check_base_model(name: str, served: str, path: str | None) -> None:
    """Raises UserError unless `name` is the model that is served, by its name or its path."""
    if name not in (served, path):
        raise UserError(f"the base model {name[:200]!r} is not served here: {served!r} is")


def check_ttl(seconds: int | None) -> None:
    """Raises UserError unless a checkpoint may be kept for so long; None is for ever."""
    if seconds is not None and not 0 < seconds <= LONGEST_TTL:
        raise UserError(f"ttl_seconds {seconds} cannot be used: 1 to {LONGEST_TTL} can")


def find_checkpoint(ledger: Ledger, address: ids.Address, tenant: str) -> rows.Checkpoint:
    """The live checkpoint at `address` if `tenant` may read it, else UserError."""
    checkpoint = ledger.checkpoint_at(*address)
    if checkpoint is not None and (checkpoint.tenant == tenant or checkpoint.public):
        return checkpoint
    raise UserError(f"there is no checkpoint {address}")


def _model_id(job: rows.Job) -> str:
    assert job.model_id is not None, "a training job has a model"
    return job.model_id


def _create_model(model_id: str, request: requests.CreateModel, context: Context) -> tink_train.CreateModel:
    check_base_model(request.base_model, context.served.base_model, context.served.base_path)
    lora = request.lora_config
    if not 1 <= lora.rank <= context.served.max_rank:
        raise UserError(f"rank {lora.rank} cannot be used: 1 to {context.served.max_rank} can")
    if lora.alpha is not None and not 0 < lora.alpha < 1e6:
        raise UserError(f"alpha {lora.alpha:g} cannot be used: more than 0 and less than 1e6 can")
    if not (lora.train_attn or lora.train_mlp or lora.train_unembed):
        raise UserError("nothing to train: set one of train_attn, train_mlp, train_unembed")
    if request.optimizer_config.type != "adamw":
        raise UserError(f"the optimizer {request.optimizer_config.type!r} is not supported: 'adamw' is")
    _check_metadata(request.user_metadata)
    # Without a seed, one that every life of this model agrees on.
    seed = (
        lora.seed if lora.seed is not None else int(hashlib.sha256(model_id.encode()).hexdigest()[:7], 16)
    )
    return tink_train.CreateModel(
        rank=lora.rank,
        alpha=context.alpha if lora.alpha is None else lora.alpha,
        seed=seed % 2**63,
        train_attn=lora.train_attn,
        train_mlp=lora.train_mlp,
        train_unembed=lora.train_unembed,
    )


def optim_step(body: bytes) -> tuple[requests.OptimStep, tink_train.OptimStep]:
    """The request of an optim_step, and the operation. Raises UserError if it cannot be served."""
    request = requests.decode(body, requests.OptimStep)
    if request.optimizer_params is not None:
        kind = str(request.optimizer_params.get("type"))[:80]
        raise UserError(f"the optimizer {kind!r} is not supported: send adam_params")
    adam = request.adam_params or requests.AdamParams()
    if adam.learning_rate < 0 or adam.weight_decay < 0 or adam.grad_clip_norm < 0:
        raise UserError("learning_rate, weight_decay and grad_clip_norm cannot be negative")
    if not (0 <= adam.beta1 < 1 and 0 <= adam.beta2 < 1 and adam.eps > 0):
        raise UserError("beta1 and beta2 must be in [0, 1), and eps above 0")
    return request, tink_train.OptimStep(**msgspec.structs.asdict(adam))


def _load_weights(job: rows.Job, request: requests.LoadWeights, context: Context) -> Plan:
    address = ids.Address.parse(request.path)
    if address.kind != "weights":
        raise UserError(f"{address} cannot be trained on: only a state that save_state wrote can")
    # A job that was begun goes on with what it began with, whatever has become of the checkpoint.
    directory = job.directory or find_checkpoint(context.ledger, address, job.tenant).directory
    source = context.ledger.models[(address.model_id,)]
    if request.base_model is not None:
        check_base_model(request.base_model, context.served.base_model, context.served.base_path)
    if job.seq_id != 0:
        target = context.ledger.models[(_model_id(job),)]
        for part in ("rank", "train_attn", "train_mlp", "train_unembed"):
            mine, theirs = getattr(target, part), getattr(source, part)
            if mine != theirs:
                raise UserError(f"{address} has {part} {theirs}, this model {mine}: they must be equal")
        return Plan(tink_train.LoadState(directory, request.optimizer), directory, request=request)
    if request.optimizer_config is not None and request.optimizer_config.type != "adamw":
        raise UserError(f"the optimizer {request.optimizer_config.type!r} is not supported: 'adamw' is")
    _check_metadata(request.user_metadata)
    return Plan(_like(source, directory, request.optimizer), directory, request=request)


def _check_save(job: rows.Job, request: Save, ledger: Ledger) -> None:
    check_ttl(request.ttl_seconds)
    _check_metadata(getattr(request, "user_metadata", None))
    name = _save_name(job, request)
    if name is not None and not getattr(request, "overwrite", False):
        taken = ledger.checkpoint_at(_model_id(job), KINDS[type(request)], name)
        if taken is not None and taken.checkpoint_id != job.job_id:
            raise UserError(f"{taken.address} exists already: choose another name, or pass overwrite=True")


def _check_ephemeral(job: rows.Job, request: requests.SaveWeightsForSampler, ledger: Ledger) -> None:
    if request.sampling_session_seq_id is None:
        raise UserError("save_weights_for_sampler needs a path, or sampling_session_seq_id for a sampler")
    sampler = ids.sampler_id(str(job.session_id), request.sampling_session_seq_id)
    if (sampler,) in ledger.samplers:
        raise UserError(f"the sampler {sampler} exists already: count sampling_session_seq_id up")


def _check_metadata(metadata: Any) -> None:
    if metadata and len(msgspec.json.encode(metadata)) > MAX_METADATA_BYTES:
        raise UserError(f"user_metadata is over {MAX_METADATA_BYTES} bytes")


def _save_name(job: rows.Job, request: Save) -> str | None:
    """The checkpoint's name; None for ephemeral sampler weights, which have no address."""
    if request.path is not None:
        return ids.check_name(request.path)
    return None if isinstance(request, requests.SaveWeightsForSampler) else f"seq-{job.seq_id:06d}"


def started(job: rows.Job, op_no: int, plan: Plan, now: float) -> Entry:
    """The event of the next attempt."""
    event = events.JobStarted(
        attempt=job.attempts + 1,
        backend="trainer",
        op_no=op_no,
        seq_id=job.seq_id,
        directory=plan.directory,
        queue_ms=job.queued_ms(now),
    )
    return rows.about(job), event


# -- the end of a training job ----------------------------------------------------------------------


def step(job: rows.Job, ledger: Ledger) -> int | None:
    """The optimizer step of its model that a job makes or adds a gradient to. A model's jobs run one after
    the other, so it is the next one whenever this is asked."""
    if job.op not in ("forward_backward", "optim_step"):
        return None
    return ledger.models[(_model_id(job),)].steps + 1


def learning_rate(plan: Plan) -> float | None:
    return plan.op.learning_rate if isinstance(plan.op, tink_train.OptimStep) else None


def exported(
    job: rows.Job, plan: Plan, result: tink_train.OpResult, context: Context, now: float
) -> rows.Adapter | None:
    """The adapter version that a done job has written, if it has: the row that its event will make."""
    if plan.export is None or not result.files:  # applied when nobody had asked for an adapter
        return None
    model_id = _model_id(job)
    versions = context.ledger.models[(model_id,)].versions
    version = 1 + versions if job.op == "save_weights_for_sampler" else 0
    return rows.Adapter(
        adapter_id=ids.adapter_id(model_id, version),
        tenant=job.tenant,
        model_id=model_id,
        version=version,
        job_id=job.job_id,
        directory=plan.export,
        size_bytes=sum(file.size for file in result.files),
        files={file.name: file.sha256 for file in result.files},
        step=context.ledger.models[(model_id,)].steps,
        created_at=now,
    )


def exported_events(job: rows.Job, adapter: rows.Adapter, replicas: Iterable[str]) -> list[Entry]:
    """The events of a new version, and of the servers that have it."""
    who = rows.about(job, adapter_id=adapter.adapter_id)
    made = events.AdapterExported(
        version=adapter.version,
        directory=adapter.directory,
        size_bytes=adapter.size_bytes,
        files=adapter.files,
        step=adapter.step,
    )
    placed = [
        (msgspec.structs.replace(who, replica=replica), events.AdapterPlaced(state="loaded"))
        for replica in replicas
    ]
    return [(who, made), *placed]


def conclusion(
    job: rows.Job,
    plan: Plan,
    result: tink_train.OpResult,
    context: Context,
    now: float,
    adapter: rows.Adapter | None,
) -> tuple[dict[str, Any] | None, list[Entry]]:
    """What a done job answers in JSON (None: its body is the answer), and the events beside its own and
    those of the `adapter` version that it has written. Raises UserError if its sampler's number was
    taken meanwhile."""
    model_id, request = _model_id(job), plan.request
    match request:
        case None if job.op == "unload_model":
            return {"model_id": model_id, "type": "unload_model"}, _removed(job, context.ledger)
        case None:
            return None, []
        case requests.OptimStep():
            return {"metrics": result.metrics}, []
        case requests.CreateModel():
            return _created(job, request.user_metadata, None, result, context)
        case requests.LoadWeights() if job.seq_id != 0:
            return {"path": request.path, "model_id": model_id}, []
        case requests.LoadWeights():
            answer, entries = _created(job, request.user_metadata, request.path, result, context)
            return {"path": request.path, **answer}, entries
        case requests.SaveWeights() | requests.SaveWeightsForSampler() | requests.SaveWeightsExternal():
            return _saved(job, plan, result, context, now, adapter)
    assert_never(request)


def _removed(job: rows.Job, ledger: Ledger) -> list[Entry]:
    """Nothing of the model is redone any more."""
    entries: list[Entry] = [(rows.about(job), events.ModelRemoved())]
    for snapshot in ledger.snapshots.values():
        if snapshot.model_id == job.model_id and snapshot.state == "live":
            dropped = events.SnapshotDropped(snapshot_id=snapshot.snapshot_id, reason="pruned")
            entries.append((rows.about(job), dropped))
    return entries


def _created(
    job: rows.Job,
    user_metadata: dict[str, Any] | None,
    source: str | None,
    result: tink_train.OpResult,
    context: Context,
) -> tuple[dict[str, Any], list[Entry]]:
    model = result.model
    assert model is not None, "the trainer says what it made"
    made = events.ModelCreated(
        base_model=context.served.base_model,
        user_metadata=user_metadata or {},
        source=source,
        **msgspec.structs.asdict(model),
    )
    return {"model_id": _model_id(job)}, [(rows.about(job), made)]


def _saved(
    job: rows.Job,
    plan: Plan,
    result: tink_train.OpResult,
    context: Context,
    now: float,
    adapter: rows.Adapter | None,
) -> tuple[dict[str, Any], list[Entry]]:
    model_id, directory, request = _model_id(job), str(plan.directory), plan.request
    assert isinstance(request, Save)
    kind = KINDS[type(request)]
    size = sum(file.size for file in result.files)
    who = rows.about(job, adapter_id=None if adapter is None else adapter.adapter_id)
    answer: dict[str, Any] = {"path": None}
    name = _save_name(job, request)
    if name is None:
        assert isinstance(request, requests.SaveWeightsForSampler)
        assert request.sampling_session_seq_id is not None, "the plan has checked it"
        _check_ephemeral(job, request, context.ledger)  # the number may have been taken meanwhile
        sampler = ids.sampler_id(str(job.session_id), request.sampling_session_seq_id)
        made = events.SamplerCreated(
            sampler_id=sampler,
            sampling_seq_id=request.sampling_session_seq_id,
            base_model=context.served.base_model,
        )
        answer["sampling_session_id"] = sampler
        return answer, [(who, made)]
    entries: list[Entry] = []
    taken = context.ledger.checkpoint_at(model_id, kind, name)
    if taken is not None:
        entries.append(
            (who, events.CheckpointDeleted(checkpoint_id=taken.checkpoint_id, reason="overwritten"))
        )
    saved = events.CheckpointSaved(
        checkpoint_kind=kind,
        name=name,
        directory=directory,
        size_bytes=size,
        user_metadata=getattr(request, "user_metadata", None) or {},
        expires_at=None if request.ttl_seconds is None else now + request.ttl_seconds,
        step=context.ledger.models[(model_id,)].steps,
    )
    answer["path"] = str(ids.Address(model_id, kind, name))
    if kind == "external_weights":
        answer["size_bytes"] = size
    return answer, [*entries, (who, saved)]
