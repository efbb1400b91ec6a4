"""The HuggingFace engine: many LoRAs on one frozen transformers model, in this process.

A model (in the protocol's sense) is an adapter, its Adam moments and the gradient it has accumulated.
All three are replaced, never changed in place, and only at the end of an operation: one that fails has
changed nothing, and what another thread reads is whole.
"""

from __future__ import annotations

import json
import platform
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

from tink import crash
from tink.errors import BackendError, NotFound, UserError
from tink.limits import ADAPTER_CACHE, MAX_RANK
from tink.trainer import batch as batches
from tink.trainer import losses
from tink.trainer.artifacts import Artifacts
from tink.trainer.engines import adamw, lora, sampler
from tink.trainer.engines.adamw import Moments
from tink.trainer.engines.base import Facts, Sampled
from tink.trainer.engines.frozen import Frozen
from tink.trainer.engines.lora import Adapter
from tink.trainer.progress import beat
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

WEIGHTS = "weights.safetensors"
MOMENTS = "optimizer.safetensors"
GRADIENT = "gradient.safetensors"
BOOK = "book.msgpack"
PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Trained:
    """A model's state. `gradient` None: nothing accumulated since the last step."""

    adapter: Adapter
    moments: Moments
    gradient: Tensor | None = None


class HFEngine:
    """`threads` is part of what a bit-exact redo must find unchanged, so it is in the facts."""

    def __init__(self, frozen: Frozen, artifacts: Artifacts, threads: int = 1) -> None:
        torch.set_num_threads(threads)
        self._frozen = frozen
        self._artifacts = artifacts
        self._models: dict[str, Trained] = {}
        self._adapters = _AdapterCache(frozen, artifacts)
        self.facts = Facts(
            engine="hf",
            versions={
                "python": platform.python_version(),
                "torch": str(torch.__version__),
                "transformers": transformers.__version__,
                "threads": str(threads),
            },
            base_model=frozen.name,
            base_path=str(frozen.path),
            base_digest=frozen.digest,
            arch=(frozen.config.architectures or [frozen.config.model_type])[0],
            parameters=frozen.parameters,
            vocab_size=frozen.vocab_size,
            max_context=frozen.context,
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
            lora.check(info, self._frozen.sites)
            adapter = lora.fresh(info, self._frozen.sites)
            trained = Trained(adapter, Moments.zero(adapter.values))
        else:
            trained = self._read(op.source, op.optimizer)
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
        trained = self._model(model_id)

        def fill(directory: Path) -> None:
            _write_state(directory, trained)

        return self._artifacts.publish(op.path, origin, self._about(trained), fill)

    def load_state(self, model_id: str, op: LoadState) -> None:
        now = self._model(model_id).adapter.info
        loaded = self._read(op.path, op.optimizer)
        saved = loaded.adapter.info
        if lora.targets(saved, self._frozen.sites) != lora.targets(now, self._frozen.sites) or (
            saved.rank != now.rank
        ):
            raise UserError(
                f"the state is of a LoRA of rank {saved.rank}, the model's is {now.rank}, or their "
                "layers differ: create a model from the state instead"
            )
        self._models[model_id] = loaded

    def export_adapter(self, model_id: str, op: ExportAdapter, origin: str) -> list[File]:
        trained = self._model(model_id)

        def fill(directory: Path) -> None:
            _write_peft(directory, trained.adapter, self._frozen)

        return self._artifacts.publish(op.path, origin, self._about(trained), fill)

    def remove(self, model_id: str) -> None:
        self._model(model_id)
        del self._models[model_id]

    # -- snapshots ----------------------------------------------------------------------------------

    def snapshot(self, model_id: str, path: str, book: bytes, origin: str) -> list[File]:
        trained = self._model(model_id)

        def fill(directory: Path) -> None:
            _write_state(directory, trained)
            if trained.gradient is not None:
                _save(directory / GRADIENT, trained.adapter.split(trained.gradient))
            (directory / BOOK).write_bytes(book)

        return self._artifacts.publish(path, origin, self._about(trained), fill)

    def read_book(self, path: str) -> bytes:
        directory, _ = self._artifacts.open(path)
        try:
            return (directory / BOOK).read_bytes()
        except OSError as error:
            raise BackendError(f"{path} is not a snapshot: {error}") from error

    def restore(self, model_id: str, path: str) -> None:
        trained = self._read(path, optimizer=True)
        crash.point("trainer.restoring")
        directory, manifest = self._artifacts.open(path)
        if any(file.name == GRADIENT for file in manifest.files):
            gradient = trained.adapter.join(load_file(directory / GRADIENT))
            trained = replace(trained, gradient=gradient)
        self._models[model_id] = trained

    # -- sampling -----------------------------------------------------------------------------------

    def sample(self, request: SampleRequest) -> Sampled:
        adapter = None if request.adapter is None else self._adapters.get(request.adapter)
        return sampler.sample(self._frozen, adapter, request)

    # -- the inside ---------------------------------------------------------------------------------

    def _model(self, model_id: str) -> Trained:
        trained = self._models.get(model_id)
        if trained is None:
            raise NotFound(f"model {model_id} does not exist here: its creation failed")
        return trained

    def _decode(self, body: bytes) -> batches.Batch:
        return batches.decode(body, self._frozen.vocab_size, self._frozen.context)

    def _run(self, adapter: Adapter, batch: batches.Batch, backward: bool = False) -> _Run:
        """Loss and log-probabilities of the batch and, if `backward`, the gradient of the loss."""
        gradient = torch.zeros_like(adapter.values)
        logprobs: list[Tensor] = []
        total = 0.0
        with lora.using(adapter):
            for group in batches.micro_batches(batch.data):
                if logprobs:
                    crash.point("trainer.micro-batch")
                each, pieces = self._micro_batch(batch, group)
                for value, piece in zip(each.tolist(), pieces, strict=True):
                    _check_finite(len(logprobs), value, piece)
                    logprobs.append(piece.detach())
                    total += value
                if backward:
                    crash.point("trainer.forward")
                    gradient += adapter.gradient(each.sum())
                beat()
        metrics = {"loss:sum": total, "tokens:sum": float(batch.tokens)}
        body = batches.encode(logprobs, metrics)
        result = OpResult(body=body, metrics=metrics, loss=total, tokens=batch.tokens)
        return _Run(result, gradient)

    def _micro_batch(self, batch: batches.Batch, group: list[batches.Datum]) -> tuple[Tensor, list[Tensor]]:
        """The loss of each datum (D,), and its log-probabilities in the shape of its targets."""
        lengths = [datum.length for datum in group]
        width = min(batches.width(max(lengths)), self._frozen.context)
        ids = torch.zeros((len(group), width), dtype=torch.int64)
        for row, datum in zip(ids, group, strict=True):
            row[: datum.length] = datum.tokens
        hidden = self._frozen.hidden(ids)
        packed = torch.cat([row[:length] for row, length in zip(hidden, lengths, strict=True)])
        targets = torch.cat([datum.targets.reshape(datum.length, -1) for datum in group])
        scored = self._frozen.logprobs(packed, targets).split(lengths)
        pieces = [piece.reshape(datum.targets.shape) for piece, datum in zip(scored, group, strict=True)]
        each = [
            batch.loss.function(piece, datum.inputs, batch.config)
            for piece, datum in zip(pieces, group, strict=True)
        ]
        return torch.stack(each), pieces

    def _about(self, trained: Trained) -> dict[str, Any]:
        return {
            "base_model": self._frozen.name,
            "base_digest": self._frozen.digest,
            "model": msgspec.to_builtins(trained.adapter.info),
            "step": trained.moments.step,
        }

    def _read(self, path: str, optimizer: bool) -> Trained:
        """A saved state or a snapshot, without its gradient."""
        directory, manifest = self._artifacts.open(path)
        about = manifest.about
        if not (directory / WEIGHTS).is_file():
            raise UserError(f"{path} is not a saved state")
        adapter = _adapter(self._frozen, about, load_file(directory / WEIGHTS))
        if not optimizer:
            return Trained(adapter, Moments.zero(adapter.values))
        both = load_file(directory / MOMENTS)
        m, v = (
            adapter.join(
                {
                    name.removeprefix(prefix): tensor
                    for name, tensor in both.items()
                    if name.startswith(prefix)
                }
            )
            for prefix in ("m.", "v.")
        )
        return Trained(adapter, Moments(about["step"], m, v))


@dataclass(frozen=True)
class _Run:
    result: OpResult
    gradient: Tensor


class _AdapterCache:
    """Exported adapters by path, the latest used ADAPTER_CACHE of them. A path's content never
    changes, so that what is in memory stays right after the files are deleted."""

    def __init__(self, frozen: Frozen, artifacts: Artifacts) -> None:
        self._frozen = frozen
        self._artifacts = artifacts
        self._loaded: OrderedDict[str, Adapter] = OrderedDict()

    def get(self, path: str) -> Adapter:
        """Two threads may read the same path at once; each operation on the dict is atomic, and the
        adapters they read are equal."""
        adapter = self._loaded.pop(path, None) or self._read(path)
        self._loaded[path] = adapter
        while len(self._loaded) > ADAPTER_CACHE:
            self._loaded.popitem(last=False)
        return adapter

    def _read(self, path: str) -> Adapter:
        directory, manifest = self._artifacts.open(path)
        if not (directory / PEFT_WEIGHTS).is_file():
            raise BackendError(f"{path} is not an exported adapter")
        tensors = {
            name.removeprefix(PEFT_PREFIX).removesuffix(".weight"): tensor
            for name, tensor in load_file(directory / PEFT_WEIGHTS).items()
        }
        return _adapter(self._frozen, manifest.about, tensors)


def _adapter(frozen: Frozen, about: dict[str, Any], tensors: dict[str, Tensor]) -> Adapter:
    if about["base_digest"] != frozen.digest:
        raise UserError(
            f"these weights belong to another base model ({about['base_model']}), this one is {frozen.name}"
        )
    empty = Adapter(msgspec.convert(about["model"], ModelInfo), frozen.sites)
    return empty.with_values(empty.join(tensors))


def _check_finite(index: int, loss: float, logprobs: Tensor) -> None:
    if not torch.isfinite(logprobs).all():
        raise UserError(f"data[{index}]: log-probabilities are not finite: training has diverged")
    if not np.isfinite(loss):
        raise UserError(f"data[{index}]: the loss is {loss}; its loss_fn_inputs overflow it")


def _write_state(directory: Path, trained: Trained) -> None:
    split = trained.adapter.split
    _save(directory / WEIGHTS, split(trained.adapter.values))
    moments = {f"m.{name}": part for name, part in split(trained.moments.m).items()}
    moments |= {f"v.{name}": part for name, part in split(trained.moments.v).items()}
    _save(directory / MOMENTS, moments)


def _write_peft(directory: Path, adapter: Adapter, frozen: Frozen) -> None:
    """What peft.PeftModel.from_pretrained and vLLM read."""
    _save(
        directory / PEFT_WEIGHTS,
        {f"{PEFT_PREFIX}{name}.weight": part for name, part in adapter.split(adapter.values).items()},
    )
    info = adapter.info
    modules = {name.rpartition(".")[2] for name in lora.targets(info, frozen.sites)}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": frozen.name,
        "r": info.rank,
        "lora_alpha": int(info.alpha) if info.alpha == int(info.alpha) else info.alpha,
        "target_modules": sorted(modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
    }
    (directory / PEFT_CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    # Views of one flat vector share its storage, which safetensors refuses.
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    crash.point("trainer.file")
