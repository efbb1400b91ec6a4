"""Adapters as the training server exports them, and what it says of them: what vLLM is compared with."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from tink.trainer.artifacts import Artifacts
from tink.trainer.engines import huggingface
from tink.trainer.engines.lora_engine import LoraEngine
from tink.wire import tinker_pb2 as pb
from tink.wire.tink_train import (
    CreateModel,
    ExportAdapter,
    ForwardBackward,
    OptimStep,
    SampleRequest,
)


class Adapters:
    """Under `root`, trained a little on a model directory, so that each differs clearly from the base."""

    def __init__(self, model: Path, root: Path) -> None:
        self._engine = LoraEngine(huggingface.load(model, "base"), Artifacts(root, "tests"))
        self.root = root

    def make(self, name: str, *, rank: int = 8, seed: int = 0, unembed: bool = True) -> Path:
        """Trains and exports one; its directory."""
        create = CreateModel(rank=rank, alpha=32.0, seed=seed, train_unembed=unembed)
        self._engine.create(name, create)
        for step in range(3):
            self._engine.forward_backward(name, ForwardBackward(_text(100 * seed + step)))
            self._engine.optim_step(name, OptimStep(learning_rate=0.02))
        self._engine.export_adapter(name, ExportAdapter(name), name)
        return self.root / name

    def diverge(self, name: str, new: str) -> Path:
        """Copies one, with weights that are not finite."""
        shutil.copytree(self.root / name, self.root / new)
        weights = self.root / new / "adapter_model.safetensors"
        save_file({key: value * np.nan for key, value in load_file(weights).items()}, weights)
        return self.root / new

    def sample(self, request: SampleRequest) -> pb.SampleResponse:
        """`adapter` is a name."""
        return pb.SampleResponse.FromString(self._engine.sample(request).body)


def _text(seed: int) -> bytes:
    random = np.random.default_rng(seed)
    tokens = random.integers(20, 1000, 41)
    datum = pb.Datum(
        model_input=[
            pb.Chunk(encoded_text=pb.EncodedTextChunk(tokens=tokens[:-1].astype("<i4").tobytes()))
        ],
        loss_fn_inputs={
            "target_tokens": pb.Tensor(
                dense=tokens[1:].astype("<i8").tobytes(), dtype=pb.DTYPE_INT64, shape=[40]
            ),
            "weights": pb.Tensor(dense=np.ones(40, "<f4").tobytes(), dtype=pb.DTYPE_FLOAT32, shape=[40]),
        },
    )
    request = pb.ForwardBackwardRequest(model_id="m", seq_id=1, data=[datum], loss_fn="cross_entropy")
    return request.SerializeToString()
