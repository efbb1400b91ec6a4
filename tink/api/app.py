"""The ASGI application. It knows the worker by one function, `ask`, and the messages that go through it."""

from __future__ import annotations

from pathlib import Path

from starlette.applications import Starlette
from starlette.middleware import Middleware

from tink.api import both, front, rest, tinker
from tink.api.access_log import AccessLog
from tink.api.auth import Auth
from tink.api.call import Ask, Nowhere, Service, routes
from tink.api.downloads import Downloads
from tink.api.texts import Texts
from tink.world import World


def create_app(
    ask: Ask,
    *,
    auth: Auth,
    artifacts: Path,
    secret: bytes,
    world: World,
) -> Starlette:
    """`ask` answers a message of tink.domain.messages, or raises a TinkError. `secret` signs download
    URLs."""
    service = Service(ask, auth, world, Downloads(artifacts, secret, world), Texts(world))
    app = Starlette(
        routes=[
            *routes(service, front.TABLE, public=True),
            *routes(service, both.together(tinker.TABLE, rest.API), prefix="/api/v1"),
            *routes(service, rest.SHORT),
        ],
        middleware=[Middleware(AccessLog, world=world)],
    )
    app.router.default = Nowhere(service)
    # A path with a slash too many is a mistake to be told about: the SDK follows no redirect on a POST.
    app.router.redirect_slashes = False
    return app
