"""The routes that need no key."""

from __future__ import annotations

from typing import Any

from starlette.responses import FileResponse, Response

import tink
from tink.api.call import Call, Table
from tink.api.downloads import PATH
from tink.api.rest import JOBS, openapi
from tink.domain import messages

# Prometheus's text format.
METRICS = "text/plain; version=0.0.4"


async def index(call: Call) -> dict[str, Any]:
    """For the person who opened the URL in a browser."""
    return {
        "name": "Tink",
        "version": tink.__version__,
        "what": tink.__doc__,
        "use": "TINKER_BASE_URL=<this URL> with the tinker SDK, or plain HTTP: POST /api/v1/NAME",
        "routes": {
            "health": "/healthz",
            "metrics": "/metrics",
            "description": "/openapi.json",
            "api": "/api/v1",
        },
        "operations": [path.removeprefix("/") for path in JOBS],
    }


async def health(call: Call) -> dict[str, Any]:
    """Healthy is a worker that answers, not a server that listens."""
    found: messages.Health = await call.ask(messages.GetHealth(tenant=call.tenant))
    return {"status": "ok", "version": tink.__version__, "mode": found.mode, "servers": found.servers}


async def description(call: Call) -> dict[str, Any]:
    return openapi.document()


async def metrics(call: Call) -> Response:
    exposition: bytes = await call.ask(messages.GetMetrics(tenant=call.tenant))
    return Response(exposition, media_type=METRICS)


async def download(call: Call) -> Response:
    query = call.request.query_params
    path = await call.service.downloads.file(
        call.path("path"), query.get("expires", ""), query.get("signature", "")
    )
    return FileResponse(path, filename=path.name)


TABLE: Table = {
    "/": {"GET": index},
    "/openapi.json": {"GET": description},
    "/healthz": {"GET": health},
    "/api/v1/healthz": {"GET": health},
    "/metrics": {"GET": metrics},
    f"{PATH}/{{path:path}}": {"GET": download},
}
