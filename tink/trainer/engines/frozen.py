"""The frozen base model, from a directory in Hugging Face's format."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.checkpoint import checkpoint

from tink.errors import StartupError
from tink.limits import LOGIT_CELLS
from tink.trainer.engines import lora

Tensor = Any


@dataclass(frozen=True)
class Frozen:
    """`trunk` gives hidden states, `head` logits of them; an adapter in use (lora.using) takes part in
    both. `sites` are the layers that an adapter may have; `eos` the ids that end a sequence."""

    trunk: Any
    head: Any
    tokenizer: Any
    config: Any
    name: str
    path: Path
    digest: str
    sites: dict[str, tuple[int, int]]
    eos: frozenset[int]
    vocab_size: int
    context: int
    parameters: int

    def hidden(self, ids: Tensor, cache: Any = None) -> Tensor:
        """ids (B, S) -> (B, S, H). No mask: rows are padded on the right or not at all, where a causal
        model cannot see it. With a cache, the ids go behind what it has, and are added to it."""
        out = self.trunk(input_ids=ids, past_key_values=cache, use_cache=cache is not None)
        return out.last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., H) -> float32 (..., V)."""
        return self.head(hidden).float()

    def new_cache(self) -> Any:
        return transformers.DynamicCache(config=self.config)

    @property
    def rows(self) -> int:
        """Positions whose logits may be held at once."""
        return max(LOGIT_CELLS // self.vocab_size, 1)

    def logprobs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """hidden (T, H), targets (T, K) -> log p(target), float32 (T, K). K targets of one position
        share its row of logits. Logits are made a few rows at a time, and again in the backward pass,
        since a whole batch of them would be the largest thing in memory by far."""
        if len(hidden) <= self.rows:
            return self._score(hidden, targets)
        pieces = zip(hidden.split(self.rows), targets.split(self.rows), strict=True)
        if torch.is_grad_enabled():
            return torch.cat(
                [
                    checkpoint(self._score, *piece, use_reentrant=False, preserve_rng_state=False)
                    for piece in pieces
                ]
            )
        return torch.cat([self._score(*piece) for piece in pieces])

    def _score(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self.logits(hidden)
        return logits.gather(-1, targets) - logits.logsumexp(-1, keepdim=True)


def require_determinism() -> None:
    """For this process: an operation without a deterministic kernel raises. What
    torch.use_deterministic_algorithms does, without its import of the compiler (seconds)."""
    torch.set_deterministic_debug_mode("error")


def load(directory: Path, name: str, dtype: str = "float32") -> Frozen:
    """Reads the model and installs the adapters' hooks. StartupError when it is not a causal language
    model of the shape that Tink can train."""
    require_determinism()
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=getattr(torch, dtype), local_files_only=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise StartupError(f"{directory} is no model that can be loaded: {error}") from error
    model.eval().requires_grad_(False)
    head = model.get_output_embeddings()
    sites = lora.install(model)
    if head is None or not sites:
        raise StartupError(f"{directory}: {type(model).__name__} has no layers that LoRA knows")
    _check_head(model, head)
    config = model.config
    return Frozen(
        trunk=model.base_model,
        head=head,
        tokenizer=tokenizer,
        config=config,
        name=name,
        path=directory,
        digest=_digest(directory),
        sites=sites,
        eos=_eos(model.generation_config.eos_token_id, config.eos_token_id),
        vocab_size=config.vocab_size,
        context=config.max_position_embeddings,
        parameters=sum(math.prod(p.shape) for p in model.parameters()),
    )


def _check_head(model: Any, head: Any) -> None:
    """Trunk and head are called apart; a model that does more than that (soft caps, scaled logits)
    would be trained wrongly without a word."""
    ids = torch.arange(4).unsqueeze(0)
    with torch.inference_mode():
        whole = model(input_ids=ids).logits
        parts = head(model.base_model(input_ids=ids).last_hidden_state)
    if not torch.allclose(whole, parts, atol=1e-4):
        raise StartupError(f"{type(model).__name__} changes its logits after lm_head: unsupported")


def _eos(*sources: int | list[int] | None) -> frozenset[int]:
    """The first that says anything."""
    for source in sources:
        if source is not None:
            return frozenset([source] if isinstance(source, int) else source)
    return frozenset()


def _digest(directory: Path) -> str:
    """Identifies weights and architecture: sha256 over the names and hashes of their files."""
    whole = hashlib.sha256()
    for file in sorted([*directory.glob("*.safetensors"), directory / "config.json"]):
        with file.open("rb") as stream:
            part = hashlib.file_digest(stream, "sha256").hexdigest()
        whole.update(f"{file.name} {part}\n".encode())
    return whole.hexdigest()
