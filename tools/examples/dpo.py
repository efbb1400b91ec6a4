"""Direct preference optimization: a loss of your own, computed here with torch.

    tink serve                        # in one terminal
    python tools/examples/dpo.py      # in another

forward_backward_custom gets log-probabilities from the server, runs your function on them, and sends
the gradient back. The reference is a sampler taken before the first step; it keeps those weights.
"""

import os
import sys

import tinker
import torch
from tinker import types

os.environ.setdefault("TINKER_BASE_URL", "http://127.0.0.1:8400")
os.environ.setdefault("TINKER_API_KEY", "tml-local")

STEPS = 10
BETA = 0.1
# Prompt, the answer that people preferred, and the other one.
PREFERENCES = [
    ("How do I boil an egg?", "Eight minutes in boiling water.", "Eggs are boiled by boiling."),
    ("Is it going to rain?", "I cannot see the weather; a forecast can.", "Yes, no, maybe."),
    ("Fix my bicycle.", "What is wrong with it?", "Buy another one."),
    ("Tell me a joke.", "A byte walks into a bar, a bit off.", "No."),
]

base_model = tinker.RestClient().get_server_capabilities().result().supported_models[0].model_name
training = tinker.ServiceClient().create_lora_training_client(base_model=base_model, rank=16).result()
tokenizer = training.get_tokenizer()
reference = training.save_weights_and_get_sampling_client().result()

# Chosen and rejected in turn: data[2 * i] and data[2 * i + 1]. `references` are log p(answer) by the
# reference model, one number each.
data, references = [], []
for prompt, *answers in PREFERENCES:
    for answer in answers:
        head = tokenizer.encode(f"{prompt}\n")
        tail = [*tokenizer.encode(answer), tokenizer.eos_token_id]
        datum = types.Datum(
            model_input=types.ModelInput.from_ints(head + tail[:-1]),
            loss_fn_inputs={
                "target_tokens": head[1:] + tail,
                "weights": [0.0] * (len(head) - 1) + [1.0] * len(tail),
            },
        )
        data.append(datum)
        logprobs = reference.compute_logprobs(types.ModelInput.from_ints(head + tail)).result()
        references.append(sum(logprobs[len(head) :]))
references = torch.tensor(references)


def dpo(data: list[types.Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    """How much more likely than to the reference is each answer; then: is that more for the chosen?"""
    answers = [
        (values * datum.loss_fn_inputs["weights"].to_torch()).sum()
        for datum, values in zip(data, logprobs, strict=True)
    ]
    gains = torch.stack(answers) - references
    margins = BETA * (gains[0::2] - gains[1::2])
    loss = -torch.nn.functional.logsigmoid(margins).mean()
    accuracy = (margins > 0).float().mean()
    return loss, {"margin:mean": margins.mean().item(), "accuracy:mean": accuracy.item()}


history = []
for step in range(STEPS):
    metrics = training.forward_backward_custom(data, dpo).result().metrics
    training.optim_step(types.AdamParams(learning_rate=1e-3)).result()
    history.append(metrics)
    figures = "  ".join(f"{name} {metrics[f'{name}:mean']:7.4f}" for name in ("margin", "accuracy"))
    print(f"step {step:2}  loss {metrics['loss:sum']:.4f}  {figures}")

first, last = history[0], history[-1]
print(f"dpo: margin {first['margin:mean']:.3f} -> {last['margin:mean']:.3f} in {STEPS} steps")
sys.exit(last["margin:mean"] < 0.5 or last["accuracy:mean"] < 1)
