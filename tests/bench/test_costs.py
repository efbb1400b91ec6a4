"""What a worker does most has not become dearer; and if it had, that would be told."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.bench import costs
from tests.bench.__main__ import main


@pytest.mark.slow
def test_nothing_has_become_dearer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["costs", "--check"]) == 0
    told = {line.split(" ")[0] for line in capsys.readouterr().out.splitlines()}
    assert told == set(json.loads(costs.RECORDED.read_text())) != set()


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Of a worker that is not there, whose one operation takes two units."""
    path = tmp_path / "costs.json"
    monkeypatch.setattr(costs, "RECORDED", path)
    monkeypatch.setattr(costs, "unit", lambda: 0.001)
    monkeypatch.setattr(costs, "worker", lambda folder, vllm: nullcontext())
    monkeypatch.setattr(costs, "costs", lambda tink: {"append": lambda: 0.002})
    return path


def test_what_is_dearer_than_recorded_is_told(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded.write_text('{"append": 0.9}')
    with pytest.raises(SystemExit, match="dearer than it was: append 2 units"):
        main(["costs", "--check"])
    recorded.write_text('{"append": 1.1}')
    assert main(["costs", "--check"]) == 0
    assert "append 2 units (1.1, 1.82)" in capsys.readouterr().out


def test_what_it_costs_now_can_be_recorded(recorded: Path) -> None:
    recorded.write_text('{"append": 0.9}')
    assert main(["costs", "--record"]) == 0
    assert json.loads(recorded.read_text()) == {"append": 2.0}
