"""The questions that are asked of the views: the tests look at how SQLite goes about them, and
`tools/bench audit` measures them."""

from __future__ import annotations

from typing import NamedTuple

from tink.audit.questions import QUESTIONS


class Asked(NamedTuple):
    """What the questions are about. `since`: a time, of which few rows are younger. `days`: of those at the
    end."""

    model: str = "m"
    adapter: str = "a"
    tenant: str = "t"
    step: int = 1
    since: float = 5.0
    days: int = 30


def hot(asked: Asked) -> dict[str, str]:
    """None of them goes through a table that is long."""
    model, adapter, tenant, step, since, days = asked
    about: dict[str, str | int] = {"model": model, "adapter": adapter, "step": step, "days": days}
    newest = "ORDER BY submitted_at DESC LIMIT 20"
    of_model = f"WHERE model_id = '{model}'"
    return {
        "v_jobs": f"SELECT * FROM v_jobs {of_model} ORDER BY seq_id",
        "v_jobs by state": f"SELECT state, count(*) FROM v_jobs {of_model} GROUP BY state",
        "v_jobs of tenant and model": f"SELECT * FROM v_jobs {of_model} AND tenant = '{tenant}' {newest}",
        "v_jobs by time": f"SELECT * FROM v_jobs WHERE submitted_at > {since} ORDER BY submitted_at",
        "v_jobs of tenant": f"SELECT * FROM v_jobs WHERE tenant = '{tenant}' {newest}",
        "v_jobs of nobody": f"SELECT * FROM v_jobs WHERE tenant = 'nobody' {newest}",
        "v_jobs failed": f"SELECT * FROM v_jobs WHERE state = 'failed' {newest}",
        "v_jobs of kind": f"SELECT * FROM v_jobs WHERE op = 'unload_model' {newest}",
        "v_steps": f"SELECT * FROM v_steps {of_model} ORDER BY step",
        "v_steps by norm": f"SELECT * FROM v_steps {of_model} ORDER BY grad_norm DESC LIMIT 20",
        "v_adapters": f"SELECT * FROM v_adapters {of_model} ORDER BY version",
        "v_adapters newest": "SELECT * FROM v_adapters ORDER BY created_at DESC LIMIT 20",
        "v_samples": f"SELECT * FROM v_samples WHERE adapter_id = '{adapter}'",
        "v_samples of model": f"SELECT * FROM v_samples {of_model} {newest}",
        "v_samples newest": f"SELECT * FROM v_samples {newest}",
        "v_samples of nobody": f"SELECT * FROM v_samples WHERE tenant = 'nobody' {newest}",
        "v_incidents": "SELECT * FROM v_incidents ORDER BY at",
        "v_incidents by time": f"SELECT * FROM v_incidents WHERE at > {since} ORDER BY at",
        "v_incidents of model": f"SELECT * FROM v_incidents {of_model} ORDER BY at",
        "v_usage": f"SELECT * FROM v_usage WHERE tenant = '{tenant}'",
        "v_usage by tenant": "SELECT tenant, sum(tokens) FROM v_usage GROUP BY tenant",
        **{f"tink audit {name}": question.filled(about) for name, question in QUESTIONS.items()},
    }


def whole() -> dict[str, str]:
    """These go through all jobs, steps or events, and take as long as the journal is."""
    done = "FROM jobs WHERE state = 'done' GROUP BY op"
    return {
        "jobs by op and state": "SELECT op, state, count(*) FROM jobs GROUP BY op, state",
        "jobs by tenant": "SELECT tenant, count(*) FROM v_jobs GROUP BY tenant",
        "jobs waits": f"SELECT op, count(*), avg(queue_ms), avg(run_ms) {done}",
        "steps by norm": "SELECT model_id, step, grad_norm FROM v_steps ORDER BY grad_norm DESC LIMIT 20",
        "steps by norm all columns": "SELECT * FROM v_steps ORDER BY grad_norm DESC LIMIT 20",
        "incidents by kind": "SELECT kind, count(*), sum(lost_ms) FROM v_incidents GROUP BY kind",
        "events by kind": "SELECT kind, count(*) FROM events GROUP BY kind",
        "events by time": "SELECT count(*) FROM events WHERE at > 5",
    }
