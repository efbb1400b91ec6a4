"""Files of published checkpoints, by URLs that need no key: each is signed, for one file, for an hour."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import quote, urlencode

from tink import limits
from tink.domain import messages
from tink.errors import NotFound, Unauthorized
from tink.world import World

PATH = "/api/v1/downloads"


class Urls(NamedTuple):
    by_name: dict[str, str]
    expires: float


class Downloads:
    """Signs URLs, and serves what was signed. A URL holds a path in the artifact folder; the server
    that made it is the only one that can, so the path is one of ours, and is checked all the same."""

    def __init__(self, artifacts: Path, secret: bytes, world: World) -> None:
        self._artifacts = artifacts
        self._secret = secret
        self._world = world

    def urls(self, base: str, checkpoint: messages.CheckpointView) -> Urls:
        expires = int(self._world.now()) + limits.LINK_SECONDS
        return Urls(
            {
                name: self._url(base.rstrip("/"), f"{checkpoint.row.directory}/{name}", expires)
                for name in checkpoint.files
            },
            expires,
        )

    def _url(self, base: str, path: str, expires: int) -> str:
        query = urlencode({"expires": expires, "signature": self._sign(path, str(expires))})
        return f"{base}{PATH}/{quote(path)}?{query}"

    def _sign(self, path: str, expires: str) -> str:
        return hmac.new(self._secret, f"{expires}\n{path}".encode(), hashlib.sha256).hexdigest()

    async def file(self, path: str, expires: str, signature: str) -> Path:
        """The file of a URL. Raises Unauthorized for what we did not sign or signed too long ago."""
        expected = self._sign(path, expires)
        if not hmac.compare_digest(expected.encode(), signature.encode()):
            raise Unauthorized("this download URL is not one that this server made")
        if int(expires) < self._world.now():
            raise Unauthorized("this download URL has expired: ask for the checkpoint's URLs again")
        return await self._world.run_sync(_find, self._artifacts, path)


def _find(root: Path, path: str) -> Path:
    """`path` below `root`: an ordinary file, reached through nothing that leads elsewhere."""
    gone = NotFound("the file is gone: its checkpoint was deleted or has expired")
    if ".." in PurePosixPath(path).parts:
        raise gone
    try:
        found = (root / path).resolve(strict=True)
    except (OSError, RuntimeError, ValueError):
        # Not there, a circle of links, a NUL.
        raise gone from None
    if not (found.is_relative_to(root.resolve()) and found.is_file()):
        raise gone
    return found
