"""On PostgreSQL too no question that is asked again and again goes through a table that grows: of the plans
that it makes with the statistics of a history of some size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from sqlalchemy import Connection, event

from tests.bench import history
from tests.postgres import PostgresServer
from tests.unit.journal.hot import Asked, hot
from tink.domain import rows
from tink.domain.ledger import Ledger
from tink.home import Home
from tink.journal import bodies, queries, store
from tink.journal.bodies import Stored
from tink.journal.reader import open_journal

pytestmark = pytest.mark.on_postgres

EVENTS, NEWEST = 8_000, 1_700_000_000.0
# Tables with so few rows that PostgreSQL would rather read all of one are not asked that way here.
LONG, GROWING = (
    {"events", "jobs"},
    {"adapters", "samplers", "checkpoints", "snapshots", "short_bodies", "bodies"},
)
# Indexes of few rows, or with little of each.
FEW = {
    *("ix_jobs_open", "ix_jobs_retried", "ix_jobs_loads", "ix_jobs_model_id_step"),
    *("ix_adapters_live", "ix_snapshots_live", "ix_snapshots_damaged"),
    # By time: from the newest on, to where there is enough.
    *("ix_jobs_submitted_at", "ix_adapters_created_at"),
}

Plan = dict[str, Any]


@pytest.fixture(scope="module")
def home(postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    url = postgres.create_database()
    made = Home(tmp_path_factory.mktemp("plans"), url)
    history.write(made, wanted=EVENTS, open_jobs=20, until=NEWEST)
    # Rows that change are put where there is room, which is a matter of timing: here they are in no order.
    for statement in (
        "CREATE INDEX mixed ON jobs (md5(job_id))",
        "CLUSTER jobs USING mixed",
        "DROP INDEX mixed",
    ):
        postgres.execute(statement, url.rpartition("/")[2])
    postgres.execute("VACUUM ANALYZE", url.rpartition("/")[2])
    yield made
    postgres.drop_database(url)


@pytest.fixture
def asked(home: Home) -> Iterator[Connection]:
    with open_journal(home) as connection:
        yield connection


def _nodes(plan: Plan, above: str = "") -> Iterator[tuple[Plan, str]]:
    """Each node, and the kind of the one above it."""
    yield plan, above
    for below in plan.get("Plans", ()):
        yield from _nodes(below, plan["Node Type"])


def _scans(plan: Plan, tables: set[str]) -> list[str]:
    """What goes through one of the tables, or an index on one, from its beginning to its end."""
    found = []
    for node, above in _nodes(plan):
        table, index = node.get("Relation Name", ""), node.get("Index Name", "")
        if table in tables and not index and node["Node Type"] != "Bitmap Heap Scan":
            found.append(f"{node['Node Type']} of {table}")
        # It stops where there is enough.
        one_end = above in ("Limit", "Incremental Sort")
        if index and index not in FEW and "Index Cond" not in node and not one_end:
            of = [name for name in tables if name == table or f"_{name}" in index]
            found += [f"{node['Node Type']} of all of {index}"] if of else []
    return found


def _indexes(plan: Plan) -> set[str]:
    return {node["Index Name"] for node, _ in _nodes(plan) if "Index Name" in node}


def _explained(connection: Connection, statement: str, parameters: Any = None) -> Plan:
    cursor = connection.connection.cursor()
    try:
        cursor.execute(f"EXPLAIN (FORMAT JSON) {statement}", parameters)
        ((found,),) = cursor.fetchall()
    finally:
        cursor.close()
    plan: Plan = found[0]["Plan"]
    return plan


def _plans(connection: Connection, ask: Callable[[Connection], object]) -> list[Plan]:
    """Of the statements as they are sent: taken from the connection, not written down again."""
    plans: list[Plan] = []

    def explain(_: Any, cursor: Any, statement: str, parameters: Any, *rest: object) -> None:
        plans.append(_explained(connection, statement, parameters))

    event.listen(connection, "before_cursor_execute", explain)
    ask(connection)
    event.remove(connection, "before_cursor_execute", explain)
    return plans


# PostgreSQL guesses that a third of the jobs is younger than a time that it has yet to find out, and that
# much of so few jobs is faster to be had from all of them.
GUESSED = {"tink audit slow-jobs"}


def _check(connection: Connection, explain: Callable[[], Plan], *, guessed: bool) -> Plan:
    """Asserts that no long table is gone through; the plan."""
    assert guessed or _scans(explain(), LONG) == []
    connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
    plan = explain()
    assert _scans(plan, LONG | GROWING) == []
    connection.exec_driver_sql("SET LOCAL enable_seqscan = on")
    return plan


@pytest.fixture
def question(asked: Connection) -> Callable[[str], str]:
    """Of those that are asked most, about a model and a time that are there."""
    model = asked.exec_driver_sql("SELECT max(model_id) FROM models").scalar_one()
    adapter = asked.exec_driver_sql("SELECT max(adapter_id) FROM adapters").scalar_one()
    return hot(Asked(model=model, adapter=adapter, since=NEWEST - 60, days=0)).__getitem__


@pytest.mark.parametrize("name", hot(Asked()))
def test_no_hot_question_goes_through_a_long_table(
    asked: Connection, question: Callable[[str], str], name: str
) -> None:
    plan = _check(asked, lambda: _explained(asked, question(name)), guessed=name in GUESSED)
    if "incidents" in name:  # of a retried job its own events, not all that ever began
        assert "ix_events_job_id" in _indexes(plan)


def _by_key(connection: Connection) -> None:
    store._stored(
        connection, {(name, (1 if name == "incarnations" else "x",)): {} for name in rows.TABLES}, Ledger()
    )


# What is asked -> the index that answers it, of each statement.
READERS: dict[str, tuple[Callable[[Connection], object], list[str]]] = {
    "job": (partial(queries.job, job_id="j"), ["pk_jobs"]),
    "ops": (partial(queries.ops, model_id="m", after=3, upto=7), ["uq_jobs_model_id_op_no"]),
    "job_of_key": (partial(queries.job_of_key, model_id="m", key="k"), ["uq_jobs_model_id_key"]),
    "sample_of_key": (partial(queries.sample_of_key, tenant="t", key="k"), ["uq_jobs_tenant_key"]),
    "weights": (partial(queries.weights, model_id="m"), ["uq_jobs_model_id_seq_id"]),
    "open_jobs": (queries.open_jobs, ["ix_jobs_open"]),
    "jobs, open": (partial(queries.jobs, limit=20, state="open"), ["ix_jobs_open"]),
    "jobs": (partial(queries.jobs, limit=20), ["ix_jobs_submitted_at"]),
    "jobs since": (partial(queries.jobs, limit=20, since=NEWEST - 60), ["ix_jobs_submitted_at"]),
    "events_of": (partial(queries.events_of, job_id="j"), ["ix_events_job_id"]),
    "loads": (queries.loads, ["ix_jobs_loads"]),
    "last_requests": (partial(queries.last_requests, samplers=["s"]), ["uq_jobs_sampler_id_seq_id"]),
    "trainers": (queries.trainers, ["ix_events_kind_seq", "pk_events"]),
    "last_end": (queries.last_end, ["ix_events_kind_seq"]),
    "damaged_snapshots": (partial(queries.damaged_snapshots, since=1.0), ["ix_snapshots_damaged"]),
    "naming a body": (
        partial(queries.jobs_naming, digests=["a", "b"], ended_since=1.0),
        ["ix_jobs_body_sha256"],
    ),
    "oldest bodies": (
        lambda asked: bodies.oldest(bodies.shelves(asked, asked), NEWEST, Stored("a", 1, 0.5)),
        ["ix_short_bodies_stored_at", "ix_bodies_stored_at"],
    ),
}


@pytest.mark.parametrize("name", READERS)
def test_hot_queries_use_their_indexes(asked: Connection, name: str) -> None:
    ask, indexes = READERS[name]
    assert [_scans(plan, LONG) for plan in _plans(asked, ask)] == [[]] * len(indexes)
    asked.exec_driver_sql("SET LOCAL enable_seqscan = off")
    for plan, index in zip(_plans(asked, ask), indexes, strict=True):
        assert index in _indexes(plan)
        assert _scans(plan, LONG | GROWING) == []


def test_a_start_reads_what_lives_and_the_rows_that_were_written_last(asked: Connection) -> None:
    for plan in _plans(asked, store.read_present):
        assert _scans(plan, LONG) == []
    asked.exec_driver_sql("SET LOCAL enable_seqscan = off")
    plans = _plans(asked, _by_key)
    assert len(plans) == len(rows.TABLES)
    for plan in plans:
        assert _scans(plan, LONG | GROWING) == []
