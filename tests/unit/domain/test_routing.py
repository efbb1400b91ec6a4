"""The configuration guide's table, cell by cell, as settings resolve it."""

from __future__ import annotations

import pytest

from tink.domain.routing import NO_SAMPLING, NO_TRAINING, Routes, routes
from tink.settings import Settings

# USE_MEGATRON, USE_VLLM, USE_HF -> sampling, training
TABLE = {
    ("true", "true", "auto"): ("vllm", "megatron"),
    ("true", "true", "true"): ("vllm", "megatron"),
    ("true", "true", "false"): ("vllm", "megatron"),
    ("true", "false", "auto"): ("megatron", "megatron"),
    ("true", "false", "true"): ("megatron", "megatron"),
    ("true", "false", "false"): ("megatron", "megatron"),
    ("false", "true", "auto"): ("vllm", None),
    ("false", "true", "true"): ("vllm", "hf"),
    ("false", "true", "false"): ("vllm", None),
    ("false", "false", "auto"): ("hf", "hf"),
    ("false", "false", "true"): ("hf", "hf"),
    ("false", "false", "false"): (None, None),
}


@pytest.mark.parametrize("cell", TABLE)
def test_every_cell_of_the_table(cell: tuple[str, str, str]) -> None:
    megatron, vllm, hf = cell
    settings = Settings.load({"USE_MEGATRON": megatron, "USE_VLLM": vllm, "USE_HF": hf})
    assert settings.routes == TABLE[cell]


def test_the_refusals_are_word_for_word() -> None:
    assert NO_SAMPLING == "No valid sampling backend configured"
    assert NO_TRAINING == "Training not supported in non-Megatron mode"


@pytest.mark.parametrize("cell", dict.fromkeys(TABLE.values()), ids=str)
def test_every_mode_has_a_name(cell: tuple[str | None, str | None]) -> None:
    assert "training on" in Routes(*cell).mode  # type: ignore[arg-type]


def test_nothing_configured_is_the_hugging_face_engine() -> None:
    assert Settings.load({}).routes == routes(megatron=False, vllm=False, hf=True)
