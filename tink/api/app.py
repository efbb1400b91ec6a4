"""The ASGI application. It knows the worker by one function, `ask`, and the messages that go through it."""

from __future__ import annotations

from pathlib import Path

from starlette.routing import Router
from starlette.types import ASGIApp

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
) -> ASGIApp:
    """`ask` answers a message of tink.domain.messages, or raises a TinkError. `secret` signs download
    URLs."""
    service = Service(ask, auth, world, Downloads(artifacts, secret, world), Texts(world))
    router = Router(
        routes=[
            *routes(service, front.TABLE, public=True),
            *routes(service, both.together(tinker.TABLE, rest.API), prefix="/api/v1"),
            *routes(service, rest.SHORT),
        ],
        default=Nowhere(service),
        # A path with a slash too many is a mistake to be told about: the SDK follows no redirect on a POST.
        redirect_slashes=False,
    )
    # Not Starlette's application: what it has around its router catches what no Endpoint lets out.
    return AccessLog(router, world)
