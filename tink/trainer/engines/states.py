"""What engines write into the artifact folder and read from there: saved states, snapshots and exported
adapters, in formats that no engine owns, so that what one has written another can go on from.

A saved state is `weights.safetensors` and `optimizer.safetensors` (the moments, `m.NAME` and `v.NAME`) with
the names of PEFT; a snapshot also has `gradient.safetensors`, if something is accumulated, and
`book.msgpack`. All are whole float32 matrices, however an engine holds them.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
from safetensors.torch import load_file, save_file

from tink import crash
from tink.errors import BackendError, UserError
from tink.limits import ADAPTER_CACHE, ADAPTER_CACHE_BYTES
from tink.trainer.artifacts import Artifacts
from tink.trainer.engines import lora
from tink.trainer.engines.adamw import Moments
from tink.trainer.engines.lora import Adapter, Sites
from tink.wire.tink_train import File, ModelInfo

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


class States:
    """Those of one base model, which its `name`, `digest` and `sites` are. `origin` is the operation's, as
    Artifacts.publish wants it. Reading raises NotFound, UserError or BackendError."""

    def __init__(self, artifacts: Artifacts, name: str, digest: str, sites: Sites) -> None:
        self._artifacts = artifacts
        self._name, self._digest, self._sites = name, digest, sites
        # Exported adapters by path, the latest used at the end. A path's content never changes, so that
        # what is in memory stays right after the files are deleted.
        self._exported: OrderedDict[str, Adapter] = OrderedDict()

    # -- writing ------------------------------------------------------------------------------------

    def save(self, path: str, origin: str, trained: Trained) -> list[File]:
        return self._publish(path, origin, trained, lambda directory: _write_state(directory, trained))

    def snapshot(self, path: str, origin: str, trained: Trained, book: bytes) -> list[File]:
        def fill(directory: Path) -> None:
            _write_state(directory, trained)
            if trained.gradient is not None:
                _save(directory / GRADIENT, trained.adapter.split(trained.gradient))
            (directory / BOOK).write_bytes(book)

        return self._publish(path, origin, trained, fill)

    def export(self, path: str, origin: str, trained: Trained) -> list[File]:
        """What peft.PeftModel.from_pretrained and vLLM read."""

        def fill(directory: Path) -> None:
            parts = trained.adapter.split(trained.adapter.values)
            whole = {f"{PEFT_PREFIX}{name}.weight": part for name, part in parts.items()}
            _save(directory / PEFT_WEIGHTS, whole)
            config = json.dumps(self._peft_config(trained.adapter.info), indent=1, sort_keys=True)
            (directory / PEFT_CONFIG).write_text(config + "\n")

        return self._publish(path, origin, trained, fill)

    def _publish(
        self, path: str, origin: str, trained: Trained, fill: Callable[[Path], None]
    ) -> list[File]:
        about = {
            "base_model": self._name,
            "base_digest": self._digest,
            "model": msgspec.to_builtins(trained.adapter.info),
            "step": trained.moments.step,
        }
        return self._artifacts.publish(path, origin, about, fill)

    def _peft_config(self, info: ModelInfo) -> dict[str, Any]:
        modules = {name.rpartition(".")[2] for name in lora.targets(info, self._sites)}
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self._name,
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

    # -- reading ------------------------------------------------------------------------------------

    def load(self, path: str, *, optimizer: bool) -> Trained:
        """A saved state or a snapshot, without its gradient; its moments too if `optimizer`."""
        directory, manifest = self._artifacts.open(path)
        if not (directory / WEIGHTS).is_file():
            raise UserError(f"{path} is not a saved state")
        adapter = self._adapter(manifest.about, load_file(directory / WEIGHTS))
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
        return Trained(adapter, Moments(manifest.about["step"], m, v))

    def restore(self, path: str) -> Trained:
        """All of a snapshot."""
        trained = self.load(path, optimizer=True)
        crash.point("trainer.restoring")
        directory, manifest = self._artifacts.open(path)
        if any(file.name == GRADIENT for file in manifest.files):
            trained = replace(trained, gradient=trained.adapter.join(load_file(directory / GRADIENT)))
        return trained

    def read_book(self, path: str) -> bytes:
        directory, _ = self._artifacts.open(path)
        try:
            return (directory / BOOK).read_bytes()
        except OSError as error:
            raise BackendError(f"{path} is not a snapshot: {error}") from error

    def exported(self, path: str) -> Adapter:
        """An exported adapter; the last few are kept. Two threads may read the same path at once:
        each operation on the dict is atomic, and the adapters they read are equal."""
        adapter = self._exported.pop(path, None) or self._read_exported(path)
        self._exported[path] = adapter
        while len(self._exported) > self._most(adapter):
            self._exported.popitem(last=False)
        return adapter

    @staticmethod
    def _most(like: Adapter) -> int:
        """How many are kept: on a GPU what is left of its memory is for models that train."""
        values = like.values
        if values.device.type == "cpu":
            return ADAPTER_CACHE
        size: int = values.numel() * values.element_size()
        return min(max(ADAPTER_CACHE_BYTES // size, 1), ADAPTER_CACHE)

    def _read_exported(self, path: str) -> Adapter:
        directory, manifest = self._artifacts.open(path)
        if not (directory / PEFT_WEIGHTS).is_file():
            raise BackendError(f"{path} is not an exported adapter")
        tensors = {
            name.removeprefix(PEFT_PREFIX).removesuffix(".weight"): tensor
            for name, tensor in load_file(directory / PEFT_WEIGHTS).items()
        }
        return self._adapter(manifest.about, tensors)

    def _adapter(self, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Adapter:
        if about["base_digest"] != self._digest:
            raise UserError(
                f"these weights belong to another base model ({about['base_model']}), this one is "
                f"{self._name}"
            )
        empty = Adapter(msgspec.convert(about["model"], ModelInfo), self._sites)
        return empty.with_values(empty.join(tensors))


def _write_state(directory: Path, trained: Trained) -> None:
    split = trained.adapter.split
    _save(directory / WEIGHTS, split(trained.adapter.values))
    moments = {f"m.{name}": part for name, part in split(trained.moments.m).items()}
    moments |= {f"v.{name}": part for name, part in split(trained.moments.v).items()}
    _save(directory / MOMENTS, moments)


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # Views of one flat vector share its storage, which safetensors refuses.
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    crash.point("trainer.file")
