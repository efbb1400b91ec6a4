"""What clients send, in JSON. Nothing beside it is taken: what is misspelt and passed over would be another
job than the one that was meant. (The data of a batch are in datums.py.)"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from tink.api.chat import Message
from tink.domain.requests import AdamParams, Int, Prompt, Request, SamplingParams
from tink.limits import MAX_NUM_SAMPLES, MAX_PROMPTS

Prompts = Annotated[list[str | list[Int] | Prompt], msgspec.Meta(min_length=1, max_length=MAX_PROMPTS)]


class Form(Request, frozen=True, forbid_unknown_fields=True):
    pass


class AddLora(Form, frozen=True):
    """A new adapter of `base_model`. `alpha`: else TINK_LORA_ALPHA."""

    base_model: str
    rank: Int
    alpha: float | None = None
    seed: Int | None = None
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True
    user_metadata: dict[str, Any] | None = None


class RemoveLora(Form, frozen=True):
    model_id: str


class Optim(Form, frozen=True):
    """A step along the gradients that came since the last one."""

    model_id: str
    adam_params: AdamParams = AdamParams()


class Save(Form, frozen=True):
    """`path`: a name. Without one, weights for sampling are those that a sample of the model takes until
    newer ones are saved, and a state is named by its number."""

    model_id: str
    path: str | None = None
    ttl_seconds: Int | None = None
    overwrite: bool = False
    user_metadata: dict[str, str] | None = None


class Load(Form, frozen=True):
    """`path`: what save_weights gave. `optimizer`: its moments, too."""

    model_id: str
    path: str
    optimizer: bool = False


class Sample(Form, frozen=True):
    """Of a model's newest weights, of saved ones (`model_path`) or of the base model; one of `prompt`,
    `prompts` and `messages`."""

    model_id: str | None = None
    model_path: str | None = None
    base_model: str | None = None
    prompt: str | list[Int] | Prompt | None = None
    prompts: Prompts | None = None
    messages: list[Message] | None = None
    sampling_params: SamplingParams = SamplingParams()
    num_samples: Annotated[int, msgspec.Meta(ge=1, le=MAX_NUM_SAMPLES)] = 1


class Future(Form, frozen=True):
    request_id: str
