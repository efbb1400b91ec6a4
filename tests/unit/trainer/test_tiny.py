"""The built-in model: the same every time, whole or absent, and known to Hugging Face's loader."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from trainer_kit import SHAPE, TEXTS
from transformers import AutoModelForCausalLM, AutoTokenizer

from tink.errors import StartupError
from tink.trainer import corpus, tiny


@pytest.fixture(autouse=True)
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "docstrings", lambda: TEXTS)


def hashes(directory: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(directory.iterdir())
    }


def test_two_builds_are_one(tmp_path: Path, model_dir: Path) -> None:
    tiny.build(tmp_path / "again", SHAPE, seed=3)
    assert hashes(tmp_path / "again") == hashes(model_dir)
    tiny.build(tmp_path / "other", SHAPE, seed=4)
    assert hashes(tmp_path / "other")["model.safetensors"] != hashes(model_dir)["model.safetensors"]


def test_the_tokenizer_is_lossless_and_talks(model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    for text in ("plain text", "  spaces\n\ttabs ", "Grüße, 世界 🙂", "<|im_start|>user\nhi<|im_end|>\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert len(tokenizer.encode("<|im_start|><|im_end|><|endoftext|>")) == 3


def test_a_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> list[corpus.Docstring]:
        raise MemoryError

    monkeypatch.setattr(tiny, "docstrings", fail)
    with pytest.raises(MemoryError):
        tiny.build(tmp_path / "model", SHAPE)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_model_is_left_alone(tmp_path: Path, model_dir: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").touch()
    with pytest.raises(StartupError, match="cannot be made"):
        tiny.build(tmp_path / "model", SHAPE)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_ensure_builds_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Path] = []

    def build(out: Path) -> None:
        built.append(out)
        out.mkdir(parents=True)

    monkeypatch.setattr(tiny, "build", build)
    assert tiny.ensure(tmp_path) == tiny.ensure(tmp_path) == tmp_path / "models" / "tink--qwen3-tiny"
    assert len(built) == 1


def test_pretraining_learns_and_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "SEQUENCE", 32)
    losses: list[float] = []
    for name in ("one", "two"):
        tiny.pretrain(tmp_path / name, 20, lambda step, steps, loss: losses.append(loss), SHAPE, seed=1)
    assert losses[:20] == losses[20:]
    assert losses[19] < losses[0] - 0.5
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")


def test_the_corpus_is_prose_of_this_python() -> None:
    texts = corpus.docstrings()
    assert sum(len(doc.text) for doc in texts) > 300_000
    assert any(doc.name == "pickle" for doc in texts)


LOAD = """
import sys, json
from tinker.lib.public_interfaces.sampling_client import _load_tokenizer_from_model_info as load
print(json.dumps(load("tink/qwen3-tiny").encode("Return the list")))
"""


def test_the_sdk_finds_the_published_tokenizer_offline(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = tiny.publish_tokenizer(model_dir)
    assert snapshot is not None
    assert tiny.publish_tokenizer(model_dir) == snapshot
    env = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOAD], env=env, capture_output=True, text=True, check=True
    )
    expected = AutoTokenizer.from_pretrained(model_dir).encode("Return the list")
    assert json.loads(done.stdout.splitlines()[-1]) == expected


def test_a_cache_entry_of_somebody_else_is_left_alone(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    theirs = tmp_path / "models--tink--qwen3-tiny"
    theirs.mkdir()
    assert tiny.publish_tokenizer(model_dir) is None
    assert list(theirs.iterdir()) == []
