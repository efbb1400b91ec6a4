"""The base model of megatron-core's layers, alone or in parts on several processes: slices of the layers
(tensor parallel), some of the layers (pipeline parallel), or both."""

from __future__ import annotations

import atexit
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
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
from tink.pretrained import Config
from tink.trainer.engines import base_model, lora, megatron_lora, megatron_weights, recompute
from tink.trainer.engines.base_model import BaseModel
from tink.trainer.engines.head import NAME as HEAD
from tink.trainer.engines.head import Head
from tink.trainer.engines.parallel import Mesh, Ranks
from tink.trainer.engines.pipeline import Pipeline


@contextmanager
def _uncompiled() -> Iterator[None]:
    """megatron-core decorates functions with torch.compile when it is imported, for which torch imports the
    compiler. That takes seconds of each start, and none of these functions is called here."""
    compiling = torch.compile
    torch.compile = lambda function: function
    try:
        yield
    finally:
        torch.compile = compiling


with warnings.catch_warnings(), _uncompiled():
    # Of Transformer Engine and Apex, which a CPU lacks, and of names that it deprecates and uses itself.
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import VocabParallelEmbedding
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.transformer_block import TransformerBlock

Tensor = Any

# Their layers are what this engine builds; others differ in more than their config.json says.
KNOWN = ("llama", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3")
DIVIDED = ("num_attention_heads", "num_key_value_heads", "intermediate_size")

# Of transformers, which imports a class when it is named.
NAMED = ("AutoConfig", "AutoTokenizer", "DynamicCache")

_cache: ContextVar[Any] = ContextVar("cache", default=None)


@dataclass(frozen=True, kw_only=True)
class Megatron(BaseModel):
    """`frequencies` are the rotary embedding's, (head size / 2)."""

    engine = "megatron"

    model: _Model
    frequencies: Tensor
    mesh: Mesh

    def hidden(self, ids: Tensor, cache: Any = None) -> Tensor:
        with _using_cache(cache):
            return self._hiddens([ids], 0 if cache is None else cache.get_seq_length())[0]

    def hiddens(self, batches: Sequence[Tensor]) -> list[Tensor]:
        return self._hiddens(batches)

    def _hiddens(self, batches: Sequence[Tensor], start: int = 0) -> list[Tensor]:
        # Megatron's order is (S, B, H).
        embedded = [self.model.embedding(ids.T) for ids in batches]
        found = self.mesh.pipeline.through(partial(self._layers, start), embedded, self._trained())
        return [self.model.decoder.final_layernorm(x).transpose(0, 1) for x in found]

    def _layers(self, start: int, x: Tensor) -> Tensor:
        """Through those of this process."""
        angles = self._angles(start, len(x))
        for layer in self.model.decoder.layers:
            # In the place of a mask: Megatron only hands it on, and its own rotation would compute sines
            # and cosines in each layer anew.
            x, _ = layer(x, attention_mask=angles)
        return x

    def _trained(self) -> Tensor | None:
        """Any part of the adapter in use that these layers use. It has the same ones in all layers."""
        layers = (joint.name for joint in self.sites.joints if joint.name != HEAD)
        pairs = map(lora.pair_in_use, layers)
        return next((pair[0] for pair in pairs if pair is not None), None)

    def _angles(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of so many positions, (S, 1, 1, head size) each, for `_rotated`."""
        positions = torch.arange(start, start + length, dtype=torch.float32, device=self.device)
        angles = torch.outer(positions, self.frequencies)[:, None, None]
        cosines, sines = angles.cos(), angles.sin()
        dtype = self.sites.dtype
        return torch.cat([cosines, cosines], -1).to(dtype), torch.cat([-sines, sines], -1).to(dtype)

    def total(self, gradient: Tensor) -> Tensor:
        return self.mesh.all.sum(gradient)


class _Model(torch.nn.Module):  # type: ignore[misc]
    """What GPTModel has, but for where: the embedding and the head are in slices on all ranks, and not on
    the first stage and the last one. The norm behind the layers is on all of them, too."""

    def __init__(self, shape: TransformerConfig, spec: Any, config: Any, mesh: Mesh) -> None:
        super().__init__()
        self.embedding = VocabParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            config=shape,
            init_method=shape.embedding_init_method,
            tp_group=mesh.all.group,
        )
        self.decoder = TransformerBlock(shape, spec)
        if not config.tie_word_embeddings:
            self.head = torch.nn.Parameter(torch.empty_like(self.embedding.weight))


# -- attention ----------------------------------------------------------------------------------------


class _Attention(torch.nn.Module):  # type: ignore[misc]
    """Rotary embedding, and Megatron's core attention by torch's kernels, on a cache of keys and values if
    there is one. Its own makes the whole matrix of scores, and a mask on a GPU."""

    def __init__(self, *, layer_number: int, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        self._layer, self._scale = layer_number - 1, softmax_scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, angles: tuple[Tensor, Tensor], **_: Any
    ) -> Tensor:
        """(S, B, heads, head size) each -> (S, B, heads * head size)."""
        turned = _rotated(query, *angles), _rotated(key, *angles), value
        q, k, v = (x.permute(1, 2, 0, 3) for x in turned)
        cache = _cache.get()
        if cache is not None:
            k, v = cache.update(k, v, self._layer)
        # A prompt goes into an empty cache, and then one token at a time behind it.
        assert q.shape[2] in (1, k.shape[2])
        out = functional.scaled_dot_product_attention(
            q, k, v, is_causal=q.shape[2] > 1, scale=self._scale, enable_gqa=True
        )
        return out.permute(2, 0, 1, 3).flatten(2)


def _rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Number i of each head and number i + half of it, turned by one angle: the sines' first half is
    negative."""
    return torch.addcmul(x * cosines, x.roll(x.shape[-1] // 2, -1), sines)


@contextmanager
def _using_cache(cache: Any) -> Iterator[None]:
    token = _cache.set(cache)
    try:
        yield
    finally:
        _cache.reset(token)


# -- loading ------------------------------------------------------------------------------------------


def join(ranks: int = 1, stages: int = 1) -> Mesh:
    """Meets the other processes of this model, which torchrun has told where; or is alone. Once in a
    process: the model is in parts on all of them, `stages` of layers in slices on as many ranks each."""
    if not dist.is_initialized():
        timeout = timedelta(seconds=COLLECTIVE_SECONDS)
        store, rank, size = dist.HashStore(), 0, 1
        if ranks > 1:
            store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
            # torchrun starts all of them anew with the same store, which has the addresses of the dead.
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", ""), store)
        backend = "gloo"
        if ranks > 1 and torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        if ranks == 1:
            # gloo's threads abort one exit in ten if they are still there. (One of several ranks waits for
            # nobody at its end: lockstep.leave.)
            atexit.register(dist.destroy_process_group)
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=ranks // stages,
            pipeline_model_parallel_size=stages,
            distributed_timeout_minutes=COLLECTIVE_SECONDS / 60,
        )
    mesh = Mesh(
        all=Ranks.of(dist.group.WORLD),
        tensor=Ranks.of(parallel_state.get_tensor_model_parallel_group()),
        pipeline=Pipeline.of(parallel_state.get_pipeline_model_parallel_group()),
    )
    assert (mesh.all.size, mesh.pipeline.stages) == (ranks, stages)
    return mesh


def preload() -> None:
    """Imports what `load` would."""
    for name in NAMED:
        getattr(transformers, name)


def load(directory: Path, name: str, dtype: str | None = None, ranks: int = 1, stages: int = 1) -> Megatron:
    """Reads this rank's part of the model and installs the adapters' hooks. StartupError when the engine
    does not know its shape, or cannot divide it among so many ranks and stages of them."""
    base_model.require_determinism()
    with base_model.reading(directory):
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
        _check(config, ranks, stages)
    mesh = join(ranks, stages)
    with (
        base_model.reading(directory),
        megatron_weights.opened(directory, config.tie_word_embeddings) as files,
    ):
        model = _build(config, base_model.dtype(dtype), files, mesh)
        megatron_weights.fill(model, files, config, mesh)
        count = files.count
    device = base_model.device()
    model.to(device).eval().requires_grad_(False)
    for layer in model.decoder.layers:
        layer.forward = recompute.layer(layer.forward)
    head = model.embedding.weight if config.tie_word_embeddings else model.head
    shapes, joints = megatron_lora.install(model, config, _head_size(config), mesh)
    return Megatron(
        model=model,
        frequencies=_frequencies(config).to(device),
        mesh=mesh,
        head=Head(head, None, mesh.all),
        in_flight=stages,
        tokenizer=tokenizer,
        name=name,
        path=directory,
        digest=base_model.digest(directory),
        arch=(config.architectures or [config.model_type])[0],
        sites=lora.Sites(shapes, joints, device, base_model.dtype(dtype)),
        eos=Config.load(directory).eos,
        vocab_size=config.vocab_size,
        context=config.max_position_embeddings,
        parameters=count,
        versions={
            "transformers": transformers.__version__,
            "megatron-core": version("megatron-core"),
            "tensor_parallel": str(mesh.tensor.size),
            "pipeline_parallel": str(stages),
        },
    )


def _check(config: Any, ranks: int, stages: int) -> None:
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
    if config.num_hidden_layers < stages:
        raise StartupError(f"num_hidden_layers {config.num_hidden_layers} are fewer than {stages} stages")
    for field, parts in (*((field, ranks // stages) for field in DIVIDED), ("vocab_size", ranks)):
        if getattr(config, field) % parts:
            raise StartupError(
                f"{field} {getattr(config, field)} cannot be divided among {parts} processes"
            )


def _build(config: Any, dtype: Any, files: megatron_weights.Weights, mesh: Mesh) -> _Model:
    """A model without weights; which biases and norms it has, the files say."""
    attention = "model.layers.0.self_attn."
    normed = f"{attention}q_norm.weight" in files
    spec = get_gpt_layer_local_spec(qk_layernorm=normed, normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = _Attention
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shape = TransformerConfig(
            # Those of this stage: its layers, and the cache's, are numbered from its first one.
            num_layers=len(mesh.pipeline.share(config.num_hidden_layers)),
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
            tensor_model_parallel_size=mesh.tensor.size,
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
        model = _Model(shape, spec, config, mesh)
    # Norms come in float32 whatever is asked for.
    converted: _Model = model.to(dtype)
    return converted


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
