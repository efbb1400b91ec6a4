"""What is left to say when both runs have been made, disturbed and undisturbed: was anything lost, doubled,
an error or different?"""

from __future__ import annotations

import logging
import math
import statistics
from dataclasses import dataclass

from tests.crash.killer import Done
from tests.crash.runs import Numbers, say
from tink.home import Home
from tink.journal import chain, store
from tink.journal.reader import open_journal


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
        SELECT count(*) FROM (SELECT DISTINCT job_id FROM events WHERE kind = 'job_accepted') AS accepted
        WHERE job_id NOT IN (SELECT job_id FROM events WHERE kind IN ({ENDS}))""",
    "ended twice": f"""
        SELECT count(*) FROM (
            SELECT job_id FROM events WHERE kind IN ({ENDS}) GROUP BY job_id
            HAVING count(*) > 1) AS twice""",
    "accepted twice": """
        SELECT count(*) FROM (
            SELECT job_id FROM events WHERE kind = 'job_accepted' GROUP BY job_id
            HAVING count(*) > 1) AS twice""",
    "numbers used twice": """
        SELECT count(*) FROM (
            SELECT model_id FROM events
            WHERE kind = 'job_started' AND data ->> 'op_no' IS NOT NULL
            GROUP BY model_id, data ->> 'op_no' HAVING count(DISTINCT job_id) > 1) AS twice""",
    "numbers changed": """
        SELECT count(*) FROM (
            SELECT job_id FROM events WHERE kind = 'job_started'
            GROUP BY job_id HAVING count(DISTINCT data ->> 'op_no') > 1) AS changed""",
    # The trainer counts the steps of a model: each result says the next number.
    "steps miscounted": """
        SELECT coalesce(sum(abs(counted - steps)), 0) FROM (
            SELECT count(*) AS steps, max(CAST(result -> 'metrics' ->> 'step' AS REAL)) AS counted
            FROM jobs WHERE op = 'optim_step' AND state = 'done' GROUP BY model_id) AS made""",
    "diverged": "SELECT count(*) FROM events WHERE kind = 'diverged'",
}
DOUBLED = ("ended twice", "accepted twice", "numbers used twice", "numbers changed", "steps miscounted")
COUNTED = ("snapshot_taken", "bodies_pruned", "trainer_started", "incarnation_started")


@dataclass(frozen=True)
class Played:
    """What there is to compare of two runs side by side. `kills`: each with its recovery, in seconds."""

    numbers: Numbers
    journal: dict[str, int]
    failed: int
    kills: list[tuple[Done, float]]


def examine(home: Home) -> dict[str, int]:
    """What the journal says. Beside the queries: how many jobs of each kind there are, and snapshots; and
    whether it is whole."""
    with open_journal(home) as journal:

        def ask(query: str) -> int:
            return int(journal.exec_driver_sql(query).scalar_one())

        found = {name: ask(query) for name, query in QUERIES.items()}
        for op, jobs in journal.exec_driver_sql("SELECT op, count(*) FROM jobs GROUP BY op"):
            found[f"jobs {op}"] = int(jobs)
        for kind in COUNTED:
            found[kind] = ask(f"SELECT count(*) FROM events WHERE kind = '{kind}'")
        wrong = [*store.check(journal), *chain.breaks(journal)]
        for line in wrong:
            say(f"journal: {line}")
        return found | {"wrong": len(wrong)}


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


def judge(disturbed: Played, undisturbed: Played, logged: int) -> tuple[str, bool]:
    """The last line, and whether it is as promised. `logged`: errors that the SDK told of."""
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
    recoveries = [seconds for _done, seconds in disturbed.kills] or [0.0]
    line = (
        f"kills={len(disturbed.kills)} lost={lost} doubled={doubled} client_errors={errors} "
        f"max_abs_diff={largest} "
        f"recovery_p50={statistics.median(recoveries):.1f}s recovery_max={max(recoveries):.1f}s"
    )
    diverged = sum(journal["diverged"] for journal in journals)
    wrong = sum(journal["wrong"] for journal in journals)
    return line, not (lost or doubled or errors or largest or diverged or wrong)


def table(kills: list[tuple[Done, float]]) -> str:
    """Who was killed, and how; and how long it took until both runs had a result again."""
    groups: dict[tuple[str, str], list[float]] = {}
    for done, seconds in kills:
        groups.setdefault((done.victim, done.how), []).append(seconds)
    lines = ["| killed | when | kills | recovery p50 | max |", "|---|---|---|---|---|"]
    lines += [
        f"| {victim} | {how} | {len(each)} | {statistics.median(each):.1f} s | {max(each):.1f} s |"
        for (victim, how), each in sorted(groups.items())
    ]
    return "\n".join(lines)
