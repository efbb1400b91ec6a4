from __future__ import annotations

import httpx
import pytest
import structlog
from api_double import StillWorld, Worker

from tink.api.app import create_app
from tink.api.auth import Auth

SECRET = b"a secret of the test"


@pytest.fixture
def worker():
    return Worker()


@pytest.fixture
def world():
    return StillWorld()


@pytest.fixture
def auth():
    return Auth()


@pytest.fixture
def app(worker, world, auth, tmp_path):
    return create_app(worker.ask, auth=auth, artifacts=tmp_path, secret=SECRET, world=world)


@pytest.fixture
async def client(app):
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://tink") as client:
        yield client


@pytest.fixture
def log_output():
    """What was logged, as `entries`."""
    captured = structlog.testing.LogCapture()
    before = structlog.get_config()
    structlog.configure(processors=[captured], cache_logger_on_first_use=False)
    yield captured
    structlog.configure(**before)
