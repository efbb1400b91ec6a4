"""Which sequence numbers a sampler's jobs have, so that a new one need not be looked for in the journal."""

from __future__ import annotations

from tink.limits import SCATTERED_NUMBERS


class Numbers:
    """Of a sampler, from its making on. All below one number may be taken; above, those that are not here
    are free. Clients count up, with few of them out of order at a time."""

    def __init__(self) -> None:
        self._below = 0
        self._above: set[int] = set()

    def take(self, number: int) -> None:
        if number < self._below:
            return
        self._above.add(number)
        while self._below in self._above:
            self._above.remove(self._below)
            self._below += 1
        if len(self._above) > SCATTERED_NUMBERS:
            self._below = max(self._above) + 1
            self._above.clear()

    def is_free(self, number: int) -> bool:
        """Whether no job has it, for certain."""
        return number >= self._below and number not in self._above
