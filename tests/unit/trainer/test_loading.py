"""Files of a model that are not what they should be, for each engine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tink.errors import StartupError


def said(**fields: object) -> Callable[[Path], None]:
    """Changes config.json."""

    def change(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, **fields}))

    return change


def written(name: str, text: str) -> Callable[[Path], None]:
    return lambda model: (model / name).write_text(text) and None


def halved(model: Path) -> None:
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def indexed(text: str) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        (model / "model.safetensors").unlink()
        (model / "model.safetensors.index.json").write_text(text)

    return change


@pytest.mark.parametrize(
    "change",
    [
        written("config.json", "[]"),
        written("config.json", '{"model_type"'),
        said(model_type="unheard-of"),
        said(hidden_size="large"),
        said(num_attention_heads=0),
        said(num_hidden_layers=100),
        said(vocab_size=77),
        said(rope_parameters=5),
        written("generation_config.json", "{"),
        written("generation_config.json", "[]"),
        written("generation_config.json", '{"eos_token_id": "the end"}'),
        written("model.safetensors", "no tensors"),
        halved,
        indexed("{}"),
        indexed('{"weight_map": {"model.embed_tokens.weight": "gone.safetensors"}}'),
        written("tokenizer.json", "{"),
    ],
)
def test_a_directory_that_is_no_model_is_refused(
    kind: ModuleType, model_dir: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(model_dir, model)
    change(model)
    with pytest.raises(StartupError, match=r"model|config\.json"):
        kind.load(model, "odd")
