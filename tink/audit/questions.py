"""The questions that come up again and again, as SQL for any client: `tink audit NAME --sql` prints it.
They build on the views (journal/views.py). What a question is not about costs it no time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from tink.errors import UserError


class Parameter(NamedTuple):
    """`:name` in the SQL. `kind`: a text is quoted, a number is not. Without a default it must be given."""

    name: str
    kind: type[str] | type[int]
    help: str
    default: int | None = None


class Question(NamedTuple):
    """`none`: what an empty answer means. `alarm`: whether any answer is bad news."""

    help: str
    sql: str
    parameters: tuple[Parameter, ...] = ()
    none: str = "nothing"
    alarm: bool = False

    def filled(self, values: Mapping[str, str | int | None]) -> str:
        """The SQL with its parameters in their places."""
        texts = {}
        for name, kind, _, default in self.parameters:
            value = values.get(name)
            value = default if value is None else value
            if value is None:
                raise UserError(f"it needs {name.upper()}")
            texts[name] = str(int(value)) if kind is int else "'" + str(value).replace("'", "''") + "'"
        # All at once: a value may have `:step` in it.
        return re.sub(r":(\w+)", lambda found: texts[found[1]], self.sql.strip())


_MODEL = Parameter("model", str, "the model (training run)")
_ADAPTER = Parameter("adapter", str, "the adapter version, MODEL@VERSION")
_STEP = Parameter("step", int, "the optimizer step, counted from 1")
_DAYS = Parameter("days", int, "only the last so many days before the newest event", 1)

QUESTIONS: dict[str, Question] = {
    "slow-jobs": Question(
        "the jobs that took longest from their submission to their end",
        """
SELECT job_id, op, state, tenant, total_ms, queue_ms, run_ms, attempts, backend, submitted
FROM v_jobs
WHERE submitted_at >= (SELECT at FROM events ORDER BY seq DESC LIMIT 1) - 86400 * :days
  AND finished_at IS NOT NULL
ORDER BY total_ms DESC
LIMIT 20
""",
        (_DAYS,),
        "no job ended in that time",
    ),
    "lost-time": Question(
        "every crash, redo, retry, divergence and failure, the dearest first",
        """
SELECT seq, happened, kind, tenant, model_id, job_id, replica, lost_ms, detail
FROM v_incidents
WHERE at >= (SELECT at FROM events ORDER BY seq DESC LIMIT 1) - 86400 * :days
ORDER BY coalesce(lost_ms, 0) DESC, seq
""",
        (_DAYS,),
        "nothing went wrong in that time",
    ),
    "lineage": Question(
        "from which models, states and steps an adapter version comes",
        """
WITH RECURSIVE line (depth, source, model_id, op_no, last_step, loaded) AS (
  SELECT 0, a.adapter_id, a.model_id, j.op_no, a.step, (
    SELECT max(l.op_no) FROM jobs l
    WHERE l.model_id = a.model_id AND l.op = 'load_weights' AND l.state = 'done' AND l.op_no < j.op_no)
  FROM adapters a JOIN jobs j ON j.job_id = a.job_id
  WHERE a.adapter_id = :adapter
  UNION ALL
  SELECT line.depth + 1, c.checkpoint_id, c.model_id, j.op_no, c.step, (
    SELECT max(l.op_no) FROM jobs l
    WHERE l.model_id = c.model_id AND l.op = 'load_weights' AND l.state = 'done'
      AND l.op_no < coalesce(j.op_no, (
        SELECT max(u.op_no) FROM jobs u
        WHERE u.model_id = c.model_id AND u.op = 'optim_step' AND u.step = c.step)))
  FROM line
  JOIN jobs load ON load.model_id = line.model_id AND load.op_no = line.loaded
  JOIN checkpoints c ON c.directory = load.directory
  LEFT JOIN jobs j ON j.job_id = c.checkpoint_id
)
SELECT line.depth, line.source, line.model_id, m.base_model, m.rank, line.last_step,
       count(s.step) AS steps, sum(s.tokens_in) AS tokens, sum(s.jobs) AS jobs
FROM line
JOIN models m ON m.model_id = line.model_id
LEFT JOIN steps s ON s.model_id = line.model_id AND s.updates > 0 AND s.step <= line.last_step
  AND s.step > coalesce((
    SELECT max(f.step) FROM jobs f
    WHERE f.model_id = line.model_id AND f.step IS NOT NULL AND f.op = 'optim_step'
      AND f.op_no < line.loaded
  ), 0)
GROUP BY line.depth, line.source, line.model_id, m.base_model, m.rank, line.last_step
ORDER BY line.depth
""",
        (_ADAPTER,),
        "there is no such adapter version: SELECT adapter_id FROM v_adapters",
    ),
    "steps": Question(
        "optimizer steps that were made twice, or never",
        """
WITH made AS (
  SELECT s.model_id, sum(CASE WHEN s.updates > 0 THEN 1 ELSE 0 END) AS steps, max(s.updates) AS most,
         max(CASE WHEN s.updates > 0 THEN s.step ELSE 0 END) AS last, sum(s.jobs) AS jobs
  FROM steps s GROUP BY s.model_id
),
counted AS (
  SELECT j.model_id, count(*) AS jobs FROM jobs j WHERE j.step IS NOT NULL GROUP BY j.model_id
)
SELECT m.model_id, m.steps AS counted_steps, made.steps AS made_steps, made.last AS last_step,
       made.most AS updates_of_one_step, counted.jobs AS jobs, made.jobs AS jobs_of_steps
FROM models m
LEFT JOIN made ON made.model_id = m.model_id
LEFT JOIN counted ON counted.model_id = m.model_id
WHERE coalesce(made.steps, 0) <> m.steps OR coalesce(made.last, 0) <> m.steps
   OR coalesce(made.most, 0) > 1 OR coalesce(made.jobs, 0) <> coalesce(counted.jobs, 0)
""",
        (),
        "no optimizer step was made twice, and none is missing",
        alarm=True,
    ),
    "jumps": Question(
        "the steps of a model at which its loss jumped most",
        """
SELECT step, loss_per_token, loss_per_token - before AS jump, grad_norm, learning_rate, tokens, jobs,
       finished
FROM (
  SELECT step, loss_per_token, grad_norm, learning_rate, tokens, jobs, finished,
         lag(loss_per_token) OVER (ORDER BY step) AS before
  FROM v_steps WHERE model_id = :model
) AS compared
WHERE before IS NOT NULL
ORDER BY abs(loss_per_token - before) DESC NULLS LAST
LIMIT 20
""",
        (_MODEL,),
        "there are no two steps of such a model",
    ),
    "data": Question(
        "the jobs that made one step, and the bodies that hold their data",
        """
SELECT job_id, op, tokens_in AS tokens, loss_sum, body_sha256, body_bytes, attempts, submitted
FROM v_jobs
WHERE model_id = :model AND step = :step
ORDER BY submitted_at
""",
        (_MODEL, _STEP),
        "there is no such step",
    ),
    "samples": Question(
        "who sampled from an adapter version, and when",
        """
SELECT job_id, tenant, sampler_id, state, num_samples, prompt_tokens, sampled_tokens, seed, backend,
       submitted
FROM v_samples
WHERE adapter_id = :adapter
ORDER BY submitted_at
""",
        (_ADAPTER,),
        "nobody did",
    ),
    "usage": Question(
        "tokens and seconds of each tenant by day",
        """
SELECT tenant, day, jobs, failed, tokens, training_tokens, prompt_tokens, sampled_tokens, training_seconds,
       sampling_seconds
FROM v_usage
ORDER BY day DESC, tenant
""",
        (),
        "no job has ended yet",
    ),
}
