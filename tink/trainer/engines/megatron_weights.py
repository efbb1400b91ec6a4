"""The weights of a Hugging Face directory, tensor by tensor, as megatron-core's layers have them. Each
rank reads no more than its slices.

Megatron fuses what transformers keeps apart: q, k and v lie in one matrix, group by group (the queries of
one key-value head, its key, its value), and gate and up in another. Which layers have biases and norms of
queries and keys, the files say.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tink.errors import StartupError
from tink.trainer.engines.parallel import Mesh, Ranks

Tensor = Any

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ALL = slice(None)
# Of a layer, here numbered from the first that this rank has, and by transformers.
LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")
THEIR_LAYER = re.compile(r"model\.layers\.(\d+)\.")
# Megatron's name of what every rank has whole -> that of transformers.
WHOLE = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
}
# What every rank has some columns of.
BY_COLUMNS = {
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}


class Weights:
    """The files, open. `tied`: the head is the embedding, whatever else the files have. `unread` are the
    tensors that nobody has asked for yet, and `count` all the numbers in them at the start."""

    def __init__(self, files: dict[str, Any], tied: bool) -> None:
        self._files = files
        # Old checkpoints have rotary frequencies, which are computed anew.
        self.unread = {
            name
            for name in files
            if not name.endswith("rotary_emb.inv_freq") and not (tied and name == HEAD)
        }
        self.count = sum(math.prod(self.shape(name)) for name in self.unread)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        """StartupError if there is no such tensor."""
        return tuple(self._find(name).get_shape())

    def read(self, name: str, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        """StartupError if there is no such tensor."""
        tensor = self._find(name)
        self.unread.discard(name)
        return tensor[rows] if columns == ALL else tensor[rows, columns]

    def _find(self, name: str) -> Any:
        if name not in self._files:
            raise StartupError(f"the model's files have no {name}")
        return self._files[name].get_slice(name)


@contextmanager
def opened(directory: Path, tied: bool) -> Iterator[Weights]:
    """StartupError if the directory has no safetensors files that can be read."""
    with ExitStack() as stack:
        try:
            index = directory / INDEX
            if index.is_file():
                names = set(json.loads(index.read_bytes())["weight_map"].values())
            else:
                names = {SINGLE}
            files: dict[str, Any] = {}
            for name in sorted(names):
                file = stack.enter_context(safe_open(directory / name, "pt"))
                files |= dict.fromkeys(file.keys(), file)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise StartupError(f"{directory} has no weights that can be read: {error}") from error
        yield Weights(files, tied)


def fill(model: Any, weights: Weights, config: Any, mesh: Mesh) -> None:
    """Copies this rank's slices into the model's parameters. `config` is transformers'. StartupError if a
    tensor is missing, has another shape, or has no place in the model."""
    place = _Place(weights, config, mesh)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tensor = place.tensor(name)
            if tensor.shape != parameter.shape:
                raise StartupError(
                    f"{name} has shape {tuple(tensor.shape)} in the model's files, and by its config.json "
                    f"{tuple(parameter.shape)}"
                )
            parameter.copy_(tensor)
    lost = {name for name in weights.unread if not place.is_elsewhere(name)}
    if lost:
        raise StartupError(f"the engine 'megatron' has no place for {min(lost)} of the model")


class _Place:
    """Where each of Megatron's parameters comes from."""

    def __init__(self, weights: Weights, config: Any, mesh: Mesh) -> None:
        self._weights, self._config, self._mesh = weights, config, mesh
        self._layers = mesh.pipeline.share(config.num_hidden_layers)

    def is_elsewhere(self, name: str) -> bool:
        """Whether the tensor is of another stage's layers, which will look at it."""
        match = THEIR_LAYER.match(name)
        number = int(match[1]) if match else -1
        return number in range(self._config.num_hidden_layers) and number not in self._layers

    def tensor(self, name: str) -> Tensor:
        if name == "embedding.weight":
            return self._rows(EMBEDDING, self._mesh.all)
        if name == "head":
            return self._rows(HEAD, self._mesh.all)
        if name == "decoder.final_layernorm.weight":
            return self._weights.read("model.norm.weight")
        match = LAYER.fullmatch(name)
        assert match, name
        layer, leaf = f"model.layers.{self._layers[int(match[1])]}.", match[2]
        if leaf in WHOLE:
            return self._weights.read(layer + WHOLE[leaf])
        ranks = self._mesh.tensor
        kind = leaf.rpartition(".")[2]
        if leaf.startswith("self_attention.linear_qkv."):
            q, k, v = (self._rows(f"{layer}self_attn.{part}_proj.{kind}", ranks) for part in "qkv")
            return interleave(q, k, v, self._config.num_key_value_heads // ranks.size)
        if leaf.startswith("mlp.linear_fc1."):
            gates = (f"{layer}mlp.{part}_proj.{kind}" for part in ("gate", "up"))
            return torch.cat([self._rows(gate, ranks) for gate in gates])
        name = layer + BY_COLUMNS[leaf]
        return self._weights.read(name, columns=ranks.slice(self._weights.shape(name)[1]))

    def _rows(self, name: str, ranks: Ranks) -> Tensor:
        return self._weights.read(name, ranks.slice(self._weights.shape(name)[0]))


def interleave(q: Tensor, k: Tensor, v: Tensor, groups: int) -> Tensor:
    """Rows of queries, keys and values as Megatron has them: group by group, all three of each."""
    parts = [part.unflatten(0, (groups, -1)) for part in (q, k, v)]
    return torch.cat(parts, 1).flatten(0, 1)
