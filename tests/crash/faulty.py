"""`tink serve` with little patience, and a trainer that hangs or answers wrongly when it is told to.

    python -m tests.crash.faulty serve --home DIR ...

takes limits from FAULTY_LIMITS (JSON: name of tink/limits.py -> value), and starts its trainer as

    python -m tests.crash.faulty trainer --home DIR ...

which is the real one, over real HTTP. What it is to do wrong stands in DIR.faults (JSON: see Fault); what
it was asked is in DIR.calls: a line a call, with the monotonic time, the path and the fault.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

import tink.limits

for _name, _value in json.loads(os.environ.get("FAULTY_LIMITS", "{}")).items():
    assert hasattr(tink.limits, _name), f"there is no limit {_name}"
    setattr(tink.limits, _name, _value)

# Their modules take the limits when they are imported.
import trio  # noqa: E402

from tink.actors import embedded  # noqa: E402
from tink.cli import main  # noqa: E402
from tink.trainer import build, process  # noqa: E402
from tink.wire.tink_train import OpReply, Refusal, SampleReply, encode  # noqa: E402

Message = dict[str, Any]


class Fault(msgspec.Struct):
    """The next `times` calls whose path begins with `path` get the answer that `what` names. `pid`: only
    from that process."""

    path: str
    what: str
    times: int = 1
    pid: int | None = None


def faults_file(home: Path) -> Path:
    return home.with_name(f"{home.name}.faults")


def calls_file(home: Path) -> Path:
    return home.with_name(f"{home.name}.calls")


class Faults:
    """What the file says, from the moment when it was last written."""

    def __init__(self, home: Path) -> None:
        self._file, self._content, self._left = faults_file(home), b"", list[Fault]()

    def take(self, path: str) -> str:
        content = self._file.read_bytes() if self._file.exists() else b"[]"
        if content != self._content:
            self._content = content
            self._left = msgspec.json.decode(content, type=list[Fault])
        for fault in self._left:
            if path.startswith(fault.path) and fault.times and fault.pid in (None, os.getpid()):
                fault.times -= 1
                return fault.what
        return "none"


class FaultyApp:
    """The trainer's ASGI application: does what it is asked for, and tells it wrongly."""

    def __init__(self, app: Any, home: Path, faults: Faults) -> None:
        self._app, self._calls, self._faults = app, calls_file(home), faults

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        fault = self._faults.take(scope["path"])
        with self._calls.open("a") as calls:
            calls.write(f"{time.monotonic()} {scope['path']} {fault}\n")
        if fault == "none":
            await self._app(scope, receive, send)
            return
        sent: list[Message] = []

        async def keep(message: Message) -> None:
            sent.append(message)

        await self._app(scope, receive, keep)
        await ANSWERS[fault](b"".join(part.get("body", b"") for part in sent), sent, send)


async def _answer(send: Any, body: bytes, status: int = 200, *, length: int | None = None) -> None:
    size = str(len(body) if length is None else length).encode()
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", size)]})
    await send({"type": "http.response.body", "body": body, "more_body": length is not None})


async def garbage(body: bytes, _sent: list[Message], send: Any) -> None:
    await _answer(send, b"\xc1<html>not what you asked for</html>")


async def half(body: bytes, _sent: list[Message], send: Any) -> None:
    await _answer(send, body[: len(body) // 2], length=len(body))
    raise ConnectionAbortedError("cut in the body")


async def error_500(_body: bytes, _sent: list[Message], send: Any) -> None:
    await _answer(send, encode(Refusal("failed", "a bug of the trainer")), 500)


async def error_502(_body: bytes, _sent: list[Message], send: Any) -> None:
    await _answer(send, b"Bad Gateway", 502)


async def late(_body: bytes, sent: list[Message], send: Any) -> None:
    await trio.sleep(tink.limits.HOLD_SECONDS + tink.limits.GRACE_SECONDS + 0.5)
    for message in sent:
        await send(message)


async def other_op(body: bytes, _sent: list[Message], send: Any) -> None:
    reply = msgspec.msgpack.decode(body, type=OpReply)
    await _answer(send, encode(msgspec.structs.replace(reply, op_no=reply.op_no + 1)))


async def other_model(body: bytes, _sent: list[Message], send: Any) -> None:
    reply = msgspec.msgpack.decode(body, type=OpReply)
    await _answer(send, encode(msgspec.structs.replace(reply, model_id="another")))


async def other_sample(body: bytes, _sent: list[Message], send: Any) -> None:
    reply = msgspec.msgpack.decode(body, type=SampleReply)
    await _answer(send, encode(msgspec.structs.replace(reply, sample_id="another")))


async def flood(_body: bytes, _sent: list[Message], send: Any) -> None:
    await _answer(send, bytes(2 * tink.limits.MAX_ANSWER))


async def endless(body: bytes, _sent: list[Message], send: Any) -> None:
    await _answer(send, body[:1], length=len(body))
    await trio.sleep_forever()


async def cut(_body: bytes, _sent: list[Message], _send: Any) -> None:
    raise ConnectionAbortedError("no answer at all")


ANSWERS = {
    answer.__name__: answer
    for answer in (
        garbage, half, error_500, error_502, late, other_op, other_model, other_sample, flood, endless, cut
    )
}  # fmt: skip


def run_trainer(arguments: list[str]) -> int:
    home = Path(arguments[arguments.index("--home") + 1])
    faults = Faults(home)
    application, made = process.application, build.engine

    def faulty(*given: Any) -> FaultyApp:
        return FaultyApp(application(*given), home, faults)

    def building(*given: Any) -> Any:
        engine = made(*given)
        engine.forward_backward = hanging(engine.forward_backward, faults)
        return engine

    process.application, build.engine = faulty, building  # type: ignore[assignment]
    return process.main(arguments)


def hanging(operation: Callable[..., Any], faults: Faults) -> Callable[..., Any]:
    """The operation, which may never end."""

    def run(*given: Any) -> Any:
        if faults.take("forward_backward") == "hang":
            time.sleep(10_000)
        return operation(*given)

    return run


def run_worker(arguments: list[str]) -> int:
    command = embedded.command

    def faulty(*given: Any) -> list[str]:
        python, option, _module, *rest = command(*given)
        return [python, option, "tests.crash.faulty", "trainer", *rest]

    embedded.command = faulty
    return main.main(arguments)


if __name__ == "__main__":
    if sys.argv[1] == "trainer":
        sys.exit(run_trainer(sys.argv[2:]))
    sys.exit(run_worker(sys.argv[1:]))
