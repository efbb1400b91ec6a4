"""How fast a run is done again after its training server was killed, against the first time.

A real worker with its embedded engine trains a model through the SDK, with no snapshot in between, and then
the server gets a kill -9 and the next step is asked for: the worker starts another one, which has all
operations again. Compared are the operations' own times, as the journal has them; the wait for that step is
told too, which is the start of a server, the redo and the step."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import tinker
from tinker import types

from tests.bench.figures import Figure
from tests.bench.survive import RANK, batch
from tests.live import LiveServer
from tests.processes import kill_trainers
from tink.home import Home
from tink.journal.reader import open_journal
from tink.pretrained import BUILT_IN

SUMMARY = "operations done again after a crash, against the first time"
# A snapshot is due when a redo would take so long.
NEVER = "100000"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps before the crash (40)")
    parser.add_argument("--crashes", type=int, default=3, help="of as many models; the median counts (3)")


def run(arguments: argparse.Namespace) -> Iterator[Figure]:
    os.environ |= {"HF_HUB_OFFLINE": "1", "TINKER_TELEMETRY": "0"}
    with tempfile.TemporaryDirectory(prefix="tink-bench-") as name:
        live = LiveServer(Path(name) / "home", TINK_SNAPSHOT_SECONDS=NEVER)
        live.start()
        try:
            waits = [crash(live, arguments.steps) for _ in range(arguments.crashes)]
            with open_journal(Home(live.home)) as journal:
                redone = journal.exec_driver_sql(REDONE).all()
        finally:
            live.close()
    again, first, operations = (sum(row[column] for row in redone) for column in (0, 1, 2))
    yield Figure("redo_speed", operations / again * 1000, "operations/s", operations / first * 1000)
    yield Figure("redo_wait", median(wait for wait, _ in waits), "s", median(usual for _, usual in waits))


# Of each model: milliseconds of its redo, and of the same operations the first time; and how many.
REDONE = """
SELECT (SELECT sum(json_extract(e.data, '$.run_ms')) FROM events e
         WHERE e.kind = 'redone' AND e.model_id = m.model_id),
    sum(j.run_ms), count(*)
FROM models m JOIN jobs j ON j.model_id = m.model_id
    AND j.accepted_seq < (SELECT min(seq) FROM events e WHERE e.kind = 'redone' AND e.model_id = m.model_id)
WHERE j.op IN ('forward_backward', 'optim_step') AND j.state = 'done'
GROUP BY m.model_id
"""


def crash(live: LiveServer, steps: int) -> tuple[float, float]:
    """Seconds of the step after it, and of one before."""
    service = tinker.ServiceClient(base_url=live.url, api_key="tml-local")
    client = service.create_lora_training_client(BUILT_IN, rank=RANK, seed=1).result()

    def step(number: int) -> float:
        began = time.monotonic()
        sent = [
            client.forward_backward(batch(number), "cross_entropy"),
            client.optim_step(types.AdamParams()),
        ]
        for future in sent:
            future.result()
        return time.monotonic() - began

    usual = median(step(number) for number in range(steps))
    kill_trainers(live.home)
    return step(steps), usual
