"""Reinforcement learning: samples, rewards computed here in Python, policy-gradient updates.

    tink serve                       # in one terminal
    python tools/examples/rl.py      # in another

The reward is a stand-in for yours: the share of letters in a sample that are an "e". The built-in model
of `tink serve` is random: its samples are noise before, and afterwards some word with many an "e", over
and over, since this reward asks for no more. tools/demo shows the loop on a model that knows some words.
"""

import os
import sys
from statistics import fmean

import tinker
from tinker import types

os.environ.setdefault("TINKER_BASE_URL", "http://127.0.0.1:8400")
os.environ.setdefault("TINKER_API_KEY", "tml-local")

STEPS = 12
GROUP = 16
PROMPTS = ["Once upon a time", "In the beginning", "The answer is", "Dear reader"]

base_model = tinker.RestClient().get_server_capabilities().result().supported_models[0].model_name
training = (
    tinker.ServiceClient().create_lora_training_client(base_model=base_model, rank=16, seed=0).result()
)
tokenizer = training.get_tokenizer()


def reward(text: str) -> float:
    return text.lower().count("e") / max(len(text), 1)


def example(prompt: list[int], sample: types.SampledSequence, advantage: float) -> types.Datum:
    """Position i of the input predicts target i. The prompt was not the model's choice: advantage 0.
    `logprobs` are those of the sampler, which make the importance ratio."""
    given = len(prompt) - 1
    return types.Datum(
        model_input=types.ModelInput.from_ints(prompt + sample.tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": prompt[1:] + sample.tokens,
            "logprobs": [0.0] * given + sample.logprobs,
            "advantages": [0.0] * given + [advantage] * len(sample.tokens),
        },
    )


rewards = []
for step in range(STEPS):
    # 1. A sampler with the present weights, and a group of samples for each prompt, all at once.
    sampler = training.save_weights_and_get_sampling_client().result()
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    params = types.SamplingParams(max_tokens=16, temperature=1.0, seed=step)
    futures = [sampler.sample(types.ModelInput.from_ints(p), GROUP, params) for p in prompts]
    groups = [future.result().sequences for future in futures]

    # 2. Each sample's reward, and its advantage over the mean of its group.
    data, scores, text = [], [], ""
    for prompt, group in zip(prompts, groups, strict=True):
        texts = [tokenizer.decode(sample.tokens) for sample in group]
        values = [reward(text) for text in texts]
        mean = fmean(values)
        data += [example(prompt, sample, v - mean) for sample, v in zip(group, values, strict=True)]
        scores += values
        text = texts[0]
    rewards.append(fmean(scores))
    print(f"step {step:2}  reward {rewards[-1]:.3f}  {text!r}")

    # 3. One update.
    update = training.forward_backward(data, "importance_sampling")
    optim = training.optim_step(types.AdamParams(learning_rate=1e-2))
    update.result()
    optim.result()

print(f"rl: reward {rewards[0]:.3f} -> {rewards[-1]:.3f} in {STEPS} steps")
sys.exit(rewards[-1] < 2 * rewards[0])
