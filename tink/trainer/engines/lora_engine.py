"""The engine: many LoRAs on one frozen base model.

A model (in the protocol's sense) is an adapter, its Adam moments and the gradient it has accumulated.
All three are replaced, never changed in place, and only at the end of an operation: one that fails has
changed nothing, and what another thread reads is whole.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from tink import crash
from tink.errors import NotFound, UserError
from tink.limits import MAX_RANK
from tink.trainer import batch as batches
from tink.trainer import losses
from tink.trainer.artifacts import Artifacts
from tink.trainer.engines import adamw, budget, lora, recompute, sampler
from tink.trainer.engines.adamw import Moments
from tink.trainer.engines.base_model import BaseModel
from tink.trainer.engines.interface import Facts
from tink.trainer.engines.lora import Adapter
from tink.trainer.engines.states import States, Trained
from tink.trainer.progress import beat
from tink.wire.samples import Sampled
from tink.wire.tink_train import (
    CreateModel,
    ExportAdapter,
    File,
    Forward,
    ForwardBackward,
    LoadState,
    ModelInfo,
    OpResult,
    OptimStep,
    SampleRequest,
    SaveState,
)

Tensor = Any
CPU = torch.device("cpu")


class LoraEngine:
    """`threads` and `micro_batch_tokens` (by default what suits the machine) are part of what a bit-exact
    redo must find unchanged, so they are in the facts."""

    def __init__(
        self,
        base: BaseModel,
        artifacts: Artifacts,
        threads: int = 1,
        micro_batch_tokens: int | None = None,
    ) -> None:
        torch.set_num_threads(threads)
        self._base = base
        self._micro_batch_tokens = micro_batch_tokens or budget.micro_batch_tokens(base)
        self._states = States(artifacts, base.name, base.digest, base.sites)
        self._models: dict[str, Trained] = {}
        self.facts = Facts(
            engine=base.engine,
            versions={
                "python": platform.python_version(),
                "torch": str(torch.__version__),
                **base.versions,
                "device": _device_name(base.device),
                "dtype": str(base.sites.dtype).removeprefix("torch."),
                "threads": str(threads),
                "micro_batch_tokens": str(self._micro_batch_tokens),
            },
            base_model=base.name,
            base_path=str(base.path),
            base_digest=base.digest,
            arch=base.arch,
            parameters=base.parameters,
            vocab_size=base.vocab_size,
            max_context=base.context,
            max_rank=MAX_RANK,
            losses=list(losses.LOSSES),
            capabilities=["train", "sample", "unembed"],
        )

    # -- operations on a model ----------------------------------------------------------------------

    def create(self, model_id: str, op: CreateModel) -> ModelInfo:
        if model_id in self._models:
            raise UserError(f"model {model_id} exists already")
        if op.source is None:
            info = ModelInfo(
                rank=op.rank,
                alpha=op.alpha,
                seed=op.seed,
                train_attn=op.train_attn,
                train_mlp=op.train_mlp,
                train_unembed=op.train_unembed,
            )
            lora.check(info, self._base.sites)
            adapter = lora.fresh(info, self._base.sites)
            trained = Trained(adapter, Moments.zero(adapter.values))
        else:
            trained = self._states.load(op.source, optimizer=op.optimizer)
        self._models[model_id] = trained
        return trained.adapter.info

    def forward(self, model_id: str, op: Forward) -> OpResult:
        trained = self._model(model_id)
        batch = self._decode(op.body)
        with torch.no_grad():
            return self._run(trained.adapter, batch).result

    def forward_backward(self, model_id: str, op: ForwardBackward) -> OpResult:
        trained = self._model(model_id)
        run = self._run(trained.adapter, self._decode(op.body), backward=True)
        total = run.gradient if trained.gradient is None else trained.gradient + run.gradient
        if not torch.isfinite(total).all():
            raise UserError("the gradient is not finite: the loss_fn_inputs drive it out of range")
        self._models[model_id] = replace(trained, gradient=total)
        return run.result

    def optim_step(self, model_id: str, op: OptimStep) -> dict[str, float]:
        adamw.check(op)
        trained = self._model(model_id)
        values = trained.adapter.values
        gradient = torch.zeros_like(values) if trained.gradient is None else trained.gradient
        new, moments, norm = adamw.step(values, gradient, trained.moments, op)
        if not torch.isfinite(new).all():
            raise UserError("the step makes weights that are not finite: lower the learning rate")
        self._models[model_id] = Trained(trained.adapter.with_values(new), moments)
        return {"grad_norm": norm, "step": float(moments.step)}

    def save_state(self, model_id: str, op: SaveState, origin: str) -> list[File]:
        return self._states.save(op.path, origin, self._model(model_id))

    def load_state(self, model_id: str, op: LoadState) -> None:
        now = self._model(model_id).adapter.info
        loaded = self._states.load(op.path, optimizer=op.optimizer)
        saved = loaded.adapter.info
        if lora.targets(saved, self._base.sites) != lora.targets(now, self._base.sites) or (
            saved.rank != now.rank
        ):
            raise UserError(
                f"the state is of a LoRA of rank {saved.rank}, the model's is {now.rank}, or their "
                "layers differ: create a model from the state instead"
            )
        self._models[model_id] = loaded

    def export_adapter(self, model_id: str, op: ExportAdapter, origin: str) -> list[File]:
        return self._states.export(op.path, origin, self._model(model_id))

    def remove(self, model_id: str) -> None:
        self._model(model_id)
        del self._models[model_id]

    # -- snapshots ----------------------------------------------------------------------------------

    def snapshot(self, model_id: str, path: str, book: bytes, origin: str) -> list[File]:
        return self._states.snapshot(path, origin, self._model(model_id), book)

    def read_book(self, path: str) -> bytes:
        return self._states.read_book(path)

    def restore(self, model_id: str, path: str) -> None:
        self._models[model_id] = self._states.restore(path)

    # -- sampling -----------------------------------------------------------------------------------

    def sample(self, request: SampleRequest) -> Sampled:
        adapter = None if request.adapter is None else self._states.exported(request.adapter)
        return sampler.sample(self._base, adapter, request)

    # -- the inside ---------------------------------------------------------------------------------

    def _model(self, model_id: str) -> Trained:
        trained = self._models.get(model_id)
        if trained is None:
            raise NotFound(f"model {model_id} does not exist here: its creation failed")
        return trained

    def _decode(self, body: bytes) -> batches.Batch:
        return batches.decode(body, self._base.vocab_size, self._base.context)

    def _run(self, adapter: Adapter, batch: batches.Batch, backward: bool = False) -> _Run:
        """Loss and log-probabilities of the batch and, if `backward`, the gradient of the loss."""
        gradient = torch.zeros_like(adapter.values)
        logprobs: list[Tensor] = []
        total = 0.0
        with lora.using(adapter):
            groups = batches.micro_batches(batch.data, self._micro_batch_tokens)
            while together := list(islice(groups, self._base.in_flight)):
                if logprobs:
                    crash.point("trainer.micro-batch")
                each, pieces = self._micro_batches(batch, together)
                # Both are waited for once, and not for each datum.
                found = moved([each.detach(), *(piece.detach() for piece in pieces)], CPU)
                for value, piece in zip(found[0].tolist(), found[1:], strict=True):
                    _check_finite(len(logprobs), value, piece)
                    logprobs.append(piece)
                    total += value
                if backward:
                    crash.point("trainer.forward")
                    gradient += adapter.gradient(each.sum())
                beat()
        if backward:
            gradient = self._base.total(gradient)
        metrics = {"loss:sum": total, "tokens:sum": float(batch.tokens)}
        body = batches.encode(logprobs, metrics)
        result = OpResult(body=body, metrics=metrics, loss=total, tokens=batch.tokens)
        return _Run(result, gradient)

    def _micro_batches(
        self, batch: batches.Batch, groups: list[list[batches.Datum]]
    ) -> tuple[Tensor, list[Tensor]]:
        """The loss of each datum (D,), and its log-probabilities in the shape of its targets."""
        ids = [self._ids(group) for group in groups]
        with recompute.within(any(one.numel() > self._micro_batch_tokens for one in ids)):
            hidden = self._base.hiddens(ids)
        found = [self._losses(batch, *pair) for pair in zip(groups, hidden, strict=True)]
        return torch.cat([each for each, _ in found]), [piece for _, pieces in found for piece in pieces]

    def _ids(self, group: list[batches.Datum]) -> Tensor:
        width = min(batches.width(max(datum.length for datum in group)), self._base.context)
        ids = torch.zeros((len(group), width), dtype=torch.int64)
        for row, datum in zip(ids, group, strict=True):
            row[: datum.length] = datum.tokens
        return ids.to(self._base.device)

    def _losses(
        self, batch: batches.Batch, group: list[batches.Datum], hidden: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Of the data of one micro-batch."""
        device = self._base.device
        lengths = [datum.length for datum in group]
        packed = torch.cat([row[:length] for row, length in zip(hidden, lengths, strict=True)])
        targets = torch.cat([datum.targets.reshape(datum.length, -1) for datum in group])
        scored = self._base.head.logprobs(packed, targets.to(device)).split(lengths)
        pieces = [piece.reshape(datum.targets.shape) for piece, datum in zip(scored, group, strict=True)]
        values = iter(moved([value for datum in group for value in datum.inputs.values()], device))
        each = [
            batch.loss.function(piece, dict(zip(datum.inputs, values, strict=False)), batch.config)
            for piece, datum in zip(pieces, group, strict=True)
        ]
        return torch.stack(each), pieces


@dataclass(frozen=True)
class _Run:
    result: OpResult
    gradient: Tensor


def moved(tensors: Sequence[Tensor], device: Any) -> list[Tensor]:
    """float32 tensors there, by one copy."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).to(device)
    pieces = flat.split([tensor.numel() for tensor in tensors])
    return [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]


def _device_name(device: Any) -> str:
    return str(device.type if device.type == "cpu" else torch.cuda.get_device_name(device))


def _check_finite(index: int, loss: float, logprobs: Tensor) -> None:
    if not torch.isfinite(logprobs).all():
        raise UserError(f"data[{index}]: log-probabilities are not finite: training has diverged")
    if not np.isfinite(loss):
        raise UserError(f"data[{index}]: the loss is {loss}; its loss_fn_inputs overflow it")
