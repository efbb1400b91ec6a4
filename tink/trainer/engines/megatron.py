"""The base model as megatron-core's GPTModel, alone or in slices on several processes (tensor parallel).

An adapter is whole on every rank, and its layers are those of transformers. The hooks take the slices that
belong to the rank's part of Megatron's layers, so that gradients of all ranks add up to the whole one; what
is made of it (steps, states, exports) does not know how many ranks there are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.nn import functional
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tink.errors import StartupError
from tink.limits import COLLECTIVE_SECONDS
from tink.trainer.engines import base_model, lora, weights
from tink.trainer.engines.base_model import BaseModel
from tink.trainer.engines.parallel import Ranks

with warnings.catch_warnings():
    # Of Transformer Engine and Apex, which a CPU lacks, and of names that it deprecates and uses itself.
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

Tensor = Any

# Their layers are what this engine builds; others differ in more than their config.json says.
KNOWN = ("llama", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3")
DIVIDED = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")

_cache: ContextVar[Any] = ContextVar("cache", default=None)


@dataclass(frozen=True, kw_only=True)
class Megatron(BaseModel):
    """`frequencies` are the rotary embedding's, (head size / 2)."""

    engine = "megatron"

    model: Any
    frequencies: Tensor
    ranks: Ranks

    def hidden(self, ids: Tensor, cache: Any = None) -> Tensor:
        start = 0 if cache is None else cache.get_seq_length()
        rotary = self._rotary(start, ids.shape[1])
        # Megatron's order is (S, B, H).
        x = self.model.embedding(ids, None)
        with _using_cache(cache):
            for layer in self.model.decoder.layers:
                x, _ = layer(x, attention_mask=None, rotary_pos_emb=rotary)
        return self.model.decoder.final_layernorm(x).transpose(0, 1)

    def _rotary(self, start: int, length: int) -> Tensor:
        """Angles of so many positions, as Megatron's attention takes them: (S, 1, 1, head size)."""
        positions = torch.arange(start, start + length, dtype=torch.float32)
        return torch.outer(positions, self.frequencies).repeat(1, 2)[:, None, None]

    def logits(self, hidden: Tensor) -> Tensor:
        return self.ranks.gather(self._some_logits(hidden))

    def score(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Of a vocabulary in slices: what is communicated is three numbers a row, never logits."""
        logits = self._some_logits(hidden)
        peak = self.ranks.max(logits.detach().amax(-1, keepdim=True))
        mine = self.ranks.slice(self.vocab_size)
        absent = (targets < mine.start) | (targets >= mine.stop)
        found = logits.gather(-1, (targets - mine.start).masked_fill(absent, 0)).masked_fill(absent, 0.0)
        mass = (logits - peak).exp().sum(-1, keepdim=True)
        mass, found = self.ranks.summed(torch.cat([mass, found], -1)).split([1, targets.shape[-1]], -1)
        return found - peak - mass.log()

    def _some_logits(self, hidden: Tensor) -> Tensor:
        """Those of this rank's part of the vocabulary."""
        model = self.model
        tied = model.share_embeddings_and_output_weights
        weight = model.shared_embedding_or_output_weight() if tied else None
        return model.output_layer(hidden, weight=weight)[0].float()

    def total(self, gradient: Tensor) -> Tensor:
        return self.ranks.sum(gradient)


# -- attention ----------------------------------------------------------------------------------------


class _Attention(torch.nn.Module):  # type: ignore[misc]
    """Megatron's core attention, by torch's kernels, and on a cache of keys and values if there is one.
    Its own makes the whole matrix of scores, and a mask on a GPU."""

    def __init__(
        self, config: Any, layer_number: int, softmax_scale: float | None = None, **_: Any
    ) -> None:
        super().__init__()
        self._layer, self._scale = layer_number - 1, softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """(S, B, heads, head size) each -> (S, B, heads * head size)."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        cache = _cache.get()
        if cache is not None:
            k, v = cache.update(k, v, self._layer)
        # A prompt goes into an empty cache, and then one token at a time behind it.
        assert q.shape[2] in (1, k.shape[2])
        causal = q.shape[2] > 1
        out = functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=self._scale, enable_gqa=True
        )
        return out.permute(2, 0, 1, 3).flatten(2)


@contextmanager
def _using_cache(cache: Any) -> Iterator[None]:
    token = _cache.set(cache)
    try:
        yield
    finally:
        _cache.reset(token)


# -- adapters -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Columns:
    """LoRA beside a layer whose output is in slices: its input is whole, and so is A x; of B it takes the
    rows of this rank. `names` are the layers that it has fused, and `fuse` does that with their outputs."""

    names: Sequence[str]
    fuse: Callable[..., Tensor]
    ranks: Ranks

    def __call__(self, module: Any, args: tuple[Tensor, ...], output: Any) -> Any:
        adapter = lora.in_use()
        # An adapter has all the layers that Megatron fuses, or none of them.
        pairs = [pair for name in self.names if adapter is not None and (pair := adapter.pair(name))]
        if adapter is None or not pairs:
            return None
        ranks = self.ranks
        a = ranks.once(torch.cat([pair[0] for pair in pairs]))
        # The gradient that every rank has a part of is summed here, where it is no wider than the rank.
        inner = ranks.shared(args[0].to(a.dtype) @ a.T).split(adapter.info.rank, -1)
        deltas = [x @ pair[1][ranks.slice(len(pair[1]))].T for x, pair in zip(inner, pairs, strict=True)]
        whole, bias = output
        return whole + (self.fuse(*deltas) * adapter.scale).to(whole.dtype), bias


@dataclass(frozen=True)
class _Rows:
    """LoRA beside a layer whose input is in slices: of A it takes the columns of this rank, and the sum of
    A x over the ranks is whole, and so is the output."""

    name: str
    ranks: Ranks

    def __call__(self, module: Any, args: tuple[Tensor, ...], output: Any) -> Any:
        adapter = lora.in_use()
        pair = adapter.pair(self.name) if adapter is not None else None
        if adapter is None or pair is None:
            return None
        a, b = pair
        inner = self.ranks.summed(args[0].to(a.dtype) @ a[:, self.ranks.slice(a.shape[1])].T)
        whole, bias = output
        return whole + (inner @ self.ranks.once(b).T * adapter.scale).to(whole.dtype), bias


def _install(model: Any, config: Any, ranks: Ranks) -> dict[str, tuple[int, int]]:
    """Puts the hooks on every layer that an adapter may have, and says which those are, in the order that
    they have in transformers."""
    hidden, inner = config.hidden_size, config.intermediate_size
    head_size = _head_size(config)
    queries = config.num_attention_heads * head_size
    keys = config.num_key_value_heads * head_size
    groups = config.num_key_value_heads // ranks.size
    sites: dict[str, tuple[int, int]] = {}

    def interleave(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return weights.interleave(q, k, v, groups, dim=-1)

    def join(*deltas: Tensor) -> Tensor:
        return torch.cat(deltas, -1)

    for number, layer in enumerate(model.decoder.layers):
        attention, mlp = f"model.layers.{number}.self_attn", f"model.layers.{number}.mlp"
        qkv = {
            f"{attention}.{leaf}_proj": size
            for leaf, size in zip("qkv", (queries, keys, keys), strict=True)
        }
        gates = {f"{mlp}.{leaf}_proj": inner for leaf in ("gate", "up")}
        out, down = f"{attention}.o_proj", f"{mlp}.down_proj"
        layer.self_attention.linear_qkv.register_forward_hook(_Columns(list(qkv), interleave, ranks))
        layer.self_attention.linear_proj.register_forward_hook(_Rows(out, ranks))
        layer.mlp.linear_fc1.register_forward_hook(_Columns(list(gates), join, ranks))
        layer.mlp.linear_fc2.register_forward_hook(_Rows(down, ranks))
        sites |= {name: (size, hidden) for name, size in qkv.items()}
        sites[out] = (hidden, queries)
        sites |= {name: (size, hidden) for name, size in gates.items()}
        sites[down] = (hidden, inner)
    model.output_layer.register_forward_hook(_Columns(["lm_head"], join, ranks))
    sites["lm_head"] = (config.vocab_size, hidden)
    return sites


# -- loading ------------------------------------------------------------------------------------------


def join(ranks: int = 1) -> Ranks:
    """Meets the other processes of this model, which torchrun has told where; or is alone. Once in a
    process: the model is in slices on all of them."""
    if not dist.is_initialized():
        if ranks > 1:
            dist.init_process_group("gloo", timeout=timedelta(seconds=COLLECTIVE_SECONDS))
        else:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    return Ranks.of(parallel_state.get_tensor_model_parallel_group())


def load(directory: Path, name: str, dtype: str = "float32", ranks: int = 1) -> Megatron:
    """Reads this rank's slices of the model and installs the adapters' hooks. StartupError when the engine
    does not know its shape, or cannot divide it among so many ranks."""
    base_model.require_determinism()
    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise base_model.unloadable(directory, error) from error
    _check(config, ranks)
    ours = join(ranks)
    with weights.opened(directory, config.tie_word_embeddings) as files:
        model = _build(config, getattr(torch, dtype), files, ranks)
        weights.fill(model, files, config, ours)
        count = files.count
    model.eval().requires_grad_(False)
    generation = _generation(directory)
    return Megatron(
        model=model,
        frequencies=_frequencies(config),
        ranks=ours,
        tokenizer=tokenizer,
        name=name,
        path=directory,
        digest=base_model.digest(directory),
        arch=(config.architectures or [config.model_type])[0],
        sites=_install(model, config, ours),
        eos=base_model.eos(generation.eos_token_id, config.eos_token_id),
        vocab_size=config.vocab_size,
        context=config.max_position_embeddings,
        parameters=count,
        versions={
            "transformers": transformers.__version__,
            "megatron-core": version("megatron-core"),
            "tensor_parallel": str(ranks),
        },
    )


def _check(config: Any, ranks: int) -> None:
    def refuse(field: str, value: object) -> StartupError:
        return StartupError(f"the engine 'megatron' does not know config.json's {field} {value!r}")

    if config.model_type not in KNOWN:
        raise refuse("model_type", config.model_type)
    if config.hidden_act != "silu":
        raise refuse("hidden_act", config.hidden_act)
    if config.rope_parameters["rope_type"] not in ROPE_TYPES:
        raise refuse("rope_type", config.rope_parameters["rope_type"])
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise refuse("sliding_window", config.sliding_window)
    if getattr(config, "quantization_config", None) is not None:
        raise refuse("quantization_config", config.quantization_config)
    for field in DIVIDED:
        if getattr(config, field) % ranks:
            raise StartupError(
                f"{field} {getattr(config, field)} cannot be divided among {ranks} processes"
            )


def _build(config: Any, dtype: Any, files: weights.Weights, ranks: int) -> Any:
    """A GPTModel without weights; which biases and norms it has, the files say."""
    attention = "model.layers.0.self_attn."
    normed = f"{attention}q_norm.weight" in files
    spec = get_gpt_layer_local_spec(qk_layernorm=normed, normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = _Attention
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shape = TransformerConfig(
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_query_groups=config.num_key_value_heads,
            kv_channels=_head_size(config),
            ffn_hidden_size=config.intermediate_size,
            layernorm_epsilon=config.rms_norm_eps,
            normalization="RMSNorm",
            qk_layernorm=normed,
            gated_linear_unit=True,
            activation_func=functional.silu,
            add_bias_linear=False,
            add_qkv_bias=f"{attention}q_proj.bias" in files,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            tensor_model_parallel_size=ranks,
            params_dtype=dtype,
            bf16=dtype is torch.bfloat16,
            use_cpu_initialization=True,
            perform_initialization=False,
            # Kernels of Apex and Transformer Engine, or compiled ones.
            gradient_accumulation_fusion=False,
            masked_softmax_fusion=False,
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
            apply_rope_fusion=False,
            persist_layer_norm=False,
        )
        return GPTModel(
            shape,
            spec,
            vocab_size=config.vocab_size,
            max_sequence_length=config.max_position_embeddings,
            share_embeddings_and_output_weights=config.tie_word_embeddings,
            # Angles are computed here, as transformers does it.
            position_embedding_type="none",
        )


def _head_size(config: Any) -> int:
    given: int | None = getattr(config, "head_dim", None)
    return given or int(config.hidden_size // config.num_attention_heads)


def _frequencies(config: Any) -> Tensor:
    rope = config.rope_parameters
    if rope["rope_type"] == "default":
        size = _head_size(config)
        return 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    found, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config)
    return found


def _generation(directory: Path) -> Any:
    try:
        return transformers.GenerationConfig.from_pretrained(directory, local_files_only=True)
    except OSError:  # a model need not have one
        return transformers.GenerationConfig()
