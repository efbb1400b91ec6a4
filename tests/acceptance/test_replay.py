"""`tink replay train`: what was trained through the real SDK is trained again, the same to the bit; where
it is not, the first job that differs is named; and the weights of any step can be had."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import time
import warnings
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import tinker
from tinker import types

from tests.live import START_SECONDS, LiveServer, LiveTrainer
from tests.processes import processes_of
from tink.wire import tinker_pb2 as pb

pytestmark = pytest.mark.slow

STEPS, EXPORTED_AT, LOADED_AT, RANK = 6, 4, 3, 4
FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass
class Recorded:
    """A home that a worker has written, and the model that it trained. `running`: a replay while it ran."""

    home: Path
    model: str
    running: subprocess.CompletedProcess[str] | None = None

    def query(self, sql: str, *values: Any, database: str = "journal") -> list[Any]:
        with closing(sqlite3.connect(self.home / f"{database}.sqlite")) as connection, connection:
            return connection.execute(sql, values).fetchall()

    def job(self, op: str, number: int) -> str:
        """The number-th job of the kind, from 0 on, that was done."""
        jobs = "SELECT job_id FROM jobs WHERE op = ? AND state = 'done' ORDER BY op_no"
        return str(self.query(jobs, op)[number][0])

    def result(self, job: str) -> bytes:
        [(digest,)] = self.query("SELECT result_sha256 FROM jobs WHERE job_id = ?", job)
        found = self.query("SELECT content FROM short_bodies WHERE sha256 = ?", digest)
        [(content,)] = found or self.query(
            "SELECT content FROM bodies WHERE sha256 = ?", digest, database="bodies"
        )
        return bytes(content)

    def prune(self, digest: str) -> None:
        self.query("DELETE FROM short_bodies WHERE sha256 = ?", digest)
        self.query("DELETE FROM bodies WHERE sha256 = ?", digest, database="bodies")

    def put_result(self, job: str, content: bytes) -> None:
        """As if the job had given it."""
        digest = sha256(content).hexdigest()
        stored = "INSERT INTO bodies (sha256, size, stored_at, content) VALUES (?, ?, 0, ?)"
        self.query(stored, digest, len(content), content, database="bodies")
        self.query("UPDATE jobs SET result_sha256 = ? WHERE job_id = ?", digest, job)


def train(url: str) -> str:
    """Six optimizer steps, each of two accumulated gradients; with a forward, a refused job, a state that
    is saved and loaded, and an export between them."""
    service = tinker.ServiceClient(base_url=url, api_key="tml-local")
    client = service.create_lora_training_client(base_model="tink/qwen3-tiny", rank=RANK, seed=3).result()
    path = ""
    for step in range(1, STEPS + 1):
        first, second = (
            client.forward_backward(batch(2 * step + part), "cross_entropy") for part in (0, 1)
        )
        client.optim_step(types.AdamParams(learning_rate=5e-3)).result()
        first.result(), second.result()
        if step == 2:
            client.forward(batch(100), "cross_entropy").result()
            path = client.save_state("two").result().path
            with pytest.raises(tinker.RequestFailedError, match="vocabulary"):
                client.forward_backward(batch(0, first=10**6), "cross_entropy").result()
        if step == LOADED_AT:
            client.load_state_with_optimizer(path).result()
        if step == EXPORTED_AT:
            client.save_weights_for_sampler("four").result()
    return str(client.get_info().model_id)


def batch(seed: int, first: int = 1) -> list[types.Datum]:
    tokens = [first, *((7 * seed + 13 * place) % 400 + 5 for place in range(24))]
    inputs: dict[str, Any] = {"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)}
    return [types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)] * 2


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """Of a worker that has stopped; and what a replay said while it still ran."""
    folder = tmp_path_factory.mktemp("recorded")
    server = LiveServer(folder / "home", TINK_SNAPSHOT_SECONDS="0.05")
    try:
        server.start()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*load_state", FutureWarning)  # from_state is for new models
            model = train(server.url)
        made = Recorded(server.home, model)
        made.running = replay(made, "--compare", "--format", "json")
    finally:
        server.close()
    return made


@pytest.fixture
def copied(recorded: Recorded, tmp_path: Path) -> Recorded:
    """To be tampered with."""
    shutil.copytree(recorded.home, tmp_path / "home")
    return Recorded(tmp_path / "home", recorded.model)


def replay(what: Recorded, *options: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    env = {**environment(what), **more}
    return subprocess.run(command(what, *options), capture_output=True, text=True, timeout=240, env=env)


def command(what: Recorded, *options: str | Path) -> list[str]:
    words = ["replay", "train", what.model, "--home", str(what.home), *map(str, options)]
    return [sys.executable, "-m", "tink.cli.main", *words]


def environment(what: Recorded) -> dict[str, str]:
    """Its temporary files are in a folder of their own."""
    (what.home.parent / "tmp").mkdir(exist_ok=True)
    return {**os.environ, "TMPDIR": str(what.home.parent / "tmp")}


def left_behind(what: Recorded) -> list[str]:
    """Processes and files; torch has a cache of its own there."""
    folder = what.home.parent / "tmp"
    return [*processes_of(folder), *map(str, folder.glob("*tink*"))]


def report(run: subprocess.CompletedProcess[str], status: int = 0) -> dict[str, Any]:
    assert run.returncode == status, f"{run.stdout}\n{run.stderr}"
    return dict(json.loads(run.stdout))


def contents(home: Path) -> dict[str, str]:
    """Every file; SQLite's shared memory, which readers use too, left out."""
    files = (path for path in home.rglob("*") if path.is_file() and not path.name.endswith("-shm"))
    return {str(path): sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_replay_beside_the_running_worker_is_the_same_to_the_bit(recorded: Recorded) -> None:
    assert recorded.running is not None
    said = report(recorded.running)
    assert (said["step"], said["steps"], said["snapshot"], said["different"]) == (STEPS, STEPS, None, 0)
    # Two gradients and a step, six times, and the forward: with the losses that the clients were given.
    assert said["compared"] == len(said["jobs"]) == 3 * STEPS + 1
    assert all(job["same"] for job in said["jobs"])
    losses = "SELECT job_id, loss_sum FROM jobs WHERE loss_sum IS NOT NULL ORDER BY op_no"
    now = [(job["job_id"], job["now"]) for job in said["jobs"] if job["op"] != "optim_step"]
    assert now == recorded.query(losses)
    assert left_behind(recorded) == []


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_adapter_of_a_step_is_what_the_run_exported_there(recorded: Recorded, tmp_path: Path) -> None:
    before = contents(recorded.home)
    out = tmp_path / "adapter"
    run = replay(recorded, "--to", str(EXPORTED_AT), "--output", out)
    assert (run.returncode, run.stderr) == (0, ""), run.stdout
    assert "bit for bit" in run.stdout
    assert f"the same as {recorded.model}@1" in run.stdout
    [(directory,)] = recorded.query("SELECT directory FROM adapters")
    exported = recorded.home / "artifacts" / directory
    assert sorted(os.listdir(out)) == sorted(FILES)
    assert all((out / name).read_bytes() == (exported / name).read_bytes() for name in FILES)
    assert contents(recorded.home) == before
    assert left_behind(recorded) == []

    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(recorded.home / "models/tink--qwen3-tiny")
    assert peft.PeftModel.from_pretrained(base, str(out)).peft_config["default"].r == RANK


def test_a_result_that_was_tampered_with_is_the_first_divergence(copied: Recorded) -> None:
    job = copied.job("forward_backward", 5)
    output = pb.ForwardBackwardOutput.FromString(copied.result(job))
    field = output.loss_fn_outputs[0].fields["logprobs"]
    [first] = struct.unpack_from("<f", field.data)
    field.data = struct.pack("<f", first + 0.5) + field.data[4:]
    copied.put_result(job, output.SerializeToString(deterministic=True))
    run = replay(copied, "--format", "json")
    said = report(run, 1)
    assert (said["compared"], said["different"]) == (3 * STEPS + 1, 1)
    first_one = said["first"]
    assert (first_one["job_id"], first_one["step"], first_one["loss"]) == (job, 3, 0.0)
    assert first_one["logprobs"] == pytest.approx(0.5, rel=1e-5)


def test_a_learning_rate_that_was_tampered_with_shows_in_the_next_loss(copied: Recorded) -> None:
    tampered = (
        "UPDATE events SET data = replace(data, '0.005', '0.05') WHERE kind = 'job_accepted' AND job_id = ?"
    )
    copied.query(tampered, copied.job("optim_step", 0))
    run = replay(copied)
    assert run.returncode == 1, run.stdout
    # The step itself has the gradient's norm only.
    wrong = copied.job("forward_backward", 2)
    assert f"{wrong}, forward_backward of step 2" in run.stdout
    assert "first" in run.stdout


def test_what_if_says_both_losses_and_compares_nothing(recorded: Recorded) -> None:
    dropped = recorded.job("forward_backward", 3)
    run = replay(
        recorded, "--set", "1:learning_rate=0.05", "--drop", dropped, "--to", "3", "--format", "json"
    )
    said = report(run)
    assert (said["what_if"], said["different"], said["first"]) == (True, None, None)
    jobs = {job["job_id"]: job for job in said["jobs"]}
    assert dropped not in jobs
    assert jobs[recorded.job("forward_backward", 0)]["same"]
    changed = jobs[recorded.job("forward_backward", 2)]
    assert changed["recorded"] != changed["now"]


def test_where_bodies_were_pruned_it_begins_with_a_snapshot(copied: Recorded) -> None:
    [(first, digest)] = copied.query("SELECT job_id, body_sha256 FROM jobs WHERE op_no = 2")
    copied.prune(digest)
    refused = replay(copied, "--from-start")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert f"{first}: its request was pruned; leave --from-start out" in refused.stderr
    run = replay(copied, "--format", "json")
    said = report(run)
    assert "begins with the snapshot behind operation" in run.stderr
    assert f"{first}: its request was pruned" in run.stderr
    assert said["snapshot"].startswith(f"{copied.model}#")
    assert said["different"] == 0
    assert 0 < said["compared"] < 3 * STEPS + 1


def test_after_a_tink_gc_a_replay_begins_where_that_said_and_so_does_one_of_an_export(
    copied: Recorded, tmp_path: Path
) -> None:
    tink = [sys.executable, "-m", "tink.cli.main"]
    at, env = ["--home", str(copied.home)], environment(copied) | {"TINK_KEEP_REQUESTS_HOURS": "0"}
    gc = subprocess.run([*tink, "gc", "--json", *at], capture_output=True, text=True, env=env)
    told = report(gc)
    assert told["garbage"]["requests"]["count"] > 0
    [change] = told["replays"]
    assert (change["model_id"], change["now"]) == (copied.model, "from its start")
    assert change["then"].startswith("from the snapshot behind operation ")
    begins = (
        f"begins with {change['then'].removeprefix('from ').partition(' of ')[0]}): {change['because']}"
    )
    run = replay(copied, "--format", "json")
    assert begins in run.stderr
    assert report(run)["different"] == 0
    file = tmp_path / "run.tink"
    export = subprocess.run([*tink, "export", copied.model, str(file), *at], capture_output=True, text=True)
    assert f"can be replayed {change['then']}: {change['because']}" in export.stderr
    carried = subprocess.run([*tink, "replay", str(file)], capture_output=True, text=True, env=env)
    assert (carried.returncode, begins in carried.stderr) == (0, True), carried.stdout


def test_a_result_that_was_pruned_is_compared_by_its_hash_and_that_is_said_first(copied: Recorded) -> None:
    job = copied.job("forward_backward", 1)
    [(digest,)] = copied.query("SELECT result_sha256 FROM jobs WHERE job_id = ?", job)
    copied.prune(digest)
    run = replay(copied, "--format", "json")
    assert "tink replay train: 1 of the results were pruned: their hashes tell" in run.stderr
    assert report(run)["different"] == 0


def test_a_replay_whose_trainer_is_killed_says_so_in_one_line(copied: Recorded) -> None:
    run = replay(copied, TINK_CRASH_AT="trainer.applied:5")
    assert (run.returncode, run.stdout) == (2, "")
    lost = rf"tink replay: .* was lost at {copied.model}:\d+: run it again \(.*\)\n"
    assert re.fullmatch(lost, run.stderr)
    assert left_behind(copied) == []


def test_a_replay_that_is_interrupted_leaves_nothing_behind(copied: Recorded) -> None:
    process = subprocess.Popen(
        command(copied), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(copied)
    )
    wait_for_trainer(copied)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=120) == ("", "")
    # Either is 130 to a shell. Python ends itself by the signal if it came in the middle of an exec(), of
    # which imports have many.
    assert process.returncode in (130, -signal.SIGINT)
    assert left_behind(copied) == []


def wait_for_trainer(what: Recorded) -> None:
    """Until the replay's own one listens; it still has to load its model then."""
    deadline = time.monotonic() + START_SECONDS
    while not any((what.home.parent / "tmp").glob("tink-replay-*/trainer.json")):
        assert time.monotonic() < deadline, "no trainer came up"
        time.sleep(0.02)


def test_a_trainer_of_ones_own_must_be_fresh(recorded: Recorded, tmp_path: Path) -> None:
    model = recorded.home / "models/tink--qwen3-tiny"
    options = ("--model", model, "--model-name", "tink/qwen3-tiny")
    trainer = LiveTrainer(tmp_path / "trainer", *options)
    try:
        trainer.start()
        trainer.wait_until_ready()
        to = ("--trainer", trainer.url, "--format", "json")
        missing = replay(recorded, *to)
        assert (missing.returncode, missing.stdout) == (2, "")
        assert "pass --artifacts DIR" in missing.stderr
        said = report(replay(recorded, *to, "--artifacts", tmp_path / "trainer/artifacts"))
        assert (said["different"], said["compared"]) == (0, 3 * STEPS + 1)
        again = replay(recorded, *to, "--artifacts", tmp_path / "trainer/artifacts")
        assert (again.returncode, again.stderr.count("\n")) == (2, 1)
        assert "has been used already" in again.stderr
    finally:
        trainer.kill()


REFUSED = {
    "a step that is not there": (("--to", "7"), "has 6 optimizer steps: it cannot be replayed to step 7"),
    "a change of a step that is not replayed": (
        ("--to", "2", "--set", "3:eps=1"),
        "step 3 is not replayed",
    ),
    "an optimizer that cannot be": (("--set", "beta1=2"), "beta1 and beta2 must be in"),
    "the job that makes the model": (("--drop", "{model}:0"), "makes the model: it cannot be dropped"),
    "a job that is not there": (("--drop", "nobody"), "nobody is none of the operations"),
    "an address that is none": (("--trainer", "localhost"), "a URL such as"),
    "an output in the home": (("--output", "{home}/artifacts/x"), "where a replay writes nothing"),
    "a fork without a worker": (("--fork", "mended"), "needs the worker of this home to run"),
    "a fork with a name that cannot be": (
        ("--fork", "../up"),
        "checkpoint name '../up' cannot be used",
    ),
    "an output that is there": (("--output", "{home}/.."), "is not empty"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_replayed_is_one_line(recorded: Recorded, what: str) -> None:
    options, reason = REFUSED[what]
    filled = [option.format(model=recorded.model, home=recorded.home) for option in options]
    run = replay(recorded, *filled)
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1), run.stderr
    assert reason in run.stderr


def test_a_bundle_alone_gives_the_same_training(recorded: Recorded, tmp_path: Path) -> None:
    """Without the home that it came from."""
    home, file = tmp_path / "home", tmp_path / "run.tink"
    shutil.copytree(recorded.home, home)
    words = [sys.executable, "-m", "tink.cli.main"]
    exported = [*words, "export", recorded.model, str(file), "--home", str(home)]
    subprocess.run(exported, check=True, capture_output=True, env=environment(recorded))
    shutil.rmtree(home)
    env = environment(recorded)
    done = subprocess.run(
        [*words, "replay", str(file)], capture_output=True, text=True, timeout=240, env=env
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "each event has its hash" in done.stdout
    assert "compared: the same, bit for bit" in done.stdout
