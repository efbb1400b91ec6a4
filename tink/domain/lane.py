"""A model's lane: which of its jobs is next. Jobs run in the order of the client's sequence numbers,
whatever the order of their arrival; one at a time; and a number that never comes cannot stop it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Lane:
    """Pure bookkeeping over job ids. `next_seq` is the number it waits for."""

    next_seq: int = 0
    waiting: dict[int, str] = field(default_factory=dict)
    running: str | None = None
    behind_all: int = 0

    @property
    def idle(self) -> bool:
        """Whether none of its jobs runs or waits."""
        return self.running is None and not self.waiting

    def expect(self, seq: int) -> None:
        """A job of that number is on its way."""
        self.behind_all = max(self.behind_all, seq + 1)

    def arrive(self, seq: int, job: str) -> bool:
        """Takes a job in. False if its number was consumed before: it was skipped, and came too late."""
        self.expect(seq)
        if seq < self.next_seq:
            return False
        self.waiting[seq] = job
        return True

    def start(self) -> str | None:
        """The job to run now, which then is the running one; None if there is none."""
        if self.running is not None:
            return None
        self.running = self.waiting.pop(self.next_seq, None)
        return self.running

    def behind(self) -> str | None:
        """The job that comes right behind the running one, if both are there."""
        return None if self.running is None else self.waiting.get(self.next_seq + 1)

    def end(self) -> int:
        """The number behind all that have come, or are on their way."""
        return max(self.behind_all, self.next_seq)

    def finish(self, job: str) -> None:
        """The running job ended, well or not: its number is consumed."""
        if self.running != job:
            raise ValueError(f"{job} is not running; {self.running} is")
        self.running = None
        self.next_seq += 1

    def gap(self) -> tuple[int, int] | None:
        """The missing numbers (first, last) that hold later jobs up, if there are any."""
        if self.running is not None or not self.waiting or self.next_seq in self.waiting:
            return None
        return self.next_seq, min(self.waiting) - 1

    def skip(self, last: int) -> None:
        """Declares the numbers up to `last` consumed."""
        self.next_seq = max(self.next_seq, last + 1)
