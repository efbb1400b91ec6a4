"""A language model made of hashes: the next token's distribution is a function of the weights' digest and
the text so far, and a sample one of that and its seed. With vLLM's rules for the rest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tink import manifest

Floats = npt.NDArray[np.float64]

VOCABULARY = 1024
EOS = 2
# One character a token.
ALPHABET = 0x4E00
BASE = hashlib.sha256(b"base").digest()


def digest(directory: Path) -> bytes:
    """Of an adapter's files, but for Tink's own. FileNotFoundError if they are gone."""
    whole = hashlib.sha256()
    if not (directory / "adapter_config.json").is_file():
        raise FileNotFoundError(directory)
    for file in sorted(directory.rglob("*")):
        if file.is_file() and file.name != manifest.NAME:
            whole.update(file.relative_to(directory).as_posix().encode() + b"\0" + file.read_bytes())
    return whole.digest()


def text(tokens: list[int]) -> str:
    return "".join(chr(ALPHABET + token) for token in tokens)


@dataclass
class Choice:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    # The token itself, then the likeliest.
    top: list[dict[int, float]] = field(default_factory=list)
    finish_reason: str = "length"
    stop_reason: int | str | None = None
    text: str = ""

    def cut(self, length: int) -> Choice:
        """As far as it came when it was aborted."""
        kept = self.tokens[:length]
        return Choice(kept, self.logprobs[:length], self.top[:length], "abort", None, text(kept))


def generate(weights: bytes, body: dict[str, Any], number: int, context: int, *, processed: bool) -> Choice:
    """The choice of this number of a completion request's."""
    choice = Choice()
    history = _History(weights, body["prompt"])
    stops = body.get("stop") or []
    for step in range(min(body["max_tokens"], context - len(body["prompt"]))):
        raw = history.logprobs()
        drawn = _processed(raw, body)
        token = _draw(drawn, body["seed"] + number, step, greedy=body["temperature"] == 0)
        shown = drawn if processed and body["temperature"] else raw
        history.add(token)
        choice.tokens.append(token)
        choice.logprobs.append(_finite(shown[token]))
        choice.top.append({token: _finite(shown[token])} | _top(shown, body["logprobs"]))
        choice.text = text(choice.tokens)
        string = next((stop for stop in stops if stop in choice.text), None)
        if token == EOS and not body["ignore_eos"]:
            choice.finish_reason = "stop"
        elif token in body["stop_token_ids"]:
            choice.finish_reason, choice.stop_reason = "stop", token
        elif string is not None:
            choice.finish_reason, choice.stop_reason = "stop", string
            choice.text = choice.text[: choice.text.index(string)]
        if choice.finish_reason == "stop":
            break
    return choice


def score(weights: bytes, prompt: list[int], k: int) -> Iterator[dict[int, tuple[float, int]] | None]:
    """Logprob and rank of each token of the prompt, and of the k likeliest there."""
    yield None
    history = _History(weights, prompt[:1])
    for token in prompt[1:]:
        raw = history.logprobs()
        found = {token: float(raw[token])} | _top(raw, k)
        yield {key: (value, 1 + int((raw > value).sum())) for key, value in found.items()}
        history.add(token)


class _History:
    def __init__(self, weights: bytes, tokens: list[int]) -> None:
        self._hash = hashlib.sha256(weights)
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        self._hash.update(token.to_bytes(4, "little"))

    def logprobs(self) -> Floats:
        logits = 2.0 * _random(self._hash.digest()).standard_normal(VOCABULARY)
        return logits - np.log(np.exp(logits).sum())


def _processed(raw: Floats, body: dict[str, Any]) -> Floats:
    """What is drawn from: after temperature, top_k and top_p."""
    if body["temperature"] == 0:
        return raw
    logits = raw / max(body["temperature"], 0.01)
    if 0 < body["top_k"] < VOCABULARY:
        logits = np.where(logits >= np.sort(logits)[-body["top_k"]], logits, -np.inf)
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    if body["top_p"] < 1:
        order = np.argsort(-probabilities, kind="stable")
        before = np.cumsum(probabilities[order]) - probabilities[order]
        probabilities[order[before >= body["top_p"]]] = 0.0
        probabilities /= probabilities.sum()
    with np.errstate(divide="ignore"):
        return np.log(probabilities)


def _draw(logprobs: Floats, seed: int, step: int, *, greedy: bool) -> int:
    if greedy:
        return int(logprobs.argmax())
    uniform = _random(hashlib.sha256(f"{seed}:{step}".encode()).digest()).random()
    cumulative = np.exp(logprobs).cumsum()
    return int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right").clip(0, VOCABULARY - 1))


def _top(logprobs: Floats, k: int) -> dict[int, float]:
    best = np.argsort(-logprobs, kind="stable")[:k]
    return {int(token): _finite(logprobs[token]) for token in best}


def _finite(value: Any) -> float:
    return max(float(value), -9999.0)


def _random(seed: bytes) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(int.from_bytes(seed[:16], "little")))
