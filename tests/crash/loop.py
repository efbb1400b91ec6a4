"""The kill loop: two training runs go on while their server is killed again and again.

    tools/crashloop [--kills 20] [--seed 1]

A real `tink serve` with its embedded trainer serves two models side by side, through the unmodified
`tinker` SDK: a supervised run and a reinforcement-learning run. Meanwhile the worker, the trainer or both
get a `kill -9`, at times drawn from the seed: some kills wait until the runs have gone on, some come while
the kill before is still being recovered from. A killed worker is started again at once, as a service
manager would do it; a killed trainer is its worker's affair. Then the same runs are made undisturbed, with
a new journal, and everything that the clients got is compared.

The last line says it. `lost`: accepted jobs without exactly one end, and results that a client did not
get. `doubled`: jobs with two ends or two numbers, and optimizer steps that were applied twice.
`client_errors`: exceptions that reached the runs, and errors that the SDK logged. `max_abs_diff`: over all
losses, log-probabilities, sampled tokens and metrics. `recovery`: from a kill until both runs have had a
result again. The exit status is 1 if anything is lost, doubled, an error or different.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import random
import shutil
import signal
import sqlite3
import statistics
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tinker
from tinker import types

from tests.live import LiveServer

MODEL = "tink/qwen3-tiny"
RANK = 8
SNAPSHOT_SECONDS = 1.0
# As many steps as the kills need to find both runs busy.
SFT_STEPS, SFT_STEPS_PER_KILL = 6, 4
RL_STEPS, RL_STEPS_PER_KILL = 4, 2
# Sent before the first is awaited.
AHEAD = 3
PROMPTS = ([5, 6, 7, 8], [100, 90, 80, 70, 60])
GROUP = 4
# A kill out of four comes while the one before is still being recovered from, at most so long after it.
OVERLAP, OVERLAP_SECONDS = 0.25, 3.0
# After the results that a kill waits for, at most so long.
DELAY_SECONDS = 0.3
STUCK_SECONDS = 120.0

Victim = Literal["worker", "trainer", "both"]
# What a client got: a name such as "sft/3/loss" -> its numbers.
Numbers = dict[str, list[float]]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Stuck(Exception):
    """The run cannot go on: its server ended by itself, or no result came for a long time."""


# -- the two runs -----------------------------------------------------------------------------------


@dataclass
class Run:
    """One program with one model, in a thread of its own. `results`: when each one came."""

    name: str
    program: Callable[[Run, tinker.TrainingClient], None]
    steps: int
    seed: int
    numbers: Numbers = field(default_factory=dict)
    results: list[float] = field(default_factory=list)
    error: BaseException | None = None
    thread: threading.Thread | None = None

    def start(self, url: str) -> None:
        self.thread = threading.Thread(target=self._work, args=(url,), name=self.name, daemon=True)
        self.thread.start()

    @property
    def ended(self) -> bool:
        return self.thread is not None and not self.thread.is_alive()

    def got(self, step: int, **numbers: list[float]) -> None:
        """A result is there."""
        self.results.append(time.monotonic())
        self.numbers |= {f"{self.name}/{step}/{key}": values for key, values in numbers.items()}

    def _work(self, url: str) -> None:
        try:
            service = tinker.ServiceClient(base_url=url, api_key="tml-local")
            made = service.create_lora_training_client(base_model=MODEL, rank=RANK, seed=self.seed)
            self.program(self, made.result())
        except BaseException as error:
            self.error = error
            say(f"{self.name}: {type(error).__name__}: {error}")


def sft(run: Run, client: tinker.TrainingClient) -> None:
    """Supervised: some steps are always on their way."""
    pending: deque[tuple[int, Any, Any]] = deque()

    def take() -> None:
        step, update, optim = pending.popleft()
        run.got(step, **_update(update.result()))
        run.got(step, optim=_metrics(optim.result().metrics))

    for step in range(run.steps):
        data = [_sentence(random.Random(f"{run.seed} {step} {index}")) for index in range(4)]
        update = client.forward_backward(data, "cross_entropy")
        pending.append((step, update, client.optim_step(types.AdamParams(learning_rate=2e-3))))
        if len(pending) > AHEAD:
            take()
    while pending:
        take()


def rl(run: Run, client: tinker.TrainingClient) -> None:
    """Reinforcement learning: even tokens are rewarded. Each step needs the samples of its weights, so a
    difference anywhere would grow."""
    for step in range(run.steps):
        sampler = client.save_weights_and_get_sampling_client().result()
        run.got(step)
        asked = [
            sampler.sample(
                types.ModelInput.from_ints(prompt),
                num_samples=GROUP,
                sampling_params=types.SamplingParams(max_tokens=12, seed=run.seed + 100 * step + index),
            )
            for index, prompt in enumerate(PROMPTS)
        ]
        data = []
        for index, prompt in enumerate(PROMPTS):
            group = asked[index].result().sequences
            rewards = [statistics.fmean(token % 2 == 0 for token in one.tokens) for one in group]
            mean = statistics.fmean(rewards)
            data += [
                _rollout(prompt, one.tokens, one.logprobs, reward - mean)
                for one, reward in zip(group, rewards, strict=True)
            ]
            tokens = [float(token) for one in group for token in one.tokens]
            logprobs = [value for one in group for value in one.logprobs]
            run.got(step, **{f"tokens{index}": tokens, f"logprobs{index}": logprobs})
        update = client.forward_backward(data, "importance_sampling")
        optim = client.optim_step(types.AdamParams(learning_rate=1e-3))
        run.got(step, **_update(update.result()))
        run.got(step, optim=_metrics(optim.result().metrics))


def _sentence(draw: random.Random) -> types.Datum:
    tokens = [draw.randrange(300) for _ in range(draw.randrange(20, 50))]
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)},
    )


def _rollout(prompt: list[int], tokens: list[int], logprobs: list[float], advantage: float) -> types.Datum:
    """Position i predicts token i + 1. The prompt's own tokens have no advantage, hence no gradient."""
    given = len(prompt) - 1
    return types.Datum(
        model_input=types.ModelInput.from_ints(prompt + tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": prompt[1:] + tokens,
            "logprobs": [0.0] * given + logprobs,
            "advantages": [0.0] * given + [advantage] * len(tokens),
        },
    )


def _metrics(metrics: dict[str, float] | None) -> list[float]:
    return [value for _name, value in sorted((metrics or {}).items())]


def _update(result: types.ForwardBackwardOutput) -> dict[str, list[float]]:
    outputs = [
        value
        for output in result.loss_fn_outputs
        for _name, tensor in sorted(output.items())
        for value in tensor.data
    ]
    return {"metrics": _metrics(result.metrics), "outputs": outputs}


# -- the killer -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kill:
    """`after`: how many results there must be; None: it comes during the recovery from the one before.
    `delay`: seconds, from then on."""

    victim: Victim
    after: int | None
    delay: float


def plan(kills: int, seed: int, results: int) -> list[Kill]:
    """Spread over the run, up to the place where enough is left to recover for."""
    draw = random.Random(seed)
    places = sorted(draw.randrange(2, max(3, int(0.9 * results))) for _ in range(kills))
    victims: list[Victim] = [draw.choice(("worker", "trainer", "both")) for _ in range(kills)]
    planned = []
    for number, (victim, place) in enumerate(zip(victims, places, strict=True)):
        if number and draw.random() < OVERLAP:
            planned.append(Kill(victim, None, draw.uniform(0, OVERLAP_SECONDS)))
        else:
            planned.append(Kill(victim, place, draw.uniform(0, DELAY_SECONDS)))
    return planned


@dataclass
class Killer:
    """Does the kills to the server, while the runs go on. `times`: when each was."""

    server: LiveServer
    runs: list[Run]
    times: list[float] = field(default_factory=list)

    def work(self, kills: list[Kill]) -> None:
        """Returns when the kills are done and the runs have ended. Raises Stuck."""
        for number, kill in enumerate(kills, 1):
            if kill.after is not None:
                self._wait(lambda place=kill.after: self._count() >= place and self._recovered())
            self._wait(None, seconds=kill.delay)
            if all(run.ended for run in self.runs):
                break
            self._kill(kill.victim)
            how = "" if kill.after is not None else ", before the last one was over"
            say(f"kill {number:3} of {len(kills)}: {kill.victim:7} after {self._count()} results{how}")
        self._wait(lambda: False)

    def recoveries(self) -> list[float]:
        """Seconds from each kill until every run that had not ended has had a result."""
        found = []
        for at in self.times:
            later = [next((result for result in run.results if result > at), at) for run in self.runs]
            found.append(max(later) - at)
        return found

    def _count(self) -> int:
        return sum(len(run.results) for run in self.runs)

    def _recovered(self) -> bool:
        last = self.times[-1] if self.times else 0.0
        return all(run.ended or (run.results and run.results[-1] > last) for run in self.runs)

    def _wait(self, done: Callable[[], Any] | None, seconds: float = math.inf) -> None:
        """Until it is done, the seconds are over, or both runs have ended."""
        began = time.monotonic()
        while time.monotonic() - began < seconds and not (done and done()):
            if all(run.ended for run in self.runs):
                return
            assert self.server.process is not None
            if self.server.process.poll() is not None:
                raise Stuck(f"tink serve ended by itself, with status {self.server.process.returncode}")
            last = max([began, *(run.results[-1] for run in self.runs if run.results)])
            if time.monotonic() - last > STUCK_SECONDS:
                raise Stuck(f"no result for {STUCK_SECONDS:.0f} s")
            time.sleep(0.01)

    def _kill(self, victim: Victim) -> None:
        trainers = self._trainers() if victim != "worker" else []
        self.times.append(time.monotonic())
        for pid in trainers:
            _kill(pid)
        if victim != "trainer":
            self.server.kill()
            self.server.start(wait=False)

    def _trainers(self) -> list[int]:
        """After another kill there may be none for a moment: then this waits for the next one."""
        found: list[int] = []

        def look() -> bool:
            found[:] = trainers_of(self.server.home)
            return bool(found)

        self._wait(look)
        return found


def trainers_of(home: Path) -> list[int]:
    """The training servers that were started for this home."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if os.fsencode(home / "trainer.json") in entry.read_bytes().split(b"\0"):
                found.append(int(entry.parent.name))
    return found


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


# -- the judge --------------------------------------------------------------------------------------


class ClientErrors(logging.Handler):
    """Counts what the SDK logs as an error."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.count = 0
        logging.getLogger("tinker").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1
        say(f"client error: {record.getMessage()}")


ENDS = "'job_done', 'job_failed', 'job_cancelled'"
QUERIES = {
    "endless": f"""
        SELECT count(*) FROM (SELECT DISTINCT job_id FROM events WHERE kind = 'job_accepted')
        WHERE job_id NOT IN (SELECT job_id FROM events WHERE kind IN ({ENDS}))""",
    "ended twice": f"""
        SELECT count(*) FROM (
            SELECT job_id FROM events WHERE kind IN ({ENDS}) GROUP BY job_id HAVING count(*) > 1)""",
    "accepted twice": """
        SELECT count(*) FROM (
            SELECT job_id FROM events WHERE kind = 'job_accepted' GROUP BY job_id HAVING count(*) > 1)""",
    "numbers used twice": """
        SELECT count(*) FROM (
            SELECT model_id FROM events
            WHERE kind = 'job_started' AND json_extract(data, '$.op_no') IS NOT NULL
            GROUP BY model_id, json_extract(data, '$.op_no') HAVING count(DISTINCT job_id) > 1)""",
    "numbers changed": """
        SELECT count(*) FROM (
            SELECT job_id FROM events WHERE kind = 'job_started'
            GROUP BY job_id HAVING count(DISTINCT json_extract(data, '$.op_no')) > 1)""",
    # The trainer counts the steps of a model: each result says the next number.
    "steps miscounted": """
        SELECT coalesce(sum(abs(counted - steps)), 0) FROM (
            SELECT count(*) AS steps, max(json_extract(result, '$.metrics.step')) AS counted
            FROM jobs WHERE op = 'optim_step' AND state = 'done' GROUP BY model_id)""",
    "diverged": "SELECT count(*) FROM events WHERE kind = 'diverged'",
}
DOUBLED = ("ended twice", "accepted twice", "numbers used twice", "numbers changed", "steps miscounted")


def examine(home: Path) -> dict[str, int]:
    """What the journal says. Beside the queries: how many jobs of each kind there are, and snapshots."""
    with closing(sqlite3.connect(f"file:{home / 'journal.sqlite'}?mode=ro", uri=True)) as journal:
        found = {name: int(journal.execute(query).fetchone()[0]) for name, query in QUERIES.items()}
        for op, count in journal.execute("SELECT op, count(*) FROM jobs GROUP BY op"):
            found[f"jobs {op}"] = int(count)
        for kind in ("snapshot_taken", "trainer_started", "incarnation_started"):
            found[kind] = journal.execute("SELECT count(*) FROM events WHERE kind = ?", (kind,)).fetchone()[
                0
            ]
    return found


def difference(one: Numbers, other: Numbers) -> float:
    """The largest between any two numbers that both have; infinite if there are not equally many."""
    largest = 0.0
    for name in one.keys() & other.keys():
        if len(one[name]) != len(other[name]):
            say(f"{name}: {len(one[name])} numbers, undisturbed {len(other[name])}")
            return math.inf
        for mine, theirs in zip(one[name], other[name], strict=True):
            distance = abs(mine - theirs)
            largest = max(largest, math.inf if math.isnan(distance) else distance)
    return largest


# -- the loop ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Played:
    """What there is to compare of two runs side by side."""

    numbers: Numbers
    journal: dict[str, int]
    failed: int
    recoveries: list[float]


def play(home: Path, seed: int, kills: int, planned: list[Kill]) -> Played:
    """Both runs, with a server of their own. `kills` says how long they are, `planned` what happens."""
    runs = [
        Run("sft", sft, SFT_STEPS + SFT_STEPS_PER_KILL * kills, seed),
        Run("rl", rl, RL_STEPS + RL_STEPS_PER_KILL * kills, seed + 1),
    ]
    with serving(home, kills) as server:
        for run in runs:
            run.start(server.url)
        killer = Killer(server, runs)
        killer.work(planned)
    return Played(
        {name: values for run in runs for name, values in run.numbers.items()},
        examine(home),
        sum(run.error is not None for run in runs),
        killer.recoveries(),
    )


@contextmanager
def serving(home: Path, kills: int) -> Iterator[LiveServer]:
    """A `tink serve`, ready; it and its trainers are gone afterwards."""
    server = LiveServer(
        home,
        TINK_SNAPSHOT_SECONDS=str(SNAPSHOT_SECONDS),
        # A job that kills its trainer is given up after some attempts. Here it is never the job.
        TINK_MAX_ATTEMPTS=str(2 * kills + 3),
        TINK_TRAINER_ORPHAN_SECONDS="60",
    )
    try:
        server.start()
        yield server
    finally:
        # Not to be interrupted: whoever presses Ctrl-C twice wants nothing left behind either.
        former = {
            number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)
        }
        server.close()
        for pid in trainers_of(home):
            _kill(pid)
        for number, handler in former.items():
            signal.signal(number, handler)


def results_of(kills: int) -> int:
    """How many results the clients of an undisturbed run get."""
    sft_steps, rl_steps = SFT_STEPS + SFT_STEPS_PER_KILL * kills, RL_STEPS + RL_STEPS_PER_KILL * kills
    return 2 * sft_steps + (3 + len(PROMPTS)) * rl_steps


def judge(disturbed: Played, undisturbed: Played, logged: int) -> tuple[str, bool]:
    """The figures of the last line, and whether they are as promised."""
    journals = (disturbed.journal, undisturbed.journal)
    jobs = sorted({name for journal in journals for name in journal if name.startswith("jobs ")})
    more = [disturbed.journal.get(name, 0) - undisturbed.journal.get(name, 0) for name in jobs]
    missing = undisturbed.numbers.keys() ^ disturbed.numbers.keys()
    for journal in journals:
        say("journal: " + ", ".join(f"{name} {count}" for name, count in journal.items()))
    lost = sum(journal["endless"] for journal in journals) + len(missing)
    doubled = sum(journal[name] for journal in journals for name in DOUBLED)
    # A job that the disturbed run has too many of was accepted under two names.
    doubled += sum(count for count in more if count > 0)
    lost += sum(-count for count in more if count < 0)
    errors = disturbed.failed + undisturbed.failed + logged
    largest = difference(disturbed.numbers, undisturbed.numbers)
    recoveries = disturbed.recoveries or [0.0]
    line = (
        f"lost={lost} doubled={doubled} client_errors={errors} max_abs_diff={largest} "
        f"recovery_p50={statistics.median(recoveries):.1f}s recovery_max={max(recoveries):.1f}s"
    )
    diverged = sum(journal["diverged"] for journal in journals)
    return line, not (lost or doubled or errors or largest or diverged)


def loop(root: Path, kills: int, seed: int) -> bool:
    """Prints the last line; True if all is as promised. Raises Stuck."""
    logged = ClientErrors()
    began = time.monotonic()
    disturbed = play(root / "disturbed", seed, kills, plan(kills, seed, results_of(kills)))
    say(f"{kills} kills in {time.monotonic() - began:.0f} s; now undisturbed")
    undisturbed = play(root / "undisturbed", seed, kills, [])
    count = sum(len(values) for values in undisturbed.numbers.values())
    say(f"{time.monotonic() - began:.0f} s in all; {count} numbers compared")
    line, well = judge(disturbed, undisturbed, logged.count)
    done = len(disturbed.recoveries)
    print(f"kills={done} {line}", flush=True)
    return well and done == kills


def main() -> int:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="tools/crashloop",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="of the kills and of both runs (%(default)s)")
    options = parser.parse_args()
    if options.kills < 1:
        parser.error("--kills must be at least 1")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    root = Path(tempfile.mkdtemp(prefix="tink-crashloop-"))
    for name in [name for name in os.environ if name.startswith(("TINK_", "USE_"))]:
        del os.environ[name]
    # The user's Hugging Face cache is not ours to fill.
    os.environ |= {"HF_HUB_OFFLINE": "1", "TINKER_TELEMETRY": "0", "HF_HOME": str(root / "hf")}
    status = 1
    try:
        status = 0 if loop(root, options.kills, options.seed) else 1
    except Stuck as error:
        say(f"crashloop: {error}")
    except KeyboardInterrupt:
        say("crashloop: interrupted, and everything stopped")
        status = 130
    finally:
        if status == 1:
            say(f"crashloop: journals and logs are kept in {root}")
        else:
            shutil.rmtree(root, ignore_errors=True)
    sys.stdout.flush()
    sys.stderr.flush()
    # The SDK's threads would go on asking for a server that is gone.
    os._exit(status)


if __name__ == "__main__":
    main()
