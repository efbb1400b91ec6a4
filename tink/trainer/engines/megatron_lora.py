"""LoRA beside megatron-core's layers, of which each rank has a slice, or some.

An adapter is whole on every rank, and its layers are those of transformers. The hooks take what belongs to
the rank's part of Megatron's layers, so that the gradients of all ranks add up to the whole one; what is
made of it (steps, states, exports) does not know how many ranks there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tink.trainer.engines import lora
from tink.trainer.engines.head import NAME as HEAD
from tink.trainer.engines.joints import Joint
from tink.trainer.engines.parallel import Mesh, Ranks

Tensor = Any


@dataclass(frozen=True)
class _Columns:
    """LoRA beside a layer whose output is in slices: its input is whole, and so are A and A x; of B it has
    the rows of this rank."""

    joint: str
    ranks: Ranks

    def __call__(self, module: Any, args: tuple[Tensor, ...], output: Any) -> Any:
        pair = lora.pair_in_use(self.joint)
        if pair is None:
            return None
        a, b, scale = pair
        # The gradient that every rank has a part of is summed here, where it is no wider than the rank.
        inner = self.ranks.shared(args[0] @ self.ranks.once(a).T)
        whole, bias = output
        return lora.add_(whole, inner, b, scale), bias


@dataclass(frozen=True)
class _Rows:
    """LoRA beside a layer whose input is in slices: of A it has the columns of this rank, and the sum of
    A x over the ranks is whole, and so are B and the output."""

    joint: str
    ranks: Ranks

    def __call__(self, module: Any, args: tuple[Tensor, ...], output: Any) -> Any:
        pair = lora.pair_in_use(self.joint)
        if pair is None:
            return None
        a, b, scale = pair
        inner = self.ranks.summed(args[0] @ a.T)
        whole, bias = output
        return lora.add(whole, inner, self.ranks.once(b), scale), bias


def install(
    model: Any, config: Any, head_size: int, mesh: Mesh
) -> tuple[dict[str, tuple[int, int]], list[Joint]]:
    """Which layers an adapter may have, in the order that they have in transformers, and what this rank has
    of them, where it puts the hooks. The head has none (head.py), and all ranks have its A and B whole."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * head_size
    keys = config.num_key_value_heads * head_size
    ranks = mesh.tensor
    here = mesh.pipeline.share(config.num_hidden_layers)
    sites: dict[str, tuple[int, int]] = {}
    joints: list[Joint] = []

    def columns(module: Any, layers: dict[str, tuple[int, int]], groups: int = 1) -> None:
        rows = tuple(ranks.slice(size) for size, _ in layers.values())
        joints.append(Joint(tuple(layers), rows, groups=groups))
        module.register_forward_hook(_Columns(joints[-1].name, ranks))

    def rows(module: Any, name: str, size: int) -> None:
        joints.append(Joint((name,), columns=ranks.slice(size)))
        module.register_forward_hook(_Rows(name, ranks))

    for number in range(config.num_hidden_layers):
        attention, mlp = f"model.layers.{number}.self_attn", f"model.layers.{number}.mlp"
        sizes = zip("qkv", (queries, keys, keys), strict=True)
        qkv = {f"{attention}.{leaf}_proj": (size, hidden) for leaf, size in sizes}
        gates = {f"{mlp}.{leaf}_proj": (inner, hidden) for leaf in ("gate", "up")}
        out, down = f"{attention}.o_proj", f"{mlp}.down_proj"
        sites |= {**qkv, out: (hidden, queries), **gates, down: (hidden, inner)}
        if number in here:
            layer = model.decoder.layers[number - here.start]
            columns(layer.self_attention.linear_qkv, qkv, config.num_key_value_heads // ranks.size)
            rows(layer.self_attention.linear_proj, out, queries)
            columns(layer.mlp.linear_fc1, gates)
            rows(layer.mlp.linear_fc2, down, inner)
    sites[HEAD] = (config.vocab_size, hidden)
    return sites, [*joints, Joint((HEAD,))]
