"""`PUT /api` of Megatron-LM's text generation server: the answer, and what it says of a bad request.

The request is a JSON map of its fields (tink/trainer/text_generation.py reads it). A complaint is a JSON
string, with the status 400, or with 200: look at what the answer is.
"""

from __future__ import annotations

import msgspec

PATH = "/api"
MAX_PROMPTS = 128
MAX_TEMPERATURE = 100.0
MAX_TOP_K = 1000
# What is said to a request without any field, by which such a server can be told from others.
NO_PROMPTS = "prompts argument required"


class Answer(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Row by row of the prompts, prompt and continuation together. `segments`: what each token adds to the
    text. `logprobs`: of each token but the first, if asked for. Older servers have no `tokens`."""

    text: list[str]
    tokens: list[list[int]] | None = None
    logprobs: list[list[float | None]] | None = None
    segments: list[list[str]] | None = None
