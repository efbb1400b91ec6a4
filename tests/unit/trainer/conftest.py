from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from trainer_kit import SHAPE, TEXTS

from tink.trainer import tiny
from tink.trainer.artifacts import Artifacts
from tink.trainer.engines.base_model import BaseModel
from tink.trainer.engines.lora_engine import LoraEngine


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "docstrings", lambda: TEXTS)
        tiny.build(directory, SHAPE, seed=3)
    return directory


@pytest.fixture(scope="session", params=["huggingface", "megatron"])
def kind(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The module that loads a base model: whatever tests an engine tests it on each of them."""
    if request.param == "megatron" and find_spec("megatron") is None:
        pytest.skip("megatron-core is not installed")
    threads = torch.get_num_threads()
    yield import_module(f"tink.trainer.engines.{request.param}")
    torch.set_num_threads(threads)
    torch.set_deterministic_debug_mode("default")


@pytest.fixture(scope="session")
def base(kind: ModuleType, model_dir: Path) -> BaseModel:
    return kind.load(model_dir, "test/tiny")


@pytest.fixture
def artifacts(tmp_path: Path) -> Artifacts:
    return Artifacts(tmp_path / "artifacts", "writer")


@pytest.fixture
def engine(base: BaseModel, artifacts: Artifacts) -> LoraEngine:
    return LoraEngine(base, artifacts)
