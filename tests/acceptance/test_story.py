"""The story of docs/audit-and-replay.md: a run that one bad batch spoils is understood, and trained on
without it. The commands are those of the page."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.live import LiveServer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
STORY = re.compile(r"## A story\n.*?```sh\n(.*?)```", re.DOTALL)


def test_the_story_goes_as_it_is_told(own_server: LiveServer) -> None:
    own_server.start()
    told = STORY.search((ROOT / "docs/audit-and-replay.md").read_text())
    assert told is not None
    run = subprocess.run(
        ["bash", "-euc", told[1]],
        cwd=ROOT,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "TINK_HOME": str(own_server.home),
            "TINKER_BASE_URL": own_server.url,
            "TINKER_API_KEY": "tml-local",
            "COLUMNS": "200",
        },
        capture_output=True,
        text=True,
        timeout=240,
    )
    shown = run.stdout
    assert run.returncode == 0, f"{shown}\n{run.stderr}"
    spoiled, mended = (float(loss) for loss in re.findall(r"spike: loss ([0-9.]+) after", shown))
    assert spoiled > 0.1
    assert mended < 0.01
    jumps = shown[shown.index("loss_per_token") :].splitlines()
    assert {line.split()[0] for line in jumps[1:3]} == {"8", "9"}
    [job] = re.findall(r"what if +without (\S+)", shown)
    assert re.search(rf"{job} +\d+ +3\d\d\.\d+", shown), "the batch with the highest loss"
    assert re.search(r"results +\d+ compared: the same, bit for bit", shown)
    model = job.rpartition(":")[0]
    assert f"tinker://{model}/weights/mended" in shown
    assert re.search(rf"mended +12 +.*without {job}", shown)
