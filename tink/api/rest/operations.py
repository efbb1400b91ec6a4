"""The operations by their names: what each takes, and what comes of it."""

from __future__ import annotations

from typing import NamedTuple

from tink.api.rest import answers, datums, forms, jobs
from tink.api.rest.answers import Answer
from tink.api.rest.promises import Submit
from tink.domain.requests import Request


class Operation(NamedTuple):
    submit: Submit
    form: type[Request]
    answer: type[Answer]
    summary: str


_FORWARD = Operation(
    jobs.forward, datums.Batch, answers.Trained, "The loss of a batch, without its gradients"
)
_OPTIM = Operation(jobs.optim, forms.Optim, answers.Stepped, "A step of the optimizer (AdamW)")
_SAMPLE = Operation(
    jobs.sample, forms.Sample, answers.Sampled, "Sample an adapter, saved weights or the base model"
)

OPERATIONS: dict[str, Operation] = {
    "add_lora": Operation(jobs.add_lora, forms.AddLora, answers.Model, "Make an adapter"),
    "remove_lora": Operation(
        jobs.remove_lora, forms.RemoveLora, answers.Model, "Remove an adapter; what was saved of it stays"
    ),
    "forward": _FORWARD,
    "fwd": _FORWARD,
    "fwdbwd": Operation(
        jobs.forward_backward,
        datums.Batch,
        answers.Trained,
        "The loss of a batch; its gradients add up",
    ),
    "optim": _OPTIM,
    "optim_step": _OPTIM,
    "load_weights": Operation(
        jobs.load_weights, forms.Load, answers.Loaded, "Put a saved state back into an adapter"
    ),
    "save_weights": Operation(
        jobs.save_weights, forms.Save, answers.Saved, "Save an adapter with its optimizer"
    ),
    "save_weights_for_sampler": Operation(
        jobs.save_weights_for_sampler, forms.Save, answers.Saved, "Save an adapter to be sampled"
    ),
    "sample": _SAMPLE,
}

# The forms that do not wait.
PROMISED: dict[str, Operation] = {
    **{f"{name}_async": operation for name, operation in OPERATIONS.items()},
    "asample": _SAMPLE,
}
