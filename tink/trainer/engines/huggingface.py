"""The base model as transformers has it, in this process."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.modeling_layers import GradientCheckpointingLayer

from tink.errors import StartupError
from tink.pretrained import Config
from tink.trainer.engines import base_model, lora, recompute
from tink.trainer.engines.base_model import BaseModel
from tink.trainer.engines.head import Head
from tink.trainer.engines.joints import Joint
from tink.trainer.engines.parallel import Ranks

Tensor = Any

# Of transformers, which imports a class when it is named.
NAMED = ("AutoModelForCausalLM", "AutoTokenizer", "DynamicCache", "GenerationMixin", "PreTrainedModel")


@dataclass(frozen=True, kw_only=True)
class HuggingFace(BaseModel):
    """`trunk` gives hidden states."""

    engine = "hf"

    trunk: Any
    config: Any
    cache_argument: str

    def hidden(self, ids: Tensor, cache: Any = None) -> Tensor:
        kept = {} if cache is None else {self.cache_argument: cache}
        return self.trunk(input_ids=ids, use_cache=cache is not None, **kept).last_hidden_state

    def new_cache(self) -> Any:
        return transformers.DynamicCache(config=self.config)


def preload() -> None:
    """Imports what `load` would, but for the classes of the model itself."""
    for name in NAMED:
        getattr(transformers, name)


def load(directory: Path, name: str, dtype: str | None = None) -> HuggingFace:
    """Reads the model and installs the adapters' hooks. StartupError when it is not a causal language
    model of the shape that Tink can train."""
    base_model.require_determinism()
    transformers.utils.logging.disable_progress_bar()
    with base_model.reading(directory):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=base_model.dtype(dtype), local_files_only=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    device = base_model.device()
    model.to(device).eval().requires_grad_(False)
    sites = _install(model)
    output = model.get_output_embeddings()
    if not isinstance(output, torch.nn.Linear) or not sites.shapes:
        raise StartupError(f"{directory}: {type(model).__name__} has no layers that LoRA knows")
    head = Head(output.weight, output.bias, Ranks.alone())
    _check_head(model, head)
    config = model.config
    return HuggingFace(
        trunk=model.base_model,
        cache_argument=_cache_argument(model.base_model),
        head=head,
        tokenizer=tokenizer,
        config=config,
        name=name,
        path=directory,
        digest=base_model.digest(directory),
        arch=(config.architectures or [config.model_type])[0],
        sites=sites,
        eos=Config.load(directory).eos,
        vocab_size=config.vocab_size,
        context=config.max_position_embeddings,
        parameters=sum(math.prod(p.shape) for p in model.parameters()),
        versions={"transformers": transformers.__version__},
    )


def _install(model: Any) -> lora.Sites:
    """Puts the hooks on every layer that an adapter may have but the head, and says which those are."""
    shapes = {}
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.forward = recompute.layer(module.forward)
        leaf = name.rpartition(".")[2]
        if isinstance(module, torch.nn.Linear) and leaf in lora.LEAVES:
            shapes[name] = (module.out_features, module.in_features)
            if leaf not in lora.UNEMBED:
                module.register_forward_hook(partial(_add, name))
    return lora.Sites(shapes, [Joint((name,)) for name in shapes], model.device, model.dtype)


def _add(name: str, module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
    pair = lora.pair_in_use(name)
    if pair is None:
        return None
    a, b, scale = pair
    return lora.add_(output, args[0] @ a.T, b, scale)


def _cache_argument(trunk: Any) -> str:
    """As the model's class names it: `past_key_values` was renamed in transformers 5.24."""
    return "cache" if "cache" in inspect.signature(trunk.forward).parameters else "past_key_values"


def _check_head(model: Any, head: Head) -> None:
    """Trunk and head are called apart; a model that does more than that (soft caps, scaled logits)
    would be trained wrongly without a word."""
    ids = torch.arange(4, device=head.weight.device).unsqueeze(0)
    with torch.inference_mode():
        whole = model(input_ids=ids).logits.float()
        parts = head.logits(model.base_model(input_ids=ids).last_hidden_state)
    if not torch.allclose(whole, parts, atol=1e-4 if model.dtype == torch.float32 else 1e-2):
        raise StartupError(f"{type(model).__name__} changes its logits after lm_head: unsupported")
