"""LoRA beside megatron-core's layers, of which each rank has a slice, or some.

An adapter is whole on every rank, and its layers are those of transformers. The hooks take what belongs to
the rank's part of Megatron's layers, so that the gradients of all ranks add up to the whole one; what is
made of it (steps, states, exports) does not know how many ranks there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from tink.trainer.engines import lora
from tink.trainer.engines.parallel import Mesh, Ranks
from tink.trainer.engines.weights import interleave

Tensor = Any


@dataclass(frozen=True)
class _Columns:
    """LoRA beside a layer whose output is in slices: its input is whole, and so is A x; of B it takes the
    rows of this rank. `names` are the layers that it has fused, and `fuse` does that with their rows."""

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
        inner = ranks.shared(args[0] @ a.T)
        b = self.fuse(*_blocks([pair[1][ranks.slice(len(pair[1]))] for pair in pairs]))
        whole, bias = output
        return lora.add_(whole, inner, b, adapter.scale), bias


def _blocks(parts: Sequence[Tensor]) -> list[Tensor]:
    """(out, r) each -> (out, n r), with zeros in the others' places: one product for all of them, added to
    the output in place, is less work than what it saves in passes over the output."""
    rank = parts[0].shape[1]
    return [
        functional.pad(part, (place * rank, (len(parts) - 1 - place) * rank))
        for place, part in enumerate(parts)
    ]


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
        inner = self.ranks.summed(args[0] @ a[:, self.ranks.slice(a.shape[1])].T)
        whole, bias = output
        return lora.add(whole, inner, self.ranks.once(b), adapter.scale), bias


def install(
    model: Any, config: Any, head_size: int, mesh: Mesh
) -> tuple[dict[str, tuple[int, int]], frozenset[str]]:
    """Which layers an adapter may have, in the order that they have in transformers, and which of them are
    on this rank: on those it puts the hooks. The head has none (head.py)."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * head_size
    keys = config.num_key_value_heads * head_size
    ranks = mesh.tensor
    groups = config.num_key_value_heads // ranks.size
    here = mesh.pipeline.share(config.num_hidden_layers)
    sites: dict[str, tuple[int, int]] = {}
    held: set[str] = set()

    def by_group(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return interleave(q, k, v, groups)

    def join(*parts: Tensor) -> Tensor:
        return torch.cat(parts)

    for number in range(config.num_hidden_layers):
        attention, mlp = f"model.layers.{number}.self_attn", f"model.layers.{number}.mlp"
        qkv = {
            f"{attention}.{leaf}_proj": size
            for leaf, size in zip("qkv", (queries, keys, keys), strict=True)
        }
        gates = {f"{mlp}.{leaf}_proj": inner for leaf in ("gate", "up")}
        out, down = f"{attention}.o_proj", f"{mlp}.down_proj"
        sites |= {name: (size, hidden) for name, size in qkv.items()}
        sites[out] = (hidden, queries)
        sites |= {name: (size, hidden) for name, size in gates.items()}
        sites[down] = (hidden, inner)
        if number in here:
            layer = model.decoder.layers[number - here.start]
            layer.self_attention.linear_qkv.register_forward_hook(_Columns(list(qkv), by_group, ranks))
            layer.self_attention.linear_proj.register_forward_hook(_Rows(out, ranks))
            layer.mlp.linear_fc1.register_forward_hook(_Columns(list(gates), join, ranks))
            layer.mlp.linear_fc2.register_forward_hook(_Rows(down, ranks))
            held |= {*qkv, out, *gates, down}
    sites["lm_head"] = (config.vocab_size, hidden)
    return sites, frozenset(held)
