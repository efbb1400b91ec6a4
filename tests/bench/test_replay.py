"""The bench of the fold runs, and says what it promises to."""

from __future__ import annotations

import re
from argparse import ArgumentParser
from pathlib import Path

from tests.bench import replay


def test_the_bench_gives_each_figure(tmp_path: Path) -> None:
    parser = ArgumentParser()
    replay.add_arguments(parser)
    options = ["--events", "2000", "--runs", "1", "--home", str(tmp_path / "home")]
    found = {figure.name: figure for figure in replay.run(parser.parse_args(options))}
    assert list(found) == [
        "events",
        "replay_events",
        "replay_seconds",
        "replay_cpu",
        "replay_rss",
        "replay_model_seconds",
        "replay_bytes_per_job",
    ]
    assert 2_000 <= found["events"].value < 3_000
    assert all(figure.value > 0 for figure in found.values())
    assert all(re.match(rf"{name} [\d.,]+ \S+", str(figure)) for name, figure in found.items())
