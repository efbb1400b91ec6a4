"""What one user does: makes an adapter, trains it on chats of its own, samples it. By plain HTTP, one call
after another, as a script does."""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass, field
from typing import Any

import httpx
import trio

# Of the chats. The words do not matter, only that every model has tokens for them.
WORDS = ("a", "journal", "is", "the", "list", "of", "what", "happened", "so", "it", "can", "be", "made")
SAMPLING = {"max_tokens": 32, "temperature": 0.7}
LEARNING_RATE = 5e-3
# A job may wait for those of many others.
CALL_SECONDS = 3600.0


@dataclass(frozen=True)
class Work:
    """The same for all users, but for the words and seeds, which are functions of the user's number.
    `words`: of an answer; a step sees all `chats`."""

    base_model: str
    steps: int
    chats: int
    words: int
    rank: int


@dataclass
class Outcome:
    """`answers`: all that the worker computed, in order. `error`: None if all went well."""

    user: int
    model_id: str | None = None
    losses: list[float] = field(default_factory=list)
    answers: list[Any] = field(default_factory=list)
    seconds: float = 0.0
    error: str | None = None


def chats(work: Work, user: int) -> list[list[dict[str, str]]]:
    draw = random.Random(user)
    return [
        [
            {"role": "user", "content": f"What is number {number}?"},
            {"role": "assistant", "content": " ".join(draw.choices(WORDS, k=work.words))},
        ]
        for number in range(work.chats)
    ]


async def use(client: httpx.AsyncClient, work: Work, user: int) -> Outcome:
    """Never raises for what the worker answers, or does not answer: the outcome says it."""
    outcome = Outcome(user)
    data = chats(work, user)
    started = time.perf_counter()
    try:
        added = await _post(client, "/add_lora", base_model=work.base_model, rank=work.rank, seed=user)
        outcome.model_id = model = added["model_id"]
        for _ in range(work.steps):
            batch = await _post(client, "/fwdbwd", model_id=model, data=data)
            optim = {"learning_rate": LEARNING_RATE}
            stepped = await _post(client, "/optim", model_id=model, adam_params=optim)
            outcome.losses.append(batch["loss"])
            outcome.answers += [batch, stepped["metrics"]]
        sampling = SAMPLING | {"seed": user}
        sampled = await _post(
            client, "/sample", model_id=model, messages=data[0][:1], sampling_params=sampling
        )
        outcome.answers.append(sampled)
        outcome.seconds = time.perf_counter() - started
    except (httpx.HTTPError, KeyError, ValueError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    return outcome


async def remove(client: httpx.AsyncClient, outcome: Outcome) -> None:
    """What it made. One that cannot be removed stays."""
    if outcome.model_id is not None and outcome.error is None:
        await _post(client, "/remove_lora", model_id=outcome.model_id)


async def _post(client: httpx.AsyncClient, route: str, **sent: Any) -> Any:
    """HTTPError with the worker's own words."""
    answer = await client.post(route, json=sent)
    while answer.status_code == 429:
        await trio.sleep(float(answer.headers.get("Retry-After", 1)))
        answer = await client.post(route, json=sent)
    if not answer.is_success:
        raise httpx.HTTPError(f"POST {route}: {answer.status_code} {_detail(answer)}")
    return answer.json()


def _detail(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["detail"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return answer.text[:200]
