"""A tiny Qwen3-shaped model and tokenizer that Tink builds itself, offline, on first use.

Both are functions of the Python version's standard library (the tokenizer learns its merges from its
docstrings) and of the seed. `build` gives random weights within seconds; `pretrain` trains the same
shape on those docstrings for about a minute, so that what it samples can be read.

    python -m tink.trainer.tiny OUT [--pretrain-steps N]
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tink import files
from tink.errors import StartupError
from tink.pretrained import BUILT_IN, built_in
from tink.trainer.corpus import Docstring, docstrings
from tink.trainer.engines.base_model import require_determinism

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# What AutoTokenizer reads.
TOKENIZER_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# In a Hugging Face cache entry: Tink made it, and may add to it.
MARK = "made-by-tink"

PRETRAIN_STEPS = 600
SEQUENCE, SEQUENCES = 128, 8
# The loss falls fastest here; twice as much diverges, half as much leaves words half-learnt.
LEARNING_RATE = 4e-3
# So small a model gains little from a second one, and on a busy machine the two wait for each other.
THREADS = 1

# progress(step, steps, loss), after each step.
Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Shape:
    vocab_size: int = 1024
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False


TINY = Shape()


def ensure(home: Path) -> Path:
    """The built-in model under `home`, built now if it is not there."""
    directory = built_in(home)
    if not directory.is_dir():
        build(directory)
    # Whoever built it may have been killed before its name was synced.
    files.sync_names(directory, home)
    return directory


def build(out: Path, shape: Shape = TINY, seed: int = 0) -> None:
    """Random weights. `out` appears whole or not at all; StartupError if something else is there."""
    with _published(out) as directory:
        tokenizer = _tokenizer(shape.vocab_size, docstrings())
        tokenizer.save_pretrained(directory)
        _model(shape, tokenizer, seed).save_pretrained(directory)


def pretrain(
    out: Path,
    steps: int = PRETRAIN_STEPS,
    progress: Progress | None = None,
    shape: Shape = TINY,
    seed: int = 0,
) -> None:
    """`build`, and `steps` steps of language modelling on the docstrings, about 0.1 s each.
    Deterministic for one machine type and set of versions."""
    with _published(out) as directory:
        texts = docstrings()
        tokenizer = _tokenizer(shape.vocab_size, texts)
        tokenizer.save_pretrained(directory)
        model = _model(shape, tokenizer, seed)
        threads = torch.get_num_threads()
        torch.set_num_threads(THREADS)
        try:
            prose = [doc for doc in texts if doc.is_prose]
            _train(model, _examples(tokenizer, prose), steps, seed, progress)
        finally:
            torch.set_num_threads(threads)
        model.save_pretrained(directory)


def _tokenizer(vocab_size: int, texts: list[Docstring]) -> Any:
    """Byte-level BPE: any text can be encoded, and decoded back."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, IM_START, IM_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([doc.text for doc in texts], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[IM_START],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _model(shape: Shape, tokenizer: Any, seed: int) -> Any:
    """Weights are drawn here, in the order of their names, and not by transformers, whose own
    initialisation changes between versions. Logits get a standard deviation of about 2, so that
    greedy choices are clear of rounding and samples still differ."""
    transformers.utils.logging.disable_progress_bar()
    config = transformers.Qwen3Config(
        **asdict(shape),
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(IM_END),
        pad_token_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
        dtype="float32",
    )
    model = transformers.Qwen3ForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    scales = {"model.embed_tokens.weight": 1.0, "lm_head.weight": 2 * shape.hidden_size**-0.5}
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.dim() == 2:
                scale = scales.get(name, weight.shape[1] ** -0.5)
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    return model


def _examples(tokenizer: Any, texts: list[Docstring]) -> Any:
    """All the text as rows of SEQUENCE + 1 tokens. Every other docstring is an answer in a chat, so
    that the model also learns to take turns and to end them."""
    ids: list[int] = []
    for index, doc in enumerate(texts):
        if index % 2:
            chat = [
                {"role": "user", "content": f"What is {doc.name}?"},
                {"role": "assistant", "content": doc.text.rstrip()},
            ]
            text = tokenizer.apply_chat_template(chat, tokenize=False)
        else:
            text = doc.text
        ids += tokenizer.encode(text + END_OF_TEXT)
    rows = len(ids) // (SEQUENCE + 1)
    return torch.tensor(ids[: rows * (SEQUENCE + 1)]).view(rows, SEQUENCE + 1)


def _train(model: Any, rows: Any, steps: int, seed: int, progress: Progress | None) -> None:
    require_determinism()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        # From logits near zero the first hundred steps are not spent on unlearning them.
        model.lm_head.weight.mul_(0.1)
        model.model.embed_tokens.weight.mul_(0.1)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01
    )
    model.train()
    for step in range(steps):
        # A short rise, and a cosine down to zero.
        rise = min((step + 1) / 20, 1.0)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * rise * (1 + math.cos(math.pi * step / steps)) / 2
        picked = rows[torch.randint(len(rows), (SEQUENCES,), generator=generator)]
        logits = model(input_ids=picked[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), picked[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if progress is not None:
            progress(step + 1, steps, loss.item())
    model.eval()


def publish_tokenizer(directory: Path, name: str = BUILT_IN) -> Path | None:
    """Puts the tokenizer of `directory` into this user's Hugging Face cache under `name`, so that
    AutoTokenizer.from_pretrained(name) works in any process with HF_HUB_OFFLINE=1. Returns the
    snapshot's directory, or None when the cache has an entry of that name that Tink did not make:
    that one is left alone."""
    from huggingface_hub.constants import HF_HUB_CACHE

    entry = Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    if entry.exists() and not (entry / MARK).is_file():
        return None
    files = [directory / file for file in TOKENIZER_FILES if (directory / file).is_file()]
    # A commit's name, as the hub has it: 40 hexadecimal digits.
    revision = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:40]
    snapshot = entry / "snapshots" / revision
    entry.mkdir(parents=True, exist_ok=True)
    (entry / MARK).touch()
    if not snapshot.is_dir():
        with _published(snapshot) as scratch:
            for file in files:
                shutil.copyfile(file, scratch / file.name)
    (entry / "refs").mkdir(exist_ok=True)
    reference = entry / "refs" / f".main.{os.getpid()}"
    reference.write_text(revision)
    reference.replace(entry / "refs" / "main")
    return snapshot


@contextmanager
def _published(out: Path) -> Iterator[Path]:
    """A new directory to fill, which becomes `out` when all went well."""
    scratch = out.parent / f".{out.name}.{os.getpid()}"
    # In a container every life has the same number: the one before was killed.
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        files.sync_tree(scratch)
        scratch.rename(out)
    except OSError as error:
        # Two processes built it at once: the first one's is as good. Anything else is in the way.
        if not (out / "config.json").is_file():
            raise StartupError(f"{out} cannot be made: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Builds Tink's tiny model.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--pretrain-steps", type=int, default=0)
    options = parser.parse_args()
    if options.pretrain_steps:
        pretrain(options.out, options.pretrain_steps, _report)
    else:
        build(options.out)
    print(options.out)


def _report(step: int, steps: int, loss: float) -> None:
    if step % 50 == 0 or step == steps:
        print(f"step {step}/{steps}  loss {loss:.3f}", flush=True)


if __name__ == "__main__":
    main()
