"""The base model as transformers has it, in this process."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from tink.errors import StartupError
from tink.trainer.engines import base_model, lora
from tink.trainer.engines.base_model import BaseModel

Tensor = Any

# Of transformers, which imports a class when it is named.
NAMED = ("AutoModelForCausalLM", "AutoTokenizer", "DynamicCache", "GenerationMixin", "PreTrainedModel")


@dataclass(frozen=True, kw_only=True)
class HuggingFace(BaseModel):
    """`trunk` gives hidden states, `head` logits of them."""

    engine = "hf"

    trunk: Any
    head: Any
    config: Any

    def hidden(self, ids: Tensor, cache: Any = None) -> Tensor:
        out = self.trunk(input_ids=ids, past_key_values=cache, use_cache=cache is not None)
        return out.last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden).float()

    def score(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self.logits(hidden)
        return logits.gather(-1, targets) - logits.logsumexp(-1, keepdim=True)

    def new_cache(self) -> Any:
        return transformers.DynamicCache(config=self.config)


def preload() -> None:
    """Imports what `load` would, but for the classes of the model itself."""
    for name in NAMED:
        getattr(transformers, name)


def load(directory: Path, name: str, dtype: str = "float32") -> HuggingFace:
    """Reads the model and installs the adapters' hooks. StartupError when it is not a causal language
    model of the shape that Tink can train."""
    base_model.require_determinism()
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=getattr(torch, dtype), local_files_only=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise base_model.unloadable(directory, error) from error
    device = base_model.device()
    model.to(device).eval().requires_grad_(False)
    head = model.get_output_embeddings()
    sites = _install(model)
    if head is None or not sites:
        raise StartupError(f"{directory}: {type(model).__name__} has no layers that LoRA knows")
    _check_head(model, head)
    config = model.config
    return HuggingFace(
        trunk=model.base_model,
        head=head,
        tokenizer=tokenizer,
        config=config,
        name=name,
        path=directory,
        device=device,
        digest=base_model.digest(directory),
        arch=(config.architectures or [config.model_type])[0],
        sites=sites,
        eos=base_model.eos(model.generation_config.eos_token_id, config.eos_token_id),
        vocab_size=config.vocab_size,
        context=config.max_position_embeddings,
        parameters=sum(math.prod(p.shape) for p in model.parameters()),
        versions={"transformers": transformers.__version__},
    )


def _install(model: Any) -> dict[str, tuple[int, int]]:
    """Puts the hooks on every layer that an adapter may have, and says which those are."""
    sites = {}
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if isinstance(module, torch.nn.Linear) and leaf in lora.LEAVES:
            sites[name] = (module.out_features, module.in_features)
            module.register_forward_hook(partial(_add, name))
    return sites


def _add(name: str, module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
    adapter = lora.in_use()
    pair = adapter.pair(name) if adapter is not None else None
    if adapter is None or pair is None:
        return None
    a, b = pair
    x = args[0]
    delta = (x.to(a.dtype) @ a.T) @ b.T
    return output + (delta * adapter.scale).to(output.dtype)


def _check_head(model: Any, head: Any) -> None:
    """Trunk and head are called apart; a model that does more than that (soft caps, scaled logits)
    would be trained wrongly without a word."""
    ids = torch.arange(4, device=head.weight.device).unsqueeze(0)
    with torch.inference_mode():
        whole = model(input_ids=ids).logits
        parts = head(model.base_model(input_ids=ids).last_hidden_state)
    if not torch.allclose(whole, parts, atol=1e-4 if whole.dtype == torch.float32 else 1e-2):
        raise StartupError(f"{type(model).__name__} changes its logits after lm_head: unsupported")
