"""Request bodies: read with every byte counted, decompressed the same way, and never trusted to be
as long as they say."""

from __future__ import annotations

from typing import Literal, NamedTuple

import trio
import zstandard
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from tink import limits
from tink.errors import MalformedRequest, TooLarge

Codec = Literal["identity", "zstd"]


class Body(NamedTuple):
    """What was sent, in its codec; only its first limits.PEEK_BYTES bytes when it was over the limit."""

    data: bytes
    codec: Codec = "identity"
    whole: bool = True


class Upload:
    """The stream of one request's body."""

    def __init__(self, request: Request) -> None:
        self._receive = request.receive
        self._headers = request.headers
        length = self._headers.get("content-length", "0")
        self._declared = int(length) if length.isascii() and length.isdigit() else 0
        self.finished = False

    @property
    def abandoned(self) -> bool:
        """Whether there is something of it that nobody has taken."""
        return not self.finished and (self._declared > 0 or "transfer-encoding" in self._headers)

    @property
    def codec(self) -> Codec:
        encoding = self._headers.get("content-encoding", "identity").strip().lower()
        if encoding in ("", "identity"):
            return "identity"
        if encoding == "zstd":
            return "zstd"
        raise HTTPException(415, "the Content-Encoding must be zstd, or none")

    async def read(self, limit: int) -> Body:
        """The body, if it has at most `limit` bytes, else its beginning."""
        codec = self.codec
        keep = limit if self._declared <= limit else limits.PEEK_BYTES
        pieces, size = [], 0
        while not self.finished and size <= keep:
            piece = await self._next()
            pieces.append(piece)
            size += len(piece)
        data = b"".join(pieces)
        if size <= limit and self.finished:
            return Body(data, codec)
        return Body(data[: limits.PEEK_BYTES], codec, whole=False)

    async def drain(self, most: int) -> None:
        """Take what is left, within reason."""
        taken = 0
        with trio.move_on_after(limits.DRAIN_SECONDS):
            while not self.finished and taken < most:
                taken += len(await self._next())

    async def discard(self) -> None:
        """Take everything until the connection is closed: a server whose reader waits for us would
        not notice the end of the connection."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def _next(self) -> bytes:
        with trio.move_on_after(limits.STALL_SECONDS):
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            self.finished = not message.get("more_body", False)
            piece: bytes = message.get("body", b"")
            return piece
        raise HTTPException(408, f"nothing more of the body came for {limits.STALL_SECONDS:.0f} s")


def expand(body: Body, limit: int) -> bytes:
    """The decompressed bytes. What a frame declares is not believed: the first pass counts what it
    really yields and keeps nothing, so that the second has a known size."""
    if not body.whole:
        raise TooLarge(f"the body is over the limit of {limit} bytes; send less at a time")
    if body.codec == "identity":
        return body.data
    total = 0
    try:
        reader = _decompressor().stream_reader(body.data)
        while piece := reader.read(limits.UNPACK_BYTES):
            total += len(piece)
            if total > limit:
                raise TooLarge(f"the body decompresses to more than the limit of {limit} bytes; send less")
        frame = _decompressor().decompressobj()
        data = frame.decompress(body.data)
    except zstandard.ZstdError as error:
        raise MalformedRequest(f"the body is not a zstd frame: {error}") from None
    if not frame.eof or frame.unused_data:
        raise MalformedRequest("the body is not one whole zstd frame")
    return data


def beginning(body: Body) -> bytes:
    """As much of the first limits.PEEK_BYTES decompressed bytes as can be had."""
    if body.codec == "identity":
        return body.data[: limits.PEEK_BYTES]
    data = b""
    try:
        reader = _decompressor().stream_reader(body.data)
        while len(data) < limits.PEEK_BYTES and (piece := reader.read(4096)):
            data += piece
    except zstandard.ZstdError:
        pass
    return data[: limits.PEEK_BYTES]


def _decompressor() -> zstandard.ZstdDecompressor:
    return zstandard.ZstdDecompressor(max_window_size=limits.MAX_ZSTD_WINDOW)
