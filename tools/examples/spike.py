"""A run that one bad batch spoils: the story of docs/audit-and-replay.md.

    tink serve                                            # in one terminal
    python tools/examples/spike.py                        # in another: the loss jumps, and stays high
    python tools/examples/spike.py tinker://RUN/weights/NAME   # trains on from a saved state

One of the four batches of step 8 has other answers, with far too much weight, as a broken data pipeline
would make them.
"""

import os
import sys

import tinker
from tinker import types

os.environ.setdefault("TINKER_BASE_URL", "http://127.0.0.1:8400")
os.environ.setdefault("TINKER_API_KEY", "tml-local")

STEPS, BAD_STEP, MORE_STEPS = 12, 8, 4
EXAMPLES = {
    "What is the capital of France?": "Paris.",
    "How many legs has a spider?": "Eight.",
    "Who wrote Hamlet?": "William Shakespeare.",
    "What colour is the sky?": "Blue.",
}

service = tinker.ServiceClient()
if len(sys.argv) > 1:
    training = service.create_training_client_from_state_with_optimizer(sys.argv[1]).result()
    steps = range(STEPS + 1, STEPS + MORE_STEPS + 1)
else:
    base_model = tinker.RestClient().get_server_capabilities().result().supported_models[0].model_name
    training = service.create_lora_training_client(base_model=base_model, rank=16, seed=1).result()
    steps = range(1, STEPS + 1)
tokenizer = training.get_tokenizer()


def example(question: str, answer: str, weight: float = 1.0) -> types.Datum:
    prompt = tokenizer.encode(question, add_special_tokens=False)
    completion = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
    return types.Datum(
        model_input=types.ModelInput.from_ints(prompt + completion[:-1]),
        loss_fn_inputs={
            "target_tokens": prompt[1:] + completion,
            "weights": [0.0] * (len(prompt) - 1) + [weight / len(completion)] * len(completion),
        },
    )


loss = 0.0
for step in steps:
    batches = [example(question, answer) for question, answer in EXAMPLES.items()]
    if step == BAD_STEP:
        batches[2] = example("Who wrote Hamlet?", "?? \x07\x07 }}{{ NaN NaN", weight=40.0)
    updates = [training.forward_backward([datum], "cross_entropy") for datum in batches]
    optim = training.optim_step(types.AdamParams(learning_rate=5e-3))
    loss = sum(update.result().metrics["loss:sum"] for update in updates) / len(updates)
    optim.result()
    print(f"step {step:2}  loss {loss:.4f}")
print(f"spike: loss {loss:.4f} after step {steps[-1]}")
