"""`tink jobs` lists and filters, and `tink jobs show` tells all about one, except what is in it."""

from __future__ import annotations

import os

import pytest
from cli_home import (
    BEGAN,
    MADE,
    MODEL,
    REFUSED,
    REQUEST,
    RESULT,
    SAMPLED,
    SECRET,
    SESSION,
    TRAINED,
    WAITING,
    files,
)

from tink.cli import jobs
from tink.journal import schema

ALL = [SAMPLED, WAITING, REFUSED, TRAINED, MADE]


def test_the_newest_job_comes_first(home, tink, tink_json):
    code, document = tink_json("jobs", "--home", home.root)
    assert code == 0
    assert [job["job_id"] for job in document["jobs"]] == ALL
    assert document["more"] is False
    out = tink("jobs", "--home", home.root)[1]
    assert [line.split()[0] for line in out.splitlines()[1:]] == ALL


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (["--state", "done"], [TRAINED, MADE]),
        (["--state", "open"], [SAMPLED, WAITING]),
        (["--failed"], [REFUSED]),
        (["--op", "optim_step"], [WAITING, REFUSED]),
        (["--model", MODEL], [WAITING, REFUSED, TRAINED, MADE]),
        (["--session", SESSION, "--op", "sample"], [SAMPLED]),
        (["--session", "another"], []),
        (["--since", "170s"], [SAMPLED, WAITING]),
        (["--since", "3m"], [SAMPLED, WAITING, REFUSED]),
        (["--since", "1w"], ALL),
        (["--limit", "1"], [SAMPLED]),
        (["--state", "done", "--limit", "2"], [TRAINED, MADE]),
    ],
)
def test_a_filter_leaves_what_it_says(home, tink_json, options, found):
    code, document = tink_json("jobs", "--home", home.root, *options)
    assert code == 0
    assert [job["job_id"] for job in document["jobs"]] == found
    assert document["more"] is (options == ["--limit", "1"])


def test_a_limit_that_hides_jobs_says_so(home, tink):
    out = tink("jobs", "--home", home.root, "--limit", "1")[1]
    assert "older ones" in out
    assert len(out.splitlines()) == 3


def test_no_job_found_is_a_sentence_and_no_error(home, tink):
    assert tink("jobs", "--home", home.root, "--state", "cancelled") == (0, "no such jobs\n", "")


def test_times_are_those_of_the_journal(home, tink_json):
    trained = tink_json("jobs", "--home", home.root, "--op", "forward_backward")[1]["jobs"][0]
    assert trained["submitted_at"] == BEGAN + 10
    assert (trained["queue_seconds"], trained["run_seconds"], trained["total_seconds"]) == (2.0, 2.9, 5.0)
    assert trained["idle_seconds"] == 0.04
    assert (trained["tokens_in"], trained["loss_sum"], trained["attempts"]) == (1234, 2.5, 1)
    waiting = tink_json("jobs", "--home", home.root, "--state", "accepted")[1]["jobs"][0]
    assert (waiting["queue_seconds"], waiting["total_seconds"]) == (170.0, None)


def test_a_date_is_taken_as_local_time(monkeypatch):
    monkeypatch.setenv("TZ", "UTC")
    assert jobs.since("2023-11-14") == 1_699_920_000.0
    assert jobs.since("2023-11-14T22:13:20+00:00") == BEGAN


@pytest.mark.parametrize(
    "options",
    [
        ["--since", "yesterday"],
        ["--since", "99999-01-01"],
        ["--limit", "0"],
        ["--limit", "many"],
        ["--state", "lost"],
        ["--op", "dance"],
    ],
)
def test_a_bad_option_is_named_and_exits_2(home, tink, options):
    code, _, err = tink("jobs", "--home", home.root, *options)
    assert code == 2
    assert options[0] in err.splitlines()[-1]
    assert options[1] in err.splitlines()[-1]


def test_one_job_is_shown_with_its_events_in_order(home, tink, tink_json):
    code, document = tink_json("jobs", "show", TRAINED, "--home", home.root)
    assert code == 0
    job = document["job"]
    assert (job["state"], job["op_no"], job["seq_id"], job["loss_sum"]) == ("done", 2, 1, 2.5)
    assert (job["queue_seconds"], job["run_seconds"], job["total_seconds"]) == (2.0, 2.9, 5.0)
    assert [event["kind"] for event in document["events"]] == ["job_accepted", "job_started", "job_done"]
    assert [event["seq"] for event in document["events"]] == sorted(e["seq"] for e in document["events"])
    out = tink("jobs", "show", TRAINED, "--home", home.root)[1]
    assert "queue 2.0 s, run 2.9 s, total 5.0 s" in out
    assert "1,234 in, 0 out" in out
    assert out.index("job_accepted") < out.index("job_started") < out.index("job_done")


def test_the_keys_of_the_documents_are_these(home, tink_json):
    listed = tink_json("jobs", "--home", home.root)[1]
    assert list(listed) == ["jobs", "more"]
    keys = (
        "job_id tenant op state session_id model_id sampler_id seq_id op_no attempts submitted_at "
        "started_at finished_at queue_seconds run_seconds idle_seconds total_seconds tokens_in tokens_out "
        "loss_sum error_category error"
    )
    assert {tuple(job) for job in listed["jobs"]} == {tuple(keys.split())}
    shown = tink_json("jobs", "show", TRAINED, "--home", home.root)[1]
    assert list(shown) == ["job", "events"]
    columns = [column.name for column in schema.jobs.columns]
    times = {"queue_seconds", "run_seconds", "idle_seconds", "total_seconds"}
    assert set(shown["job"]) == {*columns, *times}
    assert {frozenset(event) for event in shown["events"]} == {
        frozenset(schema.events.columns.keys()) - {"hash"}
    }


def test_options_may_stand_before_show_too(home, tink_json):
    code, document = tink_json("jobs", "--home", home.root, "show", MADE)
    assert (code, document["job"]["job_id"]) == (0, MADE)
    assert document["job"]["result"] == {"model_id": MODEL}


def test_an_error_is_one_line_as_it_was_said(home, tink):
    for out in (
        tink("jobs", "--home", home.root, "--failed")[1],
        tink("jobs", "show", REFUSED, "--home", home.root)[1],
    ):
        assert "user: learning_rate cannot be negative [bold]" in out


def test_an_unknown_job_is_one_line_and_exits_2(home, tink):
    code, out, err = tink("jobs", "show", "nobody", "--home", home.root)
    assert (code, out) == (2, "")
    assert err == "tink jobs: there is no job 'nobody': 'tink jobs' lists them\n"


def test_a_narrow_terminal_hides_no_column(home, tink, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    lines = tink("jobs", "--home", home.root)[1].splitlines()
    assert [line.split()[0] for line in lines[1:] if not line.startswith(" ")] == ALL
    assert "2 min ago" in lines[1]
    assert any("[bold]" in line for line in lines)


def test_no_body_is_ever_printed_and_nothing_is_changed(home, tink):
    before = files(home.root)
    out = "".join(
        tink("jobs", *arguments, "--home", home.root, *how)[1]
        for arguments in ([], *(["show", job] for job in ALL))
        for how in ([], ["--json"])
    )
    assert files(home.root) == before
    assert not any(word in out for word in (SECRET, REQUEST.decode(), RESULT.decode()))


def test_a_reader_that_has_seen_enough_is_no_error(home, monkeypatch, capfd):
    """`tink jobs | head`"""
    from tink.cli.main import main

    def close(*arguments):
        raise BrokenPipeError

    saved = os.dup(1)
    try:
        monkeypatch.setattr(jobs, "print_jobs", close)
        assert main(["jobs", "--home", str(home.root)]) == 0
    finally:
        os.dup2(saved, 1)
        os.close(saved)
    assert "Traceback" not in capfd.readouterr().err
