"""megatron-core's own text generation server, on the CPU: its routes, its engine, its GPTModel.

    python -m tests.megatron_lm.server MODEL PORT

It asks for CUDA at many places: what it finds there is the CPU.
"""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import functional

from tink.trainer.engines import megatron, megatron_weights

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.inference import communication_utils
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.inference.engines.static_engine import StaticInferenceEngine
    from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (
        GPTInferenceWrapper,
    )
    from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import (
        InferenceWrapperConfig,
    )
    from megatron.core.inference.text_generation_controllers.text_generation_controller import (
        TextGenerationController,
    )
    from megatron.core.inference.text_generation_server.text_generation_server import MegatronServer
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import initialize_rng_tracker
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnBackend

CPU = torch.device("cpu")


class Event:
    """Of a stream. Nothing is timed."""

    def __init__(self, **_: Any) -> None:
        pass

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, _: Event) -> float:
        return 1.0


def replace_cuda() -> None:
    made = torch.tensor

    def tensor(*args: Any, device: Any = None, **options: Any) -> Any:
        return made(*args, device=CPU if device == "cuda" else device, **options)

    torch.tensor = tensor
    torch.Tensor.cuda = lambda self, *_, **__: self
    torch.cuda.Event = Event
    torch.cuda.current_device = lambda: CPU
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.nvtx = types.SimpleNamespace(range_push=lambda *_: None, range_pop=lambda *_: None)
    communication_utils._is_cuda = communication_utils._is_cuda_contiguous = lambda _: None


class _Named:
    """A GPTModel's parameters, by the names that they have where Tink builds a model of its layers."""

    NAMES = types.MappingProxyType(
        {"embedding.word_embeddings.weight": "embedding.weight", "output_layer.weight": "head"}
    )

    def __init__(self, model: Any) -> None:
        self._model = model

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        for name, parameter in self._model.named_parameters():
            yield self.NAMES.get(name, name), parameter


def build(directory: Path) -> Any:
    """A Qwen3, as Megatron-LM computes it by itself."""
    config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    mesh = megatron.join()
    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    shape = TransformerConfig(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        kv_channels=config.head_dim,
        ffn_hidden_size=config.intermediate_size,
        layernorm_epsilon=config.rms_norm_eps,
        normalization="RMSNorm",
        qk_layernorm=True,
        gated_linear_unit=True,
        activation_func=functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_backend=AttnBackend.local,
        params_dtype=torch.float32,
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )
    model = GPTModel(
        shape,
        get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm"),
        vocab_size=config.vocab_size,
        max_sequence_length=config.max_position_embeddings,
        share_embeddings_and_output_weights=config.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=int(config.rope_parameters["rope_theta"]),
    )
    with megatron_weights.opened(directory, config.tie_word_embeddings) as files:
        megatron_weights.fill(_Named(model), files, config, mesh)
    return model.eval()


class Tokenizer:
    """What a server asks of one; Megatron-LM's own of this kind is in no package."""

    def __init__(self, directory: Path) -> None:
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
        self.eod = self._tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.vocab_size = len(self._tokenizer)

    def tokenize(self, text: str) -> list[int]:
        return list(self._tokenizer(text).input_ids)

    def detokenize(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))

    def offsets(self, ids: list[int], text: str) -> list[int]:
        spans = self._tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        begins = [begin for begin, _ in spans] + [len(text)] * len(ids)
        return begins[: len(ids)]


def main(directory: Path, port: int) -> None:
    replace_cuda()
    model = build(directory)
    settings = InferenceWrapperConfig(
        hidden_size=model.config.hidden_size,
        params_dtype=torch.float32,
        inference_batch_times_seqlen_threshold=10**9,
        padded_vocab_size=model.vocab_size,
    )
    wrapped = GPTInferenceWrapper(model, settings, StaticInferenceContext.from_config(settings))
    engine = StaticInferenceEngine(TextGenerationController(wrapped, Tokenizer(directory)), legacy=True)
    MegatronServer(engine).run("127.0.0.1", port)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]), int(sys.argv[2]))
