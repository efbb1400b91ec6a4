"""What a run's worker is asked for a fork, and what its answers mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import pytest
import trio
from trio.testing import MockClock

from tink.errors import StartupError, TinkError, UserError
from tink.limits import FORK_SECONDS
from tink.replay.fork import connect
from tink.replay.training import Schedule
from tink.world import World

CHECKPOINTS = "/api/v1/training_runs/s:train:0/checkpoints"
Serve = Callable[[httpx.Request], httpx.Response]


class Network(World):
    """`serve` None: it hangs."""

    def __init__(self, serve: Serve | None) -> None:
        self.requests: list[httpx.Request] = []
        self._serve = serve

    def http_transport(self, origin: str, max_slots: int) -> httpx.AsyncBaseTransport:
        async def handle(request: httpx.Request) -> httpx.Response:
            self.requests.append(request)
            if self._serve is None:
                await trio.sleep_forever()
            return self._serve(request)

        return httpx.MockTransport(handle)


async def test_a_fork_is_published_with_the_owners_key_once_its_name_is_known_to_be_free() -> None:
    network = Network(lambda request: httpx.Response(200, json={"checkpoints": []}))
    async with connect("http://worker", "tml-a", "s:train:0", "mended", network) as worker:
        (asked,) = network.requests
        assert (asked.method, asked.url.path) == ("GET", CHECKPOINTS)
        await worker.publish("a" * 32, Schedule("s:train:0", (), last=7, step=3, steps=3, begun=0))
    published = network.requests[1]
    assert (published.method, published.url.path) == ("POST", f"{CHECKPOINTS}/weights/mended/fork")
    sent: dict[str, Any] = {"fork_id": "a" * 32, "op_no": 7, "step": 3, "edits": []}
    assert msgspec.json.decode(published.content) == sent
    assert {request.headers["authorization"] for request in network.requests} == {"Bearer tml-a"}


def _breaks(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("refused", request=request)


TAKEN = {"checkpoints": [{"tinker_path": "tinker://s:train:0/weights/mended"}]}
REFUSED: dict[str, tuple[Serve, type[TinkError], str]] = {
    "nobody": (_breaks, StartupError, "the worker at http://worker.* does not answer: refused"),
    "no worker": (lambda request: httpx.Response(200, text="<html>"), StartupError, "does not answer"),
    "no key": (lambda request: httpx.Response(401, json={}), UserError, "set TINKER_API_KEY"),
    "no model": (
        lambda request: httpx.Response(404, json={"detail": "there is no model s:train:0"}),
        UserError,
        "the worker refuses the fork: there is no model s:train:0",
    ),
    "a name that is taken": (lambda request: httpx.Response(200, json=TAKEN), UserError, "exists already"),
}


@pytest.mark.parametrize("what", REFUSED)
async def test_what_keeps_a_fork_from_being_made_is_known_before_anything_is_replayed(what: str) -> None:
    serve, kind, text = REFUSED[what]
    with pytest.raises(kind, match=text) as caught:
        async with connect("http://worker", "", "s:train:0", "mended", Network(serve)):
            raise AssertionError("it must not come so far")
    assert "\n" not in str(caught.value)


async def test_a_worker_that_hangs_is_waited_for_as_long_as_it_may_read_files(
    autojump_clock: MockClock,
) -> None:
    with pytest.raises(StartupError, match="does not answer"):
        async with connect("http://worker", "", "s:train:0", "mended", Network(None)):
            raise AssertionError("it must not come so far")
    assert trio.current_time() == pytest.approx(FORK_SECONDS)
