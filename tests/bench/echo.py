"""A server for the bench: it answers every completion alike, after a while, with hardly any work.

python -m tests.bench.echo PORT SECONDS
"""

from __future__ import annotations

import json
import re
import sys
from functools import partial

import trio

MODEL, TOKENS = "base", 16
LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)


def answer() -> bytes:
    """As vLLM's: TOKENS tokens of MODEL."""
    logprobs = {
        "text_offset": [0] * TOKENS,
        "token_logprobs": [-1.5] * TOKENS,
        "tokens": ["token_id:7"] * TOKENS,
        "top_logprobs": [{"token_id:7": -1.5}] * TOKENS,
    }
    choice = {"index": 0, "text": "x" * TOKENS, "logprobs": logprobs, "token_ids": [7] * TOKENS}
    choice |= {"finish_reason": "length", "stop_reason": None, "prompt_logprobs": None}
    body = json.dumps({"id": "cmpl-0", "object": "text_completion", "model": MODEL, "choices": [choice]})
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return (head + body).encode()


async def serve(seconds: float, content: bytes, stream: trio.SocketStream) -> None:
    received = b""
    async for part in stream:
        received += part
        head, found, rest = received.partition(b"\r\n\r\n")
        length = LENGTH.search(head)
        if found and len(rest) >= int(length[1] if length else 0):
            received = b""
            await trio.sleep(seconds)
            await stream.send_all(content)


async def main(port: int, seconds: float) -> None:
    await trio.serve_tcp(partial(serve, seconds, answer()), port, host="127.0.0.1", backlog=2048)


if __name__ == "__main__":
    trio.run(main, int(sys.argv[1]), float(sys.argv[2]))
