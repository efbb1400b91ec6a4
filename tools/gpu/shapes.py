"""The random models that are measured, and the batch that each gets."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Shape:
    """`rows` sequences of `length` tokens are one forward_backward. `share` of the GPU is vLLM's."""

    name: str
    rows: int
    length: int
    config: dict[str, Any]
    vocab: int = 151936
    dtype: str = "bfloat16"
    rank: int = 32
    share: float = 0.2

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def flops(self) -> float:
        """Of a step of LoRA: the products of the frozen weights forward and, for the activations' gradient,
        backward, 4 for each weight and token. Attention and the adapters are left out, so that the share of
        the ceiling is a little more than it says."""
        c = self.config
        h, head = c["hidden_size"], c["head_dim"]
        queries, keys = c["num_attention_heads"] * head, c["num_key_value_heads"] * head
        layer = h * (queries + 2 * keys) + queries * h + 3 * h * c["intermediate_size"]
        return 4.0 * self.tokens * (c["num_hidden_layers"] * layer + h * self.vocab)


def _qwen3(hidden: int, layers: int, heads: int, inner: int, tied: bool, head: int = 128) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8 if heads > 8 else heads,
        "head_dim": head,
        "intermediate_size": inner,
        "tie_word_embeddings": tied,
    }


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("0.6B", 16, 512, _qwen3(1024, 28, 16, 3072, tied=True)),
        Shape("8B", 8, 1024, _qwen3(4096, 36, 32, 12288, tied=False), share=0.3),
        # For trying this out on a CPU.
        Shape("tiny", 4, 64, _qwen3(128, 2, 2, 256, True, 64), vocab=4096, dtype="float32", rank=8),
    )
}


def make(shape: Shape, folder: Path) -> Path:
    """A Qwen3 of that shape with random weights, and the built-in model's tokenizer, unless it is there."""
    import torch
    import transformers

    from tink.trainer import tiny

    directory = folder / shape.name
    if (directory / "tokenizer.json").is_file():
        return directory
    config = transformers.Qwen3Config(
        vocab_size=shape.vocab,
        max_position_embeddings=8192,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        eos_token_id=0,
        **shape.config,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, shape.dtype))
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.Qwen3ForCausalLM(config)
    model.save_pretrained(directory)
    built_in = tiny.ensure(folder)
    for file in [*built_in.glob("tokenizer*"), *built_in.glob("special_tokens*")]:
        shutil.copy(file, directory)
    return directory
