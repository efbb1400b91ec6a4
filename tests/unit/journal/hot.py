"""The questions that are asked of the views: the tests look at how SQLite goes about them, and
`tools/bench audit` measures them."""

from __future__ import annotations

from typing import NamedTuple

from tink.audit.questions import QUESTIONS


class Asked(NamedTuple):
    """What the questions are about. `since`: a time, of which few rows are younger."""

    model: str = "m"
    adapter: str = "a"
    tenant: str = "t"
    step: int = 1
    since: float = 5.0


def hot(asked: Asked) -> dict[str, str]:
    """None of them goes through a table that is long."""
    model, adapter, tenant, step, since = asked
    about: dict[str, str | int] = {"model": model, "adapter": adapter, "step": step, "days": 100}
    return {
        "v_jobs": f"SELECT * FROM v_jobs WHERE model_id = '{model}' ORDER BY seq_id",
        "v_jobs by state": f"SELECT state, count(*) FROM v_jobs WHERE model_id = '{model}' GROUP BY state",
        "v_jobs by time": f"SELECT * FROM v_jobs WHERE submitted_at > {since} ORDER BY submitted_at",
        "v_jobs newest": f"SELECT * FROM v_jobs WHERE tenant = '{tenant}' ORDER BY submitted_at DESC LIMIT 20",
        "v_steps": f"SELECT * FROM v_steps WHERE model_id = '{model}' ORDER BY step",
        "v_steps by norm": f"SELECT * FROM v_steps WHERE model_id = '{model}' ORDER BY grad_norm DESC LIMIT 20",
        "v_adapters": f"SELECT * FROM v_adapters WHERE model_id = '{model}' ORDER BY version",
        "v_samples": f"SELECT * FROM v_samples WHERE adapter_id = '{adapter}'",
        "v_samples newest": "SELECT * FROM v_samples ORDER BY submitted_at DESC LIMIT 20",
        "v_incidents": "SELECT * FROM v_incidents ORDER BY at",
        "v_incidents by time": f"SELECT * FROM v_incidents WHERE at > {since} ORDER BY at",
        "v_usage": f"SELECT * FROM v_usage WHERE tenant = '{tenant}'",
        "v_usage by tenant": "SELECT tenant, sum(tokens) FROM v_usage GROUP BY tenant",
        **{f"tink audit {name}": question.filled(about) for name, question in QUESTIONS.items()},
    }


def whole() -> dict[str, str]:
    """These go through all jobs, or all events, and take as long as the journal is."""
    return {
        "jobs by op": "SELECT op, state, count(*) FROM jobs GROUP BY op, state",
        "jobs waits": "SELECT op, count(*), avg(queue_ms), avg(run_ms) FROM jobs WHERE state = 'done' GROUP BY op",
        "jobs by tenant": "SELECT tenant, count(*) FROM v_jobs GROUP BY tenant",
        "events by kind": "SELECT kind, count(*) FROM events GROUP BY kind",
    }
