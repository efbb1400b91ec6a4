"""When a sequence is at its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Stops:
    """Token ids, and strings searched in the decoded text. What ends a sequence stays part of it.

    A stop string may begin or end in the middle of a token, and a character may take several tokens
    (four at most), so the text of the last few tokens is decoded anew after each one: long enough for
    the longest string, since hardly any token is shorter than a byte."""

    def __init__(self, tokens: frozenset[int], strings: Sequence[str], tokenizer: Any) -> None:
        self._tokens = tokens
        self._strings = strings
        self._tokenizer = tokenizer
        self._tail = max((len(text.encode()) for text in strings), default=0) + 8

    def ends(self, tokens: Sequence[int]) -> bool:
        """Whether the newest of these generated tokens ends the sequence."""
        if tokens[-1] in self._tokens:
            return True
        if not self._strings:
            return False
        text = self._tokenizer.decode(tokens[-self._tail :], skip_special_tokens=False)
        return any(string in text for string in self._strings)
