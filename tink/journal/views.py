"""The questions that are asked most, as views: their names and columns are part of the product, like those
of the tables, and the same on every database. They hold nothing, and are made anew with each migration."""

from __future__ import annotations

import re

from sqlalchemy import Connection, text

# What databases say differently. UTC[x]: seconds since the epoch as text. PostgreSQL rounds to milliseconds
# here as SQLite does, which counts them from another day and loses some digits. STRINGS[x]: all of a group,
# with a space between them.
_UTC = {
    "sqlite": "strftime('%Y-%m-%dT%H:%M:%fZ', {}, 'unixepoch')",
    "postgresql": "to_char(to_timestamp((floor({} * 1000 + 210866760000000 + 0.5) - 210866760000000) "
    "/ 1000) AT TIME ZONE 'UTC', "
    '\'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"\')',
}
_STRINGS = {"sqlite": "group_concat({}, ' ')", "postgresql": "string_agg({}, ' ')"}

# `kind || ''` keeps SQLite from the index of the kinds where that of the jobs is the better one, and
# `model_id || ''` from all events of a model where few are of that kind. That what
# has a sampler is a sample it finds in the index of the jobs by time: `op` is in it.
_TEMPLATES = {
    "v_jobs": """
SELECT job_id, tenant, op, state, session_id, model_id, sampler_id, seq_id, op_no, step, attempts, backend,
       UTC[submitted_at] AS submitted, submitted_at, started_at, finished_at, queue_ms, run_ms, idle_ms,
       (finished_at - submitted_at) * 1000 AS total_ms, tokens_in, tokens_out,
       CASE WHEN run_ms > 0 THEN (tokens_in + tokens_out) * 1000 / run_ms END AS tokens_per_second,
       loss_sum, error_category, error, body_sha256, body_bytes, result_sha256, result_bytes
FROM jobs
""",
    "v_steps": """
SELECT s.model_id, s.step, s.tenant, UTC[s.finished_at] AS finished, s.finished_at, s.learning_rate,
       s.grad_norm, s.loss_sum, s.tokens_in AS tokens,
       CASE WHEN s.tokens_in > 0 THEN s.loss_sum / s.tokens_in END AS loss_per_token,
       s.run_ms, s.jobs, s.updates, s.job_id,
       (SELECT STRINGS[j.job_id] FROM jobs j WHERE j.model_id = s.model_id AND j.step = s.step) AS job_ids
FROM steps s
WHERE s.updates > 0
""",
    "v_adapters": """
SELECT a.adapter_id, a.tenant, a.model_id, a.version, a.step, a.state, m.base_model, m.rank, m.alpha,
       a.job_id, a.directory, a.size_bytes, UTC[a.created_at] AS created, a.created_at, a.deleted_at,
       (SELECT c.checkpoint_id
          FROM jobs l JOIN checkpoints c ON c.directory = l.directory
         WHERE l.model_id = a.model_id AND l.op = 'load_weights' AND l.state = 'done'
           AND l.op_no < (SELECT j.op_no FROM jobs j WHERE j.job_id = a.job_id)
         ORDER BY l.op_no DESC LIMIT 1) AS parent,
       (SELECT STRINGS[s.sampler_id] FROM samplers s WHERE s.adapter_id = a.adapter_id) AS sampler_ids,
       (SELECT count(*) FROM samplers s JOIN jobs j ON j.sampler_id = s.sampler_id
         WHERE s.adapter_id = a.adapter_id) AS samples
FROM adapters a JOIN models m ON m.model_id = a.model_id
""",
    "v_samples": """
SELECT j.job_id, j.tenant, j.session_id, j.sampler_id, s.base_model, a.model_id, s.adapter_id, a.version,
       a.step, j.state, j.num_samples, j.seed, j.backend, j.attempts, UTC[j.submitted_at] AS submitted,
       j.submitted_at, j.started_at, j.finished_at, j.queue_ms, j.run_ms, j.tokens_in AS prompt_tokens,
       j.tokens_out AS sampled_tokens, j.error
FROM jobs j
JOIN samplers s ON s.sampler_id = j.sampler_id
LEFT JOIN adapters a ON a.adapter_id = s.adapter_id
WHERE j.op = 'sample'
""",
    "v_incidents": """
SELECT e.seq, e.at, UTC[e.at] AS happened, 'worker_crash' AS kind, e.tenant,
       e.model_id || '' AS model_id, e.job_id, e.replica, (e.at - p.at) * 1000 AS lost_ms,
       'worker ' || p.incarnation || ' left no stop' AS detail
FROM events e JOIN events p ON p.seq = (SELECT max(b.seq) FROM events b WHERE b.seq < e.seq)
WHERE e.kind = 'incarnation_started' AND p.kind <> 'incarnation_stopped'
UNION ALL
SELECT e.seq, e.at, UTC[e.at], 'trainer_restart', e.tenant, e.model_id || '', e.job_id, e.replica, NULL,
       'another training server: ' || (e.data ->> 'incarnation')
FROM events e
WHERE e.kind = 'trainer_started'
  AND EXISTS (SELECT 1 FROM events p WHERE p.kind = 'trainer_started' AND p.seq < e.seq
                 AND p.seq > (SELECT max(b.seq) FROM events b
                               WHERE b.kind = 'incarnation_started' AND b.seq < e.seq))
UNION ALL
SELECT e.seq, e.at, UTC[e.at], 'redo', e.tenant, e.model_id || '', e.job_id, e.replica,
       CAST(e.data ->> 'run_ms' AS DOUBLE PRECISION),
       CASE WHEN CAST(e.data ->> 'first' AS BIGINT) > CAST(e.data ->> 'last' AS BIGINT)
            THEN 'a snapshot was restored, with all that was applied'
            ELSE 'operations ' || (e.data ->> 'first') || ' to ' || (e.data ->> 'last') || ' once more' END
FROM events e WHERE e.kind = 'redone'
UNION ALL
SELECT e.seq, e.at, UTC[e.at], 'divergence', e.tenant, e.model_id || '', e.job_id, e.replica, NULL,
       e.data ->> 'detail'
FROM events e WHERE e.kind = 'diverged'
UNION ALL
SELECT e.seq, e.at, UTC[e.at], 'failure', e.tenant, e.model_id || '', e.job_id, e.replica, NULL,
       (e.data ->> 'category') || ': ' || (e.data ->> 'error')
FROM events e WHERE e.kind = 'job_failed'
UNION ALL
SELECT j.accepted_seq, j.started_at, UTC[j.started_at], 'retry', j.tenant, j.model_id || '', j.job_id,
       j.backend,
       (j.started_at - (SELECT min(e.at) FROM events e
                         WHERE e.job_id = j.job_id AND e.kind || '' = 'job_started')) * 1000,
       'started ' || j.attempts || ' times'
FROM jobs j WHERE j.attempts > 1
UNION ALL
SELECT e.seq, e.at, UTC[e.at], 'gap', e.tenant, e.model_id || '', e.job_id, e.replica, NULL,
       'numbers ' || (e.data ->> 'first') || ' to ' || (e.data ->> 'last') || ' never came'
FROM events e WHERE e.kind = 'seq_skipped'
UNION ALL
SELECT e.seq, e.at, UTC[e.at], 'client_failure', e.tenant, e.model_id || '', e.job_id, e.replica, NULL,
       e.data ->> 'exception_type'
FROM events e WHERE e.kind = 'client_failed'
""",
    "v_usage": """
SELECT tenant, day, done + failed + cancelled AS jobs, done, failed, cancelled, training_tokens,
       prompt_tokens, sampled_tokens, training_tokens + prompt_tokens + sampled_tokens AS tokens,
       training_ms / 1000 AS training_seconds, sampling_ms / 1000 AS sampling_seconds
FROM usage
""",
}

# name -> what it has a row for each of.
VIEWS = {
    "v_jobs": "job, with its times",
    "v_steps": "optimizer step of a model, with the jobs that made it",
    "v_adapters": "adapter version: the checkpoint it was made from (`parent`), and who sampled from it",
    "v_samples": "sample, with the adapter version that gave it",
    "v_incidents": "crash, restart, redo, retry, divergence, failure and gap, with the time that it took",
    "v_usage": "tenant and day",
}


def definitions(dialect: str) -> dict[str, str]:
    """name -> the statement that makes the view, in the words of `sqlite` or `postgresql`."""
    macros = {"UTC": _UTC[dialect], "STRINGS": _STRINGS[dialect]}

    def expand(found: re.Match[str]) -> str:
        return macros[found[1]].format(found[2])

    return {
        name: f"CREATE VIEW {name} AS\n" + re.sub(r"(UTC|STRINGS)\[(.*?)\]", expand, body.strip())
        for name, body in _TEMPLATES.items()
    }


def drop(connection: Connection) -> None:
    """A table under a view cannot be changed."""
    for name in VIEWS:
        connection.exec_driver_sql(f"DROP VIEW IF EXISTS {name}")


def create(connection: Connection) -> None:
    for statement in definitions(connection.dialect.name).values():
        # As text: a driver may take the percent sign for a parameter.
        connection.execute(text(statement.replace(":", "\\:")))
