"""The suite passes on our own server, and fails on every server that is wrong in one way."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest

from tests.conformance import doubles
from tests.conformance.__main__ import outcome
from tests.conformance.checks import CHECKS
from tink.trainer.books import Books

ROOT = Path(__file__).parents[2]
PARTS = {"books": Books}


def named(words: str):
    """The check whose name has these words."""
    (found,) = [check for check in CHECKS if words in check.__name__.replace("_", " ")]
    return found


async def test_a_right_server_passes_every_check() -> None:
    async with doubles.conformance(token="secret") as server:
        found = [await outcome(server, check) for check in CHECKS]
    assert [str(one) for one in found if one.state == "FAIL" or one.warnings] == []
    # The double may be too quick to be seen running, on some machine; nothing else is left out.
    assert {one.detail for one in found if one.state == "not run"} <= {
        "the ops ended too fast to be seen running",
        "the ops ended too fast for a connection to be lost meanwhile",
        "the op ended too fast to be seen running",
        "the op was running or done already when the cancel came",
    }


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (doubles.ForgetsReplays, "a known op returns its stored result"),
        (doubles.ComputesAgain, "a known op returns its stored result"),
        (doubles.FencesNobody, "an older lease is fenced"),
        (doubles.TakesAnyIncarnation, "another incarnation is refused"),
        (doubles.TakesAnyJob, "a number known under another job"),
        (doubles.RunsWhatWasCancelled, "a queued op that is cancelled"),
        (doubles.ForwardAddsGradient, "forward touches no gradient"),
        (doubles.FailsHalfWay, "a failed op is answered 200"),
        (doubles.KeepsTheGradient, "a step uses the gradient up"),
        (doubles.IgnoresTheSeed, "a redo with the same seed"),
        (doubles.SharesOneModel, "two models side by side"),
        (doubles.LoadsNoMoments, "a loaded state goes on"),
        (doubles.SnapshotsNoGradient, "a model goes on from its snapshot"),
        (doubles.SnapshotsChange, "a snapshot changes nothing"),
        (doubles.WritesOver, "a published directory is never written again"),
        (doubles.ExportsElsewhere, "export adapter publishes peft files"),
        (doubles.SamplesOneThing, "samples of one request are distinct"),
        (doubles.SamplesAnew, "the same sample request"),
        (doubles.SamplesTheBase, "a sample is drawn from its adapter"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
async def test_a_wrong_server_fails(wrong: type, words: str) -> None:
    part = next((name for name, kind in PARTS.items() if issubclass(wrong, kind)), "engine")
    async with doubles.conformance(**{part: wrong}) as server:
        found = await outcome(server, named(words))
    assert found.state == "FAIL"
    assert "expected" in found.detail or "bitwise: no" in found.detail


async def test_a_small_difference_is_a_warning_unless_none_is_tolerated() -> None:
    class Rounds(doubles.Engine):
        calls = 0

        def run(self, state, body):
            result, gradient = super().run(state, body)
            Rounds.calls += 1
            return doubles.msgspec.structs.replace(result, loss=result.loss + 1e-9 * Rounds.calls), gradient

    for tolerance, state, warnings in ((1e-3, "ok", 1), (0.0, "FAIL", 0)):
        async with doubles.conformance(Rounds) as server:
            server.tolerance = tolerance
            found = await outcome(server, named("a redo with the same seed"))
        assert (found.state, len(found.warnings)) == (state, warnings)
        assert "bitwise: no, max difference" in str(found)


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "starter", "stages"),
    [("hf", [], 1), ("megatron", [], 1), ("megatron", TORCHRUN, 1), ("megatron", TORCHRUN, 2)],
    ids=["hf", "megatron", "megatron-in-slices", "megatron-in-stages"],
)
def test_the_training_server_passes_every_check(
    tmp_path: Path, engine: str, starter: list[str], stages: int
) -> None:
    """As anyone would run it: on a real server, killed and started again by a command."""
    if engine == "megatron" and find_spec("megatron") is None:
        pytest.skip("megatron-core is not installed")
    pid, ready, log = tmp_path / "pid", tmp_path / "ready.json", tmp_path / "log"
    start = [sys.executable, "-m", *starter, "tink.trainer", "--engine", engine]
    start += ["--pipeline-parallel", str(stages)]
    start += ["--home", str(tmp_path / "home"), "--artifacts", str(tmp_path / "artifacts")]
    start += ["--ready-file", str(ready), "--port"]

    def command(port: int) -> str:
        line = shlex.join([*start, str(port)])
        return f"{line} >>{log} 2>&1 </dev/null & echo $! >{pid}"

    # The server itself; whatever started it ends by itself then, and with it all other processes.
    server = rf"$(sed 's/.*\"pid\":\([0-9]*\).*/\1/' {ready})"
    kill = f"kill -9 {server}; while kill -0 $(cat {pid}); do sleep 0.1; done"
    environment = {**os.environ, "TINK_TRAINER_TOKEN": "secret", "OMP_NUM_THREADS": "1"}
    try:
        subprocess.run(command(0), shell=True, cwd=ROOT, env=environment, check=True)
        deadline = time.monotonic() + 60
        while not ready.exists():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        port = json.loads(ready.read_text())["port"]
        url = f"http://127.0.0.1:{port}"
        assert httpx.get(f"{url}/v1/health", trust_env=False).is_success
        done = subprocess.run(
            [
                *(sys.executable, "-m", "tests.conformance", url, "--json", "--strict"),
                *("--restart", f"{kill}; {command(port)}"),
            ],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            timeout=400,
            check=False,
        )
        report = json.loads(done.stdout)
        assert [one for one in report["checks"] if one["state"] == "FAIL" or one["warnings"]] == []
        assert (done.returncode, report["failed"], len(report["checks"])) == (0, 0, len(CHECKS))
        assert not [one for one in report["checks"] if "--" in one["detail"]]
    finally:
        subprocess.run(kill, shell=True, check=False)
