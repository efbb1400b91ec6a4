from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from trainer_kit import SHAPE, TEXTS

from tink.trainer import tiny
from tink.trainer.artifacts import Artifacts
from tink.trainer.engines import frozen as frozen_base
from tink.trainer.engines.frozen import Frozen
from tink.trainer.engines.hf import HFEngine


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "docstrings", lambda: TEXTS)
        tiny.build(directory, SHAPE, seed=3)
    return directory


@pytest.fixture(scope="session")
def frozen(model_dir: Path) -> Iterator[Frozen]:
    threads = torch.get_num_threads()
    yield frozen_base.load(model_dir, "test/tiny")
    torch.set_num_threads(threads)
    torch.set_deterministic_debug_mode("default")


@pytest.fixture
def artifacts(tmp_path: Path) -> Artifacts:
    return Artifacts(tmp_path / "artifacts", "writer")


@pytest.fixture
def engine(frozen: Frozen, artifacts: Artifacts) -> HFEngine:
    return HFEngine(frozen, artifacts)
