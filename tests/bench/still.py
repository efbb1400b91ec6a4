"""A training server for the bench: the real one, before an engine that only waits, as if for a GPU.

python -m tests.bench.still READY_FILE SECONDS
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from tink.trainer import build, process
from tink.trainer.engines.interface import Facts
from tink.trainer.options import Options
from tink.wire.tink_train import CreateModel, ForwardBackward, ModelInfo, OpResult, OptimStep

MODEL = "bench/still"


class Still:
    """Of the engine's methods, those that the bench calls."""

    facts = Facts("still", {}, MODEL, None, "0", "still", 1, 2, 1024, 64, ["any"], ["train"])

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def create(self, model_id: str, op: CreateModel) -> ModelInfo:
        return ModelInfo(op.rank, op.alpha, op.seed, op.train_attn, op.train_mlp, op.train_unembed)

    def forward_backward(self, model_id: str, op: ForwardBackward) -> OpResult:
        """A result as long as a real one is: of 16 bytes for a token, 4 come back."""
        time.sleep(self._seconds)
        return OpResult(body=op.body[: len(op.body) // 4], loss=1.0, tokens=len(op.body) // 16)

    def optim_step(self, model_id: str, op: OptimStep) -> dict[str, float]:
        time.sleep(self._seconds)
        return {"grad_norm": 1.0}


def main(ready_file: Path, seconds: float) -> int:
    load: Any = lambda options, incarnation: Still(seconds)  # noqa: E731
    build.load = load
    options = Options(home=ready_file.parent, slots=1, ready_file=ready_file, orphan_seconds=60.0)
    return process.run(options)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), float(sys.argv[2])))
