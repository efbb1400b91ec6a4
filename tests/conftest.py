"""Fixtures for all tests."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from tests import postgres as postgres_kit
from tests.live import LiveServer
from tests.postgres import PostgresServer
from tests.vllm.fixtures import tiny_model, vllm_python, vllm_replica

__all__ = ["tiny_model", "vllm_python", "vllm_replica"]

# The SDK's loaders must not look for a hub, and the user's Hugging Face cache is not ours to fill.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="tink-hf-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], True)

# What is printed has the width of no terminal, which processes of pytest's have set.
os.environ.pop("COLUMNS", None)

# Whoever runs the tests from a script's background job has Ctrl-C ignored, and what the tests start would
# inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests with the SDK in this process last: it leaves threads and, when its server dies under it,
    sockets behind, which would be taken for those of whatever test comes next."""
    ignore = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

    def has_the_sdk(item: pytest.Item) -> bool:
        return not {"acceptance", "crash"}.isdisjoint(item.path.parts)

    items.sort(key=has_the_sdk)
    for item in filter(has_the_sdk, items):
        item.add_marker(ignore)


@pytest.hookimpl(tryfirst=True)
def pytest_unconfigure() -> None:
    """No test runs any more: what the SDK forgot in the acceptance tests is collected now, and blamed on
    nobody. In every test an unclosed socket is still an error."""
    warnings.filterwarnings("ignore", "unclosed", ResourceWarning)
    # And what was collected since the last test is told of after this.
    warnings.filterwarnings("ignore", category=pytest.PytestUnraisableExceptionWarning)


@pytest.fixture(autouse=True)
def _process_restored() -> Iterator[None]:
    """A command configures the logs and signals of its process; here the next test is in it too, and
    what that one starts would ignore Ctrl-C as well."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    structlog.reset_defaults()
    signal.signal(signal.SIGINT, handler)


@pytest.fixture(scope="session")
def live_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """One `tink serve` that many tests share: none of them may kill it."""
    server = LiveServer(tmp_path_factory.mktemp("live") / "home")
    server.start()
    yield server
    server.close()


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[LiveServer]:
    """A `tink serve` for one test, to be killed and started at will. Not yet started."""
    server = LiveServer(tmp_path / "home")
    yield server
    server.close()


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL that many tests share: none of them may stop it."""
    with postgres_kit.running() as server:
        yield server


@pytest.fixture
def postgres_url(postgres: PostgresServer) -> Iterator[str]:
    """A new and empty database, which goes after the test."""
    url = postgres.create_database()
    yield url
    postgres.drop_database(url)
