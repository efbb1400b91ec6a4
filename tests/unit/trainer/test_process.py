"""The server as a process, with a real model, over real HTTP."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import trio
from trainer_kit import body, logprobs, sampled, supervised
from trio.testing import MockClock, wait_all_tasks_blocked

from tink.errors import StartupError
from tink.trainer import engines, process
from tink.trainer.options import Options, add_arguments, parsed
from tink.wire.tink_train import (
    CreateModel,
    ExportAdapter,
    ForwardBackward,
    Op,
    OpReply,
    OpRequest,
    OptimStep,
    SampleReply,
    SampleRequest,
    encode,
)

ENGINES = ["hf", "megatron"] if find_spec("megatron") else ["hf"]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
ROOT = Path(process.__file__).parents[2]


@contextmanager
def started(tmp_path: Path, *arguments: str, starter: Sequence[str] = ()) -> Iterator[Child]:
    command = [sys.executable, "-m", *starter, "tink.trainer", "--home", str(tmp_path)]
    ready_file = tmp_path / "ready.json"
    with subprocess.Popen(
        [*command, "--ready-file", str(ready_file), *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            child = Child(process)
            child.wait_for("event=listening")
            child.ready = json.loads(ready_file.read_bytes())
            yield child
        finally:
            process.kill()


class Child:
    """The process; `ready` is what its ready file says."""

    ready: dict[str, Any]

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def wait_for(self, text: str) -> None:
        """Reads its log up to a line with that text."""
        assert self.process.stderr is not None
        lines = []
        for line in self.process.stderr:
            lines.append(line)
            if text in line:
                return
        raise AssertionError("".join(lines))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_over_http(tmp_path: Path, model_dir: Path, engine: str) -> None:
    arguments = ["--engine", engine, "--model", str(model_dir), "--model-name", "test/tiny"]
    with started(tmp_path, *arguments, "--artifacts", str(tmp_path / "a")) as child:
        ready = child.ready
        assert ready["pid"] == child.process.pid
        with httpx.Client(base_url=f"http://127.0.0.1:{ready['port']}", timeout=60) as http:
            health = http.get("/v1/health").json()
            assert (health["state"], health["incarnation"]) == ("loading", ready["incarnation"])
            child.wait_for("event=ready")
            assert http.get("/v1/health").json()["state"] == "ready"
            info = http.get("/v1/info").json()
            assert (info["engine"], info["base_model"], info["vocab_size"]) == (engine, "test/tiny", 320)
            assert info["base_path"] == str(model_dir)

            def op(op_no: int, op: Op) -> OpReply:
                request = OpRequest(ready["incarnation"], 1, "m", op_no, f"j{op_no}", op)
                return msgspec.msgpack.decode(
                    http.post("/v1/ops", content=encode(request)).content, type=OpReply
                )

            assert op(1, CreateModel(4, 8.0, 1)).state == "done"
            reply = op(2, ForwardBackward(body(supervised())))
            assert reply.result is not None
            assert [len(one) for one in logprobs(reply.result.body)] == [5, 40, 17]
            assert op(3, OptimStep(learning_rate=0.01)).state == "done"
            assert op(4, ExportAdapter("adapters/v1")).state == "done"
            failed = op(5, ForwardBackward(body(supervised(lengths=(200,)))))
            assert failed.failure is not None
            assert failed.failure.message.startswith("data[0]: model_input has 200 tokens")
            request = SampleRequest("s", [1, 2, 3], 1, adapter="adapters/v1", max_tokens=5, ignore_eos=True)
            answer = http.post("/v1/samples", content=encode(request)).content
            (sequence,) = sampled(msgspec.msgpack.decode(answer, type=SampleReply).body).sequences
            assert len(sequence.tokens) == 20
        child.process.send_signal(signal.SIGINT)
        child.process.send_signal(signal.SIGTERM)
        child.wait_for("told to stop")
        assert child.process.wait(20) == 0


@pytest.mark.slow
@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.skipif("megatron" not in ENGINES, reason="megatron-core is not installed")
def test_torchrun_starts_one_server_and_sigterm_ends_all_of_it(tmp_path: Path, stages: int) -> None:
    arguments = ["--engine", "megatron", "--pipeline-parallel", str(stages)]
    with started(tmp_path, *arguments, starter=TORCHRUN) as child:
        child.wait_for("event=ready")
        with httpx.Client(base_url=f"http://127.0.0.1:{child.ready['port']}", timeout=60) as http:
            info = http.get("/v1/info").json()
            assert (info["engine"], info["versions"]["pipeline_parallel"]) == ("megatron", str(stages))
            create = OpRequest(child.ready["incarnation"], 1, "m", 1, "j", CreateModel(4, 8.0, 1))
            assert http.post("/v1/ops", content=encode(create)).is_success
        child.process.send_signal(signal.SIGTERM)
        child.wait_for("told to stop")
        child.wait_for("event=stopped")
        child.wait_for("the first rank is gone")
        child.process.wait(30)


@pytest.mark.slow
@pytest.mark.skipif("megatron" not in ENGINES, reason="megatron-core is not installed")
def test_torchrun_starts_all_of_them_anew_when_one_is_killed(tmp_path: Path) -> None:
    starter = [*TORCHRUN[:-1], "--max-restarts=1", "-m"]
    with started(tmp_path, "--engine", "megatron", starter=starter) as child:
        child.wait_for("event=ready")
        os.kill(child.ready["pid"], signal.SIGKILL)
        child.wait_for("the first rank is gone")
        child.wait_for("event=ready")
        again = json.loads((tmp_path / "ready.json").read_bytes())
        assert again["incarnation"] != child.ready["incarnation"]
        child.process.send_signal(signal.SIGTERM)
        child.wait_for("event=stopped")
        child.process.wait(30)


@pytest.mark.slow
@pytest.mark.skipif("megatron" not in ENGINES, reason="megatron-core is not installed")
def test_a_model_that_cannot_be_divided_ends_all_of_them(tmp_path: Path, model_dir: Path) -> None:
    """Rather than serve nothing: torchrun's supervisor shall know."""
    with started(tmp_path, "--engine", "megatron", "--model", str(model_dir), starter=TORCHRUN) as child:
        child.wait_for("num_key_value_heads 1 cannot be divided among 2 processes")
        assert child.process.wait(30) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"engine": "hf"}, "the engine 'hf' is one process: start it without torchrun"),
        ({"engine": "megatron", "preload": True}, "--preload"),
        (
            {"engine": "megatron", "pipeline_parallel": 4},
            "--pipeline-parallel 4: 2 processes are no multiple of that",
        ),
        ({"engine": "megatron", "pipeline_parallel": 0}, "--pipeline-parallel 0 is not 1 or more"),
    ],
)
def test_what_cannot_be_several_processes_says_so(
    tmp_path: Path, options: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: name)
    with pytest.raises(StartupError, match=says):
        process.run(Options(home=tmp_path, rank=0, ranks=2, **options))


def test_an_engine_that_is_not_installed_names_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: None if name == "megatron" else name)
    with pytest.raises(StartupError, match=r"needs megatron, not installed here: .*tink\[megatron\]"):
        process.run(Options(home=tmp_path, engine="megatron"))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_preloaded_server_that_is_killed_is_followed_by_another(
    tmp_path: Path, model_dir: Path, engine: str
) -> None:
    with started(tmp_path, "--engine", engine, "--preload", "--model", str(model_dir)) as child:
        child.wait_for("event=ready")
        first = child.ready
        os.kill(first["pid"], signal.SIGKILL)
        child.wait_for("the server was killed")
        child.wait_for("event=ready")
        second = json.loads((tmp_path / "ready.json").read_bytes())
        assert second["pid"] != first["pid"]
        assert second["incarnation"] != first["incarnation"]
        health = httpx.get(f"http://127.0.0.1:{second['port']}/v1/health").json()
        assert (health["state"], health["incarnation"]) == ("ready", second["incarnation"])
        child.process.send_signal(signal.SIGTERM)
        child.wait_for("told to stop")
        assert child.process.wait(20) == 0


# torch here cannot lose a GPU by being forked: this one says that it has.
FORKED = """
import os, sys, torch
first = os.getpid()
torch.cuda._is_in_bad_fork = lambda: os.getpid() != first
from tink.trainer import process
sys.exit(process.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_server_whose_fork_cannot_use_the_gpu_begins_anew(tmp_path: Path, model_dir: Path) -> None:
    ready = tmp_path / "ready.json"
    words = ["--home", str(tmp_path), "--model", str(model_dir), "--preload", "--ready-file", str(ready)]
    with subprocess.Popen(
        [sys.executable, "-c", FORKED, *words], cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as parent:
        try:
            child = Child(parent)
            child.wait_for("torch is imported anew")
            child.wait_for("event=ready")
            server = json.loads(ready.read_bytes())["pid"]
            assert server != parent.pid
            assert "--preload" not in Path(f"/proc/{server}/cmdline").read_text().split("\0")
        finally:
            parent.terminate()


@pytest.mark.slow
def test_an_orphan_exits_by_itself(tmp_path: Path, model_dir: Path) -> None:
    with started(tmp_path, "--model", str(model_dir), "--orphan-seconds", "0.2") as child:
        child.wait_for("no worker has called")
        assert child.process.wait(30) == 0


def test_options() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    given = ["--home", "/h", "--port", "7", "--slots", "2", "--orphan-seconds", "3"]
    assert parsed(parser.parse_args(given)) == Options(
        home=Path("/h"), port=7, slots=2, orphan_seconds=3.0, token=None
    )


@pytest.mark.parametrize(("restarts", "armed"), [(None, True), ("0", True), ("1", False), ("12", False)])
def test_a_crash_point_is_for_the_first_processes_that_torchrun_starts(
    restarts: str | None, armed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them have its environment: else none would ever get beyond that point."""
    monkeypatch.setenv("TINK_CRASH_AT", "trainer.loading")
    if restarts is not None:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert parsed(parser.parse_args([])).crash_at == ("trainer.loading" if armed else "")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "example.com"])
def test_other_machines_need_a_token(tmp_path: Path, host: str) -> None:
    with pytest.raises(StartupError, match="TINK_TRAINER_TOKEN"):
        process.run(Options(home=tmp_path, host=host))


def test_a_bad_option_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert process.main(["--home", str(tmp_path), "--slots", "0"]) == 2
    assert capsys.readouterr().err == "tink trainer: --slots and --threads must be 1 or more\n"


class Called:
    """A trainer, as far as its calls go."""

    called_at = 0.0


async def test_a_trainer_that_was_itself_stopped_is_no_orphan(mock_clock: MockClock) -> None:
    """It could not hear its worker: what it missed is not held against that one."""
    trainer, stop = Called(), trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(process._await_silence, trainer, 600.0, stop)
        for called_at in range(5):
            await wait_all_tasks_blocked()
            mock_clock.jump(3600.0)
            await wait_all_tasks_blocked()
            assert not stop.is_set()
            trainer.called_at = called_at + 1.0
            mock_clock.jump(60.0)
        for _ in range(11):
            assert not stop.is_set()
            await wait_all_tasks_blocked()
            mock_clock.jump(60.0)
        await stop.wait()
