"""The two programs that go on while their server is killed: what a user of the SDK would write, and
nothing about kills."""

from __future__ import annotations

import random
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import tinker
from tinker import types

MODEL = "tink/qwen3-tiny"
RANK = 8
# Steps of the supervised run that are sent before the first is awaited, and between two saved states.
AHEAD, SAVED_EVERY = 3, 4
PROMPTS = ([5, 6, 7, 8], [100, 90, 80, 70, 60])
GROUP = 4

# What a client got: a name such as "sft/3/loss" -> its numbers.
Numbers = dict[str, list[float]]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass
class Run:
    """One program with one model, in a thread of its own. `steps` None: it goes on until it is `enough`;
    `made` is how many it has begun, and `results` when each result came."""

    name: str
    program: Callable[[Run, tinker.TrainingClient], None]
    seed: int
    steps: int | None = None
    made: int = 0
    numbers: Numbers = field(default_factory=dict)
    results: list[float] = field(default_factory=list)
    enough: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None
    thread: threading.Thread | None = None

    def start(self, url: str) -> None:
        self.thread = threading.Thread(target=self._work, args=(url,), name=self.name, daemon=True)
        self.thread.start()

    @property
    def ended(self) -> bool:
        return self.thread is not None and not self.thread.is_alive()

    def each_step(self) -> Iterator[int]:
        for step in count():
            if step == self.steps or self.enough.is_set():
                return
            self.made = step + 1
            yield step

    def got(self, step: int, **numbers: list[float]) -> None:
        """A result is there."""
        self.results.append(time.monotonic())
        self.numbers |= {f"{self.name}/{step}/{key}": values for key, values in numbers.items()}

    def _work(self, url: str) -> None:
        try:
            service = tinker.ServiceClient(base_url=url, api_key="tml-local")
            made = service.create_lora_training_client(base_model=MODEL, rank=RANK, seed=self.seed)
            self.program(self, made.result())
        except BaseException as error:
            self.error = error
            say(f"{self.name}: {type(error).__name__}: {error}")


def both(seed: int, steps: Sequence[int | None] = (None, None)) -> list[Run]:
    return [Run("sft", sft, seed, steps[0]), Run("rl", rl, seed + 1, steps[1])]


def sft(run: Run, client: tinker.TrainingClient) -> None:
    """Supervised: some steps are always on their way, and the state is saved now and then."""
    pending: deque[tuple[int, Any, Any]] = deque()

    def take() -> None:
        step, update, optim = pending.popleft()
        run.got(step, **_update(update.result()))
        run.got(step, optim=_metrics(optim.result().metrics))

    for step in run.each_step():
        data = [_sentence(random.Random(f"{run.seed} {step} {index}")) for index in range(3)]
        data.append(_distribution(random.Random(f"{run.seed} {step} wide")))
        update = client.forward_backward(data, "cross_entropy")
        pending.append((step, update, client.optim_step(types.AdamParams(learning_rate=2e-3))))
        if len(pending) > AHEAD:
            take()
        if step % SAVED_EVERY == SAVED_EVERY - 1:
            client.save_state(f"step-{step}").result()
            run.got(step)
    while pending:
        take()


def rl(run: Run, client: tinker.TrainingClient) -> None:
    """Reinforcement learning: even tokens are rewarded. Each step needs the samples of its weights, so a
    difference anywhere would grow."""
    for step in run.each_step():
        sampler = client.save_weights_and_get_sampling_client().result()
        run.got(step)
        asked = [
            sampler.sample(
                types.ModelInput.from_ints(prompt),
                num_samples=GROUP,
                sampling_params=types.SamplingParams(max_tokens=12, seed=run.seed + 100 * step + index),
            )
            for index, prompt in enumerate(PROMPTS)
        ]
        data = []
        for index, prompt in enumerate(PROMPTS):
            group = asked[index].result().sequences
            rewards = [statistics.fmean(token % 2 == 0 for token in one.tokens) for one in group]
            mean = statistics.fmean(rewards)
            data += [
                _rollout(prompt, one.tokens, one.logprobs, reward - mean)
                for one, reward in zip(group, rewards, strict=True)
            ]
            tokens = [float(token) for one in group for token in one.tokens]
            logprobs = [value for one in group for value in one.logprobs]
            run.got(step, **{f"tokens{index}": tokens, f"logprobs{index}": logprobs})
        update = client.forward_backward(data, "importance_sampling")
        optim = client.optim_step(types.AdamParams(learning_rate=1e-3))
        run.got(step, **_update(update.result()))
        run.got(step, optim=_metrics(optim.result().metrics))


def _sentence(draw: random.Random) -> types.Datum:
    tokens = [draw.randrange(300) for _ in range(draw.randrange(20, 50))]
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)},
    )


def _distribution(draw: random.Random) -> types.Datum:
    """Two targets at each position, as in distillation: the trainer computes it in a micro-batch of its
    own, so that there is a place between two of them."""
    tokens = [draw.randrange(300) for _ in range(draw.randrange(20, 50))]
    targets = [draw.randrange(300) for _ in range(2 * len(tokens))]
    weights = [0.75, 0.25] * len(tokens)
    shape = [len(tokens), 2]
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens),
        loss_fn_inputs={
            "target_tokens": types.TensorData(data=targets, dtype="int64", shape=shape),
            "weights": types.TensorData(data=weights, dtype="float32", shape=shape),
        },
    )


def _rollout(prompt: list[int], tokens: list[int], logprobs: list[float], advantage: float) -> types.Datum:
    """Position i predicts token i + 1. The prompt's own tokens have no advantage, hence no gradient."""
    given = len(prompt) - 1
    return types.Datum(
        model_input=types.ModelInput.from_ints(prompt + tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": prompt[1:] + tokens,
            "logprobs": [0.0] * given + logprobs,
            "advantages": [0.0] * given + [advantage] * len(tokens),
        },
    )


def _metrics(metrics: dict[str, float] | None) -> list[float]:
    return [value for _name, value in sorted((metrics or {}).items())]


def _update(result: types.ForwardBackwardOutput) -> dict[str, list[float]]:
    outputs = [
        value
        for output in result.loss_fn_outputs
        for _name, tensor in sorted(output.items())
        for value in tensor.data
    ]
    return {"metrics": _metrics(result.metrics), "outputs": outputs}
