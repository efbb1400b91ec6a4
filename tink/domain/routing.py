"""Which backend serves which operation: the configuration guide's table, and nothing else.

| USE_MEGATRON | USE_VLLM | sampling | training |
|---|---|---|---|
| true | true | vLLM | Megatron |
| true | false | Megatron | Megatron |
| false | true | vLLM | HuggingFace if enabled by name, else an error |
| false | false | HuggingFace if enabled, else an error | HuggingFace if enabled, else an error |
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Sampling = Literal["vllm", "megatron", "hf"]
Training = Literal["megatron", "hf"]

NO_SAMPLING = "No valid sampling backend configured"
NO_TRAINING = "Training not supported in non-Megatron mode"


class Routes(NamedTuple):
    """None: not served; the caller gets NO_SAMPLING or NO_TRAINING, word for word."""

    sampling: Sampling | None
    training: Training | None

    @property
    def trainer(self) -> bool:
        """Whether there is a training server: it may sample, too."""
        return self.training is not None or self.sampling in ("megatron", "hf")

    @property
    def mode(self) -> str:
        names = {"megatron": "Megatron", "hf": "HuggingFace", "vllm": "vLLM", None: "none"}
        return f"training on {names[self.training]}, sampling on {names[self.sampling]}"


def routes(*, megatron: bool, vllm: bool, hf: bool) -> Routes:
    """`hf`: the HuggingFace engine is enabled (settings resolve `auto`)."""
    training: Training | None = "megatron" if megatron else "hf" if hf else None
    sampling: Sampling | None = "vllm" if vllm else training
    return Routes(sampling, training)
