"""What is served, by whatever serves: what clients are told of the base model and of the servers."""

from __future__ import annotations

from typing import NamedTuple

from tink.actors.link import Link
from tink.actors.pool import VLLMPool


class Base(NamedTuple):
    """The base model that is served. `max_context`: tokens. `path`: a directory with its tokenizer, which
    may be on another machine, or its name on the hub. `trains`: whether its server can train it."""

    name: str
    max_context: int
    arch: str = ""
    path: str | None = None
    trains: bool = True


class Backends:
    """Models are made on what the trainer serves; without one, what vLLM serves is all there is. One of
    them is not None."""

    def __init__(self, link: Link | None, pool: VLLMPool | None) -> None:
        self._link, self._pool = link, pool
        self._replicas = [] if pool is None else pool.replicas

    def known(self) -> Base | None:
        """What is served, if it is known yet."""
        served = [replica.served for replica in self._replicas if replica.served is not None]
        if self._link is None:
            first = next(iter(served), None)
            return first and Base(first.base_model, first.max_context, path=first.root or None)
        if (trained := self._link.known) is None:
            return None
        # What is longer could be trained, and not sampled.
        context = min([trained.max_context, *(one.max_context for one in served)])
        return Base(trained.base_model, context, trained.arch, trained.base_path, trained.trains)

    async def base(self) -> Base:
        """The same, once it is known."""
        if self._link is not None:
            await self._link.served()
        elif self._pool is not None:
            await self._pool.served()
        found = self.known()
        assert found is not None, "one of them serves it"
        return found

    def health(self) -> dict[str, str]:
        """The state of each server, by its name."""
        states = {replica.url: replica.state for replica in self._replicas}
        if self._link is not None:
            states["trainer"] = self._link.state
        return states
