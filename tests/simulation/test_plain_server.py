"""A training server that only samples, as a plain Megatron-LM text generation server is to the worker."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from trio.testing import MockClock

from tests.simulation.cluster import TENANT, Cluster
from tests.simulation.doubles import HashEngine
from tink.backends.text_generation import ENGINE
from tink.domain import messages


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = HashEngine.facts.fget
    assert facts is not None
    plain = property(lambda self: replace(facts(self), engine=ENGINE, capabilities=["sample"]))
    monkeypatch.setattr(HashEngine, "facts", plain)


async def test_training_fails_there_in_one_line_and_nothing_is_sent(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with Cluster.running(tmp_path) as cluster:
        model = await cluster.create(await cluster.session(), 0)
        outcome = await cluster.outcome(f"{model}:0")
        assert (outcome.state, outcome.error) == (
            "failed",
            "the server at http://trainer.sim is a plain Megatron-LM text generation server, which only "
            "samples: training needs `tink trainer --engine megatron` in its place",
        )
        assert cluster.trainer.engine is not None
        assert cluster.trainer.engine._models == {}
        cluster.check_journal()


async def test_it_is_said_what_serves(autojump_clock: MockClock, tmp_path: Path) -> None:
    async with Cluster.running(tmp_path) as cluster:
        capabilities: messages.Capabilities = await cluster.ask(messages.GetCapabilities(TENANT))
        (model,) = capabilities.models
        assert (model.trainable, model.sampleable) == (False, True)
        health: messages.Health = await cluster.ask(messages.GetHealth(""))
        assert health.servers["trainer"] == f"ready: a plain {ENGINE}, which only samples"
