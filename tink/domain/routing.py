"""Which backend serves which operation: the configuration guide's table, and nothing else. README has it,
written by `tools/generate-docs`."""

from __future__ import annotations

from typing import Literal, NamedTuple

from tink.errors import NotServed

Sampling = Literal["vllm", "megatron", "hf"]
Training = Literal["megatron", "hf"]

NO_SAMPLING = "No valid sampling backend configured"
NO_TRAINING = "Training not supported in non-Megatron mode"
# This one goes on: for how long, where, and what to do.
NO_VLLM = "vLLM server can't be reached"
HOW_TO_SAMPLE = (
    "sample on vLLM (USE_VLLM=true, VLLM_BASE_URL), on a training server (USE_MEGATRON=true, "
    "MEGATRON_SERVER_URL) or on the embedded engine (USE_HF=true)"
)
HOW_TO_TRAIN = (
    "train on a training server (USE_MEGATRON=true, MEGATRON_SERVER_URL) or on the embedded engine "
    "(USE_HF=true)"
)


class Routes(NamedTuple):
    """None: not served; the caller gets NO_SAMPLING or NO_TRAINING, word for word."""

    sampling: Sampling | None
    training: Training | None

    @property
    def trainer(self) -> bool:
        """Whether there is a training server: it may sample, too."""
        return self.training is not None or self.sampling in ("megatron", "hf")

    def check_sampling(self) -> None:
        """Raises NotServed in the guide's words."""
        if self.sampling is None:
            raise NotServed(NO_SAMPLING, HOW_TO_SAMPLE)

    def check_training(self) -> None:
        """Raises NotServed in the guide's words."""
        if self.training is None:
            raise NotServed(NO_TRAINING, HOW_TO_TRAIN)

    @property
    def mode(self) -> str:
        names = {"megatron": "Megatron", "hf": "HuggingFace", "vllm": "vLLM", None: "none"}
        return f"training on {names[self.training]}, sampling on {names[self.sampling]}"


def routes(*, megatron: bool, vllm: bool, hf: bool) -> Routes:
    """`hf`: the HuggingFace engine is enabled (settings resolve `auto`)."""
    training: Training | None = "megatron" if megatron else "hf" if hf else None
    sampling: Sampling | None = "vllm" if vllm else training
    return Routes(sampling, training)
