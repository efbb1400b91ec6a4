"""Bodies that came ahead of the operations that name them."""

from __future__ import annotations

from collections import OrderedDict

from tink.limits import TRAINER_BODIES, TRAINER_BODIES_BYTES


class Bodies:
    """By their sha256, each until it is taken. Bounded: the oldest go first, and whoever named one of those
    sends it again."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._bytes = 0

    def keep(self, digest: str, body: bytes) -> None:
        """The caller has compared the two."""
        self.take(digest)
        self._kept[digest] = body
        self._bytes += len(body)
        while len(self._kept) > TRAINER_BODIES or self._bytes > TRAINER_BODIES_BYTES:
            self.take(next(iter(self._kept)))

    def take(self, digest: str) -> bytes | None:
        """That body, which is not kept any longer; None if there is none."""
        body = self._kept.pop(digest, None)
        self._bytes -= len(body or b"")
        return body
