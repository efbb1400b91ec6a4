"""Each bench runs to its end, and gives the figures that the documentation tells of."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bench import __main__ as bench
from tests.bench import samples
from tests.bench.__main__ import main

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SHORT = {
    "overhead": ["--each", "3", "--rounds", "1", "--operations", "100"],
    "accept": ["--jobs", "400", "--large", "8", "--rounds", "1", "--seconds", "1"],
    "polls": ["--polls", "20", "--requests", "20"],
    "samples": ["--samples", "64", "--rounds", "1", "--sdk", "8"],
    "journal": ["--events", "600", "--runs", "1", "--postgres"],
    "lane": ["--jobs", "8", "--op-ms", "5", "--steps", "6", "--step-ms", "5", "--rounds", "1"],
    "trainer": ["--steps", "8", "--rounds", "1"],
    "calls": ["--in-flight", "50", "--calls", "100", "--rounds", "1"],
    "redo": ["--steps", "3", "--crashes", "1"],
    "survive": ["--steps", "4", "--kills", "1"],
}
# Of each the figures that matter most.
NAMES = {
    "overhead": {"fresh_optim_step_p50", "old_pair_p95", "aged_optim_step_p50", "old_cpu"},
    "accept": {"small_1_rate", "small_32_p99", "small_256_cpu", "large_8_rate", "small_beside_large_p99"},
    "polls": {"memory", "optim_step_p99", "heartbeat_p50"},
    "samples": {"samples_1_rate", "samples_8_cpu", "sdk_8"},
    "journal": {"journal_16_rate", "journal_256_cpu", "journal_postgres_256_rate"},
    "lane": {"idle_10kB_1_model", "idle_one_step_ahead_p50", "fairness_8_models"},
    "trainer": {"trainer_1_adapter", "trainer_8_adapters", "trainer_memory"},
    "calls": {"call_cpu"},
    "redo": {"redo_speed", "redo_wait"},
    "survive": {"kills", "client_errors", "different_losses", "longest_wait"},
}


@pytest.fixture(autouse=True)
def _what_the_sdk_leaves_open_is_told_here() -> Iterator[None]:
    """Where it is ignored, and not in whichever test its garbage is collected."""
    yield
    gc.collect()


@pytest.mark.parametrize("name", SHORT)
def test_a_bench_gives_its_figures(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "IN_FLIGHT", (1, 8))
    written = tmp_path / "figures.json"
    assert main([name, *SHORT[name], "--json", str(written)]) == 0
    said = json.loads(written.read_text())
    assert said["machine"]["cores"] >= 1
    figures = {figure["name"]: figure for figure in said["figures"]}
    assert NAMES[name] <= set(figures)
    assert all(math.isfinite(figure["value"]) and figure["bench"] == name for figure in figures.values())
    if name == "survive":
        assert [figures[what]["value"] for what in ("kills", "client_errors", "different_losses")] == [
            1,
            0,
            0,
        ]


def test_all_of_them_give_what_they_have_if_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "figures.json"
    monkeypatch.setattr(bench, "BENCHES", {"nonesuch": samples, "calls": samples})
    monkeypatch.setattr(bench, "OPTIONS", {"calls": SHORT["calls"]})
    assert main(["all", "--json", str(written)]) == 1
    assert {figure["name"] for figure in json.loads(written.read_text())["figures"]} == NAMES["calls"]
    out, err = capfd.readouterr()
    assert out.startswith("call_cpu ")
    assert err.endswith("tools/bench: failed: nonesuch\n")
