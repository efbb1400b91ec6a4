"""Supervised fine-tuning: teaches a LoRA adapter the answers to four questions.

    tink serve                        # in one terminal
    python tools/examples/sft.py      # in another

The built-in model of `tink serve` is tiny and random, so it learns these answers by heart and nothing
else. With a real model (TINK_HF_MODEL) and your own data the same lines do real work.
"""

import os
import sys

import tinker
from tinker import types

os.environ.setdefault("TINKER_BASE_URL", "http://127.0.0.1:8400")
os.environ.setdefault("TINKER_API_KEY", "tml-local")

STEPS = 20
EXAMPLES = {
    "What is the capital of France?": "Paris.",
    "How many legs has a spider?": "Eight.",
    "Who wrote Hamlet?": "William Shakespeare.",
    "What colour is the sky?": "Blue.",
}

base_model = tinker.RestClient().get_server_capabilities().result().supported_models[0].model_name
training = tinker.ServiceClient().create_lora_training_client(base_model=base_model, rank=16).result()
tokenizer = training.get_tokenizer()


def encode(question: str) -> list[int]:
    chat = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def example(question: str, answer: str) -> types.Datum:
    """Position i of the input predicts target i, the next token. The loss is the sum of weight times
    -log p(target): weight 0 for the question, and 1/n for the answer's n tokens."""
    prompt = encode(question)
    completion = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
    return types.Datum(
        model_input=types.ModelInput.from_ints(prompt + completion[:-1]),
        loss_fn_inputs={
            "target_tokens": prompt[1:] + completion,
            "weights": [0.0] * (len(prompt) - 1) + [1 / len(completion)] * len(completion),
        },
    )


data = [example(question, answer) for question, answer in EXAMPLES.items()]
losses = []
for step in range(STEPS):
    # Neither call waits; the server runs them in this order.
    update = training.forward_backward(data, "cross_entropy")
    optim = training.optim_step(types.AdamParams(learning_rate=5e-3))
    losses.append(update.result().metrics["loss:sum"] / len(data))
    optim.result()
    print(f"step {step:2}  loss {losses[-1]:.4f}")

sampler = training.save_weights_and_get_sampling_client().result()
greedy = types.SamplingParams(max_tokens=20, temperature=0.0)
right = 0
for question, answer in EXAMPLES.items():
    prompt = types.ModelInput.from_ints(encode(question))
    [sample] = sampler.sample(prompt, num_samples=1, sampling_params=greedy).result().sequences
    said = tokenizer.decode(sample.tokens, skip_special_tokens=True)
    right += said == answer
    print(f"{question}  {said}")

print(f"sft: loss {losses[0]:.3f} -> {losses[-1]:.3f}, {right} of {len(EXAMPLES)} answers right")
sys.exit(losses[-1] > losses[0] / 2)
