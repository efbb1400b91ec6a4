"""Which sequence numbers a sampler's jobs have, so that a new one need not be looked for in the journal."""

from __future__ import annotations

from bisect import bisect_right

from tink.limits import NUMBER_RUNS


class Numbers:
    """Of a sampler, from its making on. All below one number may be taken; above, those that are not here
    are free. They are kept as runs: clients count up, with few of them out of order at a time, and several
    clients of one sampler count from places of their own."""

    def __init__(self) -> None:
        self._below = 0
        # Of each run, in order: its first number, and the one behind its last. No two runs touch.
        self._firsts: list[int] = []
        self._behinds: list[int] = []

    def take(self, number: int) -> None:
        if not self.is_free(number):
            return
        # The run is to be before that place, which is where the next one is.
        place = bisect_right(self._firsts, number)
        follows = place > 0 and self._behinds[place - 1] == number
        precedes = place < len(self._firsts) and self._firsts[place] == number + 1
        if follows and precedes:
            self._behinds[place - 1] = self._behinds.pop(place)
            del self._firsts[place]
        elif follows:
            self._behinds[place - 1] = number + 1
        elif precedes:
            self._firsts[place] = number
        else:
            self._firsts.insert(place, number)
            self._behinds.insert(place, number + 1)
        if len(self._firsts) > NUMBER_RUNS:
            self._below = self._behinds[-1]
            self._firsts, self._behinds = [], []

    def is_free(self, number: int) -> bool:
        """Whether no job has it, for certain."""
        if number < self._below:
            return False
        place = bisect_right(self._firsts, number)
        return place == 0 or number >= self._behinds[place - 1]
