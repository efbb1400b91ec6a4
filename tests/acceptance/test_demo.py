"""tools/rl_demo.py, README's first command without its virtual environment: a real server, the real SDK.
With --megatron on a training server of two processes, one of which is killed half way."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.processes import processes_of

ROOT = Path(__file__).resolve().parents[2]
STEPS = 8
LAST_LINE = r"demo: reward (0\.\d{3}) -> (0\.\d{3}) in (\d+) steps, (\d+) jobs journaled, 0 client errors"

pytestmark = pytest.mark.slow
needs_megatron = pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a base model that has read less than the demo's own: enough to learn from. Made in another
    process: it parses the standard library, and CPython's ast is confused by finalizers that format
    tracebacks meanwhile, which the SDK's forgotten sockets do in this one."""
    home = tmp_path_factory.mktemp("demo") / "home"
    base = home / "base-model"
    command = [sys.executable, "-m", "tink.trainer.tiny", base, "--pretrain-steps", "60"]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, timeout=280)
    return home


def start(home: Path, *options: str, steps: int = STEPS) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tools.rl_demo", "--home", home, "--steps", str(steps), *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    "options", [[], pytest.param(["--megatron"], marks=needs_megatron)], ids=["hf", "megatron"]
)
def test_demo_raises_the_reward_and_journals_every_job(home: Path, options: list[str]) -> None:
    out, err = start(home, *options).communicate(timeout=280)
    if options:
        assert "kill -9" in out
        assert (home / "trainer.log").read_text().count("event=ready") == 2, "torchrun started both again"
    match = re.fullmatch(LAST_LINE, out.splitlines()[-1])
    assert match, f"{out}\n{err}"
    first, last, steps, jobs = float(match[1]), float(match[2]), int(match[3]), int(match[4])
    assert last > first
    assert steps == STEPS
    # Per step: sampler weights, eight groups of samples, a backward pass, an optimizer step. And before
    # them the model, and after them one more round of samples.
    assert jobs == 1 + STEPS * 11 + 9
    assert (home / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert err == ""
    assert "\x1b" not in out, "control sequences go to terminals only"
    assert not processes_of(home)


@pytest.mark.parametrize(
    "options", [[], pytest.param(["--megatron"], marks=needs_megatron)], ids=["hf", "megatron"]
)
def test_ctrl_c_leaves_nothing_behind(home: Path, options: list[str]) -> None:
    with start(home, *options, steps=1000) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if line.startswith("  1/"):
                break
        demo.send_signal(signal.SIGINT)
        try:
            _, err = demo.communicate(timeout=100)
        finally:
            demo.kill()
    assert demo.returncode == 130, err
    assert err == "demo: interrupted, and everything stopped\n"
    deadline = time.monotonic() + 5
    while processes_of(home) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes_of(home)
